"""Block attention on one GPU, both paths of the CuPy and the Triton backend in one run: python -m sparsetile.bench.block_attention [--quick] [--backend NAME]

First small calls of every kind (windows, globals, random blocks, bitmaps, ragged lengths, sinks, head groups, strides, NaN in keys that nobody sees) against the
float64 formula by the numeric policy; then the large ones, each checked on a few rows, timed in turn (CUDA events, cold L2, median) and counted by the pairs inside the
pattern. Leaves with 1 if an answer is wrong. --quick: fewer repeats.
"""
import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from sparsetile.autotune import measure, numeric, plain, tasks, timing  # noqa: E402
from sparsetile.bench import spot  # noqa: E402
from sparsetile.ops.attention import sparse_attention  # noqa: E402
from sparsetile.ops.patterns import Causal, Dilated, Full, Global, RandomBlocks, Sink, Window  # noqa: E402
from sparsetile.ops.presets import bigbird  # noqa: E402

PATHS = {  # backend and path -> config, by the wider of the widths
    ("cupy", "hopper"): lambda D: dict(path="hopper", block_q=128, block_k=128, tile_k=64 if D <= 128 else 32),
    ("cupy", "portable"): lambda D: dict(path="portable", block_q=128, block_k=128, tile_k=64 if D <= 128 else 32),
    ("triton", "gluon"): lambda D: dict(path="gluon", block_q=128, block_k=128, num_warps=8, num_stages=2),
    ("triton", "portable"): lambda D: dict(path="portable", block_q=128, block_k=64, num_warps=4 if D <= 128 else 8, num_stages=2),
}
LARGE = ("causal/8192", "causal/32768", "window-4096/32768", "window-1024/32768", "bigbird-128/32768", "longformer-512/32768", "causal-d64/16384", "causal-d192/16384")
SMALL = (  # pattern, B, Hq, Hk, T, S, D, Dv, options
    (Causal(), 2, 4, 2, 1000, 1000, 128, 128, {}),
    (Causal(), 1, 4, 4, 513, 2000, 64, 64, dict(sink=True, dtype=torch.float16)),
    (Window(300), 2, 2, 1, 777, 1500, 96, 96, dict(lengths=(900, 1500))),
    (Window(1023) | Sink(4), 2, 8, 2, 700, 1300, 192, 128, dict(lengths=(0, 1300), sink=True)),
    (Window(200, 200) | Global(range(64)), 1, 2, 2, 1500, 1500, 128, 128, dict(strided=True)),
    (bigbird(128), 1, 2, 2, 1921, 1921, 128, 128, {}),
    (RandomBlocks(2, 128, 7), 1, 2, 2, 1100, 1100, 64, 128, {}),
    (Dilated(700, 0, 3) & Window(600), 1, 2, 1, 640, 640, 128, 64, {}),
    (Full(), 2, 2, 2, 130, 3000, 128, 128, dict(lengths=(77, 2999), q_start=(5, 1000))),
    (Causal(), 1, 4, 2, 500, 900, 128, 128, dict(softcap=5.0)),
    (Window(300) & ~Window(64), 2, 4, 4, 900, 700, 128, 128, {}),
    (Causal(), 3, 24, 8, 512, 512, 128, 128, dict(lengths=(512, 0, 300))),
    (Window(100) | Sink(4), 2, 2, 1, 2300, 4096, 128, 128, dict(lengths=(4096, 3000))),  # more than 16 query tiles see one key block: sections in the backward
)


def wrong_paths(paths, pattern, B, Hq, Hk, T, S, D, Dv, options) -> dict:
    """Backend and path -> what is wrong with its out and lse by the numeric policy, or None."""
    generator = torch.Generator("cuda").manual_seed(0)
    make = lambda H, n, width: torch.randn(B, H, n, width, device="cuda", generator=generator).to(options.get("dtype", torch.bfloat16))  # noqa: E731
    q, k, v = make(Hq, T, D), make(Hk, S, D), make(Hk, S, Dv)
    limit = options.get("lengths", (S,) * B)
    starts = options.get("q_start", [n - T for n in limit])
    seen = np.stack([pattern.visible(starts[b] + np.arange(T)[:, None], np.arange(S), S) & (np.arange(S) < limit[b]) for b in range(B)])
    for x in (k, v):
        x.masked_fill_(torch.from_numpy(~seen.any(1)).cuda()[:, None, :, None], float("nan"))
    sink = torch.randn(Hq, device="cuda", generator=generator) if options.get("sink") else None
    how = dict(scale=D ** -0.5, sink_logits=None if sink is None else sink.cpu().numpy(), softcap=options.get("softcap"))
    on_host, count = [spot.host(x) for x in (q, k, v)], np.broadcast_to(seen[:, None], (B, Hq, T, S)).astype(int)
    truths, formulas = plain.attention(*spot.wide(*on_host), count, **how), plain.attention(*on_host, count, **how)
    if options.get("strided"):
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    integers = {name: torch.tensor(options[key], dtype=torch.int32, device="cuda") for name, key in (("kv_length", "lengths"), ("q_start", "q_start")) if key in options}
    found = {}
    for path in paths:
        got = sparse_attention(q, k, v, pattern, sink_logits=sink, softcap=options.get("softcap"), return_lse=True, backend=path[0],
                               config=PATHS[path](max(D, Dv)), **integers)
        try:
            for name, x, truth, formula in zip(("out", "lse"), got, truths, formulas):
                numeric.assert_close(name, x, truth, formula, reduction=S + D)
            found[path] = None
        except AssertionError as error:
            found[path] = str(error)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--backend", choices=("cupy", "triton"), help="only this one")
    given = parser.parse_args()
    seconds, paths = 0.6 if given.quick else 2.0, [path for path in PATHS if given.backend in (None, path[0])]
    wrong = 0
    for case in SMALL:
        found = wrong_paths(paths, *case)
        wrong += sum(x is not None for x in found.values())
        print(f"{str(case[0])[:60]:62}" + "  ".join(f"{' '.join(path)} {'right' if x is None else 'WRONG: ' + x[:200]}" for path, x in found.items()), flush=True)
    watch, lines = timing.Stopwatch(0, flush_mb=1024), []
    for name in LARGE:
        task = tasks.Task(tasks.find(f"gpu/{name}"), 0)
        judge, flops = spot.Judge(task), measure.operations(task)
        calls = [task.bound(path[0], PATHS[path](task.workload["D"])) for path in paths]
        verdicts = [judge.wrong(call()) for call in calls]
        wrong += sum(x is not None for x in verdicts)
        rates = [flops / watch.centre(x) / 1e6 for x in timing.finals(watch, calls, seconds)]
        lines.append(f"{name:24}" + "".join(f"{rate:17.0f}" for rate in rates) + "".join(f"  {' '.join(path)} WRONG: {x[:120]}" for path, x in zip(paths, verdicts) if x))
    print(f"\nforward, TFLOP/s, {torch.cuda.get_device_name(0)}\n{'':24}" + "".join(f"{' '.join(path):>17}" for path in paths), *lines, sep="\n")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
