"""What the bench worker does: it holds one workload on its device, and checks, screens and finally times configs. Nothing here knows of processes."""
import contextlib
import gc
import resource
import statistics
import time

from sparsetile.autotune import bands, graphs, pinning, provenance, timing
from sparsetile.autotune.tasks import Task, Workload
from sparsetile.autotune.verify import Verifier
from sparsetile.backends.contract import BACKENDS
from sparsetile.ops import dispatch

FLUSH_MB = 1024  # 0.35 ms of writing between calls: longer than the host needs to launch one
LEAK_MB = 64  # that the calls of one trial may keep
NEAR = 0.1  # of the best one's time: whose place in a table matters
BUSY = 0.5  # seconds of work before the finals, so that clock and temperature have settled


class Bench:
    """One device and the workload that is open on it. `broken` says that the device is lost to this process."""

    def __init__(self, device: int | None):
        self.device, self.broken, self.watch = device, False, timing.Stopwatch(device, flush_mb=FLUSH_MB)

    def open(self, workload: Workload, seed: int) -> None:
        """Inputs of another workload; those before are let go."""
        self.workload, self.task, self._verifier = workload, None, None
        gc.unfreeze()
        gc.collect()
        self.task = Task(workload, self.device, seed)
        self.verifier  # noqa: B018 (made now: the first trial's time is its own)
        gc.freeze()  # what stays as long as the workload, whole frameworks: a trial looks twice for what its calls kept, 40 ms each time

    @property
    def verifier(self):
        if self._verifier is None:
            self._verifier = Verifier(self.workload, self.device)
        return self._verifier

    def machine(self) -> dict:
        return provenance.device(self.device)

    def facts(self, workload: Workload | None = None) -> dict:
        """What the controller has to know of the device, which it never touches, and of the workload that is open, or of another, which costs no inputs."""
        problem = (self.task if workload is None else Task(workload, self.device, hollow=True)).problem
        refused = {name: dispatch.refusal(name, problem, self.device) for name in BACKENDS if name != "reference"}
        return {"problem": problem, "refused": refused, "device": provenance.device(self.device), "versions": provenance.versions(), "unit": provenance.unit(self.device)}

    def attempt(self, backend: str, config: dict, best_us: float) -> dict:
        """One config: checked between guard bands, then screened. A failure is told with its cause."""
        start, told = time.monotonic(), {"time_us": None, "failure": None}
        try:
            told["failure"] = self._wrong(backend, config)
            if told["failure"] is None:
                call = self.task.bound(backend, config)
                call()
                self.watch.synchronize()
                before = self._held_mb()
                told["time_us"] = self.watch.centre(timing.screen(self.watch, call, best_us))
                kept = self._held_mb() - before
                if kept > LEAK_MB:
                    told.update(time_us=None, failure=f"leak: {kept:.0f} MB kept after the trial's calls")
                    self.broken = True
        except Exception as error:  # noqa: BLE001 (whatever a compiler or driver throws is this config's failure)
            told.update(time_us=None, failure=f"{type(error).__name__}: {error}"[:300])
        self._look_after(told)
        return told | {"seconds": round(time.monotonic() - start, 3)}

    def finals(self, chosen: list, seconds: float, kept=(), recorded: bool = True) -> tuple[list, dict]:
        """Samples of each (backend, config), interleaved, warm, None for one that does not answer rightly in this process; and what an entry says of the timing.

        kept      places in `chosen` that are timed to the end, however slow
        recorded  whether the calls are recorded in CUDA graphs, where they can be
        """
        try:
            return self._finals(chosen, seconds, kept, recorded)
        except Exception as error:
            self._look_after({"failure": str(error)})
            raise

    def _finals(self, chosen: list, seconds: float, kept, recorded: bool) -> tuple[list, dict]:
        calls, errors = {}, {}
        for n, (backend, config) in enumerate(chosen):
            try:
                if self._wrong(backend, config) is None:
                    calls[n], errors[n] = self.task.bound(backend, config), self.verifier.error
                    calls[n]()
            except Exception:  # noqa: BLE001 (a finalist that ran in another process and fails in this one is none)
                calls.pop(n, None)
        self.watch.synchronize()
        if not calls:
            return [None] * len(chosen), {}
        about = {"errors": [errors.get(n) for n in range(len(chosen))], **self._ready(chosen, calls, recorded)}
        with self._pinned(calls) as threads:
            found, clocks = timing.ranked(self.watch, list(calls.values()), seconds, {place for place, n in enumerate(calls) if n in kept}, self._clock_mhz)
        clocks = [clock for clock in clocks if clock]
        if clocks:
            about |= {"clock_mhz": round(statistics.median(clocks)), "clocks": [min(clocks), max(clocks)]}
        if self.device is None:
            about["launch"] = self._launched(threads)
        samples = dict(zip(calls, found))
        return [samples.get(n) for n in range(len(chosen))], about

    def _ready(self, chosen, calls: dict, recorded: bool) -> dict:
        """A busy half second, and on a GPU the calls as graphs, in place; how they will be launched."""
        if self.device is None:
            return {}
        until = time.monotonic() + BUSY
        while time.monotonic() < until:
            for call in calls.values():
                call()
            self.watch.synchronize()
        why = "events: as asked" if not recorded else next(filter(None, (self._no_graph(*chosen[n]) for n in calls)), None)
        graph, how = (None, why) if why else graphs.record(list(calls.values()), self.device)
        if graph:
            calls.update(zip(calls, graph))
        return {"launch": how}

    def _no_graph(self, backend, config) -> str | None:
        """Why a graph would hold other work than the call does."""
        says = getattr(dispatch.kernel(backend, self.workload.kernel), "captures", None)
        why = says and says(config)
        return why and f"events: {why}"

    def rounds(self, chosen: list, count: int) -> tuple[list, str]:
        """Samples of each (backend, config), interleaved and launched as in the finals: `count`, and four times as many of those that are near the best; and how they were launched. They have been
        checked before."""
        calls = dict(enumerate(self.task.bound(backend, config) for backend, config in chosen))
        for call in calls.values():
            call()
        how = self._ready(chosen, calls, True)
        with self._pinned(calls) as threads:
            samples = timing.finals(self.watch, list(calls.values()), float("inf"), count)
            middles = [statistics.median(found) for found in samples]
            near = [n for n, middle in enumerate(middles) if middle <= (1 + NEAR) * min(middles)]
            for n, more in zip(near, timing.finals(self.watch, [calls[n] for n in near], float("inf"), 3 * count)):
                samples[n] += more
        return samples if self.device is not None else timing.levelled(samples), how.get("launch") or self._launched(threads)

    def _pinned(self, calls: dict):
        return contextlib.nullcontext(0) if self.device is not None else pinning.pinned(next(iter(calls.values())))

    def _launched(self, threads: int) -> str:
        return f"{threads} threads pinned" if threads else "threads free"

    def _wrong(self, backend, config) -> str | None:
        try:
            with bands.around():
                wrong = self.verifier.wrong(backend, config)
        except bands.Overwritten as error:
            return f"out of bounds: {error}"
        return None if wrong is None else f"wrong answer: {wrong}"[:300]

    def _clock_mhz(self) -> int | None:
        if self.device is None:
            return None
        import torch
        try:
            return torch.cuda.clock_rate(self.device)
        except Exception:  # noqa: BLE001 (NVML is not there, or is not allowed to say)
            return None

    def _held_mb(self) -> float:
        gc.collect()
        if self.device is not None:
            import torch
            return torch.cuda.memory_allocated(self.device) / 2 ** 20
        with open("/proc/self/statm") as file:  # the resident pages
            return int(file.read().split()[1]) * resource.getpagesize() / 2 ** 20

    def _look_after(self, told) -> None:
        """After a failure on a GPU: is the device still ours? Every later call fails after an illegal access."""
        if told["failure"] is None or self.device is None:
            return
        import torch
        try:
            torch.cuda.synchronize(self.device)
            self.broken = self.broken or "OutOfMemory" in told["failure"]
        except Exception:  # noqa: BLE001
            self.broken = True
