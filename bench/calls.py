"""What the benchmarks of whole calls share: their arguments, where they run, and calls in turn within each round."""
import argparse
import time
from dataclasses import dataclass
from typing import Any

from sparsetile.autotune import timing


@dataclass(frozen=True)
class Run:
    """given: the arguments; backends: names, None for the first that runs."""
    given: argparse.Namespace
    cuda: bool
    device: str
    watch: Any
    backends: tuple

    def times(self, every: dict, quick: tuple, full: tuple) -> dict:
        """name -> milliseconds of each call, after a first one that is told; quick, full: (seconds, rounds at most) of a GPU."""
        report_first(self.watch, every)
        seconds, most = quick if self.given.quick else full
        samples = timing.finals(self.watch, list(every.values()), seconds=0.0 if self.given.quick and not self.cuda else seconds, most=most)
        return {name: self.watch.centre(x) / 1e3 for name, x in zip(every, samples)}

    def on(self, torch) -> str:
        return torch.cuda.get_device_name() if self.cuda else "CPU"


def started(torch, name: str, doc: str, only: str, flush_mb: int, arguments=None) -> Run:
    """only: which rows --only takes, in words."""
    parser = argparse.ArgumentParser(prog=f"sparsetile.bench.{name}", description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; on a CPU one")
    parser.add_argument("--backend", nargs="+", help="backends; by default both of a GPU, and on a CPU the first")
    parser.add_argument("--only", nargs="+", default=[""], help=only)
    given, cuda = parser.parse_args(arguments), torch.cuda.is_available()
    return Run(given, cuda, "cuda" if cuda else "cpu", timing.Stopwatch(0 if cuda else None, flush_mb=flush_mb), tuple(given.backend or (("triton", "cupy") if cuda else (None,))))


def without_gradients(torch, call):
    def run():
        with torch.no_grad():
            return call()
    return run


def backward(torch, function, *tensors):
    """The backward alone: its forward is made by the first call."""
    tensors, made = [x.detach().requires_grad_() for x in tensors], []

    def run():
        if not made:
            made.append(function(*tensors))
            made.append(torch.randn_like(made[0]))
        return torch.autograd.grad(made[0], tensors, made[1], retain_graph=True)
    return run


def report_first(watch, calls):
    for name, call in calls.items():
        begun = time.perf_counter()
        call()
        watch.synchronize()
        print(f"first call of {name}: {time.perf_counter() - begun:.1f} s", flush=True)
