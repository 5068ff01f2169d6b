"""What the bench worker does: it holds one workload on its device, and checks, screens and finally times configs. Nothing here knows of processes."""
import gc
import resource
import time

from sparsetile.autotune import bands, provenance, timing
from sparsetile.autotune.tasks import Task, Workload
from sparsetile.autotune.verify import Verifier
from sparsetile.backends.contract import BACKENDS
from sparsetile.ops import dispatch

LEAK_MB = 64  # that the calls of one trial may keep


class Bench:
    """One device and the workload that is open on it. `broken` says that the device is lost to this process."""

    def __init__(self, device: int | None):
        self.device, self.broken, self.watch = device, False, timing.Stopwatch(device)

    def open(self, workload: Workload, seed: int) -> None:
        """Inputs of another workload; those before are let go."""
        self.workload, self.task, self._verifier = workload, None, None
        gc.collect()
        self.task = Task(workload, self.device, seed)

    @property
    def verifier(self):
        if self._verifier is None:
            self._verifier = Verifier(self.workload, self.device)
        return self._verifier

    def facts(self) -> dict:
        """What the controller has to know of the device, which it never touches."""
        problem = self.task.problem
        refused = {name: dispatch.refusal(name, problem, self.device) for name in BACKENDS if name != "reference"}
        return {"problem": problem, "refused": refused, "device": provenance.device(self.device), "versions": provenance.versions()}

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

    def finals(self, chosen: list, seconds: float) -> list:
        """Samples of each (backend, config), interleaved, warm; None for one that does not answer rightly in this process."""
        calls = {}
        for n, (backend, config) in enumerate(chosen):
            try:
                if self._wrong(backend, config) is None:
                    calls[n] = self.task.bound(backend, config)
                    calls[n]()
            except Exception:  # noqa: BLE001 (a finalist that ran in another process and fails in this one is none)
                calls.pop(n, None)
        self.watch.synchronize()
        samples = dict(zip(calls, timing.finals(self.watch, list(calls.values()), seconds)))
        return [samples.get(n) for n in range(len(chosen))]

    def centre(self, samples: list) -> float:
        return self.watch.centre(samples)

    def _wrong(self, backend, config) -> str | None:
        try:
            with bands.around():
                wrong = self.verifier.wrong(backend, config)
        except bands.Overwritten as error:
            return f"out of bounds: {error}"
        return None if wrong is None else f"wrong answer: {wrong}"[:300]

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
