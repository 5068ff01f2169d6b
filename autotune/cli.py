"""The command line. Every command has --help that teaches and --json for machines.

sparsetile demo | tune | show | diff | merge | verify | export | report | replay | dashboard | proxy | bench | warmup | doctor | explain | pattern | catalogue | recommend | plan
"""
import argparse
import importlib
import json
import os
import sys

from sparsetile.autotune import commands
from sparsetile.backends.contract import BACKENDS

_PACKAGE = __name__.partition(".autotune.")[0]


def main(argv=None) -> int:
    """Exit codes: 0 well, 1 something failed or is missing, 2 bad usage."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("\nstopped; a run with --storage, or of catalogue --measure, goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        if getattr(args, "json", False):
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        else:
            print(f"sparsetile {args.command}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sparsetile", description="Sparse attention, indexer scoring and latent KV decompression on Triton, CuPy and Numba, tuned per device.",
                                     epilog="Start with `sparsetile doctor` (what runs here) and `sparsetile demo` (what it does).")
    parser.add_argument("--version", action="version", version=importlib.import_module(_PACKAGE).__version__)
    parsers = parser.add_subparsers(dest="command", metavar="command")

    def command(name, run, help, epilog=None):
        p = parsers.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        p.add_argument("--json", action="store_true", help="print JSON, one object a line")
        p.set_defaults(run=run)
        return p

    p = command("demo", commands.do_demo, "Attention tensors of a real model reading a real text, under every pattern and selector: keys seen, mass kept, error, time.",
                "Needs the extra: pip install 'sparsetile[demo]'. Writes demo/masks.png and demo/profiles/ in the current directory.")
    p.add_argument("--out", default="demo", help="directory for the picture and the tuned profiles (default: demo)")
    p.add_argument("--tokens", type=_count, default=16384, help="positions laid end to end for the timing (default: 16384)")
    p.add_argument("--tune-seconds", type=_duration, default=10, help="seconds of tuning for each pattern timed again (default: 10; 0 skips it)")

    p = command("tune", commands.do_tune, "Search the legal configs of kernels on this device and write the winners as YAML that the next call finds.",
                "examples:\n  sparsetile tune                                    every CPU workload, 30 s each\n  sparsetile tune --device 0 --effort quick          the first GPU\n"
                "  sparsetile tune cpu/window-256/4096 --backend numba\n  sparsetile tune --device all --missing --trials 6 --profiles profiles     in a checkout: what its profiles lack, or have of older kernels\n  sparsetile tune --storage tune.journal             survives a kill: run it again to go on; processes side by side share the work\n"
                "  sparsetile tune --storage postgresql+psycopg://user@host/db --device all      on every host: they share the list, each GPU model's its own\n"
                "  sparsetile tune --shapes shapes.jsonl              after SPARSETILE_RECORD_SHAPES=shapes.jsonl python app.py\n"
                "  sparsetile tune --list                             the workloads")
    p.add_argument("workloads", nargs="*", help="names of workloads, or of kernels (all their workloads); none: every workload of the device")
    p.add_argument("--device", default="cpu", help="cpu, the index of a GPU, or all: every GPU of this host, one process each (default: cpu)")
    p.add_argument("--shapes", help="tune what a running application needed: the file that SPARSETILE_RECORD_SHAPES named")
    p.add_argument("--again", action="store_true", help="tune workloads too that the storage says are done")
    p.add_argument("--missing", action="store_true", help="tune only workloads for which the profiles (--profiles and the shipped ones) hold no entry of this device made by the kernels of today, on some backend")
    p.add_argument("--backend", choices=("triton", "cupy", "numba"), help="tune this backend only (default: each that supports the problem)")
    p.add_argument("--seconds", type=_duration, help="budget for each workload and backend (default: 30)")
    p.add_argument("--trials", type=_count, help="configs to try for each workload and backend")
    p.add_argument("--effort", choices=("quick", "standard", "thorough"), help="instead of --seconds and --trials: 20, 120 or 600 s for each workload and backend, less where nothing better is found for long")
    p.add_argument("--storage", help="Optuna journal file, or a storage URL, that remembers every trial")
    p.add_argument("--profiles", help="directory to write into (default: the user cache, where calls look by themselves)")
    p.add_argument("--sampler", choices=("pool", "tpe", "random", "nsga2"), default="pool", help="how configs are chosen: pool is ours, the others are Optuna's (default: pool)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--list", action="store_true", help="list the workloads and stop")

    def profiles(name, help, run):
        p = command(name, run, help)
        p.add_argument("paths", nargs="*", help="profile files or directories (none: the user cache and the shipped ones)")
        return p

    profiles("show", "Print the entries of profiles: time, gain over the default, config, and whether the kernel has changed since.", commands.do_show)
    p = command("diff", commands.do_diff, "What changed from one profile (or directory) to another: speed and config of each entry.")
    p.add_argument("a"), p.add_argument("b")
    p = command("merge", commands.do_merge, "Put the entries of profiles into one directory: of two for one key a pinned one stays, else the one of today's kernel, then the higher status, then the faster; conflicts are printed.",
                "example:\n  sparsetile merge host1/profiles host2/profiles --into profiles")
    p.add_argument("paths", nargs="+", help="profile files or directories")
    p.add_argument("--into", required=True, help="the directory that receives them")
    p = profiles("verify", "Time each entry's config again beside the default on this machine, where it is another. Exit code 1 if one is slower beyond the noise, or fails.", commands.do_verify)
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")
    p.add_argument("--write", action="store_true", help="instead: time what another GPU of this model made (in one directory, default the user cache) and write the figures into the entries; one that is slower than "
                   "the default here gives way to it. `tune --device all` does so at its end")
    profiles("export", "The entries of profiles as CSV.", commands.do_export)
    p = profiles("report", "One HTML page for each profile: tuned against default, rates, the course of the search and what each knob does.", commands.do_report)
    p.add_argument("--out", default="report", help="directory for the pages (default: report)")
    p.add_argument("--storage", help="the storage of the run, for the course of its search")

    p = command("replay", commands.do_replay, "How good the samplers are: regret against trials and seconds on spaces that were timed whole (Kernel Tuner's T4 format).",
                "examples:\n  sparsetile replay bench/tables/*.t4.json.gz        every table, 30 seeds\n"
                "  sparsetile replay --record cpu/window-256/4096 --backend numba --out window.t4.json.gz     time a space whole, every config")
    p.add_argument("tables", nargs="*", help="tables to replay")
    p.add_argument("--samplers", default=None, help="comma-separated (default: pool,random,tpe-plain,tpe,subset)")
    p.add_argument("--repeats", type=_count, default=30, help="seeds (default: 30)")
    p.add_argument("--blind", action="store_true", help="begin with a config of chance instead of the default: what a sampler finds by itself")
    p.add_argument("--record", help="a workload to time whole")
    p.add_argument("--backend", choices=("triton", "cupy", "numba"), help="whose configs are timed (with --record)")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")
    p.add_argument("--rounds", type=_count, default=20, help="samples of each config, interleaved (default: 20)")
    p.add_argument("--seconds", type=_duration, help="end the trials after so long; the table says how many of the legal configs it holds")
    p.add_argument("--only", type=_knob, action="append", help="knob=value,value: only these values of a knob, so that a large space's part can be timed whole (with --record; may be repeated)")
    p.add_argument("--out", help="the table's file (with --record)")

    for name, run, port, help in (("dashboard", commands.do_serve, 8080, "Show the searches of a storage in a browser (Optuna's dashboard)."),
                                  ("proxy", commands.do_serve, 13000, "Serve a database to very many workers, which tune with --storage grpc://host:port (Optuna's gRPC proxy; the port asks for no password).")):
        p = command(name, run, help)
        p.add_argument("storage", help="what `sparsetile tune --storage` was given")
        p.add_argument("--host", default="localhost", help="where to listen (default: localhost)")
        p.add_argument("--port", type=_count, default=port, help=f"(default: {port})")

    p = command("bench", commands.do_bench, "Time workloads with the config that a call would get, beside the kernel's default (where that is another) and PyTorch (where it has the op).",
                "examples:\n  sparsetile bench                                   every CPU workload\n  sparsetile bench cpu/window-256/4096\n"
                "  sparsetile bench block_attention --device 0        every workload of one kernel on the first GPU")
    p.add_argument("workloads", nargs="*", help="names or kernels; none: every workload of the device")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")
    p.add_argument("--seconds", type=_duration, default=1.0, help="time for each workload (default: 1)")

    p = command("warmup", commands.do_warmup, "Compile ahead: one small call of each workload on each backend that runs it, so that the first real call finds its kernels on disk.",
                "Compiled code is kept where Numba and the GPU compilers keep theirs (NUMBA_CACHE_DIR, SPARSETILE_CACHE_DIR, TRITON_CACHE_DIR); another CPU or a new version compiles anew.")
    p.add_argument("workloads", nargs="*", help="names or kernels; none: every workload of the device")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU")
    p.add_argument("--backend", choices=("triton", "cupy", "numba"), help="this backend only (default: each that supports the problem)")

    p = command("doctor", commands.do_doctor, "What this machine has, which backends run, why the others do not, and which profiles are in use.",
                "examples:\n  sparsetile doctor\n  sparsetile doctor --matrix                         which backend runs which kernel on which element types, and each refusal (needs no GPU)")
    p.add_argument("--matrix", action="store_true", help="the support matrix in Markdown instead, asked of the kernels themselves")

    p = command("explain", commands.do_explain, "Which backend and config a workload's call gets, from where, and why not the other backends.",
                "examples:\n  sparsetile explain cpu/window-256/4096\n  SPARSETILE_BACKEND=reference sparsetile explain cpu/topk-32\n"
                "  SPARSETILE_PROFILE_DIR=tuned sparsetile explain --device 0 --json     every workload of the first GPU, one line each\n"
                "For a call of your own: print(sparsetile.explain(sparsetile.sparse_attention, q, k, v, pattern))")
    p.add_argument("workloads", nargs="*", help="names of workloads, as `sparsetile tune --list` shows them, or of kernels; none: every workload of the device")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")
    p.add_argument("--backend", choices=BACKENDS, help="as the argument backend= of the call (default: what the environment and the profiles say)")

    p = command("pattern", commands.do_pattern, "Print, count and plot a pattern.",
                "examples:\n  sparsetile pattern \"Causal() & (Window(255) | Sink(4))\" --tokens 4096\n  sparsetile pattern \"longformer(512, globals=[0])\" --plot mask.png")
    p.add_argument("pattern", help="a pattern or preset in the library's own words")
    p.add_argument("--tokens", type=_count, default=64, help="queries and keys (default: 64)")
    p.add_argument("--keys", type=_count, help="keys, where they differ from the queries")
    p.add_argument("--plot", help="write a PNG here")
    p.add_argument("--block", type=_count, default=128, help="block size for the layout's figures (default: 128)")
    importlib.import_module(f"{_PACKAGE}.catalogue.command").add(command, _count, _duration, commands.device_of)
    return parser


def _count(text):
    """A whole number from 1 on; argparse says the rest."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}; give e.g. 1024")
    return int(text)


def _knob(text):
    """(knob, its values): numbers, True, False and words."""
    name, _, values = text.partition("=")
    if not name or not values:
        raise argparse.ArgumentTypeError(f"expected knob=value,value, got {text!r}; give e.g. num_warps=4,8")
    return name, tuple(int(v) if v.lstrip("-").isdecimal() else {"True": True, "False": False}.get(v, v) for v in values.split(","))


def _duration(text):
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text!r}; give e.g. 30")
    return seconds
