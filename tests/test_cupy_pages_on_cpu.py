"""The CuPy backend's kernels that read keys through a page table, run on the CPU as they are written (cuda_on_cpu.py) and judged by the numeric policy."""
import dataclasses

import ml_dtypes
import numpy as np
import oracle
import paged_keys
import pytest
from cuda_on_cpu import CXX, CpuPlace
from numeric import assert_close, assert_same_bits, plain

from sparsetile.backends.cupy import block_attention
from sparsetile.ops.lowering import lower
from sparsetile.ops.patterns import Causal, Full, Sink, Strided, Window

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ compiles the kernels for the CPU, and is not there")
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PORTABLE = dict(path="portable", block_q=32, block_k=64, tile_k=32, row_tiles=1)
DECODE = dict(PORTABLE, path="decode", tile_k=64)
SINKS = Window(7) | Sink(2) & Causal()
CASES = [  # config, rule, T, S, Hq, Hk, D, Dv, lengths, page, holes (batch, page)
    (DECODE, Full(), 1, 300, 8, 2, 32, 24, (300, 131), 16, [(0, 3)]),
    (DECODE, Causal(), 4, 200, 4, 2, 64, 64, (33, 190), 7, [(0, 0), (1, 20), (1, 21)]),
    (DECODE, SINKS, 16, 260, 6, 1, 40, 17, (260, 0), 1, [(0, 250)]),
    (dict(DECODE, tile_k=32), Window(100), 3, 300, 4, 4, 48, 48, (5, 299), 64, [(1, 2), (1, 3), (1, 4)]),
    (PORTABLE, Causal(), 70, 150, 4, 2, 32, 24, (150, 97), 16, [(0, 2), (0, 8)]),
    (dict(PORTABLE, tile_k=64), Window(30), 40, 130, 2, 1, 64, 64, (130, 128), 128, []),
    (PORTABLE, Causal() & (Window(5) | Strided(4)), 36, 120, 2, 2, 16, 16, (120, 77), 5, [(1, 3)]),
]


def lists_of(place, rule, S, config):
    """Positions are known on the device only: the lists serve any."""
    for part in lower(rule, -64, S + 64, S, config["block_q"], config["block_k"]):
        names = [f.name for f in dataclasses.fields(part) if isinstance(getattr(part, f.name), np.ndarray)]
        yield dataclasses.replace(part, **{name: place.put(np.ascontiguousarray(getattr(part, name))) for name in names}, extras={})


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]['path']}-{c[1].kind}-T{c[2]}-page{c[9]}")
def test_block_attention(case, kind, rng):
    config, rule, T, S, Hq, Hk, D, Dv, lengths, page, holes = case
    if kind == "float32":
        config = dict(config, path="portable", tile_k=32)
    place, B = CpuPlace(), 2
    q, k, v = (rng.standard_normal(shape).astype(TYPES[kind]) for shape in ((B, Hq, T, D), (B, Hk, S, D), (B, Hk, S, Dv)))
    pools, table = paged_keys.scatter((k, v), lengths, page, rng, holes)
    there, whole = paged_keys.there(lengths, S, page, holes), -(-S // page) * page
    rows, length = np.array(lengths)[:, None, None] - T + np.arange(T)[:, None], place.put(np.array(lengths, np.int32))
    seen = rule.visible(rows, np.arange(S), S) & there[:, None]                       # [B, T, S]
    how = dict(config=config, place=place, scale=0.2, kv_length=length)
    parts = list(lists_of(place, rule, whole, config))
    got = [[x.owner for x in block_attention.run(place.put(q), *map(place.put, pools), part, table=place.put(table), out_dtype="float32" if parts[1:] else None, **how)] for part in parts]
    count = np.repeat(seen[:, None], Hq, 1).astype(int)
    for name, x, true, one in zip(("out", "lse"), merged(got, TYPES[kind]), *(f.attention(q, k, v, count, scale=0.2) for f in (oracle, plain))):
        assert_close(name, x, true, one, reduction=S + D)
    if not holes:
        pad = ((0, 0), (0, 0), (0, whole - S), (0, 0))
        for x, want in zip(got[0], block_attention.run(place.put(q), place.put(np.pad(k, pad)), place.put(np.pad(v, pad)), parts[0], **how)):
            assert_same_bits("in one piece", x, want.owner)


def merged(parts, dtype):
    """(out, lse) of one layout's parts, in which a query sees each key once."""
    if len(parts) == 1:
        return parts[0]
    lse = np.logaddexp(*(lse.astype(float) for _, lse in parts))
    base = np.where(np.isneginf(lse), 0, lse)
    return sum(np.exp(e - base)[..., None] * out for out, e in parts).astype(dtype), lse.astype(np.float32)
