"""Before and after path "gluon" of block_attention_backward: partial blocks as its keys see them, and sums of sections."""
import triton
import triton.language as tl

from sparsetile.backends.triton.tiles import place_of


TOGETHER = 8  # kinds that a program turns: sixteen lanes each


@triton.jit
def _below(n):
    """A word whose bits below n are set."""
    ones = tl.full(n.shape, -1, tl.int32).to(tl.uint32, bitcast=True)
    return tl.where(n > 0, ones >> tl.minimum(tl.maximum(32 - n, 0), 31).to(tl.uint32), 0)


@triton.jit
def _exchanged(rows, J: tl.constexpr, LOW: tl.constexpr):
    """Of words of 32 bits: bits with J in the one of rows r and bits without in the one of r + J change places; LOW: the bits without."""
    made = ()
    for r in tl.static_range(32):
        if r & J == 0:
            made = made + ((rows[r] & LOW) | ((rows[r + J] & LOW) << J),)
        else:
            made = made + (((rows[r - J] >> J) & LOW) | (rows[r] & (LOW << J)),)
    return made


@triton.jit(do_not_specialize=["n_intervals", "n"])
def turn_kinds(intervals, bitmaps, words, quarters, n_intervals, n, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, EACH: tl.constexpr, TOGETHER: tl.constexpr):
    """Of n kinds of partial blocks, 128 queries x 128 keys: words [keys, 4] from EACH * kind on, which queries see a key, 32 a word; quarters [kinds], 64 x 64 each: bit 2 i + j says that some
    of the queries 64 i .. see some of the keys 64 j .., bit 4 + 2 i + j that all see all. A lane turns 32 queries x 32 keys in its registers. Words of a kind without pairs are not written."""
    lane = tl.arange(0, 16 * TOGETHER)
    x = tl.program_id(0) * TOGETHER + lane // 16
    i = lane // 4 % 4
    w = lane % 4
    there = x < n
    ruled = x < n_intervals
    kind = tl.where(ruled, 2 * x, 2 * (x - n_intervals) + 1)
    rows = ()
    some = tl.zeros([16 * TOGETHER], tl.uint32)
    every = tl.full([16 * TOGETHER], 0xFFFFFFFF, tl.uint32)
    for r in tl.static_range(32):
        word = tl.zeros([16 * TOGETHER], tl.uint32)
        if INTERVALS:
            at = intervals + x.to(tl.int64) * 256 + (i * 32 + r) * 2
            lo = tl.load(at, mask=ruled, other=0) - 32 * w
            hi = tl.load(at + 1, mask=ruled, other=0) - 32 * w
            word = _below(tl.maximum(lo, hi)) ^ _below(lo)
        if BITMAPS:
            word |= tl.load(bitmaps + (x - n_intervals).to(tl.int64) * 512 + (i * 32 + r) * 4 + w, mask=there & (ruled == 0), other=0).to(tl.uint32, bitcast=True)
        some |= word
        every &= word
        rows = rows + (word,)
    rows = _exchanged(rows, 16, 0x0000FFFF)
    rows = _exchanged(rows, 8, 0x00FF00FF)
    rows = _exchanged(rows, 4, 0x0F0F0F0F)
    rows = _exchanged(rows, 2, 0x33333333)
    rows = _exchanged(rows, 1, 0x55555555)
    some = tl.reshape((some != 0).to(tl.int32), [TOGETHER, 2, 2, 2, 2])
    every = tl.reshape((every == 0xFFFFFFFF).to(tl.int32), [TOGETHER, 2, 2, 2, 2])
    some = tl.max(tl.max(some, 4), 2)
    every = tl.min(tl.min(every, 4), 2)
    h = tl.arange(0, 2)
    place = (2 * h[:, None] + h[None, :])[None, :, :]
    bits = tl.sum(tl.sum((some << place) | (every << (place + 4)), 2), 1)
    own = tl.program_id(0) * TOGETHER + tl.arange(0, TOGETHER)
    tl.store(quarters + tl.where(own < n_intervals, 2 * own, 2 * (own - n_intervals) + 1), bits, mask=own < n)
    pairs = tl.reshape(tl.broadcast_to((bits != 0)[:, None], [TOGETHER, 16]), [16 * TOGETHER]) & there
    to = words + kind.to(tl.int64) * EACH + w * 128 + i
    for c in tl.static_range(32):
        tl.store(to + 4 * c, rows[c].to(tl.int32, bitcast=True), mask=pairs)


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
