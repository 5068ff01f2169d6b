"""How long layouts take to make, and how much memory: python -m sparsetile.bench.layouts (or python bench/layouts.py). NumPy only, no GPU.

Each row is the median of a few runs on this machine's CPU; `peak` is tracemalloc's, of one further run. Targets: window 1024 + sink + 64 globals at 1M tokens
under 1 s and 100 MB; a new Documents layout at 32k about 2 ms (its lengths are new in every run, as in training).
"""
import statistics
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsetile.ops.lowering import lower  # noqa: E402
from sparsetile.ops.patterns import Causal, Dilated, Documents, Fixed, Global, Sink, Strided, Window  # noqa: E402
from sparsetile.ops.presets import bigbird  # noqa: E402


def documents(N, rng):
    lengths = []
    while sum(lengths) < N:
        lengths.append(int(rng.integers(1024, 16384)))
    lengths[-1] -= sum(lengths) - N
    return Documents(lengths)


def main():
    rng = np.random.default_rng(0)
    window = Window(1023) | Sink(4) | Global(range(64))
    rows = [("causal", 2 ** 15, lambda N: Causal()), ("window 4096", 2 ** 15, lambda N: Window(4095)), ("documents", 2 ** 15, lambda N: documents(N, rng)),
            ("documents, causal", 2 ** 15, lambda N: documents(N, rng) & Causal()), ("strided 128", 2 ** 15, lambda N: Causal() & (Window(127) | Strided(128))),
            ("fixed 128 + 8", 2 ** 15, lambda N: Causal() & Fixed(128, 8)), ("dilated 8", 2 ** 15, lambda N: Dilated(2048, 2048, 8)), ("BigBird 128", 2 ** 15, lambda N: bigbird(128)),
            ("window 1024 + sink + 64 globals", 2 ** 20, lambda N: window), ("the same, causal", 2 ** 20, lambda N: window & Causal()), ("BigBird 128", 2 ** 20, lambda N: bigbird(128))]
    print(f"{'pattern':34}{'N':>9}{'ms':>9}{'peak MB':>9}{'blocks':>9}{'pairs / 128^2':>15}  parts")
    for name, N, make in rows:
        times = []
        for _ in range(5 if N > 2 ** 16 else 15):
            rule = make(N)
            start = time.perf_counter()
            parts = lower(rule, 0, N, N, 128, 128)
            times.append((time.perf_counter() - start) * 1e3)
        tracemalloc.start()
        lower(rule, 0, N, N, 128, 128)
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        print(f"{name:34}{N:9}{statistics.median(times):9.2f}{peak:9.1f}{sum(int(p.offsets[-1]) for p in parts):9}{rule.pairs(N, N) / 128 ** 2:15.0f}  {len(parts)}")


if __name__ == "__main__":
    main()
