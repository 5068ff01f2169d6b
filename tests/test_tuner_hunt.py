"""One search from its first config to its entry, with a bench worker and compilers that are made up: who waits for whom, when it ends, what its finals do."""
import itertools
import os
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
import recorded

from sparsetile.autotune import batch, decide, hunt, isolate, pinning, provenance, replay, tasks, timing, tune
from sparsetile.backends.contract import Tunable
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup, schema

TOPK = tasks.Workload.of("test/topk", "topk", B=1, T=8, S=64, K=5)


class Kernel(recorded.Kernel):
    TUNABLES = (Tunable("threads", tuple(range(64, 64 + 400))),)

    def default_config(self, problem):
        return {"threads": 64}


class Worker:
    """A bench worker that answers at once; config n takes us(n)."""
    starts, process = 1, object()

    def __init__(self, us=lambda threads: 100.0, breaks=()):
        self.us, self.breaks, self.tried, self.asked = us, breaks, [], []

    def __call__(self, order, *args, seconds=None):
        self.asked.append(order)
        if order == "attempt":
            self.tried.append(args[1]["threads"])
            time.sleep(0.001)
            return {"time_us": self.us(args[1]["threads"]), "failure": None}
        if order == "finals":
            chosen, self.seconds, kept, recorded = args
            self.kept, self.recorded = [chosen[n][1] for n in kept], recorded
            if recorded in self.breaks:
                raise isolate.Lost("crash: SIGSEGV")
            return [[self.us(config["threads"])] * 9 for _, config in chosen], {"launch": "graph" if recorded else "events: as asked", "errors": [{"max": 0.5, "allowed": 1.0}] * len(chosen), "clock_mhz": 1900}
        return args[0][0]  # centre


class Compilers:
    """Compiles the default for long, everything else at once."""
    width, typical = 4, 0.0

    def __init__(self):
        self.jobs = []

    def submit(self, workload, backend, config):
        job = Future()
        self.jobs.append((config["threads"], job))
        threading.Timer(0.3 if config["threads"] == 64 else 0.0, compiled, [job]).start()
        return job


def compiled(job):
    if job.set_running_or_notify_cancel():
        job.set_result((None, None))


@pytest.fixture
def search(monkeypatch):
    kernel, made = dispatch.kernel, Kernel()
    monkeypatch.setattr(dispatch, "kernel", lambda backend, name: made if (backend, name) == ("numba", "topk") else kernel(backend, name))
    monkeypatch.setattr(provenance, "code", lambda module: "0" * 8)
    problem = tasks.Task(TOPK, None, hollow=True).problem

    def begun(worker, compilers=None, trials=None, seconds=None, seeds=()):
        one = hunt.Hunt("numba", TOPK, problem, worker, compilers, lambda event: None)
        one.prepare(trials, None, "pool", 0, seeds)
        one.search(seconds)
        return one
    return begun


def test_what_is_compiled_first_is_timed_first(search):
    worker, compilers = Worker(), Compilers()
    one = search(worker, compilers, trials=30)
    assert len(worker.tried) == 30 and worker.tried[0] != 64 and 64 in worker.tried and len(compilers.jobs) == 30 and one.stop == "trials"


def test_the_first_configs_are_compiled_before_the_search_begins(search):
    compilers = Compilers()
    one = hunt.Hunt("numba", TOPK, tasks.Task(TOPK, None, hollow=True).problem, Worker(), compilers, lambda event: None)
    one.prepare(9, None, "pool", 0)
    assert [threads for threads, _ in compilers.jobs][0] == 64 and len(compilers.jobs) == compilers.width


def test_nothing_is_compiled_that_would_not_be_in_time(search):
    compilers = Compilers()
    compilers.typical = 10.0
    one = search(Worker(), compilers, seconds=2.0)
    assert len(one.tried) == len(compilers.jobs) == compilers.width and one.stop == "seconds"


def test_a_search_that_finds_nothing_better_ends_and_one_that_does_goes_on(search):
    one = search(Worker(), seconds=60)
    assert one.stop == "stagnation" and len(one.tried) == hunt.PATIENCE[0] + 1
    better = itertools.count(1000, -10)
    assert search(Worker(lambda threads: float(next(better))), trials=150).stop == "trials"
    more = search(Worker(lambda threads: float(next(better))), seconds=60)
    assert more.stop == "exhausted" and len(more.tried) == 400


@pytest.mark.parametrize("seconds, finals", [(60, 2.0), (3, 3 / timing.LONGEST), (None, 2.0)])
def test_the_finals_of_a_cpu_take_no_longer_than_was_asked_for(search, seconds, finals):
    worker = Worker()
    search(worker, trials=5, seconds=seconds).entry()
    assert worker.seconds == finals


