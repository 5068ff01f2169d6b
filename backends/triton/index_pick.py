"""The end of indexer_topk without scores in memory (index_keep.py): candidates anew for rows whose bound failed, and the k best of a row's candidates."""
import triton
import triton.language as tl

from sparsetile.backends.triton import index_score
from sparsetile.backends.triton.float8 import widen
from sparsetile.backends.triton.select import kth_key, order_keys, pad
from sparsetile.backends.triton.select_rows import take_all

STATE = tl.constexpr(8)  # int32 of a row, a sector of memory: candidates, bits of the two limits, the position up to which the first holds, the bound's key, the step of its tile of queries


@triton.jit
def first_of(ties, at, left):
    """The `left` of `ties` with the smallest positions."""
    marks = tl.where(ties, 0xFFFFFFFF - at.to(tl.uint32), 0)
    bound, _ = kth_key(marks, tl.sum(ties.to(tl.int32), axis=0), left, 0)
    return ties & (marks >= bound)


@triton.jit
def put_in_order(words, at, chosen, out, WORDS: tl.constexpr):
    """The chosen positions, ascending, by way of a bitmap of the row, which stands where its candidates have stood."""
    n = tl.arange(0, WORDS)
    tl.debug_barrier()  # everyone has read its candidates
    tl.store(words + n, n * 0)
    tl.debug_barrier()
    tl.atomic_or(words + (at >> 5), 1 << (at & 31), mask=chosen, sem="relaxed")
    tl.debug_barrier()
    w = tl.load(words + n, cache_modifier=".cg").to(tl.uint32, bitcast=True)  # what atomics wrote is not in the L1
    ones = w - ((w >> 1) & 0x55555555)
    ones = (ones & 0x33333333) + ((ones >> 2) & 0x33333333)
    ones = ((((ones + (ones >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)
    slot = tl.cumsum(ones, axis=0) - ones
    most = tl.max(ones, axis=0)
    for _ in range(most):
        low = w & (0 - w)
        bit = (low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(out + slot, n * 32 + bit, mask=w != 0)
        slot += 1
        w = w & (w - 1)


@triton.jit
def entry_of(score, at):
    """What stands in a row's room: bits of the score, position."""
    return ((score.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | at.to(tl.uint32).to(tl.uint64)).to(tl.int64, bitcast=True)


@triton.jit
def standing(entry):
    """uint64, larger for a better entry: the score's key, of equal ones the smaller position; below 2 ** 32 for what is never chosen."""
    return (order_keys((entry >> 32).to(tl.int32)).to(tl.uint64) << 32) | (0xFFFFFFFF - entry.to(tl.uint32)).to(tl.uint64)


@triton.jit
def kth_standing(room, count, k, slack, BLOCK: tl.constexpr):
    """A standing that k to k + slack of `count` > k + slack entries reach: digits of 8 bits, from the highest on, until the entries that share them may all be taken."""
    prefix = (count * 0).to(tl.uint64)
    k += count * 0  # k = 1 comes as a constant, and changes below
    shift = count * 0 + 64
    inside = count
    while (inside - k > slack) & (shift > 0):
        shift -= 8
        low = shift.to(tl.uint64)
        bins = tl.zeros((256,), tl.int32)
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            rank = standing(tl.load(room + i, mask=i < count, other=0))
            bins += tl.histogram(((rank >> low) & 255).to(tl.int32), 256, mask=(i < count) & ((rank >> low >> 8) == prefix))
        above = inside - tl.cumsum(bins, axis=0)  # entries with a larger digit
        digit = tl.sum((above >= k).to(tl.int32), axis=0)
        k -= tl.sum(tl.where(tl.arange(0, 256) > digit, bins, 0), axis=0)
        inside = tl.sum(tl.where(tl.arange(0, 256) == digit, bins, 0), axis=0)
        prefix = (prefix << 8) | digit.to(tl.uint64)
    return prefix << shift.to(tl.uint64)


@triton.jit
def thin(room, count, k, slack, BLOCK: tl.constexpr):
    """Leaves the k best entries of a room, and at most `slack` more -> (what they all reach, how many there are)."""
    tl.debug_barrier()  # all entries are there
    bound = kth_standing(room, count, k, slack, BLOCK)
    left = count * 0
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        entry = tl.load(room + i, mask=i < count, other=0)
        stays = ((i < count) & (standing(entry) >= bound)).to(tl.int32)
        slot = left + tl.cumsum(stays, axis=0) - 1
        tl.debug_barrier()  # everyone has read its entries: those before may be written over
        tl.store(room + slot, entry, mask=stays > 0)
        left += tl.sum(stays, axis=0)
    tl.debug_barrier()
    return bound, left


@triton.jit
def rescue_rows(q, k, weights, k_scale, starts, ends, q_starts, room, state, T, T_all, S, top_k, q_b, q_h, q_t, k_b, k_s, w_b, w_h, w_t, scale_b, position,
                H: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, ACT: tl.constexpr,
                CAUSAL: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr):
    """Program (row): where its bound failed, its candidates from all of its scores. The room is thinned to top_k whenever it may overflow: the worst of those is a bound that cannot fail, however the row is made."""
    r = tl.program_id(0)
    state += r.to(tl.int64) * STATE
    count = tl.load(state)
    if (count > CAPACITY) | ((count < top_k) & (tl.load(state + 4) != 0)):
        b, t = r // T, r % T
        lo, hi = index_score.key_window(starts, ends, q_starts, b, T_all, t, S, position, 0, CAUSAL, t < T)
        i, h, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
        queries = q + b.to(tl.int64) * q_b + h.to(tl.int64)[:, None] * q_h + t.to(tl.int64) * q_t + d[None, :]
        query = widen(tl.load(queries, mask=(h < H)[:, None] & (d < D)[None, :], other=0.0), DTYPE)
        weight = tl.load(weights + b.to(tl.int64) * w_b + h.to(tl.int64) * w_h + t.to(tl.int64) * w_t, mask=h < H, other=0.0)
        room += r.to(tl.int64) * WIDTH
        many = tl.maximum((CAPACITY - top_k) // (2 * BLOCK_S), 1)  # tiles between two looks at the count
        count = t * 0
        bound = (count + 1).to(tl.uint64) << 32
        end = (hi + BLOCK_S - 1) // BLOCK_S
        for first in range(lo // BLOCK_S, end, many):
            for tile in range(first, tl.minimum(first + many, end)):
                s = tile * BLOCK_S + i
                keys = k + b.to(tl.int64) * k_b + s.to(tl.int64)[:, None] * k_s + d[None, :]
                held = widen(tl.load(keys, mask=(s < S)[:, None] & (d < D)[None, :], other=0.0), DTYPE)
                if k_scale is not None:
                    scale = tl.load(k_scale + b.to(tl.int64) * scale_b + s, mask=s < S, other=0.0)
                score = tl.gather(index_score.score_of(held, query, weight, None, h, H, BLOCK_H, ACT), i, 0)  # to a thread a score, once
                if k_scale is not None:
                    score = score * scale
                entry = entry_of(score, s)
                passes = ((s >= lo) & (s < hi) & (standing(entry) >= bound)).to(tl.int32)
                tl.store(room + count + tl.cumsum(passes, axis=0) - 1, entry, mask=passes > 0)
                count += tl.sum(passes, axis=0)
            if count + many * BLOCK_S > CAPACITY:
                bound, count = thin(room, count, top_k, (CAPACITY - top_k) // 8, min(CAPACITY, 1024))
        tl.store(state, count)


@triton.jit
def pick_rows(room, state, starts, ends, q_starts, out, lengths, T, T_all, S, k, position, CAUSAL: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr, ROOM: tl.constexpr, WORDS: tl.constexpr):
    """Program (row): the k best of its candidates. ROOM >= k and 32 * WORDS >= S are powers of two; without WORDS positions are sorted."""
    r = tl.program_id(0)
    b, t = r // T, r % T
    lo, hi = index_score.key_window(starts, ends, q_starts, b, T_all, t, S, position, 0, CAUSAL, t < T)
    hi = tl.maximum(lo, hi)
    item = b.to(tl.int64) * T_all + t
    answer = out + item * k
    count = tl.load(state + r.to(tl.int64) * STATE)
    written = t * 0
    if hi - lo <= k:
        written = take_all(lo, hi, answer, 1024)
    else:
        i = tl.arange(0, CAPACITY)
        entry = tl.load(room + r.to(tl.int64) * WIDTH + i, mask=i < count, other=0)
        at = entry.to(tl.int32)
        keys = tl.where(i < count, order_keys((entry >> 32).to(tl.int32)), 0)
        chosen = keys > 0
        written = tl.minimum(count, k)
        if count > k:
            bound, passed_ = kth_key(keys, count, k, 0)
            chosen = keys >= bound
            if passed_ > k:  # more equal scores at the end than are wanted
                chosen = (keys > bound) | first_of(keys == bound, at, k - tl.sum((keys > bound).to(tl.int32), axis=0))
        if WORDS:
            put_in_order(room.to(tl.pointer_type(tl.int32)) + r.to(tl.int64) * (2 * WIDTH), at, chosen, answer, WORDS)
        else:
            slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(answer + slot, at, mask=chosen)
            tl.debug_barrier()
            place = tl.arange(0, ROOM)
            sorted_ = tl.sort(tl.load(answer + place, mask=place < written, other=0x7FFFFFFF))
            tl.debug_barrier()
            tl.store(answer + place, sorted_, mask=place < written)
    pad(answer, answer, written, k, 1024, False)
    tl.store(lengths + item, written)
