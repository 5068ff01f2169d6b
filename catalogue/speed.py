"""How long the systems take on this device, beside dense attention in the same rounds: `sparsetile catalogue --measure`.

Rows come one system at a time, so that a pass that is cut keeps what it has and the next one measures what lacks. On a GPU everything is first called once by many processes
at a time, which leaves what it compiles in the caches on disk; then one process measures.
"""
import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from queue import SimpleQueue

import sparsetile as st
from sparsetile.autotune import isolate, provenance, timing
from sparsetile.backends.devices import cpu_count
from sparsetile.catalogue import store
from sparsetile.catalogue.entries import SYSTEMS, find
from sparsetile.catalogue.system import CPU, GPU, Inputs, System

PASSES = ("forward", "training")  # training: forward and backward of one call
DENSE = {True: st.Causal(), False: st.Full()}  # the baseline over the same grouped heads, by System.causal: the fastest of the device's backends
ROUNDS = ((2e6, 0), (3e5, 2), (0, 40))  # where a call takes so many us: rounds at most after the first
LONGEST = "triton", "cupy", "numba", None  # who compiles longest; another package comes last, as its rows do
FLUSH_MB = 8192  # two milliseconds of writing: the host, which needs one of them for all the launches of a selector, is ahead when a call begins
COMPILING = 45.0  # seconds; what is not compiled by then, the measurement compiles


def shape_of(device: int | None):
    return CPU if device is None else GPU


def lacking(device: int | None, tokens, systems=SYSTEMS, known=(), passes=PASSES) -> list[tuple]:
    """(system, tokens, pass, backend) of what has no time among the rows `known`. What failed or was refused before comes last, after what another package computes, which
    tunes itself at its first call."""
    found, tried = {store.key(row) for row in known if not store.why_not(row)}, {store.key(row) for row in known}
    every = [(s.name, N, what, backend) for N in tokens for what in passes for s in systems if s.run for backend in backends(s, device)]
    late = {s.name for s in systems if s.run and s.works(None)}
    return sorted((one for one in every if one not in found), key=lambda one: (one in tried, one[0] in late))


def ours(device: int | None) -> tuple:
    return ("numba",) if device is None else ("triton", "cupy")


def backends(system: System, device: int | None) -> tuple:
    """Who may compute it: None stands for the caller's framework, or another package."""
    return ours(device) if system.kernels else (None,)


def rows(device: int | None, wanted: list[tuple], seconds: float = 0.3, commit: str | None = None):
    """One row after the other for what is wanted, a (system, tokens, pass, backend) each. `seconds` for the rounds of a system at one length and pass: six at least, three
    of slow calls, one of very slow ones."""
    watch, x, commit = timing.Stopwatch(device, flush_mb=FLUSH_MB), None, commit or provenance.commit()
    for (name, N, what), some in groupby(wanted, lambda one: one[:3]):
        if x is None or (x.tokens, x.gradient) != (N, what == "training"):
            x = Inputs(shape_of(device), N, device, what == "training")
        if device is not None:
            watch.torch.cuda.empty_cache()  # what the system before held is no room in pieces
        for backend, found in _timed(watch, x, find(name), [one[3] for one in some], seconds):
            yield dict(zip(store.KEY, (name, N, what, backend))) | {"commit": commit} | found


def _timed(watch, x, system, some, seconds):
    """(backend, times or why there are none) of one system."""
    calls = {}
    for backend in some:
        why = tried(call := _call(x, lambda: system.run(x, system.real), backend), watch)
        if why:
            yield backend, why
        else:
            calls[backend] = call
    if not calls:
        return
    dense = [_call(x, lambda: st.sparse_attention(x.q, x.k, x.v, DENSE[system.causal]), backend) for backend in ours(x.device)]
    every = [*[call for call in dense if tried(call, watch) is None], *calls.values()]
    first = [watch.samples(call, 1) for call in every]
    slowest = max(map(max, first))
    later = timing.finals(watch, every, seconds, next(rounds for us, rounds in ROUNDS if slowest >= us))
    samples = [a + b for a, b in zip(first, later)]
    dense_us = min(map(watch.centre, samples[:-len(calls)]))
    for backend, found in zip(calls, samples[-len(calls):]):
        time_us = watch.centre(found)
        yield backend, {"time_us": round(time_us, 1), "dense_us": round(dense_us, 1), "times_dense": float(f"{dense_us / time_us:.4g}"), **timing.spread(found)}


