"""Samplers on spaces that were timed whole: the file format, what a regret is, and that ours beats random and plain TPE on a space of knobs that interact."""
import itertools
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numeric import assert_close

from sparsetile.autotune import parzen, replay, search
from sparsetile.autotune.surface import Surface
from sparsetile.backends.contract import Tunable

ROOT = Path(__file__).resolve().parent.parent
TABLES = sorted((ROOT / "bench" / "tables").glob("*.t4.json.gz"))
KNOBS = (Tunable("tile", (64, 16, 32, 128)), Tunable("block", (32, 64, 128)), Tunable("warps", (4, 8, 2)), Tunable("stages", (1, 2, 3, 4)), Tunable("path", ("plain", "fast")))


def rows(seed=0):
    """A space whose best lies in a corner, with a third of it illegal and some that fail."""
    rng, found = np.random.default_rng(seed), []
    for values in itertools.product(*(t.values for t in KNOBS)):
        config = dict(zip((t.name for t in KNOBS), values))
        if config["tile"] * config["block"] * config["stages"] > 20_000:
            continue
        us = 100 + abs(np.log2(config["tile"] / 32)) * 20 + abs(np.log2(config["block"] / 64)) * 15 * (config["path"] == "fast") + abs(config["stages"] - 3) * 9 + 40 * (config["path"] == "plain") + \
            (config["warps"] != 8) * 25 * (config["tile"] > 16)
        fails = config != {t.name: t.values[0] for t in KNOBS} and rng.random() < 0.1
        samples = None if fails else list(us * (1 + 0.002 * rng.standard_normal(5)))
        found.append(dict(config=config, samples=samples, time_us=samples and float(np.median(samples)), failure="hang: no answer" if fails else None, seconds=0.5))
    return found


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "made.t4.json.gz"
    about = {"workload": "made", "backend": "numba", "tunables": {t.name: list(t.values) for t in KNOBS}, "default": {t.name: t.values[0] for t in KNOBS}, "noise": 0.001}
    path.write_bytes(replay.t4(about, rows()))
    return replay.load(path)


def test_a_table_is_what_was_timed(table):
    made = {table.key(r["config"]): r["time_us"] for r in rows()}
    assert {key: us for key, (us, _) in table.results.items()} == {key: us and pytest.approx(us, rel=1e-3) for key, us in made.items()}
    assert table.pool[0] == table.default and len(table.pool) == len(made) and all(seconds == pytest.approx(0.5, rel=1e-3) for _, seconds in table.results.values())


@pytest.mark.parametrize("sampler", ["pool", "random", "tpe", "tpe-plain", "subset"])
def test_a_course_descends_and_ends_at_the_best_when_everything_was_tried(table, sampler):
    course = replay.run(table, sampler, len(table.results) if sampler != "tpe-plain" else 20, 0)
    regret = [r for r, _ in course]
    assert regret == sorted(regret, reverse=True) and (regret[-1] == 0 or sampler == "tpe-plain") and [s for _, s in course] == sorted(s for _, s in course)


def test_a_blind_replay_begins_with_a_config_of_chance(table):
    begun = {replay.run(table, "pool", 1, seed, blind=True)[0][0] for seed in range(8)}
    assert len(begun) > 4 and {replay.run(table, "pool", 1, seed)[0][0] for seed in range(8)} == {table.results[table.key(table.default)][0] / table.best - 1}


def test_ours_beats_random_and_plain_tpe(table):
    rows = replay.regrets(table, ("pool", "random", "tpe-plain"), (40,), repeats=10)
    found = {r["sampler"]: r for r in rows if r["trials"]}
    assert "better after 40, worse after none" in replay.verdict(rows) and {r["seconds"] for r in rows if not r["trials"]} == set(replay.SECONDS)
    assert found["pool"]["median"] <= min(found["random"]["median"], found["tpe-plain"]["median"]) and found["pool"]["p90"] <= found["random"]["p90"]


