"""One call of block attention as compiled code sees it: a record of addresses, byte steps and sizes, and where its rows and keys stand.

A record spares compilations: element types, strides, orders, lengths and widths are values in it, so that one compiled kernel serves all.
"""
import math
import weakref
from functools import lru_cache

import numpy as np

from sparsetile.backends.numba.convert import CODE
from sparsetile.backends.numba.far import far, make_record, record_at
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import address, get_i32, put_i64

F64_CODE = 4
LARGEST = float(np.finfo(np.float32).max)
CODES = {**CODE, "float64": F64_CODE}

_TENSORS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_FIELDS = {name: tuple(name + part for part in ("", "_b", "_h", "_t", "_code")) for name in _TENSORS}
JOB = np.dtype(
    [(field, "i8") for fields in _FIELDS.values() for field in fields]
    + [(name, "i8") for name in (
        "lse", "delta", "B", "Hq", "Hk", "T", "S", "D", "Dv", "kv_length", "q_start", "q_start_mode", "sink", "capped",
        "block_q", "block_k", "first", "nq", "offsets", "cols", "kinds", "intervals", "bitmaps", "q_order", "k_order", "list_of", "list_b", "list_h",
        "table", "table_b", "page", "pool", "q_scale", "k_scale", "v_scale", "tiles", "counter", "lost", "odd", "panels", "Dp", "Dq", "Dvp", "width", "constants", "direct_k", "direct_v", "pairs", "stack", "shares", "cuts", "sums_k", "sums_v", "sum_rows", "owners", "touched", "touched_step", "turns",
        "memory", "memory_step", "rows", "flat", "qt", "ot", "s", "state", "words", "spans", "keys", "values", "saw", "gt", "q_rows", "g_rows", "p", "ds", "bounds", "asks", "dqt", "rows_lse", "more", "few", "few_step", "few_shares", "few_entries", "quads", "head", "heads")]
    + [(name, "f8") for name in ("scale", "softcap", "unit", "sign")])
"""x: address of a tensor [B, H, T or S, width]; x_b, x_h, x_t: bytes from batch to batch, head to head, row to row; x_code: its element type.
table: pages of each batch, table_b entries apart (0: none): key s lies in row table[s // page] * page + s % page of `pool` rows, k_b and v_b are 0. q_scale [B,Hq,T], k_scale and v_scale [B,Hk,ceil(S/128)]: float32, what rows of float8 are
multiplied by. tiles: blocks of queries of one batch and head. turns: threads that take them in turn. memory: scratch, in which the last line's names are offsets. What is absent is 0.
Scores times sign times unit are natural logarithms (a softcap takes the scale in)."""
job_at = record_at(JOB)
START_FROM_ARGUMENT, START_FROM_ARRAY, START_FROM_LENGTH = 0, 1, 2

code_of = lru_cache(maxsize=None)(lambda dtype: CODES[dtype.name])  # a dtype takes microseconds to say its name


def _int32(x):
    return None if x is None else np.ascontiguousarray(x).view(np.int32) if x.dtype == np.uint32 else np.ascontiguousarray(x, np.int32)


_LISTED = weakref.WeakKeyDictionary()


def _listed(lists):
    """(fields of the record, arrays) of a layout's lists, which serve many calls."""
    found = _LISTED.get(lists)
    if found is None:
        arrays = {name: _int32(getattr(lists, name)) for name in ("offsets", "cols", "kinds", "intervals", "bitmaps", "q_order", "k_order", "list_of")}
        rows, columns = arrays["list_of"].shape
        sizes = dict(block_q=lists.block_q, block_k=lists.block_k, first=lists.first, nq=lists.nq, list_b=columns if rows > 1 else 0, list_h=1 if columns > 1 else 0)
        found = _LISTED[lists] = {name: address(x) for name, x in arrays.items()} | sizes, arrays
    return found


