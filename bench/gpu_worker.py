"""The process that measures rows of the GPU table, one after the other, and says each result as a line of JSON at once. bench/gpu_table.py starts it.

It begins when a line comes. Events: {"machine": ...}, {"ceilings": ...}, {"row", "who", "trying": true} before anything of `who` runs, then {"row", "who", ...} with what came of it.
A kernel that breaks the device's context ends the process; its supervisor goes on without that kernel.
"""
import importlib
import json
import statistics
import sys
import time

import numpy as np
import torch

from sparsetile.autotune import graphs, measure, tasks, timing
from sparsetile.backends import arrays
from sparsetile.bench import gpu_rows, peers, spot
from sparsetile.ops import dispatch

OURS = ("triton", "cupy")
FLUSH_MB = 3072  # 0.7 ms of writing on an H200, longer than a busy host needs to launch any call: behind 0.24 ms a call of 1.15 ms measured 1.23
SLOW_US = 300_000  # rows with a slower call are timed three times only


def say(**event):
    print(json.dumps(event), flush=True)


def machine() -> dict:
    found = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "python": sys.version.split()[0]}
    for name in ("triton", "cupy"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    return found


def clock_mhz() -> int | None:
    """The SM clock now, by NVML."""
    try:
        return torch.cuda.clock_rate(0)
    except Exception:  # NVML is not there, or is not allowed to say
        return None


def ceilings(watch) -> dict:
    """What this chip reaches today: a copy of 2 GB and a square product."""
    source = torch.empty(2 ** 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy, product = lambda: target.copy_(source), lambda: a @ b
    for call in (copy, product):
        timing.screen(watch, call, 0)
    copies, products = (statistics.median(samples) for samples in timing.finals(watch, [copy, product], 0.5))
    return {"copy_gbs": round(2 * source.numel() / copies / 1e3), "bf16_tflops": round(2 * 8192 ** 3 / products / 1e6, 1), "clock_mhz": clock_mhz()}


def failure(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def candidates(task, order: dict) -> list[peers.Peer]:
    found = [peers.Peer(name, lambda name=name: task.bound(name)) for name in order.get("backends", OURS)]
    w = task.workload
    if order.get("portable") and w.kernel.startswith("block_attention") and w["T"] > 1:
        found.append(peers.Peer("portable", lambda: task.bound("triton", dispatch.kernel("triton", w.kernel).portable_config(task.problem))))
    return found + [varied(task, one) for one in order.get("knobs", ())] + peers.peers(task, order["compiled"])


def varied(task, variant: str) -> peers.Peer:
    """BACKEND:KNOB=VALUE,...: the backend's default config with these knobs."""
    backend, _, knobs = variant.partition(":")

    def make():
        kernel = dispatch.kernel(backend, task.workload.kernel)
        known = {knob.name: knob.values for knob in kernel.TUNABLES}
        chosen = {name: next(x for x in known[name] if str(x) == value) for name, value in (knob.split("=") for knob in knobs.split(","))}
        return task.bound(backend, {**kernel.default_config(task.problem), **chosen})
    return peers.Peer(variant, make)


def ours(name: str) -> bool:
    return name.partition(":")[0] in (*OURS, "portable")


def ready(who: peers.Peer, judge, row: str) -> tuple | None:
    """The call to time, what is known of it, microseconds; after two calls and the check. None if it failed, which is said. A peer outside our numeric policy is timed all the same."""
    say(row=row, who=who.name, trying=True)
    try:
        call, start = who.make(), time.monotonic()
        got = call()
        torch.cuda.synchronize()
        first_s = time.monotonic() - start
        wrong = judge.wrong(got) if who.judged else None
        size = sum(x.numel() * x.element_size() for x in tasks.outputs(got))
        del got
        if wrong and ours(who.name):
            say(row=row, who=who.name, failed=f"wrong answer: {wrong[:300]}")
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.monotonic()
        tasks.outputs(call())
        torch.cuda.synchronize()
        beyond = torch.cuda.max_memory_allocated() - before - size
        known = {"first_s": round(first_s, 2), "scratch_mb": round(max(0, beyond) / 1e6, 1)} | ({"outside_policy": wrong[:200]} if wrong else {})
        return call, known, (time.monotonic() - start) * 1e6
    except Exception as error:
        say(row=row, who=who.name, failed=failure(error))
        del error
        torch.cuda.synchronize()  # raises if the context is broken: nothing more can be measured in this process
        return None


def measured(row: gpu_rows.Row, watch, order: dict, stages: dict):
    """Everything of one row: inputs, truth, each candidate checked, then all that passed in turn, as CUDA graphs if told so and no call refuses. stages: gets what each took in seconds."""
    say(row=row.name, who="inputs", trying=True)
    start = time.monotonic()

    def ended(stage):
        stages[stage] = round(time.monotonic() - start - sum(stages.values()), 1)
    try:
        task = tasks.Task(row.make(), 0)
        torch.cuda.synchronize()
        ended("inputs_s")
        judge, flops = spot.Judge(task), measure.operations(task)
    except Exception as error:
        say(row=row.name, who="inputs", failed=failure(error))
        del error
        torch.cuda.synchronize()
        return
    ended("truth_s")
    found = {who.name: ready(who, judge, row.name) for who in candidates(task, order) if [row.name, who.name] not in order["without"]}
    ended("calls_s")
    found = {name: one for name, one in found.items() if one}
    if not found:
        return
    slow = max(us for _, _, us in found.values()) > SLOW_US
    calls = [call for call, _, _ in found.values()]
    say(row=row.name, who="timing", trying=True)
    recorded, how = graphs.record(calls, 0) if order.get("graph") else (None, None)
    samples = timing.finals(watch, recorded or calls, order["seconds"], 3 if slow else 40)
    calls[0]()
    clock = clock_mhz()  # under load
    torch.cuda.synchronize()
    for (name, (_, known, _)), times in zip(found.items(), samples):
        time_us = watch.centre(times)
        say(row=row.name, who=name, time_us=round(time_us, 1), **timing.spread(times), **known, clock_mhz=clock, **({"timed": how} if order.get("graph") else {}),
            **({"tflops": round(flops / time_us / 1e6, 1)} if flops else {}), gbs=round(moved(task) / time_us / 1e3))


def moved(task) -> float:
    """The fewest bytes: every input and every output once."""
    w = task.workload
    arrays_in = [x for group in task.inputs for x in (group if isinstance(group, list) else [group]) if isinstance(x, torch.Tensor)]
    total = sum(x.numel() * x.element_size() for x in arrays_in)
    size = arrays.ITEMSIZE[w.dtype]
    if w.kernel == "block_attention" and w["T"] == 1:  # keys that the query does not see need not be read
        hidden = w["S"] - int(task.inputs[3].visible(np.array([[w["S"] - 1]]), np.arange(w["S"])[None], w["S"]).sum())
        total -= w["B"] * w["Hk"] * hidden * (w["D"] + (0 if w.option("shared_kv") else w["Dv"])) * size
    if w.kernel == "gather_attention" and w["T"] == 1:
        total -= w["B"] * (w["S"] - w["K"]) * w["D"] * size
    if w.kernel.endswith("_backward"):
        return total + sum(x.numel() * x.element_size() for x in task.inputs[:3] if x is not None)
    if w.kernel in ("block_attention", "gather_attention"):
        return total + w["B"] * w["Hq"] * w["T"] * w["Dv"] * size
    if w.kernel == "latent_decompress":
        return total + w["B"] * w["H"] * w["S"] * (w["Dn"] + w["P"] + w["Dv"]) * size
    if w.kernel == "grouped_matmul":
        return total + w["B"] * w["H"] * w["T"] * (w["M"] + w["P"]) * size
    if w.kernel == "merge_attention":
        return total + w["B"] * w["Hq"] * w["T"] * (w["Dv"] * size + 4)
    if w.kernel == "selection_bitmaps":
        return w["B"] * w.option("G", 1) * w["T"] * (4 * w["K"] + w["S"] / 8)
    if w.kernel == "importance_topk":
        return total + 4 * w["B"] * w["Hk"] * w["T"] * (w["K"] + 1)
    return total + 4 * w["B"] * w["T"] * (w["S"] if w.kernel == "indexer_scores" else w["K"] + 1)


class Compiler:
    """Compiles ahead of the rows, in a process of its own (autotune/isolate.py)."""

    def __init__(self, order: dict):
        torch.cuda.init()
        self.order = order

    def compile(self, name: str, compiled: bool) -> dict:
        """Of a row with a peer of torch.compile that peer, or our kernels (of a gradient also the forward that its inputs need), called once on zeros of the right shapes and strides: what each one's first
        call took in seconds, or how it failed."""
        row = gpu_rows.NAMED[name]
        task = tasks.Task(row.make(), 0, hollow=compiled or not row.backward)
        found = candidates(task, self.order)
        if not any(who.name in peers.COMPILED for who in found):
            return {}
        if task.hollow:
            task.inputs = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) if isinstance(x, torch.Tensor) else x for x in task.inputs]
        came = {who.name: _first(who) for who in found if (who.name in peers.COMPILED if compiled else ours(who.name))}
        del task, found
        torch.cuda.empty_cache()
        return came


def _first(who: peers.Peer) -> float | str:
    start = time.monotonic()
    try:
        who.make()()
        torch.cuda.synchronize()
    except Exception as error:  # the row says why
        return failure(error)
    return round(time.monotonic() - start, 1)


def main(order: dict) -> int:
    """order: rows (names), without ([row, who] pairs), seconds, compiled; graph, backends, portable, knobs where asked for."""
    torch.cuda.init()
    if order["compiled"]:
        importlib.import_module("torch._inductor.compile_fx")  # seconds, while others compile
    if not sys.stdin.readline():  # who started it is gone
        return 1
    rows = [gpu_rows.NAMED[name] for name in gpu_rows.NAMED if name in order["rows"]]
    watch = timing.Stopwatch(0, flush_mb=FLUSH_MB)
    say(machine=machine())
    say(ceilings=ceilings(watch))
    for row in rows:
        stages, start = {}, time.monotonic()
        measured(row, watch, order, stages)
        torch.cuda.empty_cache()
        say(row=row.name, who="row", done=True, seconds=round(time.monotonic() - start, 1), **stages)
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