def test_a_verdict_says_what_is_missed():
    row = lambda sampler, trials, median, p90: {"table": "x", "size": 999, "sampler": sampler, "trials": trials, "median": median, "p90": p90, "seconds": 1.0}
    said = replay.verdict([row("pool", 50, 0.0, 0.5), row("pool", 150, 0.004, 0.07), row("random", 50, 0.0, 0.2), row("random", 150, 0.001, 0.2), row("pool", None, 0, 0)])
    assert "after 150 trials median 0.40%, 90th percentile 7.00%: missed by 2.00%" in said and "against random: better after none, worse after 50, 150" in said
    assert "reached" in replay.verdict([row("pool", 150, 0.01, 0.05)])


def test_the_same_seed_is_the_same_course_and_no_config_comes_twice():
    points = np.array(list(itertools.product(range(4), range(3), range(5))))
    courses = []
    for _ in range(2):
        pool, given = parzen.Pool(points, [True, False, True], 3, seeds=(7, 8)), []
        while (n := pool.ask()) is not None:
            pool.tell(n, float((points[n] ** 2).sum()) if n % 7 else float("inf"))
            given.append(n)
        courses.append(given)
    assert courses[0] == courses[1] and sorted(courses[0]) == list(range(len(points))) and courses[0][:3] == [0, 7, 8]


def test_the_cold_arm_knows_nothing_of_the_seeds():
    pool = parzen.Pool(np.arange(50)[:, None], [True], 0, seeds=(5, 6))
    for _ in range(20):
        pool.tell(pool.ask(), 1.0)
    warm, cold = pool.arms
    assert {0, 5, 6} <= set(warm.index) and not {5, 6} & set(cold.index) and 0 in cold.index and abs(len(warm.index) - len(cold.index)) <= 4


def test_the_surface_is_a_gaussian_process():
    """Mean, error and expected improvement of every config by the definition, in float64 and at once; the surface has grown row by row, in the order of the answers."""
    rng, points = np.random.default_rng(0), np.array(list(itertools.product(range(4), range(3), range(5))))
    surface, told = Surface(points, [True, False, True]), rng.permutation(60)[:25]
    value = np.exp(0.2 * points[told, 0] + 0.5 * (points[told, 1] == 1) + 0.02 * rng.standard_normal(25))
    value[3] = np.inf
    for n, (config, us) in enumerate(zip(told, value)):
        surface.near(int(config))  # its answer is awaited
        surface.tell(int(config), float(us))
        if n % 4:
            surface.gain()
    gain, right = surface.gain(), np.isfinite(value)

    def expected(kind, normal):
        """At once, in one element type: normal(z) is the normal distribution."""
        y = np.log(np.where(right, value, value[right].max())).astype(kind)
        slow = np.quantile(y[right], 0.75).astype(kind)
        y = np.where(y > slow, slow + kind(0.3) * (y - slow), y)
        steps = np.abs(points[:, None] - points[None])
        far = ((steps > 0) * np.array([0.4, 1, 0.4]) + steps / np.array([3, 1, 4]) * np.array([0.9, 0, 0.9])).astype(kind)
        K, one = np.exp(-far @ surface.weights.astype(kind)), np.ones(25, kind)
        inverse = np.linalg.inv(K[np.ix_(told, told)] + kind(1e-3) * np.eye(25, dtype=kind))
        mean = one @ inverse @ y / (one @ inverse @ one)
        scale2 = (y - mean) @ inverse @ (y - mean) / 25
        found = mean + K[:, told] @ inverse @ (y - mean)
        error = np.sqrt(scale2 * (1 - np.einsum("nt,ts,ns->n", K[:, told], inverse, K[:, told])).clip(1e-6))
        z = (y.min() - found) / error
        return error * (z * normal(z) + np.exp(-z * z / 2) / math.sqrt(2 * math.pi))

    exact = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))
    near = lambda z: 0.5 * (1 + np.tanh(0.79788456 * (z + 0.044715 * z ** 3)))  # noqa: E731  (the surface's own form: what a plain float32 formula errs by)
    new = np.setdiff1d(np.arange(60), told)
    truth, formula = expected(np.float64, exact)[new], expected(np.float32, near)[new].astype(np.float32)
    assert_close("expected improvement", gain[new].astype(np.float32), truth, formula, reduction=25)
    assert surface.weights[2] < surface.weights[0] and surface.weights[2] < surface.weights[1]  # the last knob does nothing


