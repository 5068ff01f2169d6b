"""Compiling ahead of the bench worker: processes without a device put kernels into the caches on disk, where the worker finds them.

CuPy's kernels say what a config compiles (`artifacts`). Triton has no such list that its own launch would find again, so the call itself is made on
tensors that are nowhere (torch's meta device) with every launch ending after its compilation.
"""
import importlib
import os
import statistics
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from queue import SimpleQueue

from sparsetile.autotune import isolate
from sparsetile.autotune.tasks import Task
from sparsetile.backends import devices
from sparsetile.ops import dispatch

LIMIT = 60.0  # seconds that one config may compile
REFUSALS = ("CompileError", "CompilationError", "PTXASError")  # NVRTC's, Triton's and ptxas's


class Ahead:
    """Compile processes for one device's workloads, which start at once; each takes one config at a time."""

    def __init__(self, width: int | None = None):
        self.width = width or max(1, min(14, int(os.environ.get("SPARSETILE_COMPILERS") or 0) or devices.cpu_count() - 2))
        self.spent = deque(maxlen=3 * self.width)
        self.pool, self.idle, self.device = ThreadPoolExecutor(self.width), SimpleQueue(), None
        self.workers = [isolate.Worker(f"{__name__}:Compiler", env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}) for _ in range(self.width)]
        for worker in self.workers:
            worker.start()
            self.idle.put(worker)

    def on(self, device: dict) -> "Ahead":
        """What they compile for, as the bench worker describes it."""
        if device != self.device:
            self.device = device
            for worker in self.workers:
                worker.open(device)
        return self

    @property
    def typical(self) -> float:
        """Seconds that a config has taken to compile of late."""
        return statistics.median(self.spent) if self.spent else 0.0

    def submit(self, workload, backend: str, config: dict) -> Future:
        """Its result is (the sentence that says why the config does not compile, or None; what was left to the bench worker, or None)."""
        return self.pool.submit(self._compile, workload, backend, config)

    def _compile(self, workload, backend, config):
        worker, start = self.idle.get(), time.monotonic()
        try:
            return None, worker("compile", workload, backend, config, seconds=LIMIT)
        except (isolate.Failed, isolate.Lost) as error:
            return f"compile: {error}"[:300], None
        finally:
            self.spent.append(time.monotonic() - start)
            self.idle.put(worker)

    def close(self):
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in self.workers:
            worker.kill()


class Compiler:
    """In a compile process: the device as it was described, without touching one."""

    def __init__(self):
        os.nice(10)  # the bench worker's host must not wait for a core
        for name in ("torch", "triton"):
            if find_spec(name):
                importlib.import_module(name)  # seconds, while the bench worker makes its inputs

    def open(self, device: dict) -> None:
        info = devices.DeviceInfo(device["name"], device["arch"], device["sms"], device["mem_gb"], device["smem_optin"], device["l2_mb"], device["vendor"])
        devices.device_info = lambda index: info
        self.info, self.problems, self.settled = info, {}, False

    def compile(self, workload, backend: str, config: dict | None) -> str | None:
        """Everything that the config's trial needs: the workload itself, and the small twin that it is checked on. Raises what a compiler refuses; what cannot be
        compiled without the device is left to the bench worker. None for a config is the kernel's default, if it takes the workload."""
        if config is None:
            problem = self._problem(workload)
            module = dispatch.kernel(backend, problem.op)
            if module.supports(problem):
                return None
            config = module.default_config(problem)
        for one in (workload.small(), workload):
            try:
                self._cupy(one, config) if backend == "cupy" else self._triton(one, config)
            except Exception as error:  # noqa: BLE001
                if type(error).__name__ in REFUSALS:
                    raise
                return f"{type(error).__name__}: {error}"[:300]
        return None

    def _problem(self, workload):
        if workload not in self.problems:
            self.problems[workload] = Task(workload, None, hollow=True).problem
        return self.problems[workload]

    def _cupy(self, workload, config):
        from sparsetile.backends.cupy import compile
        problem = self._problem(workload)
        module = dispatch.kernel("cupy", problem.op)
        for artifact in module.artifacts(problem, {**module.default_config(problem), **config}):
            compile.cubin(artifact["source"], artifact["defines"], problem.arch)

    def _triton(self, workload, config):
        from sparsetile.autotune import nowhere
        if not self.settled:
            nowhere.settle(self.info)
            self.settled = True
        nowhere.Task(workload, 0).run("triton", config)
