"""Rows of few scores -> the positions of their few largest, ROWS rows a program in one launch: what `select_rows` does in three for rows of any length.

A round takes the largest of what is left, of equal ones the first (as floats are compared, -0.0 equals 0.0); after k rounds the positions are written in order.
"""
import triton
import triton.language as tl

WIDEST, MOST = 512, 32  # columns, and how many of them are chosen: a round reads a row once


@triton.jit
def row_window(starts, ends, q_starts, b, t, item, S, position, pool, force_first, force_last, CAUSAL: tl.constexpr):
    """Columns lo <= c < hi a row may choose from, and the forced ones: c < first or c >= last. All clamped to the row."""
    lo = t * 0
    hi = lo + S
    if starts is not None:
        lo = tl.minimum(tl.maximum(tl.load(starts + item), 0), S)
    if ends is not None:
        hi = tl.minimum(tl.maximum(tl.load(ends + item), 0), S)
    if CAUSAL:
        end = t.to(tl.int64) + 1 + position  # wide: positions may be any int32
        if q_starts is not None:
            end += tl.load(q_starts + b)
        hi = tl.minimum(hi, tl.maximum(tl.minimum(end, S), 0).to(tl.int32))
    hi = tl.maximum(hi, lo)
    block_lo = lo // pool
    block_hi = tl.where(hi > lo, (hi + pool - 1) // pool, block_lo)
    first = tl.minimum(force_first, block_hi - block_lo) + block_lo
    last = block_hi - tl.minimum(force_last, block_hi - block_lo)
    return block_lo, block_hi, first, last


@triton.jit
def few_columns(scores, starts, ends, q_starts, out, lengths, rows, T, T_all, S, k, stride_b, stride_t, position, pool, force_first, force_last, CAUSAL: tl.constexpr,
                FORCED: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, ROOM: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = r < rows
    r = tl.where(there, r, 0)
    b, t = r // T, r % T
    item = b.to(tl.int64) * T_all + t
    lo, hi, first, last = row_window(starts, ends, q_starts, b, t, item, S, position, pool, force_first, force_last, CAUSAL)
    c = tl.arange(0, WIDTH)[None, :]
    inside = there[:, None] & (c >= lo[:, None]) & (c < hi[:, None])
    low = float("-inf")
    s = tl.load(scores + (b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t)[:, None] + c, mask=inside, other=low)
    s = tl.where(s == s, s, low)
    chosen = inside & (c < 0)
    if FORCED:
        chosen = inside & ((c < first[:, None]) | (c >= last[:, None]))
    left = k - tl.sum(chosen.to(tl.int32), 1)
    for n in range(k):
        open_ = tl.where(chosen, low, s)
        top = tl.max(open_, 1)
        at = tl.min(tl.where((open_ == top[:, None]) & (chosen == 0), c, WIDTH), 1)
        chosen = chosen | ((c == at[:, None]) & ((top > low) & (n < left))[:, None])
    if ALL:
        chosen = tl.where((hi - lo <= k)[:, None], inside, chosen)
    place = tl.cumsum(chosen.to(tl.int32), 1) - 1
    tl.store(out + item[:, None] * k + place, c + tl.zeros([ROWS, WIDTH], tl.int32), mask=chosen)
    total = tl.sum(chosen.to(tl.int32), 1)
    rest = tl.arange(0, ROOM)[None, :]
    tl.store(out + item[:, None] * k + rest, tl.full([ROWS, ROOM], -1, tl.int32), mask=there[:, None] & (rest >= total[:, None]) & (rest < k))
    tl.store(lengths + item, total, mask=there)


def serves(columns: int, k: int) -> bool:
    return columns <= WIDEST and k <= MOST


def how(columns: int, k: int, causal: bool, forced: bool, everything: bool) -> dict:
    width = max(16, 1 << max(0, columns - 1).bit_length())
    return dict(CAUSAL=causal, FORCED=forced, ALL=everything, ROWS=max(4, 2048 // width), WIDTH=width, ROOM=1 << max(0, k - 1).bit_length(), num_warps=4)
