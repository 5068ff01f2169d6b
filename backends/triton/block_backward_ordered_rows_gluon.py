"""Path "gluon_ordered" of block_attention_backward: what is loaded for an item, and which of its pairs are seen."""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from sparsetile.backends.triton.block_backward_keys_gluon import STEP, bring_block, known_rows
from sparsetile.backends.triton.block_backward_order import following
from sparsetile.backends.triton.block_backward_steps_gluon import bring_step
from sparsetile.backends.triton.gluon_items import KEYS, ROWS, item_at
from sparsetile.backends.triton.gluon_keys import clear_word, key_range, key_word


@gluon.jit
def _clear_unseen(block, first, count, limit, row0, T, entries, kinds, tables, sk, sv, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr):
    """Keys and values that no query of the call sees become zero: in dQ they would be multiplied (0 * NaN)."""
    r = gl.arange(0, ROWS, gl.BlockedLayout([4], [32], [1], [0]))
    w0 = gl.to_tensor(0).to(gl.uint32)
    w1 = w0
    w2 = w0
    w3 = w0
    for e in range(first, first + count):
        kind = gl.load(kinds + e)
        t = row0 + gl.load(entries + e) * ROWS + r
        lo, hi = key_range(kind, r, tables, INTERVALS)
        hi = gl.where((t >= 0) & (t < T), gl.minimum(hi, limit - block * KEYS), 0)
        w0 |= gl.reduce_or(key_word(kind, lo, hi, r, 0, tables, BITMAPS), 0)
        w1 |= gl.reduce_or(key_word(kind, lo, hi, r, 1, tables, BITMAPS), 0)
        w2 |= gl.reduce_or(key_word(kind, lo, hi, r, 2, tables, BITMAPS), 0)
        w3 |= gl.reduce_or(key_word(kind, lo, hi, r, 3, tables, BITMAPS), 0)
    for x in gl.static_range(2):
        to = (sk, sv)[x]
        clear_word(w0, 0, to.index(0))
        clear_word(w1, 1, to.index(0))
        clear_word(w2, 0, to.index(1))
        clear_word(w3, 1, to.index(1))
    fence_async_shared()


@gluon.jit
def bring_queries(maps, lse, delta, entries, kinds, tables, Hk, group, abreast, T, D0: gl.constexpr, V0: gl.constexpr, STAGES: gl.constexpr, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr,
                  queue, memory, rows, k_bars, q_bars):
    """Keys and values of an item, those that no query sees as zeros, then queries, dout and what is known of their rows, 64 a step. The next item is drawn when all of this one is under way:
    an item that waits for another to be done would keep those back that wait for it."""
    q, dout, k, v = maps
    sq, sg, sk, sv = memory
    k_full, k_free, k_landed = k_bars
    n = 0
    j = 0
    turn = 0
    landed = 0
    head, block, first, full, count, gap, limit, row0 = item_at(0, queue, 1)
    while head >= 0:
        b = head // Hk
        hk = head - b * Hk
        if count > 0:
            some_unseen = (full == 0) | (block * KEYS + KEYS > limit)  # blocks all partial, or keys end within
            mbarrier.wait(k_free, (j & 1) ^ 1)
            if some_unseen:
                bring_block((k, None, v), [b, hk, block * KEYS, 0], k_landed, (sk, sk, sv), 0, D0, 0, V0)
                mbarrier.wait(k_landed, landed)
                landed ^= 1
                _clear_unseen(block, first, count, limit, row0, T, entries, kinds, tables, sk, sv, INTERVALS, BITMAPS)
                mbarrier.arrive(k_full)
            else:
                bring_block((k, None, v), [b, hk, block * KEYS, 0], k_full, (sk, sk, sv), 0, D0, 0, V0)
            j += 1
            m = 0
            e = 0
            row = gl.load(entries + first)
            for _ in range(count * group):
                h = hk * group + m
                line = (head * group + m).to(gl.int64) * T
                t = row0 + row * ROWS
                m, e = following(m, e, count, group, abreast)
                row = gl.load(entries + first + e)
                for half in gl.static_range(2):
                    s = n % STAGES
                    logs, less = known_rows(lse, delta, line, t + STEP * half, T)
                    bring_step((q, None, dout), [b, h, t + STEP * half, 0], logs, less, s, n // STAGES, 0, 2 * STEP * (D0 + V0), (sq, sq, sg), rows, q_bars)
                    mbarrier.arrive(q_bars[0].index(s))
                    n += 1
        mbarrier.arrive(queue[2].index(turn % 2))
        turn += 1
        head, block, first, full, count, gap, limit, row0 = item_at(turn, queue, 1)


@gluon.jit
def seen_by(W: gl.constexpr, kind, r, exists, left, tables, INTERVALS: gl.constexpr, BITMAPS: gl.constexpr, L: gl.constexpr):
    """Which of the queries, columns, see each of this group's keys, rows, of which the block has `left`."""
    intervals, bitmaps = tables
    c = gl.arange(0, 64, gl.SliceLayout(1, L))
    key = gl.expand_dims(c + 64 * W, 1)
    seen = gl.expand_dims(exists, 0) & (key < left)
    if INTERVALS:
        rule = (kind >= 0) & ((kind & 1) == 0)
        both = gl.load(intervals.to(gl.pointer_type(gl.int64), bitcast=True) + gl.where(rule, kind >> 1, 0).to(gl.int64) * ROWS + r)  # two rows in one load
        both = gl.where(rule, both, KEYS << 32)
        seen = seen & (key >= gl.expand_dims(both.to(gl.int32), 0)) & (key < gl.expand_dims((both >> 32).to(gl.int32), 0))
    if BITMAPS:
        if kind >= 0:
            if (kind & 1) == 1:
                at = bitmaps + (kind >> 1).to(gl.int64) * (ROWS * 4) + r * 4 + 2 * W
                words = gl.where(gl.expand_dims(c, 1) >= 32, gl.expand_dims(gl.load(at + 1), 0), gl.expand_dims(gl.load(at), 0))
                seen = seen & ((words >> gl.expand_dims(c & 31, 1)) & 1 != 0)
    return seen
