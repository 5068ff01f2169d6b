"""What each command of the command line does with its arguments (cli.py reads them). Everything that is heavy is imported when a command runs. Their answers are exit codes; None is 0."""
import importlib
import json
import sys
from importlib.util import find_spec

from sparsetile.backends.contract import BACKENDS, TUNED

_PACKAGE = __name__.partition(".autotune.")[0]


def device_of(text):
    """None for cpu, else the index of a GPU that is there."""
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
    everything = tasks.for_device(device)
    if not names:
        return everything
    found = []
    for name in names:
        mine = [w for w in everything if w.kernel == name] if name in TUNED else [tasks.find(name)]
        if not mine:
            raise ValueError(f"workload: expected a kernel that is tuned on this device, got {name!r}, which has no workload here; see sparsetile tune --list")
        found += mine
    return found


def do_demo(args):
    demo = importlib.import_module(f"{_PACKAGE}.ci.demo")
    return demo.main(out=args.out, tokens=args.tokens, tune_seconds=args.tune_seconds, as_json=args.json)


def do_tune(args):
    from sparsetile.autotune import batch, doctor, progress, search
    if args.list:  # asks for no GPU
        for w in _selected(args.workloads, None if args.device == "cpu" else args.device):
            print(json.dumps({"name": w.name, "kernel": w.kernel, "dtype": w.dtype, **dict(w.sizes)}) if args.json else f"{w.name:40} {w.kernel:28} {w.dtype:14} " +
                  " ".join(f"{a}={n}" for a, n in w.sizes))
        return 0
    if args.device == "all":
        return _every_gpu(args)
    device = device_of(args.device)
    busy = doctor.busy(device)
    if busy:
        print(busy, file=sys.stderr)
    workloads = _recorded(args.shapes, device) if args.shapes else _wanted(args, device)
    with progress.show(len(workloads), args.json) as say, search.answering(args.storage):
        failed = batch.run(workloads, say, device=device, storage=args.storage, profiles=args.profiles, backend=args.backend, again=args.again, trials=args.trials,
                           seconds=args.seconds, effort=args.effort, sampler=args.sampler, seed=args.seed)
    return 1 if failed else 0


def _every_gpu(args):
    from sparsetile.autotune import batch, tune
    if not _gpus():
        raise ValueError("--device: expected GPUs for all, got none; use --device cpu, or see sparsetile doctor")
    if args.shapes and not args.storage:
        raise ValueError("--shapes: expected --storage beside --device all, got none; the GPUs share the list by it, e.g. --storage tune.journal")
    names = [w.name for w in _wanted(args, 0)]
    tune.close()  # of this process, where it asked for the device's name
    if not names:
        return 0
    options = [(f"--{name}", getattr(args, name)) for name in ("backend", "seconds", "trials", "effort", "storage", "profiles", "sampler", "seed", "shapes")]
    words = [str(word) for pair in options if pair[1] is not None for word in pair] + ["--json"] * args.json + ["--again"] * args.again
    return batch.every_gpu(_gpus(), words, [] if args.shapes else names, args.storage, args.profiles)


def _wanted(args, device):
    """The workloads that are named; with --missing those of them that have no entry of today's kernels."""
    from sparsetile.autotune import shelf, tune
    found = _selected(args.workloads, device)
    if not args.missing:
        return found
    backends = [b for b in BACKENDS[:-1] if _runs(b, device) and args.backend in (None, b)]
    name = tune.machine(device)["name"]
    found = [w for w in found if shelf.lacks(w, name, backends, args.profiles)]
    print(f"{len(found)} workloads have no entry of {', '.join(backends)} as they are today", file=sys.stderr)
    return found


def _runs(backend, device) -> bool:
    """Whether a backend computes on the device at all."""
    from sparsetile.ops import dispatch
    package = dispatch.package(backend)
    return (package.NATIVE == "numpy") == (device is None) and package.unavailable() is None


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


def do_show(args):
    from sparsetile.autotune import shelf
    found = [row for path in shelf.files(args.paths) for row in shelf.rows(path)]
    print("\n".join(json.dumps(row) for row in found) if args.json else shelf.table(found))


def do_diff(args):
    from sparsetile.autotune import shelf
    lines = shelf.diff(args.a, args.b)
    print(json.dumps(lines) if args.json else "\n".join(lines) or "no difference")


