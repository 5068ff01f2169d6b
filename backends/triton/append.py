"""New rows of a cache, quantised and scattered through a page table, in one pass. CUDA-graph safe.

    rows [B,n,...]  pools [N,page,...]  table [B,pages] int32  lengths [B] int32  counts [B] int32 or None  ->  written into the pools, in place

Row i < counts[b] of sequence b stands at position p = lengths[b] + i, in slot p; in a ring (pinned, window) in slot p < pinned ? p : pinned + (p - pinned) % window,
and of the rows that fall on one slot the last is written. A row whose slot lies outside the table, or whose page is not one of 0 .. N - 1, is skipped.
    "copy"         rows[x] [B,n,H,C] -> pools[x] [N,page,H,C], the same bits
    "latent_fp8"   rows (latent [B,n,R], rotary [B,n,P]) -> R float8_e4m3fn, R/128 float32 scales, P bfloat16 a token
    "indexer_fp8"  rows[0] [B,n,D] -> D float8_e4m3fn of each key of a page, then a float32 scale of each
Everything is written as integers, rounded here, so that chips without float8 store the same bytes.
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton.launch import FLOATS, POINTER, power

TUNABLES = ()
BITS = {2: "int16", 4: "int32"}
GROUP = 128


@triton.jit
def slot_of(row, n, table, table_b, pages, N, lengths, counts, PAGE: tl.constexpr, PINNED: tl.constexpr, WINDOW: tl.constexpr, COUNTS: tl.constexpr):
    """(b, i, page, offset, whether it is written) of row `row` of the call."""
    b, i = row // n, row % n
    count = n
    if COUNTS:
        count = tl.minimum(tl.maximum(tl.load(counts + b), 0), n)
    start = tl.load(lengths + b).to(tl.int64)
    p = start + i
    ok = (i < count) & (p >= 0)
    slot = p
    if WINDOW:
        ok = ok & ((p < PINNED) | (p + WINDOW >= start + count))
        slot = tl.where(p < PINNED, p, PINNED + (p - PINNED) % WINDOW)
    slot = tl.where(ok, slot, 0)
    at = slot // PAGE
    ok = ok & (at < pages)
    page = tl.load(table + b.to(tl.int64) * table_b + at, mask=ok, other=-1)
    ok = ok & (page >= 0) & (page < N)
    return b.to(tl.int64), i.to(tl.int64), tl.where(ok, page, 0).to(tl.int64), slot % PAGE, ok


@triton.jit
def copy_rows(rows, rows_b, rows_n, rows_h, pool, pool_b, pool_n, pool_h, H, C, n, table, table_b, pages, N, lengths, counts,
              PAGE: tl.constexpr, PINNED: tl.constexpr, WINDOW: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of one row, all heads side by side."""
    b, i, page, offset, ok = slot_of(tl.program_id(0), n, table, table_b, pages, N, lengths, counts, PAGE, PINNED, WINDOW, COUNTS)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h, c, there = x // C, x % C, (x < H * C) & ok
    value = tl.load(rows + b * rows_b + i * rows_n + h * rows_h + c, mask=there, other=0)
    tl.store(pool + page * pool_b + offset * pool_n + h * pool_h + c, value, mask=there)


