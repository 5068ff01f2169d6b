"""How good a sampler is, on spaces that were timed whole: `sparsetile replay`.

A table is one kernel on one workload and device, every legal config of it with its times, in Kernel Tuner's T4 format (one result a line, gzip). A replay gives
a sampler the table's answers in place of a device's, so that thirty runs cost seconds: its regret after n trials, and after s seconds of compiling and timing.
"""
import gzip
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from sparsetile.autotune import search, space
from sparsetile.backends.contract import Tunable

SAMPLERS = ("pool", "random", "tpe-plain", "tpe", "subset")
BUDGETS = (5, 10, 25, 50, 100, 150)
SECONDS = (2, 5, 10, 30, 60)
MEDIAN, P90, AT = 0.01, 0.05, 150  # what ours is to reach after so many trials
TIE = 0.01  # configs within so much of the best are the best


@dataclass
class Table:
    """results: key -> (microseconds or None, seconds that the trial took)."""
    name: str
    tunables: tuple
    default: dict
    results: dict
    noise: float

    def key(self, config):
        return tuple(config[t.name] for t in self.tunables)

    @property
    def pool(self):
        rest = [dict(zip((t.name for t in self.tunables), key)) for key in self.results if key != self.key(self.default)]
        return [self.default, *rest]

    @property
    def best(self):
        return min(us for us, _ in self.results.values() if us)