def test_a_small_space_is_searched_whole(search, monkeypatch):
    monkeypatch.setattr(Kernel, "TUNABLES", (Tunable("threads", tuple(range(64, 64 + 250))),))
    one = search(Worker(), seconds=60)
    assert one.stop == "exhausted" and len(one.tried) == 250


def test_a_bucket_of_thirty_seconds_times_many_configs_though_each_takes_five_to_compile(search, monkeypatch):
    """In small: 14 compilers, 0.4 s for each config, 0.002 s for a trial, 2 s in all."""
    class Slow(Compilers):
        width, typical = 14, 0.4

        def __init__(self):
            super().__init__()
            self.free = threading.Semaphore(self.width)

        def submit(self, workload, backend, config):
            job = Future()

            def work():
                with self.free:
                    time.sleep(0.4)
                    compiled(job)
            threading.Thread(target=work, daemon=True).start()
            return job
    one = search(Worker(), Slow(), seconds=2.0)
    assert len(one.tried) > 14, len(one.tried)  # one at a time would be five


def test_the_default_and_what_stands_now_are_timed_to_the_end(search):
    worker = Worker(lambda threads: 100.0 if threads > 100 else 130.0)
    one = search(worker, trials=20)
    entry = one.entry({"threads": 77})
    assert worker.kept == [{"threads": 64}, {"threads": 77}] and entry["config"]["threads"] > 100 and entry["default_us"] == 130.0
    assert entry["launch"] == "graph" and entry["clock_mhz"] == 1900 and entry["err"] == {"max": 0.5, "allowed": 1.0} and "seed 0" in entry["inputs"]
    assert one.entry({"threads": 7}) is not None and worker.kept == [{"threads": 64}]  # not legal today


class Device(Worker):
    """A bench worker that opens workloads, and knows of others without opening them."""
    opened = None

    def open(self, workload, seed):
        self.opened = workload

    def __call__(self, order, *args, seconds=None):
        if order != "facts":
            return super().__call__(order, *args, seconds=seconds)
        self.asked.append(("open", self.opened.name) if not args else ("facts", args[0].name))
        return {"problem": tasks.Task(args[0] if args else self.opened, None, hollow=True).problem, "refused": {"triton": "no", "cupy": "no", "numba": None}, "versions": {},
                "device": {"name": "Some GPU", "arch": "cpu"}}


@pytest.mark.parametrize("budget", [dict(trials=3), dict(seconds=0.5)])
def test_the_next_workload_is_compiled_while_one_is_timed(search, budget, monkeypatch, tmp_path):
    class Host(Compilers):
        def on(self, device):
            return self

        def submit(self, workload, backend, config):
            device.asked.append(("compile", workload.name))
            return super().submit(workload, backend, config)
    device, host = Device(), Host()
    monkeypatch.setattr(tune, "_bench", lambda *_: device), monkeypatch.setattr(tune, "_compilers", lambda _: host)
    work = [tasks.Workload.of(f"test/topk-{K}", "topk", B=1, T=8, S=64, K=K) for K in (5, 9, 17)]
    monkeypatch.setenv("SPARSETILE_CACHE_DIR", str(tmp_path))
    assert batch.run(work, lambda event: None, device=0, profiles=tmp_path / "p", **budget) == 0
    (path,) = (tmp_path / "p").rglob("*.yaml")
    assert {e["workload"] for e in schema.load(path)["entries"]} == {w.name for w in work}
    for one, other in zip(work, work[1:]):
        last = [n for n, order in enumerate(device.asked) if order == "finals"][work.index(one)]
        assert device.asked.index(("facts", other.name)) < device.asked.index(("compile", other.name)) < last < device.asked.index(("open", other.name))
    assert all(device.asked.count(("facts", w.name)) == 1 for w in work)
    if "trials" in budget:
        assert all(device.asked.count(("compile", w.name)) == 3 for w in work)
    device.asked.clear()
    tune.tune("topk", work[0], device=0, profiles=tmp_path / "p", then=work[1], **budget)
    tune.tune("topk", work[1], device=0, profiles=tmp_path / "p", then=work[0], **budget)
    assert device.asked.count(("facts", work[1].name)) == 1
    device.asked.clear()
    tune.tune("topk", work[2], device=0, profiles=tmp_path / "p", **budget)  # another than was said
    assert ("open", work[0].name) not in device.asked and ("facts", work[2].name) in device.asked and not tune._next
    lookup.forget(), dispatch.clear_plans()


def test_ties_go_to_what_stands_now(search):
    worker = Worker(lambda threads: 130.0 if threads == 64 else 100.0)
    one = search(worker, trials=decide.FINALISTS)
    assert one.entry()["config"]["threads"] == min(n for n in worker.tried if n != 64)
    last = max(worker.tried)
    assert one.entry({"threads": last})["config"]["threads"] == last


