"""Before and after path "gluon" of block_attention_backward: partial blocks as its keys see them, and sums of sections."""
import triton
import triton.language as tl

from sparsetile.backends.triton.tiles import place_of, seen_by_key


@triton.jit(do_not_specialize=["n_intervals"])
def turn_kinds(intervals, bitmaps, words, quarters, n_intervals, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr):
    """Of one kind of partial blocks, 128 queries x 128 keys: words [kinds, keys, 4], which queries see a key, 32 a word; quarters [kinds], 64 x 64 each: bit 2 i + j says that some of
    the queries 64 i .. see some of the keys 64 j .., bit 4 + 2 i + j that all see all."""
    x = tl.program_id(0)
    kind = tl.where(x < n_intervals, 2 * x, 2 * (x - n_intervals) + 1)
    bits = tl.reshape(seen_by_key(kind, intervals, bitmaps, 128, 128, INTERVALS, BITMAPS).to(tl.int32), [128, 4, 32]) << tl.arange(0, 32)[None, None, :]
    word = tl.sum(bits, 2)
    c = tl.arange(0, 128)
    n = tl.arange(0, 4)
    tl.store(words + kind.to(tl.int64) * 512 + c[:, None] * 4 + n[None, :], word)
    some = tl.max(tl.max(tl.reshape((word != 0).to(tl.int32), [2, 64, 2, 2]), 3), 1)
    every = tl.min(tl.min(tl.reshape((word == -1).to(tl.int32), [2, 64, 2, 2]), 3), 1)
    h = tl.arange(0, 2)
    place = h[:, None] + 2 * h[None, :]
    tl.store(quarters + kind, tl.sum(tl.sum((some << place) | (every << (place + 4)), 1), 0))


@triton.jit
def _join(sums, slot, far, sections, r, out, line, ok, COL: tl.constexpr, N: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, OF: tl.constexpr, zero):
    """Rows r of all sections of an item, first to last, N of their WIDTH columns from COL on: rounded, to columns FROM .. of `out`'s OF, rows `line`; 0 where `zero`."""
    c = tl.arange(0, N)
    at = sums + slot.to(tl.int64) * (128 * WIDTH) + (r[:, None] * WIDTH + (COL + c)[None, :])
    step = tl.full([], 128 * WIDTH, tl.int64) * far
    y = tl.load(at)
    for _ in range(1, sections):
        at += step
        y += tl.load(at)
    tl.store(out + line[:, None] * OF + (FROM + c)[None, :], tl.where(zero[:, None], 0.0, y).to(out.dtype.element_ty), mask=ok[:, None] & (FROM + c < OF)[None, :])


@triton.jit(do_not_specialize=["heads", "Hk", "group", "T", "S", "nk", "far", "sections", "slb", "slh", "q_start"])
def join_keys(sums, dk, dv, list_of, schedule, kv_length, q_starts, slb, slh, heads, Hk, group, T, S, nk, far, sections, q_start,
              D: tl.constexpr, DV: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, V0: tl.constexpr, FROM_LENGTH: tl.constexpr, R: tl.constexpr):
    """dK and dV of R keys of a far longer key block; those past the last are 0."""
    slot = tl.program_id(0) // (128 // R)
    head = slot % heads
    b = head // Hk
    block = tl.load(schedule + tl.load(list_of + b * slb + (head - b * Hk) * group * slh) * nk + slot // heads)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    r = tl.program_id(0) % (128 // R) * R + tl.arange(0, R)
    key = block * 128 + r
    line = head.to(tl.int64) * S + key
    _join(sums, slot, far, sections, r, dk, line, key < S, 0, D0, 0, D0 + D1 + V0, D, key >= limit)
    _join(sums, slot, far, sections, r, dv, line, key < S, D0 + D1, V0, 0, D0 + D1 + V0, DV, key >= limit)
    if D1:
        _join(sums, slot, far, sections, r, dk, line, key < S, D0, D1, D0, D0 + D1 + V0, D, key >= limit)


@triton.jit(do_not_specialize=["heads", "Hq", "T", "nq", "first", "far", "sections", "slb", "slh", "q_start"])
def join_queries(sums, dq, list_of, schedule, slb, slh, heads, Hq, T, nq, first, far, sections, q_start, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr):
    """dQ of R queries of a far longer tile."""
    slot = tl.program_id(0) // (128 // R)
    head = slot % heads
    b = head // Hq
    tile = tl.load(schedule + tl.load(list_of + b * slb + (head - b * Hq) * slh) * nq + slot // heads)
    r = tl.program_id(0) % (128 // R) * R + tl.arange(0, R)
    t = (first + tile) * 128 - q_start + r
    line = head.to(tl.int64) * T + t
    _join(sums, slot, far, sections, r, dq, line, (t >= 0) & (t < T), 0, D0, 0, D0 + D1, D, r < 0)
    if D1:
        _join(sums, slot, far, sections, r, dq, line, (t >= 0) & (t < T), D0, D1, D0, D0 + D1, D, r < 0)
