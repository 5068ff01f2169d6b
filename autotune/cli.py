"""The command line: sparsetile demo | tune | bench | warmup | doctor | explain | pattern. Every command has --help that teaches and --json for machines."""
import argparse
import importlib
import json
import os
import sys

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
        print("\nstopped; a run with --storage goes on where it stopped", file=sys.stderr)
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
                "examples:\n  sparsetile tune                                    every CPU workload, 30 s each\n  sparsetile tune --device 0 --seconds 30            the first GPU\n"
                "  sparsetile tune cpu/window-256/4096 --backend numba\n  sparsetile tune --storage tune.journal             survives a kill: run it again to go on\n"
                "  sparsetile tune --list                             the workloads")
    p.add_argument("workloads", nargs="*", help="names of workloads, or of kernels (all their workloads); none: every workload of the device")
    p.add_argument("--device", default="cpu", help="cpu, or the index of a GPU (default: cpu)")
    p.add_argument("--backend", choices=("triton", "cupy", "numba"), help="tune this backend only (default: each that supports the problem)")
    p.add_argument("--seconds", type=_duration, help="budget for each workload and backend (default: 30)")
    p.add_argument("--trials", type=_count, help="configs to try for each workload and backend")
    p.add_argument("--storage", help="Optuna journal file, or a storage URL, that remembers every trial")
    p.add_argument("--profiles", help="directory to write into (default: the user cache, where calls look by themselves)")
    p.add_argument("--sampler", choices=("pool", "tpe", "random", "nsga2"), default="pool", help="how configs are chosen: pool is ours, the others are Optuna's (default: pool)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--list", action="store_true", help="list the workloads and stop")

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
    return parser


def _count(text):
    """A whole number from 1 on; argparse says the rest."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}; give e.g. 1024")
    return int(text)


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
    import torch
    if int(text) >= torch.cuda.device_count():
        raise ValueError(f"--device: expected an index below {torch.cuda.device_count()}, the number of visible GPUs, got {text}; see sparsetile doctor")
    return int(text)


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
    from sparsetile.autotune import progress, tune
    from sparsetile.backends.contract import Unsupported
    if args.list:  # asks for no GPU
        for w in _selected(args.workloads, None if args.device == "cpu" else args.device):
            print(json.dumps({"name": w.name, "kernel": w.kernel, "dtype": w.dtype, **dict(w.sizes)}) if args.json else f"{w.name:40} {w.kernel:28} {w.dtype:14} " +
                  " ".join(f"{a}={n}" for a, n in w.sizes))
        return 0
    device = _device(args.device)
    workloads, failed = _selected(args.workloads, device), 0
    with progress.show(len(workloads), args.json) as say:
        for w in workloads:
            try:
                tune.tune(w.kernel, w, backend=args.backend, trials=args.trials, seconds=args.seconds, storage=args.storage, profiles=args.profiles, device=device,
                          sampler=args.sampler, seed=args.seed, progress=say)
            except Unsupported as error:
                failed += 1
                say({"event": "failed", "workload": w.name, "error": str(error)})
    return 1 if failed else 0


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
    for w in _selected(args.workloads, device):
        found = tasks.Task(w, device, hollow=True).explain(args.backend)
        missing += found.backend is None
        if args.json:
            print(json.dumps({"workload": w.name, "op": found.op, "kernel": found.kernel, "backend": found.backend, "config": found.config, "source": found.source, "reasons": found.reasons}))
        else:
            print(f"{w.name}\n{found}" if len(args.workloads) != 1 else found)
    return 1 if missing else 0


def _pattern(args):
    from sparsetile.autotune import pattern
    report = pattern.report(args.pattern, args.tokens, args.keys or args.tokens, args.block, args.plot)
    print(json.dumps(report) if args.json else pattern.text(report))
    return 0