def do_merge(args):
    from sparsetile.autotune import shelf
    conflicts = shelf.merge(args.into, args.paths)
    print(json.dumps(conflicts) if args.json else "\n".join([f"conflict: {line}" for line in conflicts] + [f"merged into {args.into}"]))


def do_verify(args):
    from sparsetile.autotune import retime
    from sparsetile.profiles import lookup
    say = (lambda line: print(json.dumps({"line": line}), flush=True)) if args.json else (lambda line: print(line, flush=True))
    if args.write:
        if len(args.paths) > 1 or args.device == "cpu":
            raise ValueError(f"--write: expected one directory and the index of a GPU, got {' '.join(args.paths) or 'none'} and {args.device}; a CPU has no second one to ask")
        return 1 if retime.confirm(args.paths[0] if args.paths else lookup.user_cache(), device_of(args.device), say) else 0
    return 1 if retime.verify(args.paths, device_of(args.device), say) else 0


def do_export(args):
    from sparsetile.autotune import shelf
    print(json.dumps([row for path in shelf.files(args.paths) for row in shelf.rows(path)]) if args.json else shelf.to_csv(args.paths), end="")


def do_report(args):
    from pathlib import Path

    from sparsetile.autotune import report, shelf
    for path in shelf.files(args.paths):
        page = report.write(path, Path(args.out), args.storage)
        print(json.dumps({"page": str(page)}) if args.json else page)


def do_replay(args):
    from sparsetile.autotune import progress, replay, tasks
    if args.record:
        if not args.backend or not args.out:
            raise ValueError("--record: expected --backend and --out beside it, got " + ("neither" if not args.backend and not args.out else "one of them") + "; name whose configs, and the file")
        with progress.show(1, args.json) as say:
            print(json.dumps(replay.record(tasks.find(args.record), device_of(args.device), args.backend, args.out, rounds=args.rounds, seconds=args.seconds, only=dict(args.only or ()), progress=say)))
        return 0
    samplers = tuple(args.samplers.split(",")) if args.samplers else replay.SAMPLERS
    if not args.tables or not set(samplers) <= {*replay.SAMPLERS, "nsga2"}:
        raise ValueError(f"replay: expected tables, and samplers of {', '.join(replay.SAMPLERS)}, got {args.tables or 'no table'} and {', '.join(samplers)}; see bench/tables")
    for path in args.tables:
        rows = replay.regrets(replay.load(path), samplers, repeats=args.repeats, blind=args.blind)
        print("\n".join(json.dumps(row) for row in rows) if args.json else replay.text(rows) + "\n" + replay.verdict(rows), flush=True)
    return 0


def do_serve(args):
    from sparsetile.autotune import serve
    getattr(serve, args.command)(args.storage, args.host, args.port)


def do_bench(args):
    from sparsetile.autotune import measure
    rows = []
    for w in _selected(args.workloads, device_of(args.device)):
        for row in measure.rows(w, device_of(args.device), args.seconds):
            rows.append(row)
            if args.json:
                print(json.dumps(row), flush=True)
    if not args.json:
        print(measure.table(rows))
    return 0


def do_warmup(args):
    """A GPU kernel is compiled for its sizes and gets the workload itself; on the CPU a small twin's code serves all sizes."""
    import time

    from sparsetile.autotune import tasks
    from sparsetile.ops import dispatch
    device, failed = device_of(args.device), 0
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


def do_doctor(args):
    from sparsetile.autotune import doctor
    if args.matrix:
        from sparsetile.autotune import matrix
        text = matrix.markdown()
        print(json.dumps({"markdown": text}) if args.json else text)
        return 0
    report = doctor.report()
    print(json.dumps(report, indent=2) if args.json else doctor.text(report))
    return 0


def do_explain(args):
    from sparsetile.autotune import tasks
    device, missing = device_of(args.device), 0
    selected = _selected(args.workloads, device)
    for w in selected:
        found = tasks.Task(w, device, hollow=True).explain(args.backend)
        missing += found.backend is None
        if args.json:
            print(json.dumps({"workload": w.name, "op": found.op, "kernel": found.kernel, "backend": found.backend, "config": found.config, "source": found.source, "before": found.before, "reasons": found.reasons}))
        else:
            print(f"{w.name}\n{found}" if len(selected) > 1 else found)
    return 1 if missing else 0


def do_pattern(args):
    from sparsetile.autotune import pattern
    report = pattern.report(args.pattern, args.tokens, args.keys or args.tokens, args.block, args.plot)
    print(json.dumps(report) if args.json else pattern.text(report))
    return 0