def _call(x, forward, backend):
    def call():
        with asked(backend):
            out = forward()
            if x.gradient:
                for leaf in x.made.values():
                    leaf.grad = None
                out.backward(x.upstream)
    return call


@contextlib.contextmanager
def asked(backend: str | None):
    """The environment names this backend, for whatever is called, and for its backward."""
    before = os.environ.get("SPARSETILE_BACKEND")
    if backend is not None:
        os.environ["SPARSETILE_BACKEND"] = backend
    try:
        yield
    finally:
        if before is not None:
            os.environ["SPARSETILE_BACKEND"] = before
        elif backend is not None:
            del os.environ["SPARSETILE_BACKEND"]


def tried(call, watch) -> dict | None:
    """None after one call, or why there is none: the library's refusal, or what failed. A device that is lost is an error, for nothing more can be measured on it."""
    try:
        call()
        watch.synchronize()
    except st.Unsupported as refusal:
        return {"refused": str(refusal)}
    except Exception as error:  # noqa: BLE001 (a row says it, and the others are measured)
        failed = "out of memory" if "out of memory" in str(error) or "can't allocate memory" in str(error) else f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        del error
        watch.synchronize()
        return {"failed": failed}
    return None


# ---------------------------------------------------------------------------------------------------------------- compiled before
def compiled(device: int | None, wanted: list[tuple], width: int | None = None) -> list[str]:
    """Calls everything that is wanted once, in processes side by side; what they could not call, which the measurement will meet again. Kernels of a CPU are compiled in
    its own process, where they are kept."""
    units = {}
    for name, N, what, backend in wanted:
        if backend is not None or find(name).works(None):
            units.setdefault((name, backend), []).append((N, what))
    width = min(len(units), width or max(1, min(14, cpu_count() - 2)))
    # FLA keeps which of its configs were fastest: not those of a device that many share
    workers = [isolate.Worker(f"{__name__}:Caller", device, env={"FLA_CACHE_RESULTS": "0", "OMP_NUM_THREADS": "1"}) for _ in range(width)]
    idle, until = SimpleQueue(), time.monotonic() + COMPILING
    for worker in workers:
        worker.start()
        idle.put(worker)

    def one(name, backend, calls):
        worker = idle.get()
        try:
            return None if time.monotonic() > until else worker("call", name, backend, calls, seconds=max(1.0, until - time.monotonic()))
        except (isolate.Failed, isolate.Lost) as error:
            return f"{name} {backend}: {error}"
        finally:
            idle.put(worker)
    try:
        with ThreadPoolExecutor(width or 1) as pool:
            longest = sorted(reversed(units), key=lambda unit: LONGEST.index(unit[1]))
            return [why for why in pool.map(lambda unit: one(*unit, units[unit]), longest) if why]
    finally:
        for worker in workers:
            worker.kill()


class Caller:
    """In a process of its own: calls each system it is told to, once."""

    def __init__(self, device):
        self.device, self.watch = device, timing.Stopwatch(device, cold=False)

    def call(self, name, backend, calls) -> None:
        system = find(name)
        for N, what in calls:
            x = Inputs(shape_of(self.device), N, self.device, what == "training")
            tried(_call(x, lambda: system.run(x, system.real), backend), self.watch)  # noqa: B023
            del x
            if self.device is not None:
                self.watch.torch.cuda.empty_cache()
