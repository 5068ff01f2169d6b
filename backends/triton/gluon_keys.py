"""Which keys of a block the queries of a tile see, in Gluon: as bits for what multiplies, and for `clear`, which makes zero what nobody sees (it must not reach a product: 0 * NaN)."""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sparsetile.backends.triton.gluon_items import KEYS, ROWS, next_item


@gluon.jit
def key_range(kind, r, tables, INTERVALS: gl.constexpr):
    """Between which keys of a block the rows r may see."""
    lo = r * 0
    hi = lo + KEYS
    if INTERVALS:
        rule = (kind >= 0) & ((kind & 1) == 0) & (r >= 0)
        at = tables[0] + (kind >> 1).to(gl.int64) * (2 * ROWS) + 2 * r
        lo = gl.load(at, mask=rule, other=0)
        hi = gl.load(at + 1, mask=rule, other=KEYS)
    return lo, hi


@gluon.jit
def key_word(kind, lo, hi, r, n: gl.constexpr, tables, BITMAPS: gl.constexpr):
    """Which of the keys 32 n .. of a block each of the rows r sees, as bits; it sees lo .. hi - 1 at most."""
    lo = gl.minimum(gl.maximum(lo - 32 * n, 0), 32)
    hi = gl.minimum(gl.maximum(hi - 32 * n, 0), 32)
    ones = (r * 0 - 1).to(gl.uint32)
    word = gl.where(lo < hi, (ones >> gl.maximum(32 - hi, 0).to(gl.uint32)) & (ones << lo.to(gl.uint32)), ones * 0)
    if BITMAPS:
        if kind >= 0:
            if (kind & 1) == 1:
                word &= gl.load(tables[1] + (kind >> 1).to(gl.int64) * (ROWS * 4) + r * 4 + n).to(gl.uint32, bitcast=True)
    return word


@gluon.jit
def look(e, first, kept, gap, limit, r, cols, kinds, tables, INTERVALS: gl.constexpr, EDGE: gl.constexpr):
    """(kind, lo, hi) of an item's entry e: between which of its keys the rows r may see."""
    entry = first + e + gl.where(e >= kept, gap, 0)
    kind = gl.load(kinds + entry)
    lo, hi = key_range(kind, r, tables, INTERVALS)
    if EDGE:
        hi = gl.minimum(hi, limit - gl.load(cols + entry) * KEYS)
    return kind, lo, hi


@gluon.jit
def seen_or(x, other, kind, lo, hi, r, FIRST: gl.constexpr, tables, BITMAPS: gl.constexpr, L: gl.constexpr):
    """x where a query, a row, sees the key, a column, else `other`. FIRST: of these keys, in words of 32 of the block."""
    N: gl.constexpr = x.shape[1]
    c = gl.arange(0, N, gl.SliceLayout(0, L))
    words = gl.expand_dims(key_word(kind, lo, hi, r, FIRST, tables, BITMAPS), 1)
    for n in gl.static_range(1, N // 32):
        words = gl.where(gl.expand_dims(c, 0) >= 32 * n, gl.expand_dims(key_word(kind, lo, hi, r, FIRST + n, tables, BITMAPS), 1), words)
    return gl.where((words >> gl.expand_dims((c & 31).to(gl.uint32), 0)) & 1 != 0, x, other)


@gluon.jit
def _seen_by_some(e, kept, first, count, gap, limit, r, exists, cols, kinds, tables, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr):
    """Four words: which keys of an item's entry e some row of the tile sees."""
    entry = first + e + gl.where(e >= kept, gap, 0)
    kind = gl.load(kinds + entry, mask=e < count, other=-1)
    left = limit - gl.load(cols + entry, mask=e < count, other=0) * KEYS
    lo, hi = key_range(kind, r, tables, INTERVALS)
    hi = gl.where(exists, gl.minimum(hi, left), 0)
    w0 = gl.reduce_or(key_word(kind, lo, hi, r, 0, tables, BITMAPS), 0)
    w1 = gl.reduce_or(key_word(kind, lo, hi, r, 1, tables, BITMAPS), 0)
    w2 = gl.reduce_or(key_word(kind, lo, hi, r, 2, tables, BITMAPS), 0)
    w3 = gl.reduce_or(key_word(kind, lo, hi, r, 3, tables, BITMAPS), 0)
    return w0, w1, w2, w3


@gluon.jit
def clear_word(word, n: gl.constexpr, v):
    """Zeroes the values of those of the keys 32 n .. that have no bit."""
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    line = gl.arange(0, 8, gl.SliceLayout(1, B)).to(gl.uint32)
    for c in gl.static_range(4):
        bits = (word >> (8 * c)) & 0xFF
        if bits != 0xFF:
            part = v.slice(32 * n + 8 * c, 8)
            part.store(gl.where(gl.expand_dims((bits >> line) & 1, 1) != 0, part.load(B), 0.0))


@gluon.jit
def _clear_part(w0, w1, w2, w3, PART: gl.constexpr, PARTS: gl.constexpr, v):
    if PART == 0:
        clear_word(w0, 0, v)
        clear_word(w1, 1, v)
    if PARTS == 1:
        clear_word(w2, 2, v)
        clear_word(w3, 3, v)
    elif PART == 1:
        clear_word(w2, 0, v)
        clear_word(w3, 1, v)


@gluon.jit
def clear(cols, kinds, tables, T, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, MASKED: gl.constexpr, PARTS: gl.constexpr, MORE: gl.constexpr, STAGES: gl.constexpr, queue, v0, v1, full, landed):
    """A warp that reads which keys of a masked block some row of the tile sees, one block ahead, and zeroes values (or keys; MORE columns of them) of the others when they have landed, a block
    in so many PARTS."""
    r = gl.arange(0, ROWS, gl.BlockedLayout([4], [32], [1], [0]))
    n = 0
    turns = 0
    turn = 0
    head, t, first, plain, kept, count, gap, limit = next_item(0, queue, 1)
    while head >= 0:
        if MASKED:
            exists = (r + t >= 0) & (r + t < T)
            w0, w1, w2, w3 = _seen_by_some(plain, kept, first, count, gap, limit, r, exists, cols, kinds, tables, INTERVALS, BITMAPS)
            for e in range(plain, count):
                x0, x1, x2, x3 = _seen_by_some(e + 1, kept, first, count, gap, limit, r, exists, cols, kinds, tables, INTERVALS, BITMAPS)
                for part in gl.static_range(PARTS):
                    s = ((n + e) * PARTS + part) % STAGES
                    mbarrier.wait(landed.index(s), (turns >> s) & 1)
                    turns ^= 1 << s
                    if (w0 & w1 & w2 & w3) != 0xFFFFFFFF:
                        _clear_part(w0, w1, w2, w3, part, PARTS, v0.index(s))
                        if MORE:
                            _clear_part(w0, w1, w2, w3, part, PARTS, v1.index(s))
                        fence_async_shared()
                    mbarrier.arrive(full.index(s))
                w0, w1, w2, w3 = x0, x1, x2, x3
            n += count
        turn += 1
        head, t, first, plain, kept, count, gap, limit = next_item(turn, queue, 1)
