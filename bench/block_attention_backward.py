"""The backward of block attention on one GPU, the CuPy backend's paths in one run: python -m sparsetile.bench.block_attention_backward [--quick]

First the small calls of bench/block_attention.py by the default path and by two_pass against the float64 formula by the numeric policy, each twice for equal bits; then the large ones, each checked on a few rows and
keys, timed in turn (CUDA events, cold L2, median) and counted by the pairs inside the pattern. Everything a call does is in the time: delta, preparing, rounding.
Columns "heads, sums" are knobs of the path hopper. Leaves with 1 if an answer is wrong. --quick: fewer repeats, without the portable path.
"""
import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from sparsetile.autotune import measure, numeric, plain, tasks, timing  # noqa: E402
from sparsetile.backends.contract import Unsupported  # noqa: E402
from sparsetile.bench import spot  # noqa: E402
from sparsetile.bench.block_attention import SMALL  # noqa: E402
from sparsetile.ops import attention  # noqa: E402

LARGE = ("causal/32768", "window-1024/32768", "bigbird-128/32768", "random-10pct/32768", "window-4096/32768", "causal-d64/16384", "longformer-512/32768", "documents/32768", "causal/8192",
         "causal-d192/16384")
CONFIGS = {"default": {}, "two pass": dict(path="two_pass"), "two pass 2": dict(path="two_pass", heads=2), **{f"{heads}, {sums}": dict(path="hopper", heads=heads, sums=sums) for heads in (2, 8, 32) for sums in (1, 2)}, "section 0": dict(path="hopper", section=0, heads=32),
           **{f"section {n}": dict(path="hopper", section=n, heads=8) for n in (8, 16)}, **{f"{walk} {n}": dict(path="hopper", walk=walk, heads=n) for walk in ("freest", "ascending") for n in (1, 2, 4)}, "portable": dict(path="portable", block_q=64)}


def wrong(config, pattern, B, Hq, Hk, T, S, D, Dv, options) -> str | None:
    """What is wrong with the gradients by the numeric policy, or None."""
    generator = torch.Generator("cuda").manual_seed(0)
    make = lambda H, n, width: torch.randn(B, H, n, width, device="cuda", generator=generator).to(options.get("dtype", torch.bfloat16))  # noqa: E731
    q, k, v, dout = make(Hq, T, D), make(Hk, S, D), make(Hk, S, Dv), make(Hq, T, Dv)
    limit = options.get("lengths", (S,) * B)
    starts = options.get("q_start", [n - T for n in limit])
    seen = np.stack([pattern.visible(starts[b] + np.arange(T)[:, None], np.arange(S), S) & (np.arange(S) < limit[b]) for b in range(B)])
    for x in (k, v):
        x.masked_fill_(torch.from_numpy(~seen.any(1)).cuda()[:, None, :, None], float("nan"))
    sink = torch.randn(Hq, device="cuda", generator=generator) if options.get("sink") else None
    dlse = torch.randn(B, Hq, T, device="cuda", generator=generator).masked_fill_(torch.from_numpy(~seen.any(2)).cuda()[:, None], 0)
    if options.get("strided"):
        q, k, v, dout = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, dout))
    integers = [None if key not in options else torch.tensor(options[key], dtype=torch.int32, device="cuda") for key in ("lengths", "q_start")]
    call = attention.check(q, k, v, pattern, None, sink, None, *integers, None, True, "cupy", None)
    out, lse = attention.forward(call, True)
    got, again = (attention.backward(call, out, lse, dout, dlse, config) for _ in range(2))
    how = dict(scale=D ** -0.5, sink_logits=None if sink is None else sink.cpu().numpy(), dlse=dlse.cpu().numpy())
    on_host, count = [spot.host(x) for x in (q, k, v)], np.broadcast_to(seen[:, None], (B, Hq, T, S)).astype(int)
    truths, formulas = plain.attention_gradients(*spot.wide(*on_host), count, *spot.wide(spot.host(dout)), **how), plain.attention_gradients(*on_host, count, spot.host(dout), **how)
    try:
        for name, x, y, truth, formula in zip(("dq", "dk", "dv", "dsink"), got, again, truths, formulas):
            if x is not None:
                numeric.assert_close(name, x, truth, formula, reduction=S + D + Dv if name == "dq" else T * Hq // Hk + D + Dv)
                assert torch.equal(x, y), f"{name}: two calls differ"
    except AssertionError as error:
        return str(error)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, without the portable path")
    quick = parser.parse_args().quick
    bad = 0
    for case in SMALL:
        for path, config in (("default", None), ("two_pass", None if case[-1].get("softcap") else dict(path="two_pass", block_q=128, block_k=128))):
            found = wrong(config, *case)
            bad += found is not None
            print(f"{str(case[0])[:60]:62}{path:10}{'right' if found is None else 'WRONG: ' + found[:300]}", flush=True)
    configs = {label: config for label, config in CONFIGS.items() if not quick or label != "portable"}
    watch = timing.Stopwatch(0, flush_mb=1024)
    print(f"\nbackward, TFLOP/s, {torch.cuda.get_device_name(0)}\n{'':24}" + "".join(f"{label:>11}" for label in configs), flush=True)
    for name in LARGE:
        task = tasks.Task(tasks.find(f"gpu/{name}/backward"), 0)
        judge, flops = spot.Judge(task), measure.operations(task)
        calls, verdicts = {}, {}
        for label, config in configs.items():
            try:
                calls[label] = task.bound("cupy", config)
                verdicts[label] = judge.wrong(calls[label]())
            except Unsupported:  # a path that is not for this row
                del calls[label]
        bad += sum(x is not None for x in verdicts.values())
        rates = dict(zip(calls, (flops / watch.centre(x) / 1e6 for x in timing.finals(watch, list(calls.values()), 0.4 if quick else 2.0, 5 if quick else 40))))
        print(f"{name:24}" + "".join(f"{rates[label]:11.0f}" if label in rates else f"{'-':>11}" for label in configs)
              + "".join(f"  {label} WRONG: {x[:150]}" for label, x in verdicts.items() if x), flush=True)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