def make_job(lists, *, scale, table=None, softcap=None, kv_length=None, q_start=None, sink_logits=None, lse=None, delta=None, scales=(None, None, None), **tensors):
    """(record [1], arrays to keep alive while it is used). tensors: q, k, v and what else of _TENSORS the call has. table [B,pages]: k, v are [N,Hk,page,width]."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    (B, Hq, T, D), (_, Hk, S, Dv) = q.shape, v.shape
    page, pool, S = S, len(v) * S, S if table is None else S * table.shape[1]
    listed, held = _listed(lists)
    values = dict(listed, B=B, Hq=Hq, Hk=Hk, T=T, S=S, D=D, Dv=Dv, capped=softcap is not None, scale=scale, softcap=softcap or 0.0, stack=1, page=page, pool=S if table is None else pool)
    for name, x in tensors.items():
        values.update(zip(_FIELDS[name], (address(x), *x.strides[:3], code_of(x.dtype))))
    if table is not None:
        values |= dict(k_b=0, v_b=0, table_b=table.shape[1])
    arrays = dict(table=_int32(table), kv_length=_int32(kv_length), lse=lse, delta=delta, counter=np.zeros(2, np.int64),
                  sink=None if sink_logits is None else np.ascontiguousarray(sink_logits, np.float32), **dict(zip(("q_scale", "k_scale", "v_scale"), scales)))
    if q_start is None:
        values["q_start_mode"] = START_FROM_LENGTH
    elif np.ndim(q_start) == 0:
        values["q_start"] = int(q_start)
    else:
        values["q_start_mode"] = START_FROM_ARRAY
        arrays["q_start"] = _int32(q_start)
    unit, sign = (abs(scale), math.copysign(1, scale)) if scale else (1.0, 0.0)  # scale 0: all scores 0
    slope, outer, inner = unit, 0.0, 0.0
    if softcap is not None:
        unit, outer, inner = 1.0, softcap, abs(scale) / softcap
    c = unit * math.log2(math.e)
    arrays["constants"] = np.array([min(c, LARGEST), outer, inner, slope], np.float32)
    values |= dict(unit=unit, sign=sign)
    values |= {name: address(x) for name, x in arrays.items()}
    values["odd"] = values["counter"] + 8
    values["tiles"] = lists.nq if lists.q_order is not None else _tiles(T, S, lists.block_q, kv_length, q_start)
    return make_record(JOB, values), [arrays, tensors, held]


def _tiles(T, S, block_q, kv_length, q_start) -> int:
    """Blocks of queries that the positions of a batch touch, at most."""
    if T and (isinstance(q_start, int) or q_start is None and kv_length is None):  # one start for all: without NumPy
        start = S - T if q_start is None else q_start
        return (start + T - 1) // block_q - start // block_q + 1
    if q_start is None:
        q_start = (S if kv_length is None else np.clip(kv_length, 0, S)) - T
    start = np.asarray(q_start, np.int64)
    return int(((start + T - 1) // block_q - start // block_q + 1).max(initial=0)) if T else 0


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
def tile_block(job, b, tile):
    """Block of the lists that a tile is, -1: in none."""
    if job.q_order != 0:
        return tile
    i = first_position(job, b) // job.block_q + tile - job.first
    return i if 0 <= i < job.nq else -1


@far("iiiii", "i")
def tile_rows(jobs, b, tile, rows, count):
    """int64 [count] at rows = the query t of each row of a tile, -1 where there is none. Returns how many there are."""
    job = job_at(jobs)
    start, block_q = first_position(job, b), job.block_q
    base = tile * block_q if job.q_order != 0 else (start // block_q + tile) * block_q
    real = 0
    for r in range(count):
        t = -1
        if r < block_q:
            p = base + r
            if job.q_order != 0:
                p = get_i32(job.q_order, p)
            t = p - start
            if t >= job.T or t < 0 or (job.q_order != 0 and p < 0):
                t = -1
            else:
                real += 1
        put_i64(rows, r, t)
    return real


@kernel
def list_block(job, b, h, i):
    """Entries of block i of the list of a batch and head: (first, first partial one, end)."""
    l = get_i32(job.list_of, b * job.list_b + h * job.list_h)
    x = 2 * (l * job.nq + i)
    return get_i32(job.offsets, x), get_i32(job.offsets, x + 1), get_i32(job.offsets, x + 2)


@kernel
def list_ends(job, b, h, i):
    """First and last key block of the list of block i, S and -1 if it has none; full ones and partial ones are each in order."""
    begin, partial, end = list_block(job, b, h, i)
    first, last = job.S, -1
    if begin < partial:
        first, last = get_i32(job.cols, begin), get_i32(job.cols, partial - 1)
    if partial < end:
        first, last = min(first, get_i32(job.cols, partial)), max(last, get_i32(job.cols, end - 1))
    return first, last


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
def table_of(job, b):
    """The page table of a batch, 0 where keys lie in order."""
    return job.table + 4 * b * job.table_b if job.table != 0 else 0


@kernel
def row_of(job, s, table):
    """Row of key s in memory, -1 in a hole of the page table."""
    if table == 0:
        return s
    page = get_i32(table, s // job.page)
    row = page * job.page + s % job.page
    return row if page >= 0 and row < job.pool else -1


@kernel
def scales_of(job, scales, b, j):
    """Where a key head's k_scale or v_scale begins, 0 without."""
    return scales + 4 * (b * job.Hk + j) * ((job.S + 127) >> 7) if scales != 0 else 0


@kernel
def run_of_keys(job, table, s, count):
    """Row of key s if `count` keys from it on lie in rows that follow each other, else -1."""
    first = row_of(job, s, table)
    if table != 0:
        for x in range((s // job.page + 1) * job.page, s + count, job.page):
            if row_of(job, x, table) != first + x - s:
                return -1
    return first


@kernel
def key_of(job, slot, limit, table):
    """Row in memory of the key at a slot of the key order, -1 where there is none."""
    s = slot
    if job.k_order != 0:
        s = get_i32(job.k_order, slot)
    return row_of(job, s, table) if 0 <= s < limit else -1
