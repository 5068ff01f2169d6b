"""The CuPy backend's attention over float8 keys, run on the CPU as it is written (cuda_on_cpu.py) and judged by the numeric policy. NaN in keys, values and scales that nobody sees."""
import dataclasses

import block_lists
import numpy as np
import pytest
from cuda_on_cpu import CXX, CpuPlace
from hopper_on_cpu import HopperPlace
from judge import answer, normal
from test_float8 import FP8, NAN, made

from sparsetile.backends.cupy import block_attention

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ compiles the kernels for the CPU, and is not there")
RULES = {"window": lambda p, s, rng: (s <= p) & (s > p - 100), "full": lambda p, s, rng: (s >= 0) & (p >= 0), "random": lambda p, s, rng: rng.random((len(p), s.shape[1])) < 0.2}
CASES = [  # kind, rule, (B, Hq, Hk, T, S, D, Dv), path, what else
    ("bfloat16", "window", (1, 2, 1, 70, 300, 64, 48), "portable", {}),
    ("float8_e4m3fn", "random", (1, 2, 1, 40, 150, 40, 24), "portable", dict(order=True, out_dtype="float32")),
    ("float8_e4m3fn", "full", (2, 4, 1, 3, 270, 64, 64), "decode", dict(lengths=(270, 129))),
    ("float16", "random", (1, 2, 1, 2, 140, 31, 64), "decode", dict(odd=True, softcap=3.0)),
    ("bfloat16", "full", (1, 20, 1, 2, 200, 80, 128), "decode", {}),
    ("float8_e4m3fn", "window", (1, 3, 1, 1, 290, 128, 100), "decode", dict(out_dtype="float16")),
    ("bfloat16", "window", (1, 2, 1, 200, 420, 64, 48), "hopper", {}),
    ("float16", "full", (2, 4, 2, 130, 400, 128, 128), "hopper", dict(lengths=(400, 261))),
    ("float8_e4m3fn", "random", (1, 2, 1, 150, 300, 96, 64), "hopper", dict(out_dtype="float16")),
    ("float8_e4m3fn", "window", (1, 4, 2, 70, 520, 192, 128), "hopper", {}),
    ("bfloat16", "random", (1, 1, 1, 300, 520, 176, 80), "hopper", dict(zero=True)),
]


@pytest.mark.parametrize("kind, rule, case, path, more", CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_attention(kind, rule, case, path, more, rng):
    place, (B, Hq, Hk, T, S, D, Dv), block_q = HopperPlace() if path == "hopper" else CpuPlace(), case, 128 if path == "hopper" else 32
    place.refused = "block_attention" if path == "hopper" else None
    q, k, v, scales = made(rng, kind, case)
    scales["k_scale"][..., -1] *= -1
    if more.get("zero"):  # of keys that some rows do not see
        scales["k_scale"][..., 1] = 0
    scales["v_scale"][..., 0] *= np.float32(3e7 if "float16" not in (kind, more.get("out_dtype")) else 1e-4)
    if more.get("odd"):  # rows that no copy of four bytes divides
        k, v = (np.concatenate([np.zeros_like(x[..., :3]), x], -1)[..., 3:] for x in (k, v))
    lengths = np.array(more.get("lengths", [S] * B), np.int32)
    first = int(lengths.min()) - T - 31  # tiles hold queries before the call's, which see keys that it does not
    mask = RULES[rule](first + np.arange(S - first)[:, None], np.arange(S)[None], rng)
    q_order = k_order = None
    if more.get("order"):
        slots = lambda n: rng.permutation(np.concatenate((np.arange(n), np.full(-n % 128, -1))))  # noqa: E731
        first, mask = 0, mask[-T:] & (np.arange(S) < 128)
        q_order, k_order = slots(T), slots(S)
    start = 0 if q_order is not None else None
    count = np.stack([mask[(0 if start == 0 else n - T - first):][:T] & (np.arange(S) < n) for n in lengths])[:, None]
    seen = np.broadcast_to(count.any((1, 2))[:, None], (B, Hk, S))
    k[~seen], v[~seen] = FP8.type(np.nan), FP8.type(np.nan)
    for name in ("k_scale", "v_scale"):
        scales[name][~np.stack([seen[..., n:n + 128].any(-1) for n in range(0, S, 128)], -1)] = NAN
    config = dict(path=path, block_q=block_q, block_k=128, tile_k=32 if D == 31 else 64, row_tiles=1)
    lists = block_lists.build(mask[None], first, block_q, 128, q_order=q_order, k_order=k_order)
    lists = dataclasses.replace(lists, **{f.name: place.put(getattr(lists, f.name)) for f in dataclasses.fields(lists) if isinstance(getattr(lists, f.name), np.ndarray)}, extras={})
    out, lse = block_attention.run(*map(place.put, (q, k, v)), lists, place=place, config=config, scale=0.2, softcap=more.get("softcap"), q_start=start,
                                   kv_length=place.put(lengths) if start is None else None, out_dtype=more.get("out_dtype"), sink_logits=place.put(sink := normal(rng, Hq, np.float32)),
                                   **{name: place.put(x) for name, x in scales.items()})
    assert out.owner.dtype.name == (more.get("out_dtype") or ("bfloat16" if kind == FP8.name else kind))
    answer(out.owner, lse.owner, q, k, v, count, scale=0.2, softcap=more.get("softcap"), sink_logits=sink, **scales)
