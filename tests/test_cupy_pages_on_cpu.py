"""The CuPy backend's kernels that read keys through a page table, run on the CPU as they are written (cuda_on_cpu.py) and judged by the numeric policy."""
import dataclasses

import cache_format
import ml_dtypes
import numpy as np
import oracle
import paged_keys
import pytest
from cuda_on_cpu import BFLOAT16, CXX, CpuPlace
from hopper_on_cpu import HopperPlace
from numeric import assert_close, assert_same_bits, plain
from test_page_rows import rows_of

from sparsetile.backends.cupy import block_attention, gather_attention, indexer_scores, indexer_topk, page_rows
from sparsetile.backends.reference import indexer_topk as reference
from sparsetile.backends.reference.positions import latents
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


LATENTS = [(Causal(), 2, 300, 70, (133, 290), 32, [(1, 2)]), (Full(), 1, 500, 17, (0, 500), 64, [(1, 0), (1, 7)]), (Window(100), 3, 200, 5, (200, 33), 160, [])]


@pytest.mark.parametrize("page", [None, 48], ids=["by-tile", "page48"])
@pytest.mark.parametrize("case", LATENTS, ids=lambda c: f"{c[0].kind}-T{c[1]}-H{c[3]}-page{c[5]}")
def test_latents_on_hopper(case, page, rng):
    """Pages that hold whole tiles of 32 keys come through the copy engine; others are for the path decode."""
    rule, T, S, H, lengths, own, holes = case
    place, page, B = HopperPlace(), page or own, 2
    place.refused = "block_attention_decode" if page % 32 == 0 else "block_attention_latent"
    q, k = (rng.standard_normal(shape).astype(BFLOAT16) for shape in ((B, H, T, 576), (B, 1, S, 576)))
    (pool,), table = paged_keys.scatter((k,), lengths, page, rng, holes)
    config = dict(DECODE, path="latent", block_k=128)
    (part,) = lists_of(place, rule, -(-S // page) * page, config)
    got = block_attention.run(place.put(q), place.put(pool), place.put(pool[..., :512]), part, config=config, place=place, scale=0.04, table=place.put(table),
                              kv_length=place.put(np.array(lengths, np.int32)))
    seen = rule.visible(np.array(lengths)[:, None, None] - T + np.arange(T)[:, None], np.arange(S), S) & paged_keys.there(lengths, S, page, holes)[:, None]
    count = np.repeat(seen[:, None], H, 1).astype(int)
    for name, x, true, one in zip(("out", "lse"), got, *(f.attention(q, k, k[..., :512], count, scale=0.04) for f in (oracle, plain))):
        assert_close(name, x.owner, true, one, reduction=S + 576)


def merged(parts, dtype):
    """(out, lse) of one layout's parts, in which a query sees each key once."""
    if len(parts) == 1:
        return parts[0]
    lse = np.logaddexp(*(lse.astype(float) for _, lse in parts))
    base = np.where(np.isneginf(lse), 0, lse)
    return sum(np.exp(e - base)[..., None] * out for out, e in parts).astype(dtype), lse.astype(np.float32)


# --------------------------------------------------------------------------------------------------------------------- indexer
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
PLAIN = dict(path="scratch", warps=2, row_tiles=1, queries=2, threads=256, ahead=2, ctas=6, candidates=3584, scratch_mb=16)
INDEXED = [(4, 3, 16, (40, 29), 6, []), (9, 2, 40, (70, 0), 16, [(0, 1)]), (64, 5, 128, (130, 64), 64, [(1, 0)]), (1, 1, 8, (33, 20), 1, [(0, 32), (0, 5), (1, 19)])]
ON_HOPPER = [(64, 1, 128, (300, 29), 16, [(0, 1), (0, 2)]), (64, 2, 128, (130, 290), 64, [(1, 0)]), (64, 1, 128, (300, 520), 256, [(1, 1)])]


def indexed(rng, H, T, D, lengths, page, holes):
    """Arguments of the indexer over pages, and the same keys in one piece with which of them exist."""
    B, S = 2, max(lengths)
    q, k = (rng.standard_normal(shape).astype(np.float32).astype(E4M3) for shape in ((B, H, T, D), (B, S, D)))
    scale, weights = np.exp2(rng.integers(-3, 4, (B, S))).astype(np.float32), rng.standard_normal((B, H, T)).astype(np.float32)
    (keys, scales), table = paged_keys.scatter((k.view(np.uint8).astype(np.float32)[:, None], scale[:, None, :, None]), lengths, page, rng, holes)
    pool = np.zeros((len(keys), page * (D + 4)), np.uint8)                           # planar within a page
    pool[:, :page * D] = np.where(np.isnan(keys), 0x7F, keys).astype(np.uint8).reshape(len(keys), -1)
    pool[:, page * D:].view(np.float32)[:] = scales.reshape(len(keys), -1)
    paged = pool[:, :page * D].reshape(-1, page, D).view(E4M3), pool[:, page * D:].view(np.float32)
    return (q, k, weights, scale), paged, table, paged_keys.there(lengths, S, page, holes)


@pytest.mark.parametrize("case", INDEXED + ON_HOPPER, ids=str)
def test_indexer_scores(case, rng):
    """The bits of the same keys in one piece; -inf where no key is."""
    (q, k, weights, scale), (keys, scales), table, there = indexed(rng, *case)
    place, S = HopperPlace() if case in ON_HOPPER else CpuPlace(), k.shape[1]
    assert indexer_scores.takes_hopper(*map(place.put, (q, keys)), place, table) == (case in ON_HOPPER)
    how = dict(place=place, config=dict(warps=2, row_tiles=1, queries=2), q_start=place.put(np.array(case[3], np.int32) - case[1]), causal=True)
    end = place.put(np.repeat(np.array(case[3], np.int32)[:, None], case[1], 1))
    got = indexer_scores.run(*map(place.put, (q, keys, weights)), k_scale=place.put(scales), table=place.put(table), key_end=end, **how).owner
    want = indexer_scores.run(*map(place.put, (q, k, weights)), k_scale=place.put(scale), key_end=end, **how).owner
    assert (got[:, :, S:] == -np.inf).all()
    assert_same_bits("scores", got[:, :, :S], np.where(there[:, None], want, -np.inf).astype(np.float32))


@pytest.mark.parametrize("top_k, pool, scored", [(5, 1, False), (50, 1, False), (300, 1, False), (3, 4, False), (40, 7, False), (50, 1, True)])
@pytest.mark.parametrize("case", INDEXED, ids=str)
def test_indexer_topk(case, top_k, pool, scored, rng):
    """What the reference chooses, whose scores are the same (small integers): rows with all of their keys, holes among them, and rows with too many."""
    (q, k, weights, scale), (keys, scales), table, _ = indexed(rng, *case)
    q, weights = np.sign(q.astype(np.float32)).astype(E4M3), np.ones_like(weights)
    keys[:] = np.where(np.isnan(keys.astype(np.float32)), keys, np.round(keys.astype(np.float32)).astype(E4M3))
    place, T = CpuPlace(), case[1]
    start, end = np.array(case[3], np.int32) - T, np.repeat(np.array(case[3], np.int32)[:, None], T, 1)
    rest = dict(causal=True, pool=pool, return_scores=scored)
    got = indexer_topk.run(*map(place.put, (q, keys, weights)), top_k, place=place, config=PLAIN, k_scale=place.put(scales), table=place.put(table), q_start=place.put(start),
                           key_end=place.put(end), **rest)
    for name, x, want in zip(("indices", "lengths", "scores"), got, reference.run(q, keys, weights, top_k, k_scale=scales, table=table, q_start=start, key_end=end, **rest)):
        if want is not None:
            assert_same_bits(name, x.owner, want)


# ------------------------------------------------------------------------------------------------------------------ selections
@pytest.mark.parametrize("granularity, causal, start, page", [(1, False, None, 6), (1, True, None, 64), (4, True, 37, 5), (3, True, "device", 1)])
def test_rows_of_selections(granularity, causal, start, page, rng):
    """Garbage among the entries, holes in the table, lengths of sequences and of lists that are out of range; more slots than one block of threads takes."""
    place, B, G, T, K, pages, pool, bad = CpuPlace(), 3, 2, 2, 1030 // granularity, 12, 29, np.array([-1, -2 ** 31, 2 ** 31 - 1, 2 ** 30], np.int32)
    table, entries = rng.permutation(B * pages).reshape(B, pages).astype(np.int32), rng.integers(0, pages * page // granularity + 2, (B, G, T, K)).astype(np.int32)
    table[1, 3], table[2, 0], entries[..., ::7] = -5, 2 ** 31 - 1, bad[rng.integers(0, 4, entries[..., ::7].shape)]
    lengths, counts = np.array([pages * page + 9, pages * page - 3, -2], np.int32), rng.integers(-3, K + 3, (B, G, T)).astype(np.int32)
    starts = np.array([5, 2 ** 31 - 1, -9], np.int32) if start == "device" else start
    got = page_rows.run(place.put(entries), place.put(table), place.put(lengths), place=place, config={}, page_size=page, pages_of_pool=pool, lengths=place.put(counts), granularity=granularity,
                        causal=causal, q_start=place.put(starts) if start == "device" else starts).owner
    assert_same_bits("rows", got, rows_of(entries, table, lengths, page, pool, counts, granularity, causal, None if start is None else np.resize(starts, B)))


# ------------------------------------------------------------------------------------------------------------- float8 latents
EIGHTS = [  # config, rule or None (a selection of 20 entries, on path hopper of 90), T, H, R, P, lengths, page, holes
    (dict(DECODE, tile_k=32), Causal(), 3, 20, 128, 16, (200, 131), 16, [(0, 3)]),
    (dict(DECODE, tile_k=32), Full(), 1, 5, 256, 6, (70, 0), 3, []),
    (PORTABLE, Window(20), 40, 2, 128, 8, (90, 51), 64, [(1, 0)]),
    (PORTABLE, Causal(), 34, 1, 384, 2, (60, 60), 7, []),
    (dict(DECODE, path="latent", block_k=128), Causal(), 1, 70, 512, 64, (97, 40), 32, [(0, 1)]),
    (dict(DECODE, path="latent", block_k=128), Window(100), 1, 17, 512, 64, (0, 200), 64, [(1, 3)]),
    (dict(path="portable", heads=16, tile_k=64, key_warps=4, stages=1, split=0), None, 3, 20, 128, 64, (100, 64), 8, []),
    (dict(path="portable", heads=32, tile_k=32, key_warps=2, stages=2, split=0), None, 2, 3, 256, 10, (50, 30), 8, []),
    (dict(path="hopper", split=0), None, 1, 70, 512, 64, (150, 97), 8, []),
    (dict(path="hopper", split=1), None, 2, 9, 512, 64, (130, 0), 64, []),
]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", EIGHTS, ids=lambda c: f"{c[0]['path']}-{'selection' if c[1] is None else c[1].kind}-T{c[2]}-R{c[4]}-P{c[5]}-page{c[7]}")
def test_float8_latents(case, kind, rng):
    """Scales that are no powers of two; rows that are not seen are bytes of NaN."""
    config, rule, T, H, R, P, lengths, page, holes = case
    other = dict(latent="block_attention_decode", hopper="gather_attention").get(config["path"])
    place, B, S, K = HopperPlace() if other else CpuPlace(), 2, max(lengths), 90 if config["path"] == "hopper" else 20
    place.refused = other
    some = [np.frombuffer(cache_format.latent_token(*(rng.standard_normal(n).astype(np.float32) for n in (R, P)), False), np.uint8) for _ in range(24)]
    rows = np.array(some)[rng.integers(0, len(some), (B, S))]
    q, (keys, values) = rng.standard_normal((B, H, T, R + P)).astype(TYPES[kind]), latents(rows[:, None], R, P)
    (pool,), table = paged_keys.scatter((rows[:, None].astype(np.float32),), lengths, page, rng, holes)
    pool = np.where(np.isnan(pool), 0x7F, pool).astype(np.uint8)                      # [N, 1, page, bytes]
    at, there = np.array(lengths)[:, None, None] - T + np.arange(T)[:, None], paged_keys.there(lengths, S, page, holes)[:, None]
    how = dict(config=config, place=place, scale=0.1, latent=(R, P))
    if rule is None:
        chosen = np.array([[rng.permutation(S)[:K] for _ in range(T)] for _ in range(B)], np.int32)
        found = np.take_along_axis(table.astype(np.int64), chosen.reshape(B, -1) // page, 1).reshape(chosen.shape) * page + chosen % page
        garbage = rng.choice([-1, -2 ** 31, -123456, len(pool) * page, 2 ** 31 - 1], chosen.shape)
        entries = np.where(chosen < np.array(lengths)[:, None, None], found, garbage).astype(np.int32)
        seen = (chosen[..., None] == np.arange(S)).any(2) & there
        flat = np.broadcast_to(pool[:, 0].reshape(1, 1, -1, pool.shape[-1]), (B, 1, len(pool) * page, pool.shape[-1]))
        got = gather_attention.run(place.put(q), place.put(flat), place.put(flat[..., :R]), place.put(entries[:, None]), **how)
    else:
        seen, whole = rule.visible(at, np.arange(S), S) & there, -(-S // page) * page
        (part,) = lists_of(place, rule, whole, config)
        got = block_attention.run(place.put(q), place.put(pool), place.put(pool[..., :R]), part, table=place.put(table), kv_length=place.put(np.array(lengths, np.int32)), **how)
    count, given = np.repeat(seen[:, None], H, 1).astype(int), (x.astype(TYPES[kind]) for x in (keys, values))
    for name, x, true, one in zip(("out", "lse"), got, oracle.attention(q, keys, values, count, scale=0.1), plain.attention(q, *given, count, scale=0.1)):
        assert_close(name, x.owner, true, one, reduction=S + R + P)