def test_finals_that_break_are_made_again_without_graphs(search):
    worker = Worker(breaks=(True,))
    assert search(worker, trials=5).entry()["launch"] == "events: as asked" and not worker.recorded
    assert search(Worker(breaks=(True, False)), trials=5).entry() is None


# -------------------------------------------------------------------------------------------------------------------- rounds
class Watch(timing.Stopwatch):
    """Calls that say their own time."""

    def __init__(self):
        super().__init__(None)

    def samples(self, call, count):
        return [call() for _ in range(count)]


def steps(*values):
    turn = itertools.cycle(values)
    return lambda: next(turn)


def test_the_hopeless_leave_the_finals_and_the_default_stays():
    samples, clocks = timing.ranked(Watch(), [steps(100.0, 100.4), steps(100.5, 100.2), steps(160.0), steps(108.0), steps(150.0)], 60.0, kept=(4,))
    assert [len(s) for s in samples] == [40, 40, 3, 8, 40] and clocks == [None] * 40


def test_finals_of_noisy_calls_go_on():
    quiet, _ = timing.ranked(Watch(), [steps(100.0)], 60.0)
    noisy, _ = timing.ranked(Watch(), [steps(*(60.0 + 13 * (n * 7 % 11) for n in range(11)))], 60.0)
    assert len(quiet[0]) == 40 and 160 < len(noisy[0]) <= 640


def test_what_a_round_shares_is_taken_out_of_it():
    """Three calls of 100, 104 and 150 us on a machine whose clock wanders by a third from round to round; the third leaves halfway. Their own noise stays."""
    rng = np.random.default_rng(0)
    drift, own = np.exp(rng.normal(0, 0.15, 40).cumsum() / 3), np.exp(rng.normal(0, 0.004, (3, 40)))
    samples = [list(us * drift[:count] * noise[:count]) for us, count, noise in zip((100, 104, 150), (40, 40, 20), own)]
    found = timing.levelled(samples)
    ratio = np.median(found[1]) / np.median(found[0])
    assert [len(s) for s in found] == [40, 40, 20] and abs(ratio - 1.04) < 1.04 * timing.error(found[0]) < 0.008 < timing.error(samples[0])
    assert timing.levelled([[3.0, 5.0]])[0] == pytest.approx([3.0, 5.0]) and timing.levelled([[], [1.0]]) == [[], [1.0]]


def test_a_round_at_another_clock_is_taken_out():
    samples, clocks = timing.ranked(Watch(), [steps(100.0)], 60.0, clock=steps(*[1980] * 9, 1500))
    assert len(clocks) == 40 and len(samples[0]) == 36
    samples, _ = timing.ranked(Watch(), [steps(100.0)], 60.0, clock=steps(1980, 1700, 1500))  # a chip at the limit of its power
    assert len(samples[0]) == 40


def test_threads_are_pinned_while_a_cpu_kernel_is_timed():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system pins no threads")
    call = tasks.Task(tasks.find("cpu/window-256/4096").small(), None).bound("numba")
    call()
    places = lambda: {n: os.sched_getaffinity(int(n)) for n in os.listdir("/proc/self/task")}
    before = places()
    with pinning.pinned(call) as threads:
        inside = [cores for thread, cores in places().items() if before.get(thread) != cores]
        assert len(inside) == threads and all(len(cores) == 1 for cores in inside) and len(set(map(tuple, inside))) == threads
    assert places() == before


def test_decide_needs_a_gain_over_the_default():
    module, problem = replay._Module((Tunable("n", (1, 2)),)), None
    module.resources = lambda problem, config: "unknown"
    tried = lambda n, us: decide.Tried("numba", {"n": n}, us, samples=[us] * 9)
    assert decide.decide([tried(1, 100.0), tried(2, 98.5)], {"n": 1}, module, problem, {"n": 2})["config"] == {"n": 1}


def test_a_device_that_finals_lost_is_said_to_be_lost(monkeypatch):
    """Every later call of the process fails: it asks to be replaced."""
    torch = pytest.importorskip("torch")
    from sparsetile.autotune.trial import Bench
    bench = Bench(None)
    bench.device = 0
    monkeypatch.setattr(bench, "_finals", lambda *_: (_ for _ in ()).throw(RuntimeError("an illegal instruction was encountered")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pytest.raises(RuntimeError, match="illegal"):
        bench.finals([], 1.0)
    assert not bench.broken
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (_ for _ in ()).throw(RuntimeError("an illegal instruction was encountered")))
    with pytest.raises(RuntimeError, match="illegal"):
        bench.finals([], 1.0)
    assert bench.broken