def load(path) -> Table:
    """ValueError for what is no table of ours."""
    try:
        data = json.loads(gzip.decompress(Path(path).read_bytes()))
        return _table(data["metadata"], data["results"])
    except (gzip.BadGzipFile, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected a table as `sparsetile replay --record` writes it, got {type(error).__name__}: {error}; record it again, or see bench/tables") from None


def _table(about: dict, results: list) -> Table:
    tunables = tuple(Tunable(name, tuple(values), "", tuple(about.get("paths", {}).get(name, ()))) for name, values in about["tunables"].items())
    table = Table(about["workload"] + "/" + about["backend"], tunables, about["default"], {}, about["noise"])
    for r in results:
        us = r["measurements"][0]["value"] if r["invalidity"] == "correct" else None
        table.results[table.key(r["configuration"])] = us, r["times"]["compilation_time"] + sum(r["times"]["runtimes"])
    return table


def t4(about: dict, rows: list[dict]) -> bytes:
    """A table's file. rows: config, time_us and the samples behind it or failure, seconds."""
    def result(row):
        samples = row.get("samples") or []
        why = "correct" if samples else "correctness" if row["failure"].startswith(("wrong", "out of")) else "compile" if row["failure"].startswith("compile") else \
            "timeout" if row["failure"].startswith("hang") else "runtime"
        spent = [round(us / 1e6, 7) for us in samples[:1]]
        return {"configuration": row["config"], "invalidity": why, "correctness": int(bool(samples)), "objectives": ["time"],
                "times": {"compilation_time": round(max(0.0, row["seconds"] - sum(spent)), 3), "runtimes": spent},
                "measurements": [{"name": "time", "value": round(row["time_us"], 2), "unit": "us"}] if samples else [], **({"cause": row["failure"]} if not samples else {})}
    lines = ",\n".join(json.dumps(result(row)) for row in rows)
    return gzip.compress(f'{{"schema_version": "1.0.0",\n"metadata": {json.dumps(about)},\n"results": [\n{lines}\n]}}\n'.encode(), 9, mtime=0)


# -------------------------------------------------------------------------------------------------------------------- replays
class _Plain:
    """Optuna's TPE as it comes: one suggestion after the other, legal or not, new or not."""

    def __init__(self, table, seed):
        self.optuna, self.table = search.engine(), table
        self.study = self.optuna.create_study(sampler=self.optuna.samplers.TPESampler(seed=seed))
        self.space = {t.name: self.optuna.distributions.CategoricalDistribution(list(t.values)) for t in table.tunables}
        self.calls = {space.call_of(_Module(table.tunables), None, config): config for config in table.pool}

    def ask(self):
        self.trial = self.study.ask(self.space)
        return self.calls.get(space.call_of(_Module(self.table.tunables), None, self.trial.params), dict(self.trial.params))  # the same call, though the model knows it by another name

    def tell(self, config, time_us):
        self.study.tell(self.trial, search.BAD if time_us is None else time_us)


class _Subset:
    """The space from its beginning, in the order of the knobs' values: what a search stopped halfway has seen."""

    def __init__(self, table, seed):
        places = [{v: n for n, v in enumerate(t.values)} for t in table.tunables]
        self.todo = sorted(table.results, key=lambda key: [place[v] for place, v in zip(places, key)])
        turn = seed * len(self.todo) // 30 % len(self.todo)  # where it begins is chance
        self.todo, self.names = self.todo[turn:] + self.todo[:turn], [t.name for t in table.tunables]

    def ask(self):
        return dict(zip(self.names, self.todo.pop(0))) if self.todo else None

    def tell(self, config, time_us):
        pass


class _Module:
    def __init__(self, tunables):
        self.TUNABLES = tunables


def run(table: Table, sampler: str, trials: int, seed: int, seeds=(), blind: bool = False) -> list[tuple[float, float]]:
    """After each trial: (best so far / the table's best - 1, seconds spent). One that is not legal or not right costs a trial and finds nothing. blind: a config of chance stands where the default does."""
    own, pool = {"tpe-plain": _Plain, "subset": _Subset}, table.pool
    if blind:
        pool.insert(0, pool.pop(random.Random(seed).randrange(len(pool))))
    how = own[sampler](table, seed) if sampler in own else search.Study(_Module(table.tunables), pool, f"replay-{seed}", None, sampler, seed, seeds)
    found, spent, course = float("inf"), 0.0, []
    for _ in range(trials):
        config = how.ask()
        if config is None:
            course.append((course[-1][0], spent))
            continue
        us, seconds = table.results.get(table.key(config), (None, 0.0))
        how.tell(config, us)
        found, spent = min(found, us or float("inf")), spent + seconds
        course.append((found / table.best - 1, spent))
    return course


def regrets(table: Table, samplers=SAMPLERS, budgets=BUDGETS, repeats: int = 30, blind: bool = False) -> list[dict]:
    """One row for each sampler and budget: the median and 90th percentile of the regret, and the median's seconds. Differences below the tie count as none."""
    rows, size = [], len(table.results)
    for sampler in samplers:
        courses = [run(table, sampler, min(max(budgets), max(size, 1)), seed, blind=blind) for seed in range(repeats)]
        for budget in budgets:
            if budget > size and budget != min((b for b in budgets if b >= size), default=budget):
                continue
            at = [course[min(budget, len(course)) - 1] for course in courses]
            rows.append({"table": table.name, "size": size, "sampler": sampler, "trials": budget, **_spread([r for r, _ in at], table), "seconds": round(statistics.median(s for _, s in at), 1)})
        for seconds in SECONDS:
            reached = [[r for r, spent in course if spent <= seconds] or [float("inf")] for course in courses]
            rows.append({"table": table.name, "size": size, "sampler": sampler, "trials": None, **_spread([r[-1] for r in reached], table), "seconds": float(seconds)})
    return rows


def _spread(found: list, table) -> dict:
    regret = sorted(0.0 if r <= max(TIE, table.noise) else r for r in found)
    return {"median": statistics.median(regret), "p90": regret[min(len(regret) - 1, int(0.9 * len(regret)))]}


def verdict(rows: list[dict]) -> str:
    """One table's rows against what is asked: ours after AT trials (or all), and ours against random and plain TPE at equal numbers of trials, by the median and, where it is the same, by the 90th percentile."""
    by = {(r["sampler"], r["trials"]): r for r in rows if r["trials"]}
    budgets = sorted(n for sampler, n in by if sampler == "pool")
    if not budgets:
        return ""
    last = by["pool", max(n for n in budgets if n <= max(AT, budgets[0]))]
    said = [f"after {min(last['trials'], last['size'])} trials median {last['median']:.2%}, 90th percentile {last['p90']:.2%}: " + ("reached" if last["median"] <= MEDIAN and last["p90"] <= P90 else
            f"missed by {max(last['median'] - MEDIAN, last['p90'] - P90):.2%}")]
    for other in ("random", "tpe-plain"):
        ours, theirs = ({n: (by[name, n]["median"], by[name, n]["p90"]) for n in budgets if (name, n) in by} for name in ("pool", other))
        behind, ahead = [n for n in theirs if ours[n] > theirs[n]], [n for n in theirs if ours[n] < theirs[n]]
        if any(name == other for name, _ in by):
            said.append(f"against {other}: better after {', '.join(map(str, ahead)) or 'none'}, worse after {', '.join(map(str, behind)) or 'none'}")
    return f"{last['table']}: " + "; ".join(said)


def text(rows: list[dict]) -> str:
    lines = [f"{'table':44} {'configs':>7} {'sampler':10} {'trials':>6} {'median':>8} {'p90':>8} {'seconds':>8}"]
    for r in rows:
        lines.append(f"{r['table']:44} {r['size']:7} {r['sampler']:10} {r['trials'] or '-':>6} {r['median']:8.2%} {r['p90']:8.2%} {r['seconds']:8.1f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------ recording
def known(module, only: dict | None) -> None:
    """Raises where a knob or a value is not the kernel's."""
    values = {t.name: t.values for t in module.TUNABLES}
    unknown = [f"{name}={v}" for name, asked in (only or {}).items() for v in asked if v not in values.get(name, ())]
    if unknown:
        raise ValueError(f"only: expected knobs and values of {module.__name__}, got {', '.join(unknown)}; it has " + ", ".join(f"{name} {' '.join(map(str, v))}" for name, v in values.items()))


def record(workload, device, backend, path, *, rounds: int = 20, seconds: float | None = None, only: dict | None = None, progress=None) -> dict:
    """Time every legal config of a kernel on a workload, interleaved, and write the table. seconds ends the trials early: what is missing is said. only: {knob: values}, a part of the space
    that is a space of its own (beside it stands the default)."""
    from sparsetile.autotune import isolate, provenance, timing, tune
    from sparsetile.autotune.hunt import Hunt
    from sparsetile.ops import dispatch
    worker = tune._bench(tune.BENCH, device, True)
    worker.open(workload, 0)
    facts = worker("facts", seconds=isolate.STARTING)
    module, start = dispatch.kernel(backend, workload.kernel), time.monotonic()
    known(module, only)
    pool, _ = space.legal(module, facts["problem"], only=only)
    compilers = None if device is None else tune._compilers(device).on(facts["device"])
    hunt = Hunt(backend, workload, facts["problem"], worker, compilers, progress or (lambda event: None))
    hunt.prepare(len(pool), None, "random", 0, only=only)
    hunt.search(seconds)
    right = [(n, t) for n, t in enumerate(hunt.tried) if t.time_us]
    samples, launch = worker("rounds", [(t.backend, t.config) for _, t in right], rounds, seconds=600)
    rows = [dict(config=t.config, failure=t.failure, seconds=t.seconds, samples=None) for t in hunt.tried]
    for (n, _), found in zip(right, samples):
        rows[n] |= {"samples": found, "time_us": statistics.median(found)}
    near = [timing.error(found) for found in samples if len(found) > rounds]
    about = {"workload": workload.name, "kernel": workload.kernel, "backend": backend, "device": facts["device"], "versions": facts["versions"], "code": provenance.code(module),
             "tunables": {t.name: [v for v in t.values if any(config[t.name] == v for config in pool)] for t in module.TUNABLES}, "paths": {t.name: list(t.paths) for t in module.TUNABLES if t.paths},
             "default": pool[0], "samples": rounds, "launch": launch, "noise": round(statistics.median(near), 4), "legal": len(pool), "recorded_in_s": round(time.monotonic() - start, 1)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(t4(about, rows))
    return {"path": str(path), "legal": len(pool), "timed": len(right), "failed": len(rows) - len(right), "noise": about["noise"]}