@triton.jit
def float8_bits(x):
    """float32 of at most 448 in size -> e4m3fn, nearest even, as int32."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size - (120 << 23) + ((size >> 20) & 1) + 0x7FFFF) >> 20
    tiny = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)  # below 2**-6 multiples of 2**-9 stand in the low bits
    return tl.where(size < (121 << 23), tiny, normal) | ((bits >> 24) & 0x80)


@triton.jit
def quantise_rows(rows, rows_b, rows_n, rotary, rotary_b, rotary_n, bytes_, halves, words, page_bytes, n, table, table_b, pages, N, lengths, counts,
                  D: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, PLANAR: tl.constexpr, POWER: tl.constexpr,
                  PAGE: tl.constexpr, PINNED: tl.constexpr, WINDOW: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr, ROTARY: tl.constexpr):
    """One group of one row; behind the groups the rotary part. bytes_, halves, words: the pool as uint8, int16 and int32."""
    b, i, page, offset, ok = slot_of(tl.program_id(0), n, table, table_b, pages, N, lengths, counts, PAGE, PINNED, WINDOW, COUNTS)
    g = tl.program_id(1)
    GROUPS: tl.constexpr = D // GROUP
    if PLANAR:
        values = page * page_bytes + offset * D
        scale_at = page * page_bytes + PAGE * D + 4 * offset
    else:
        values = page * page_bytes + offset * (D + 4 * GROUPS + 2 * P)
        scale_at = values + D + 4 * g
    if g < GROUPS:
        d = tl.arange(0, BLOCK)
        there = (d < GROUP) & ok
        x = tl.load(rows + b * rows_b + i * rows_n + g * GROUP + d, mask=there, other=0.0).to(tl.float32)
        size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        top = tl.max(size, axis=0)  # of floats without signs bits order as numbers, NaN above all
        bad = top >= 0x7F800000
        scale = tl.maximum(tl.div_rn(tl.where(bad, 0, top).to(tl.float32, bitcast=True), 448.0), 1.1754943508222875e-38)
        if POWER:
            bits = scale.to(tl.int32, bitcast=True)
            bits = tl.where((bits & 0x7FFFFF) != 0, (bits & 0x7F800000) + 0x800000, bits)
            scale = bits.to(tl.float32, bitcast=True)
        q = tl.div_rn(tl.where(bad, 0.0, x), tl.zeros([BLOCK], tl.float32) + scale)
        q = tl.minimum(tl.maximum(q, -448.0), 448.0)
        tl.store(bytes_ + values + g * GROUP + d, tl.where(bad, 0x7F, float8_bits(q)).to(tl.uint8), mask=there)
        tl.store(words + scale_at // 4, tl.where(bad, 0x7FC00000, scale.to(tl.int32, bitcast=True)), mask=ok)
    elif P:
        r = tl.arange(0, ROTARY)
        wanted = (r < P) & ok
        word = tl.load(rotary + b * rotary_b + i * rotary_n + r, mask=wanted, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
        word = tl.where((word & 0x7FFFFFFF) > 0x7F800000, word | 0x400000, word + ((word >> 16) & 1) + 0x7FFF) >> 16
        tl.store(halves + (values + D + 4 * GROUPS) // 2 + r, word.to(tl.int16), mask=wanted)


def supports(problem):
    kind = problem.dtype("rows")
    if kind in FLOATS:
        return None
    return f"the triton kernel appends float32, float16 or bfloat16, not {kind}; cast the rows, or keep the cache on the CPU, where numba takes float64"


def resources(problem, config):
    return Resources(threads=128)


def default_config(problem):
    return {}


def _ring(ring):
    return dict(PINNED=ring[0] if ring else 0, WINDOW=ring[1] if ring else 0)


def artifacts(problem, config):
    D, rows = problem["D"], POINTER[problem.dtype("rows")]
    where = {"n": "i32", "table": "*i32", "table_b": "i64", "pages": "i32", "N": "i32", "lengths": "*i32", "counts": "*i32"}
    constants = dict(PAGE=64, COUNTS=True, **_ring((4, 124) if "ring" in problem.features else None))
    if "copy" in problem.features:
        bits = "*i32" if rows == "*fp32" else "*i16"
        steps = {f"{side}_{axis}": "i64" for side in ("rows", "pool") for axis in "bnh"}
        return [{"fn": copy_rows, "signature": {"rows": bits, "pool": bits, **steps, "H": "i32", "C": "i32", **where}, "constexprs": dict(constants, BLOCK=1024), "options": {"num_warps": 4}}]
    planar = "indexer_fp8" in problem.features
    steps = {f"{side}_{axis}": "i64" for side in ("rows", "rotary") for axis in "bn"}
    signature = {"rows": rows, "rotary": rows, **steps, "bytes_": "*u8", "halves": "*i16", "words": "*i32", "page_bytes": "i64", **where}
    return [{"fn": quantise_rows, "signature": signature, "options": {"num_warps": 1},
             "constexprs": dict(constants, D=D, P=0 if planar else 64, GROUP=D if planar else GROUP, PLANAR=planar, POWER=power_of_two, BLOCK=power(D if planar else GROUP), ROTARY=64)}
            for power_of_two in (False, True)]


def run(rows, pools, table, lengths, *, place, config, form, page_size, counts=None, ring=None, power_of_two=False):
    import torch
    B, n = rows[0].shape[:2]
    table, lengths, counts = (None if x is None else x.contiguous() for x in (table, lengths, counts))
    where = n, table, table.shape[1], table.shape[1], pools[0].shape[0], lengths, lengths if counts is None else counts
    constants = dict(PAGE=page_size, COUNTS=counts is not None, **_ring(ring))
    if form == "copy":
        for row, pool in zip(rows, pools):
            bits = getattr(torch, BITS[row.element_size()])
            H, C = row.shape[2:]
            block = min(1024, power(H * C))
            copy_rows[(B * n, triton.cdiv(H * C, block))](row.view(bits), *row.stride()[:3], pool.view(bits), *pool.stride()[:3], H, C, *where, **constants, BLOCK=block, num_warps=4)
        return
    D, planar, rotary, pool = rows[0].shape[2], form == "indexer_fp8", rows[-1], pools[0]
    P, group = rotary.shape[2] if len(rows) > 1 else 0, D if planar else GROUP
    flat = pool.view(-1)
    quantise_rows[(B * n, D // group + (P > 0))](rows[0], *rows[0].stride()[:2], rotary, *rotary.stride()[:2], flat, flat.view(torch.int16), flat.view(torch.int32), pool.stride(0), *where,
                                                 D=D, P=P, GROUP=group, PLANAR=planar, POWER=power_of_two, **constants, BLOCK=power(group), ROTARY=power(max(P, 1)), num_warps=1)