def test_a_surface_without_a_right_answer_or_too_large_says_nothing(monkeypatch):
    made = Surface(np.arange(10)[:, None], [True])
    made.tell(3, float("inf"))
    assert made.gain() is None
    made.tell(4, 1.0)
    assert made.gain() is not None
    monkeypatch.setattr("sparsetile.autotune.surface.MOST", 20)
    assert made.gain() is None
    made.tell(5, 1.0)
    assert made.told == [3, 4]


def test_first_configs_differ_in_most_knobs():
    pool = parzen.Pool(np.array(list(itertools.product(range(8), repeat=3))), [True] * 3, 0)
    given = [pool.ask() for _ in range(8)]
    values = pool.points[given]
    assert all((values[a] != values[b]).sum() >= 2 for a in range(8) for b in range(a)) and min(len(set(column)) for column in values.T) >= 5


def test_a_study_gives_back_what_was_dropped():
    module = replay._Module(KNOBS)
    study = search.Study(module, [r["config"] for r in rows()][:5], "x", None, "pool", 0)
    first = study.ask()
    study.drop(first)
    seen = [study.ask() for _ in range(5)]
    assert first in seen and study.ask() is None


def test_a_part_of_a_space_is_a_space():
    from sparsetile.autotune import space, tasks
    from sparsetile.ops import dispatch
    w = tasks.find("cpu/window-256/4096")
    problem, module = tasks.Task(w, None, hollow=True).problem, dispatch.kernel("numba", w.kernel)
    whole, part = space.legal(module, problem)[0], space.legal(module, problem, only={"block_q": (32,)})[0]
    default = module.default_config(problem)
    assert default["block_q"] != 32 and part == [default] + [c for c in whole if c["block_q"] == 32] and len(part) > 1
    with pytest.raises(ValueError, match="only: expected knobs and values .* got block_q=5, speed=1; it has block_q"):
        replay.known(module, {"block_q": (32, 5), "speed": (1,)})


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.name)
def test_committed_tables_hold_the_whole_legal_space(path):
    data, table = json.loads(gzip.decompress(path.read_bytes())), replay.load(path)
    assert len(table.results) == data["metadata"]["legal"] and table.results[table.key(table.default)][0] and {"device", "versions", "code", "noise"} <= set(data["metadata"])
    assert replay.run(table, "pool", len(table.results), 0)[-1][0] == 0


@pytest.mark.parametrize("content", [b"", b"no table", gzip.compress(b"[1]"), gzip.compress(b'{"metadata": {}, "results": []}')])
def test_what_is_no_table_is_said(content, tmp_path):
    (tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(ValueError, match="x.gz: expected a table as"):
        replay.load(tmp_path / "x.gz")


def test_the_command(table, tmp_path):
    path = tmp_path / "t.t4.json.gz"
    about = {"workload": "made", "backend": "numba", "tunables": {t.name: list(t.values) for t in KNOBS}, "default": table.default, "noise": 0.001}
    path.write_bytes(replay.t4(about, rows()))
    got = subprocess.run([sys.executable, "-m", "sparsetile", "replay", str(path), "--samplers", "pool,random", "--repeats", "2", "--json"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert got.returncode == 0 and {json.loads(line)["sampler"] for line in got.stdout.splitlines()} == {"pool", "random"}, got.stderr
