"""One call of block attention as compiled code sees it: a record of addresses, byte steps and sizes, and where its rows and keys stand.

A record spares compilations: element types, strides, orders, lengths and widths are values in it, so that one compiled kernel serves all.
"""
import numpy as np

from sparsetile.backends.numba.convert import CODE
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import address, get_i32

F64_CODE = 4
CODES = {**CODE, "float64": F64_CODE}

_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
JOB = np.dtype(
    [(f"{name}{part}", "i8") for name in _TENSORS for part in ("", "_b", "_h", "_t", "_code")]
    + [(name, "i8") for name in (
        "lse", "delta", "B", "Hq", "Hk", "T", "S", "D", "Dv", "kv_length", "q_start", "q_start_mode", "sink", "capped",
        "block_q", "block_k", "first", "nq", "offsets", "cols", "kinds", "intervals", "bitmaps", "q_order", "k_order", "list_of", "list_b", "list_h",
        "tiles", "counter", "shares", "share_rows", "sums_k", "sums_v", "Dp", "Dvp")]
    + [(name, "f8") for name in ("scale", "softcap")])
"""x: address of a tensor [B, H, T or S, width]; x_b, x_h, x_t: bytes from batch to batch, head to head, row to row; x_code: its element type.
tiles: blocks of queries of one batch and head. Steps and addresses of what is absent are 0."""
KEYS_FROM_ARGUMENT, KEYS_FROM_ARRAY, KEYS_FROM_LENGTH = 0, 1, 2


def _int32(x):
    return None if x is None else np.ascontiguousarray(x).view(np.int32) if x.dtype == np.uint32 else np.ascontiguousarray(x, np.int32)


def make_job(lists, *, scale, softcap=None, kv_length=None, q_start=None, sink_logits=None, lse=None, delta=None, **tensors):
    """(record [1], arrays to keep alive while it is used). tensors: q, k, v and what else of _TENSORS the call has."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    (B, Hq, T, D), (_, Hk, S, Dv) = q.shape, v.shape
    job = np.zeros(1, JOB)
    values = dict(B=B, Hq=Hq, Hk=Hk, T=T, S=S, D=D, Dv=Dv, capped=softcap is not None, block_q=lists.block_q, block_k=lists.block_k,
                  first=lists.first, nq=lists.nq, scale=scale, softcap=softcap or 0.0)
    for name, x in tensors.items():
        steps = x.strides[:3]
        values |= {name: address(x), f"{name}_code": CODES[x.dtype.name], **{f"{name}_{axis}": step for axis, step in zip("bht", steps)}}
    arrays = {name: _int32(getattr(lists, name)) for name in ("offsets", "cols", "kinds", "intervals", "bitmaps", "q_order", "k_order", "list_of")}
    arrays |= dict(kv_length=_int32(kv_length), lse=lse, delta=delta, counter=np.zeros(1, np.int64),
                   sink=None if sink_logits is None else np.ascontiguousarray(sink_logits, np.float32))
    if q_start is None:
        values["q_start_mode"] = KEYS_FROM_LENGTH
    elif np.ndim(q_start) == 0:
        values["q_start"] = int(q_start)
    else:
        values["q_start_mode"] = KEYS_FROM_ARRAY
        arrays["q_start"] = _int32(q_start)
    values |= {name: address(x) for name, x in arrays.items()}
    rows, columns = arrays["list_of"].shape
    values |= dict(list_b=columns if rows > 1 else 0, list_h=1 if columns > 1 else 0)
    # A range of T positions touches one block more than it fills when it starts inside of one.
    values["tiles"] = lists.nq if lists.q_order is not None else (T + lists.block_q - 2) // lists.block_q + 1 if T else 0
    for name, x in values.items():
        job[name] = x
    return job, [arrays, tensors]


@kernel
def key_limit(job, b):
    """Keys at or past it do not exist."""
    if job.kv_length == 0:
        return job.S
    return min(max(get_i32(job.kv_length, b), 0), job.S)


@kernel
def first_position(job, b):
    if job.q_start_mode == 0:
        return job.q_start
    if job.q_start_mode == 1:
        return get_i32(job.q_start, b)
    return key_limit(job, b) - job.T


@kernel
def tile_rows(job, b, tile, rows):
    """rows[r] = the query t of each row of a tile, -1 where there is none. Returns its block i in the lists (-1: in none) and how many rows are real."""
    start, block_q = first_position(job, b), job.block_q
    if job.q_order != 0:
        i, base = tile, tile * block_q
    else:
        n = start // block_q + tile
        i, base = n - job.first, n * block_q
        if i < 0 or i >= job.nq:
            i = -1
    real = 0
    for r in range(rows.shape[0]):
        t = -1
        if r < block_q:
            p = base + r
            if job.q_order != 0:
                p = get_i32(job.q_order, p)
                t = p - start if p >= 0 else -1
            else:
                t = p - start
            if t >= job.T or t < 0:
                t = -1
            else:
                real += 1
        rows[r] = t
    return i, real


@kernel
def list_block(job, b, h, i):
    """Entries of block i of the list of a batch and head: (first, first partial one, end)."""
    l = get_i32(job.list_of, b * job.list_b + h * job.list_h)
    x = 2 * (l * job.nq + i)
    return get_i32(job.offsets, x), get_i32(job.offsets, x + 1), get_i32(job.offsets, x + 2)


@kernel
def row_word(job, kind, r, w):
    """The 32 keys from 32*w on that row r of a partial block sees, as bits."""
    if kind & 1:
        return get_i32(job.bitmaps, ((kind >> 1) * job.block_q + r) * (job.block_k >> 5) + w) & 0xFFFFFFFF
    base = ((kind >> 1) * job.block_q + r) * 2
    low = min(max(get_i32(job.intervals, base) - 32 * w, 0), 32)
    high = min(max(get_i32(job.intervals, base + 1) - 32 * w, low), 32)
    return ((1 << high) - 1) & ~((1 << low) - 1)


@kernel
def key_of(job, slot, limit):
    """The key at a slot of the key order, -1 where there is none."""
    s = slot
    if job.k_order != 0:
        s = get_i32(job.k_order, slot)
    return s if 0 <= s < limit else -1
