"""Around path "gluon_ordered" of block_attention_backward: in which order key blocks walk their rows and heads, which turn each addition to dQ has, and dQ rounded."""
import triton
import triton.language as tl

from sparsetile.backends.triton.tiles import place_of


@triton.jit
def _below(cols, begin, end, x, bits):
    """How many of the ascending entries begin .. end - 1 are less than x, fewer than 2 ** bits each."""
    left = begin
    right = end
    for _ in range(bits):
        middle = (left + right) // 2
        inside = left < right
        less = inside & (tl.load(cols + middle, mask=inside, other=0) < x)
        left = tl.where(less, middle + 1, left)
        right = tl.where(inside & ~less, middle, right)
    return left - begin


@triton.jit(do_not_specialize=["nq", "nk", "key_tiles", "bits"])
def order(offsets, cols, by_key_offsets, by_key_rows, by_key_kinds, walk, kinds, ranks, nq, nk, key_tiles, bits, ASCENDING: tl.constexpr, N: tl.constexpr):
    """Of one key block of one list: rows, full and partial ones as one, descending or ascending, their kinds, and how many key blocks that come earlier add to the same row."""
    line = tl.program_id(0) // nk
    j = tl.program_id(0) - line * nk
    begin = tl.load(by_key_offsets + 2 * tl.program_id(0))
    middle = tl.load(by_key_offsets + 2 * tl.program_id(0) + 1)
    end = tl.load(by_key_offsets + 2 * tl.program_id(0) + 2)
    for f in range(begin, end, N):
        e = f + tl.arange(0, N)
        ok = e < end
        row = tl.load(by_key_rows + e, mask=ok, other=0)
        full = e < middle
        others = tl.where(full, middle, begin)
        place = tl.where(full, e - begin, e - middle) + _below(by_key_rows, others, tl.where(ok, tl.where(full, end, middle), others), row, bits)
        at = offsets + 2 * (line * nq + row)
        a = tl.load(at)
        m = tl.load(at + 1)
        c = tl.load(at + 2)
        rank = _below(cols, a, m, j, bits) + _below(cols, m, c, j, bits)
        if ASCENDING:
            rank = _below(cols, a, m, key_tiles, bits) + _below(cols, m, c, key_tiles, bits) - 1 - rank
        else:
            place = end - begin - 1 - place
        tl.store(walk + begin + place, row, mask=ok)
        tl.store(kinds + begin + place, tl.load(by_key_kinds + e, mask=ok, other=-1), mask=ok)
        tl.store(ranks + begin + place, rank, mask=ok)


@triton.jit
def following(m, e, count, group, abreast):
    """The head of a group and the entry after these in the walk of an item of so many entries: head after head, or all heads `abreast` at an entry. After the last: an entry that is there."""
    turned = tl.where(abreast > 0, m + 1 == group, e + 1 == count)
    return tl.where(turned, (m + 1) * (1 - abreast), m + abreast), tl.minimum(tl.where(turned, (e + 1) * abreast, e + 1 - abreast), count - 1)


@triton.jit(do_not_specialize=["Hq", "T", "S", "tiles", "q_start"])
def finish(sums, turns, dq, kv_length, q_starts, Hq, T, S, tiles, q_start, scale, D: tl.constexpr, FROM_LENGTH: tl.constexpr):
    """dQ of 64 rows from sums [heads, tiles, half, columns / 32, 64 rows, 32 columns]; those to which nothing was added are 0."""
    x = tl.program_id(0)
    head = x // (2 * tiles)
    limit, start = place_of(head // Hq, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    r = tl.arange(0, 64)
    c = tl.arange(0, 128)
    t = (x - head * 2 * tiles) * 64 - (start & 127) + r
    y = tl.load(sums + x.to(tl.int64) * (64 * 128) + r[:, None] * 32 + (c // 32 * (64 * 32) + c % 32)[None, :], mask=(tl.load(turns + x) > 0) & (c < D)[None, :], other=0.0)
    tl.store(dq + (head.to(tl.int64) * T + t)[:, None] * D + c[None, :], (y * scale).to(dq.dtype.element_ty), mask=((t >= 0) & (t < T))[:, None] & (c < D)[None, :])
