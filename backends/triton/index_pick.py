"""The end of indexer_topk without scores in memory (index_keep.py): the k best of a row's candidates, and rows whose candidates do not hold them."""
import triton
import triton.language as tl

from sparsetile.backends.triton import index_score
from sparsetile.backends.triton.float8 import widen
from sparsetile.backends.triton.select import choose_by_radix, kth_key, order_keys, pad
from sparsetile.backends.triton.select_rows import take_all

STATE = tl.constexpr(8)  # int32 of a row, a sector of memory: candidates, bits of the two limits, the position up to which the first holds, the bound's key


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
def pick_rows(room, state, starts, ends, q_starts, out, lengths, T, T_all, S, k, position, CAUSAL: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr, ROOM: tl.constexpr, WORDS: tl.constexpr):
    """Program (row): the k best of its candidates; length -1 where they cannot be known. ROOM >= k and 32 * WORDS >= S are powers of two; without WORDS positions are sorted."""
    r = tl.program_id(0)
    b, t = r // T, r % T
    lo, hi = index_score.key_window(starts, ends, q_starts, b, T_all, t, S, position, 0, CAUSAL, t < T)
    hi = tl.maximum(lo, hi)
    item = b.to(tl.int64) * T_all + t
    answer = out + item * k
    count = tl.load(state + r.to(tl.int64) * STATE)
    bounded = tl.load(state + r.to(tl.int64) * STATE + 4) != 0
    written = t * 0 - 1
    if hi - lo <= k:
        written = take_all(lo, hi, answer, 1024)
    elif (count <= CAPACITY) & ((count >= k) | (bounded == 0)):
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
    if written >= 0:
        pad(answer, answer, written, k, 1024, False)
    tl.store(lengths + item, written)


@triton.jit
def rescue_rows(q, k, weights, k_scale, starts, ends, q_starts, scratch, out, lengths, rows, T, S, top_k, stride, q_b, q_h, q_t, k_b, k_s, w_b, w_h, w_t, scale_b, position,
                H: tl.constexpr, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, ACT: tl.constexpr,
                CAUSAL: tl.constexpr, EACH: tl.constexpr):
    """Rows of length -1, by one program each. scratch [programs, stride]"""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    scratch += pid.to(tl.int64) * stride
    i, h, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    for base in range(pid, rows, EACH * programs):
        mine = base + tl.arange(0, EACH) * programs
        if tl.min(tl.load(lengths + mine, mask=mine < rows, other=0), axis=0) < 0:
            for r in range(base, tl.minimum(base + EACH * programs, rows), programs):
                if tl.load(lengths + r) < 0:
                    b, t = r // T, r % T
                    lo, hi = index_score.key_window(starts, ends, q_starts, b, T, t, S, position, 0, CAUSAL, t < T)
                    queries = q + b.to(tl.int64) * q_b + h.to(tl.int64)[:, None] * q_h + t.to(tl.int64) * q_t + d[None, :]
                    query = widen(tl.load(queries, mask=(h < H)[:, None] & (d < D)[None, :], other=0.0), DTYPE)
                    weight = tl.load(weights + b.to(tl.int64) * w_b + h.to(tl.int64) * w_h + t.to(tl.int64) * w_t, mask=h < H, other=0.0)
                    for tile in range(lo // BLOCK_S, (hi + BLOCK_S - 1) // BLOCK_S):
                        s = tile * BLOCK_S + i
                        keys = k + b.to(tl.int64) * k_b + s.to(tl.int64)[:, None] * k_s + d[None, :]
                        held = widen(tl.load(keys, mask=(s < S)[:, None] & (d < D)[None, :], other=0.0), DTYPE)
                        product = tl.dot(held, tl.trans(query), input_precision="ieee")
                        part = index_score.weigh(product, weight[None, :], None, ACT)
                        if H % BLOCK_H:
                            part = tl.where((h < H)[None, :], part, 0.0)
                        score = tl.zeros((BLOCK_S,), tl.float32) + tl.sum(part, axis=1)
                        if k_scale is not None:
                            score = score * tl.load(k_scale + b.to(tl.int64) * scale_b + s, mask=s < S, other=0.0)
                        tl.store(scratch + s, score, mask=s < S)
                    tl.debug_barrier()
                    answer = out + (b.to(tl.int64) * T + t) * top_k
                    written = choose_by_radix(scratch, S, lo, hi, top_k, 0, S, answer, answer, 2048, False, False)
                    pad(answer, answer, written, top_k, 1024, False)
                    tl.store(lengths + r, written)
                    tl.debug_barrier()  # before another row's scores
