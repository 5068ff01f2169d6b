"""A backend that breaks in every way a config can: the bench worker of the tests. Runs in the worker's process; what a config does is written in its knobs."""
import ctypes
import os
import time

import numpy as np

from sparsetile.autotune import trial
from sparsetile.backends.contract import Resources, Tunable
from sparsetile.ops import dispatch

FAULTS = ("none", "hang", "crash", "nan", "outside", "exit", "leak", "raise", "once", "wrong")
_kept = []


class Kernel:
    """The reference's top-k with faults, in numba's place: knob `fault` says which, knob `us` how long a call takes."""
    __name__ = "faulty.topk"
    TUNABLES = (Tunable("us", (3000, 1000)), Tunable("fault", FAULTS))

    def __init__(self):
        self.right = dispatch.kernel("reference", "topk")

    def supports(self, problem):
        return None

    def resources(self, problem, config):
        return Resources(threads=config["us"]) if config["us"] == 1000 or config["fault"] == "none" else "one fault of a kind is enough"

    def default_config(self, problem):
        return {"us": 3000, "fault": "none"}

    def run(self, scores, top_k, *, place, config, **rest):
        indices, lengths = self.right.run(scores, top_k, place=place, config={}, **rest)
        time.sleep(config["us"] / 1e6)
        getattr(self, "_" + config["fault"])(indices, place)
        return indices, lengths

    def _none(self, indices, place):
        pass

    def _hang(self, indices, place):
        time.sleep(1000)

    def _crash(self, indices, place):
        ctypes.string_at(0)  # an illegal access

    def _exit(self, indices, place):
        os._exit(3)

    def _raise(self, indices, place):
        raise RuntimeError("out of shared memory")

    def _nan(self, indices, place):
        indices[...] = -1

    def _wrong(self, indices, place):
        indices[..., 0] += 1

    def _outside(self, indices, place):
        ctypes.memset(place.empty((16,), "int32").ctypes.data + 64, 0, 4)

    def _leak(self, indices, place):
        _kept.append(np.ones(6 << 20))

    def _once(self, indices, place):
        """Dies in the first process that runs it."""
        mark = os.environ["FAULTY_MARK"]
        if not os.path.exists(mark):
            open(mark, "w").close()
            os.kill(os.getpid(), 9)


class Bench(trial.Bench):
    def __init__(self, device):
        super().__init__(device)
        install()


def install():
    """Numba's top-k is the faulty one, in this process."""
    if not isinstance(dispatch.kernel("numba", "topk"), Kernel):
        kernel, faulty = dispatch.kernel, Kernel()
        dispatch.kernel = lambda backend, name: faulty if (backend, name) == ("numba", "topk") else kernel(backend, name)
