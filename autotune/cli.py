"""The command line. Every command has --help that teaches and --json for machines.

sparsetile demo | tune | show | diff | merge | verify | export | report | replay | dashboard | proxy | bench | warmup | doctor | explain | pattern | catalogue | recommend | plan
"""
import argparse
import importlib
import json
import os
import sys
from importlib.util import find_spec

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
    commands = parser.add_subparsers(dest="command", metavar="command")

    def command(name, run, help, epilog=None):
        p = commands.add_parser(name, help=help, description=help, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
        p.add_argument("--json", action="store_true", help="print JSON, one object a line")
        p.set_defaults(run=run)
        return p

    p = command("demo", _demo, "Attention tensors of a real model reading a real text, under every pattern and selector: keys seen, mass kept, error, time.",
                "Needs the extra: pip install 'sparsetile[demo]'. Writes demo/masks.png and demo/profiles/ in the current directory.")
    p.add_argument("--out", default="demo", help="directory for the picture and the tuned profiles (default: demo)")
    p.add_argument("--tokens", type=_count, default=16384, help="positions laid end to end for the timing (default: 16384)")
    p.add_argument("--tune-seconds", type=_duration, default=10, help="seconds of tuning for each pattern timed again (default: 10; 0 skips it)")

    p = command("tune", _tune, "Search the legal configs of kernels on this device and write the winners as YAML that the next call finds.",
                "examples:\n  sparsetile tune                                    every CPU workload, 30 s each\n  sparsetile tune --device 0 --effort quick          the first GPU\n"
                "  sparsetile tune cpu/window-256/4096 --backend numba\n  sparsetile tune --storage tune.journal             survives a kill: run it again to go on; processes side by side share the work\n"
                "  sparsetile tune --storage postgresql+psycopg://user@host/db --device all      on every host: they share the list, each GPU model's its own\n"
                "  sparsetile tune --shapes shapes.jsonl              after SPARSETILE_RECORD_SHAPES=shapes.jsonl python app.py\n"
                "  sparsetile tune --list                             the workloads")
    p.add_argument("workloads", nargs="*", help="names of workloads, or of kernels (all their workloads); none: every workload of the device")
    p.add_argument("--device", default="cpu", help="cpu, the index of a GPU, or all: every GPU of this host, one process each (default: cpu)")
    p.add_argument("--shapes", help="tune what a running application needed: the file that SPARSETILE_RECORD_SHAPES named")
    p.add_argument("--again", action="store_true", help="tune workloads too that the storage says are done")
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

    profiles("show", "Print the entries of profiles: time, gain over the default, config, and whether the kernel has changed since.", _show)
    p = command("diff", _diff, "What changed from one profile (or directory) to another: speed and config of each entry.")
    p.add_argument("a"), p.add_argument("b")
    p = command("merge", _merge, "Put the entries of profiles into one directory: of two for one key the higher status stays, then the faster; conflicts are printed.",
                "example:\n  sparsetile merge host1/profiles host2/profiles --into profiles")
    p.add_argument("paths", nargs="+", help="profile files or directories")
    p.add_argument("--into", required=True, help="the directory that receives them")
    p = profiles("verify", "Time each entry's config again beside the default on this machine. Exit code 1 if one is slower beyond the noise, or fails.", _verify)
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")
    p.add_argument("--write", action="store_true", help="instead: time what another GPU of this model made (in one directory, default the user cache) and write the figures into the entries; one that is slower than "
                   "the default here gives way to it. `tune --device all` does so at its end")
    profiles("export", "The entries of profiles as CSV.", _export)
    p = profiles("report", "One HTML page for each profile: tuned against default, rates, the course of the search and what each knob does.", _report)
    p.add_argument("--out", default="report", help="directory for the pages (default: report)")
    p.add_argument("--storage", help="the storage of the run, for the course of its search")

    p = command("replay", _replay, "How good the samplers are: regret against trials and seconds on spaces that were timed whole (Kernel Tuner's T4 format).",
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

    for name, run, port, help in (("dashboard", _serve, 8080, "Show the searches of a storage in a browser (Optuna's dashboard)."),
                                  ("proxy", _serve, 13000, "Serve a database to very many workers, which tune with --storage grpc://host:port (Optuna's gRPC proxy; the port asks for no password).")):
        p = command(name, run, help)
        p.add_argument("storage", help="what `sparsetile tune --storage` was given")
        p.add_argument("--host", default="localhost", help="where to listen (default: localhost)")
        p.add_argument("--port", type=_count, default=port, help=f"(default: {port})")

    p = command("bench", _bench, "Time workloads with the config that a call would get, beside the kernel's default (where that is another) and PyTorch (where it has the op).",
                "examples:\n  sparsetile bench                                   every CPU workload\n  sparsetile bench cpu/window-256/4096\n"
                "  sparsetile bench block_attention --device 0        every workload of one kernel on the first GPU")
    p.add_argument("workloads", nargs="*", help="names or kernels; none: every workload of the device")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")
    p.add_argument("--seconds", type=_duration, default=1.0, help="time for each workload (default: 1)")

    p = command("warmup", _warmup, "Compile ahead: one small call of each workload on each backend that runs it, so that the first real call finds its kernels on disk.",
                "Compiled code is kept where Numba and the GPU compilers keep theirs (NUMBA_CACHE_DIR, SPARSETILE_CACHE_DIR, TRITON_CACHE_DIR); another CPU or a new version compiles anew.")
    p.add_argument("workloads", nargs="*", help="names or kernels; none: every workload of the device")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU")
    p.add_argument("--backend", choices=("triton", "cupy", "numba"), help="this backend only (default: each that supports the problem)")

    p = command("doctor", _doctor, "What this machine has, which backends run, why the others do not, and which profiles are in use.",
                "examples:\n  sparsetile doctor\n  sparsetile doctor --matrix                         which backend runs which kernel on which element types, and each refusal (needs no GPU)")
    p.add_argument("--matrix", action="store_true", help="the support matrix in Markdown instead, asked of the kernels themselves")

    p = command("explain", _explain, "Which backend and config a workload's call gets, from where, and why not the other backends.",
                "examples:\n  sparsetile explain cpu/window-256/4096\n  SPARSETILE_BACKEND=reference sparsetile explain cpu/topk-32\n"
                "  SPARSETILE_PROFILE_DIR=tuned sparsetile explain --device 0 --json     every workload of the first GPU, one line each\n"
                "For a call of your own: print(sparsetile.explain(sparsetile.sparse_attention, q, k, v, pattern))")
    p.add_argument("workloads", nargs="*", help="names of workloads, as `sparsetile tune --list` shows them, or of kernels; none: every workload of the device")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")
    p.add_argument("--backend", choices=BACKENDS, help="as the argument backend= of the call (default: what the environment and the profiles say)")

    p = command("pattern", _pattern, "Print, count and plot a pattern.",
                "examples:\n  sparsetile pattern \"Window(255, 0) | Sink(4)\" --tokens 4096\n  sparsetile pattern \"longformer(512, globals=[0])\" --plot mask.png")
    p.add_argument("pattern", help="a pattern or preset in the library's own words")
    p.add_argument("--tokens", type=_count, default=64, help="queries and keys (default: 64)")
    p.add_argument("--keys", type=_count, help="keys, where they differ from the queries")
    p.add_argument("--plot", help="write a PNG here")
    p.add_argument("--block", type=_count, default=128, help="block size for the layout's figures (default: 128)")
    importlib.import_module(f"{_PACKAGE}.catalogue.command").add(command, _count, _duration, _device)
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


def _device(text):
    if text == "cpu":
        return None
    if not text.isdigit():
        raise ValueError(f"--device: expected cpu or the index of a GPU, got {text!r}; see sparsetile doctor")
    if int(text) >= _gpus():
        raise ValueError(f"--device: expected an index below {_gpus()}, the number of visible GPUs, got {text}; see sparsetile doctor")
    return int(text)


def _gpus() -> int:
    if find_spec("torch") is None:  # it makes a workload's arrays, and times the calls
        raise ValueError("--device: expected torch beside a GPU, got none; pip install 'sparsetile[cuda12]' or 'sparsetile[cuda13]', or use --device cpu")
    import torch
    return torch.cuda.device_count()


def _selected(names, device):
    from sparsetile.autotune import tasks
    from sparsetile.backends.contract import KERNELS
    everything = tasks.for_device(device)
    if not names:
        return everything
    found = []
    for name in names:
        found += [w for w in everything if w.kernel == name] if name in KERNELS else [tasks.find(name)]
    return found


# ------------------------------------------------------------------------------------------------------------------ commands
def _demo(args):
    demo = importlib.import_module(f"{_PACKAGE}.ci.demo")
    return demo.main(out=args.out, tokens=args.tokens, tune_seconds=args.tune_seconds, as_json=args.json)


def _tune(args):
    from sparsetile.autotune import batch, progress, search
    if args.list:  # asks for no GPU
        for w in _selected(args.workloads, None if args.device == "cpu" else args.device):
            print(json.dumps({"name": w.name, "kernel": w.kernel, "dtype": w.dtype, **dict(w.sizes)}) if args.json else f"{w.name:40} {w.kernel:28} {w.dtype:14} " +
                  " ".join(f"{a}={n}" for a, n in w.sizes))
        return 0
    if args.device == "all":
        return _every_gpu(args)
    device = _device(args.device)
    workloads = _recorded(args.shapes, device) if args.shapes else _selected(args.workloads, device)
    with progress.show(len(workloads), args.json) as say, search.answering(args.storage):
        failed = batch.run(workloads, say, device=device, storage=args.storage, profiles=args.profiles, backend=args.backend, again=args.again, trials=args.trials,
                           seconds=args.seconds, effort=args.effort, sampler=args.sampler, seed=args.seed)
    return 1 if failed else 0


def _every_gpu(args):
    from sparsetile.autotune import batch
    if not _gpus():
        raise ValueError("--device: expected GPUs for all, got none; use --device cpu, or see sparsetile doctor")
    if args.shapes and not args.storage:
        raise ValueError("--shapes: expected --storage beside --device all, got none; the GPUs share the list by it, e.g. --storage tune.journal")
    names = [w.name for w in _selected(args.workloads, 0)]
    options = [(f"--{name}", getattr(args, name)) for name in ("backend", "seconds", "trials", "effort", "storage", "profiles", "sampler", "seed", "shapes")]
    words = [str(word) for pair in options if pair[1] is not None for word in pair] + ["--json"] * args.json + ["--again"] * args.again
    return batch.every_gpu(_gpus(), words, [] if args.shapes else names, args.storage, args.profiles)


def _recorded(path, device):
    """Workloads that stand for the recorded problems of this device's architecture."""
    from sparsetile.autotune import tasks, tune
    from sparsetile.ops.pattern import Pattern
    from sparsetile.profiles import misses
    arch, found = tune.machine(device)["arch"], []
    for problem, _, text in misses.read(path):
        workload = tasks.of_problem(problem, None if text is None else Pattern.parse(text)) if problem.arch == arch else None
        if workload is None:
            print(f"{problem.op} of {problem.arch} with {sorted(problem.features)}: " + ("no workload stands for it" if problem.arch == arch else f"this device is {arch}"), file=sys.stderr)
        else:
            found.append(workload)
    return found


def _show(args):
    from sparsetile.autotune import shelf
    found = [row for path in shelf.files(args.paths) for row in shelf.rows(path)]
    print("\n".join(json.dumps(row) for row in found) if args.json else shelf.table(found))


def _diff(args):
    from sparsetile.autotune import shelf
    lines = shelf.diff(args.a, args.b)
    print(json.dumps(lines) if args.json else "\n".join(lines) or "no difference")


def _merge(args):
    from sparsetile.autotune import shelf
    conflicts = shelf.merge(args.into, args.paths)
    print(json.dumps(conflicts) if args.json else "\n".join([f"conflict: {line}" for line in conflicts] + [f"merged into {args.into}"]))


def _verify(args):
    from sparsetile.autotune import retime
    from sparsetile.profiles import lookup
    say = (lambda line: print(json.dumps({"line": line}), flush=True)) if args.json else (lambda line: print(line, flush=True))
    if args.write:
        if len(args.paths) > 1 or args.device == "cpu":
            raise ValueError(f"--write: expected one directory and the index of a GPU, got {' '.join(args.paths) or 'none'} and {args.device}; a CPU has no second one to ask")
        return 1 if retime.confirm(args.paths[0] if args.paths else lookup.user_cache(), _device(args.device), say) else 0
    return 1 if retime.verify(args.paths, _device(args.device), say) else 0


def _export(args):
    from sparsetile.autotune import shelf
    print(json.dumps([row for path in shelf.files(args.paths) for row in shelf.rows(path)]) if args.json else shelf.to_csv(args.paths), end="")


def _report(args):
    from pathlib import Path

    from sparsetile.autotune import report, shelf
    for path in shelf.files(args.paths):
        page = report.write(path, Path(args.out), args.storage)
        print(json.dumps({"page": str(page)}) if args.json else page)


def _replay(args):
    from sparsetile.autotune import progress, replay, tasks
    if args.record:
        if not args.backend or not args.out:
            raise ValueError("--record: expected --backend and --out beside it, got " + ("neither" if not args.backend and not args.out else "one of them") + "; name whose configs, and the file")
        with progress.show(1, args.json) as say:
            print(json.dumps(replay.record(tasks.find(args.record), _device(args.device), args.backend, args.out, rounds=args.rounds, seconds=args.seconds, only=dict(args.only or ()), progress=say)))
        return 0
    samplers = tuple(args.samplers.split(",")) if args.samplers else replay.SAMPLERS
    if not args.tables or not set(samplers) <= {*replay.SAMPLERS, "nsga2"}:
        raise ValueError(f"replay: expected tables, and samplers of {', '.join(replay.SAMPLERS)}, got {args.tables or 'no table'} and {', '.join(samplers)}; see bench/tables")
    for path in args.tables:
        rows = replay.regrets(replay.load(path), samplers, repeats=args.repeats, blind=args.blind)
        print("\n".join(json.dumps(row) for row in rows) if args.json else replay.text(rows) + "\n" + replay.verdict(rows), flush=True)
    return 0


def _serve(args):
    from sparsetile.autotune import serve
    getattr(serve, args.command)(args.storage, args.host, args.port)


def _bench(args):
    from sparsetile.autotune import measure
    rows = []
    for w in _selected(args.workloads, _device(args.device)):
        for row in measure.rows(w, _device(args.device), args.seconds):
            rows.append(row)
            if args.json:
                print(json.dumps(row), flush=True)
    if not args.json:
        print(measure.table(rows))
    return 0


def _warmup(args):
    """A GPU kernel is compiled for its sizes and gets the workload itself; on the CPU a small twin's code serves all sizes."""
    import time

    from sparsetile.autotune import tasks
    from sparsetile.ops import dispatch
    device, failed = _device(args.device), 0
    for w in _selected(args.workloads, device):
        task = tasks.Task(w.small() if device is None else w, device)
        for name in [args.backend] if args.backend else BACKENDS[:-1]:
            why = dispatch.refusal(name, task.problem, device)
            start = time.perf_counter()
            if why is None:
                task.bound(name)()
            elif args.backend:
                failed += 1
            row = {"workload": w.name, "backend": name, **({"refused": why} if why else {"seconds": round(time.perf_counter() - start, 3)})}
            if args.json:
                print(json.dumps(row), flush=True)
            elif why is None or args.backend:
                print(f"{w.name:40} {name:8} " + (why or f"{row['seconds']:8.2f} s"), flush=True)
    return 1 if failed else 0


def _doctor(args):
    from sparsetile.autotune import doctor
    if args.matrix:
        from sparsetile.autotune import matrix
        text = matrix.markdown()
        print(json.dumps({"markdown": text}) if args.json else text)
        return 0
    report = doctor.report()
    print(json.dumps(report, indent=2) if args.json else doctor.text(report))
    return 0


def _explain(args):
    from sparsetile.autotune import tasks
    device, missing = _device(args.device), 0
    selected = _selected(args.workloads, device)
    for w in selected:
        found = tasks.Task(w, device, hollow=True).explain(args.backend)
        missing += found.backend is None
        if args.json:
            print(json.dumps({"workload": w.name, "op": found.op, "kernel": found.kernel, "backend": found.backend, "config": found.config, "source": found.source, "reasons": found.reasons}))
        else:
            print(f"{w.name}\n{found}" if len(selected) > 1 else found)
    return 1 if missing else 0


def _pattern(args):
    from sparsetile.autotune import pattern
    report = pattern.report(args.pattern, args.tokens, args.keys or args.tokens, args.block, args.plot)
    print(json.dumps(report) if args.json else pattern.text(report))
    return 0
