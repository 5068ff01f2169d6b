"""Block attention on one GPU, every row of its table beside its peers: python -m sparsetile.bench.block_attention [--check] [--only WORD ...] [--share I/N] [--out FILE]

Every pattern at N 8k, 32k and 128k with 32 and 8 key heads to 32 query heads, and D 64 and D 192, forward and backward: both GPU backends and Triton's portable source ("portable", what runs
where Gluon does not) beside cuDNN (causal), the compiled FlexAttention, and FlashAttention-3 where it is installed; by the machinery of bench/gpu_table.py, so --list, --share, --minutes and --read
are as there. FlexAttention's programs are compiled by several processes before anything is timed; --no-flex leaves it out, --ahead does only that. A row's floor stands as it is and by a peer: the floor of its pattern times what cuDNN (FlexAttention
where cuDNN cannot) reaches here / reached in the table. Under the table stands what came of floors, the other backend, goals and the portable source.
--knobs: variants of a backend's default config beside it, e.g. cupy:sums=1 cupy:sums=2,heads=4.

--check: small calls of every kind (windows, globals, random blocks, bitmaps, ragged lengths, sinks, head groups, strides, NaN in keys that nobody sees) by both paths of both backends against the
float64 formula by the numeric policy, and nothing else; leaves with 1 if an answer is wrong.
"""
import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from sparsetile.autotune import numeric, plain  # noqa: E402
from sparsetile.bench import gpu_table, spot  # noqa: E402
from sparsetile.bench.gpu_rows import BLOCK, GRID, NAMED, selected  # noqa: E402
from sparsetile.ops.attention import sparse_attention  # noqa: E402
from sparsetile.ops.patterns import Causal, Dilated, Full, Global, RandomBlocks, Sink, Window  # noqa: E402
from sparsetile.ops.presets import bigbird  # noqa: E402

SLOWER = {False: 1.15, True: 1.3}  # forward, backward: how much longer the other backend may take
PATHS = {  # backend and path -> config, by the wider of the widths
    ("cupy", "hopper"): lambda D: dict(path="hopper", block_q=128, block_k=128, tile_k=64 if D <= 128 else 32),
    ("cupy", "portable"): lambda D: dict(path="portable", block_q=128, block_k=128, tile_k=64 if D <= 128 else 32),
    ("triton", "gluon"): lambda D: dict(path="gluon", block_q=128, block_k=128, num_warps=8, num_stages=2),
    ("triton", "portable"): lambda D: dict(path="portable", block_q=64 if D <= 64 else 128, block_k=128 if D <= 64 else 64, num_warps=4 if D <= 128 else 8, num_stages=2 if D <= 128 else 3),
}
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


def check(backend: str | None) -> int:
    """How many of the small calls' answers are wrong; each is said."""
    paths, wrong = [path for path in PATHS if backend in (None, path[0])], 0
    for case in SMALL:
        found = wrong_paths(paths, *case)
        wrong += sum(x is not None for x in found.values())
        print(f"{str(case[0])[:60]:62}" + "  ".join(f"{' '.join(path)} {'right' if x is None else 'WRONG: ' + x[:200]}" for path, x in found.items()), flush=True)
    return wrong


def verdicts(found, names: list) -> str:
    """Four lines: rows whose floor the better backend reaches (as it stands, elsewhere by the peer), where the other one is near enough, goals, and the portable source ahead of FlexAttention."""
    seen = {name: gpu_table.rates(found, NAMED[name]) for name in names}
    both = {name: [x[who] for who in gpu_table.OURS if who in x] for name, x in seen.items()}
    best = {name: max(x) for name, x in both.items() if x}
    floors = {name: NAMED[name].floor or gpu_table.by_peer(found, NAMED[name]) for name in best}
    ahead = lambda row: 1.05 if row.backward and "causal" in row.name else 1.2  # noqa: E731
    asked = {"floors reached by the better backend": {name: (best[name], floor) for name, floor in floors.items() if floor},
             "the other backend within 1.15 x (backward 1.3 x) of its time": {name: (min(x), max(x) / SLOWER[NAMED[name].backward]) for name, x in both.items() if len(x) == 2},
             "goals": {name: (best[name], NAMED[name].goal) for name in best if NAMED[name].goal},
             "portable source 1.2 x ahead of FlexAttention (causal backward 1.05 x)": {name: (x["portable"], ahead(NAMED[name]) * x["Flex"]) for name, x in seen.items() if {"portable", "Flex"} <= x.keys()}}
    return "\n".join(gpu_table.verdict(what, {name: (*both, NAMED[name].unit) for name, both in figures.items()}) for what, figures in asked.items())


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="sparsetile.bench.block_attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="small calls of every kind by every path, nothing timed")
    parser.add_argument("--backend", choices=gpu_table.OURS, help="only this one")
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True, help="the compiled FlexAttention (half a minute a row to compile, twelve at once)")
    parser.add_argument("--portable", action=argparse.BooleanOptionalAction, default=True, help="Triton's portable source")
    parser.add_argument("--knobs", nargs="+", default=[], metavar="BACKEND:KNOB=VALUE", help="a backend's default config with these knobs (joined by commas), beside it")
    gpu_table.options(parser)
    gpu_table.compiling(parser)
    args = parser.parse_args(arguments)
    if args.check:
        return int(check(args.backend) > 0)
    names = gpu_table.share([row.name for row in selected(args.only, (*BLOCK, *GRID))], args.share)
    if args.list or not names:
        return gpu_table.listed([NAMED[name] for name in names], args)
    found = gpu_table.measured(args, names, compiled=args.flex, portable=args.portable, knobs=args.knobs, backends=[args.backend] if args.backend else gpu_table.OURS)
    if args.ahead:
        return 0
    print(f"\n{gpu_table.table(found, names)}\n{verdicts(found, names)}")
    return int(any("wrong answer" in event.get("failed", "") for name in names for event in found.rows.get(name, {}).values()))


if __name__ == "__main__":
    sys.exit(main())
