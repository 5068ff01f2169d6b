"""One call of attention over selected keys as compiled code sees it: a record of addresses, byte steps and sizes, and which keys a query names.

Heads that share a list of entries and a key head form a unit: `units` = max(G, Hk) of them, each of `heads` query heads.
"""
import math

import numpy as np

from sparsetile.backends.numba.far import make_record, record_at
from sparsetile.backends.numba.gather_tiles import WIDE, scale_row
from sparsetile.backends.numba.job import code_of, first_position, key_limit
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.rows import load_row
from sparsetile.backends.numba.selector import put_i64
from sparsetile.backends.numba.simd import LANES, address, get_i32, get_i64

_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
GATHER = np.dtype(
    [(f"{name}{part}", "i8") for name in _TENSORS for part in ("", "_b", "_h", "_t", "_code")]
    + [(name, "i8") for name in (
        "lse", "delta", "B", "Hq", "Hk", "G", "T", "S", "K", "D", "Dv", "kv_length", "q_start", "q_start_mode", "sink", "capped",
        "indices", "lengths", "granularity", "causal", "units", "heads", "split", "counter", "shared", "here_k", "here_v", "Dp", "Dvp", "row",
        "k_size", "v_size",
        "bins", "room", "first", "last", "list", "numbers", "offsets", "p", "ds", "left_q", "left_o", "sum_k", "sum_v", "odd",
        "constants", "lost", "memory", "memory_step", "keys", "rows", "more_rows", "head_q", "head_o", "s", "state", "k_rows", "v_rows")]
    + [(name, "f8") for name in ("scale", "softcap", "unit", "sign")])
"""x: address of a tensor [B, H, T or S, width]; x_b, x_h, x_t: bytes from batch to batch, head to head, row to row; x_code: its element type.
here_k, here_v: rows are read where they stand; shared: V is the first columns of K. row: float32 of a scratch row of K. Absent: 0."""
job_at = record_at(GATHER)


def up(x: int, step: int) -> int:
    return -(-x // step) * step


def make_gather(indices, *, lengths, granularity, causal, scale, softcap, kv_length, q_start, sink_logits=None, lse=None, delta=None, **tensors):
    """(record [1], arrays to keep alive while it is used). tensors: q, k, v and what else of _TENSORS the call has."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    (B, Hq, T, D), (_, Hk, S, Dv), G = q.shape, v.shape, indices.shape[1]
    units = max(G, Hk)
    # scores times sign times unit are natural logarithms; a softcap takes the scale in
    unit, sign = (abs(scale), math.copysign(1, scale)) if scale else (1.0, 0.0)
    values = dict(B=B, Hq=Hq, Hk=Hk, G=G, T=T, S=S, K=indices.shape[3], D=D, Dv=Dv, capped=softcap is not None, softcap=softcap or 0.0, scale=scale,
                  granularity=granularity, causal=int(causal), units=units, heads=Hq // units, split=Hq // units, sign=sign)
    for name, x in tensors.items():
        steps = x.strides[:3]
        values |= {name: address(x), f"{name}_code": code_of(x.dtype), **{f"{name}_{axis}": step for axis, step in zip("bht", steps)}}
    shared = values["v"] == values["k"] and v.dtype == k.dtype and v.strides == k.strides and Dv <= D
    Dvp, Dp = up(Dv, WIDE), up(D, LANES)
    values |= dict(Dp=Dp, Dvp=Dvp, row=up(D, WIDE), here_k=k.dtype == np.float32 and D == Dp and not (shared and Dv != Dvp),
                   here_v=v.dtype == np.float32 and Dv == Dvp, shared=shared, k_size=k.itemsize, v_size=v.itemsize)
    arrays = dict(indices=indices, lengths=lengths, kv_length=kv_length, lse=lse, delta=delta, counter=np.zeros(1, np.int64),
                  sink=None if sink_logits is None else np.ascontiguousarray(sink_logits, np.float32))
    if q_start is None:
        values["q_start_mode"] = 2
    elif np.ndim(q_start) == 0:
        values["q_start"] = int(q_start)
    else:
        values["q_start_mode"] = 1
        arrays["q_start"] = q_start
    values |= {name: address(x) for name, x in arrays.items()}
    outer = inner = 0.0
    slope = unit
    if softcap is not None:
        outer, inner, unit = softcap, abs(scale) / softcap, 1.0
    values |= dict(unit=unit)
    c, largest = unit * math.log2(math.e), float(np.finfo(np.float32).max)
    # c, the softcap outside and inside of tanh, the scale of dS, that of scores
    arrays["constants"] = np.array([min(c, largest), outer, inner, slope, min(unit, largest)], np.float32)
    values["constants"] = address(arrays["constants"])
    return make_record(GATHER, values), [arrays, tensors]


@kernel
def named_keys(job, b, unit, t, keys):
    """Keys that the entries of a query stand for -> int64 at `keys`, in their order, as often as they are named. Returns how many.
    Whatever an entry holds: what lies outside of 0 .. limit is passed over."""
    limit = key_limit(job, b)
    if job.causal:
        limit = min(limit, first_position(job, b) + t + 1)
    g = unit * job.G // job.units
    row = (b * job.G + g) * job.T + t
    count = job.K
    if job.lengths != 0:
        count = min(max(get_i32(job.lengths, row), 0), count)
    entries, found, step = job.indices + 4 * row * job.K, 0, job.granularity
    for n in range(count):
        s = get_i32(entries, n) * step
        if s >= 0:
            for x in range(s, min(s + step, limit)):
                put_i64(keys, found, x)
                found += 1
    return found


@kernel
def unit_of(job, unit):
    """First query head of a unit, and its key head."""
    h = unit * job.heads
    return h, h // (job.Hq // job.Hk)


@kernel
def place_rows(base, step, code, width, padded, here, keys, count, scratch, row_step, rows):
    """Addresses of `count` rows -> rows, repeating the last up to a multiple of four: where they stand, or converted into scratch."""
    for n in range(count):
        at = base + get_i64(keys, n) * step
        if here == 0:
            to = scratch + n * row_step
            load_row(code, at, width, to, padded)
            at = to
        put_i64(rows, n, at)
    for n in range(count, (count + 3) & ~3):
        put_i64(rows, n, get_i64(rows, count - 1))


@kernel
def load_heads(job, base, head_step, code, h, heads, width, padded, sign, target):
    """Rows of `heads` heads -> float32 [heads, padded], times sign."""
    for r in range(heads):
        row = target + 4 * padded * r
        load_row(code, base + (h + r) * head_step, width, row, padded)
        if sign != 1:
            scale_row(row, padded, np.float32(sign))
