"""New rows of a cache, quantised and scattered through a page table, on the CPU.

    rows [B,n,...]  pools [N,page,...]  table [B,pages] int32  lengths [B] int32  counts [B] int32 or None  ->  written into the pools, in place

Row i < counts[b] of sequence b stands at position p = lengths[b] + i, in slot p; in a ring (pinned, window) in slot p < pinned ? p : pinned + (p - pinned) % window,
and of the rows that fall on one slot the last is written. A row whose slot lies outside the table, or whose page is not one of 0 .. N - 1, is skipped.
    "copy"         rows[x] [B,n,H,C] -> pools[x] [N,page,H,C], the same bits
    "latent_fp8"   rows (latent [B,n,R], rotary [B,n,P]) -> R float8_e4m3fn, R/128 float32 scales, P bfloat16 a token
    "indexer_fp8"  rows[0] [B,n,D] -> D float8_e4m3fn of each key of a page, then a float32 scale of each
A group of values (128 of a latent, a whole key) is float8(x / scale), nearest even, scale = max |x| / 448 (power_of_two: the next one); NaN or inf make it all NaN.

A task is one row of the call; rows share no slot, so the order of tasks does not matter. Many sequences may share a page only where their owner wrote a wrong table.
"""
import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.convert import CODE
from sparsetile.backends.numba.far import far, make_record, on_threads, record_at, scratch
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.rows import copy_bytes, load_row, store_row
from sparsetile.backends.numba.simd import address, get_f32, get_i32, next_task, put_f32, put_i32

TUNABLES = ()
COPY, LATENT, INDEXER = 0, 1, 2
FORM = {"copy": COPY, "latent_fp8": LATENT, "indexer_fp8": INDEXER}
FLOAT8, BFLOAT16 = CODE["float8_e4m3fn"], CODE["bfloat16"]
SMALL = 1 << 16  # bytes that one thread writes faster than others are woken
LARGEST, TINY, NAN = np.float32(448), np.finfo(np.float32).tiny, np.float32(np.nan)

_SIDES = ("from0", "from1", "to0", "to1")
JOB = np.dtype([(f"{side}{part}", "i8") for side in _SIDES for part in ("", "_b", "_n", "_h", "_bytes")] + [(name, "i8") for name in (
    "counter", "B", "n", "N", "form", "pairs", "heads0", "heads1", "code", "D", "P", "group", "page", "table", "table_b", "pages", "lengths", "lengths_b", "counts", "counts_b",
    "ring", "pinned", "window", "power", "memory", "memory_step", "values", "scale")])
"""from0, from1: rows; to0, to1: pools; _b, _n, _h: bytes from batch to batch (page to page), row to row, head to head; _bytes: of a head's row. Absent: 0."""
job_at = record_at(JOB)


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=1)


def default_config(problem):
    return {}


@kernel
def slot_of(job, start, i, count):
    """Slot of row i, -1 where none is written."""
    p = start + i
    if p < 0 or i >= count:
        return -1
    if job.ring == 0 or p < job.pinned:
        return p
    return job.pinned + (p - job.pinned) % job.window if p + job.window >= start + count else -1


@far("iiiiii")
def quantise(jobs, memory, source, count, values, scale_at):
    """`count` values of the job's type at `source` -> float8 at `values`, float32 scale at `scale_at`."""
    job = job_at(jobs)
    wide, at = memory + job.values, memory + job.scale
    load_row(job.code, source, count, wide, count)
    top, total = np.float32(0), np.float32(0)
    for d in range(count):
        x = get_f32(wide, d)
        top, total = max(top, abs(x)), total + np.float32(0) * x  # 0 * inf and 0 * NaN are NaN
    scale = max(top / LARGEST, TINY)
    put_f32(at, 0, scale)
    if job.power and get_i32(at, 0) & 0x7fffff:
        put_i32(at, 0, (get_i32(at, 0) & 0x7f800000) + 0x800000)
        scale = get_f32(at, 0)
    if total != 0:
        scale = NAN
    put_f32(scale_at, 0, scale)
    for d in range(count):
        put_f32(wide, d, min(max(get_f32(wide, d) / scale, -LARGEST), LARGEST) if total == 0 else NAN)
    store_row(FLOAT8, wide, count, values)


@far("iiiii")
def write_row(jobs, memory, b, i, slot):
    job = job_at(jobs)
    page, offset = slot // job.page, slot % job.page
    page = get_i32(job.table, b * job.table_b + page) if page < job.pages else -1
    if page < 0 or page >= job.N:
        return
    source, target = job.from0 + b * job.from0_b + i * job.from0_n, job.to0 + page * job.to0_b + offset * job.to0_n
    if job.form == COPY:
        for h in range(job.heads0):
            copy_bytes(source + h * job.from0_h, job.from0_bytes, target + h * job.to0_h)
        source, target = job.from1 + b * job.from1_b + i * job.from1_n, job.to1 + page * job.to1_b + offset * job.to1_n
        for h in range(job.heads1):
            copy_bytes(source + h * job.from1_h, job.from1_bytes, target + h * job.to1_h)
    elif job.form == INDEXER:
        quantise(jobs, memory, source, job.D, job.to0 + page * job.to0_b + offset * job.D, job.to0 + page * job.to0_b + job.page * job.D + 4 * offset)
    else:
        for g in range(job.D // job.group):
            quantise(jobs, memory, source + g * job.group * job.from0_bytes // job.D, job.group, target + g * job.group, target + job.D + 4 * g)
        if job.P > 0:
            load_row(job.code, job.from1 + b * job.from1_b + i * job.from1_n, job.P, memory + job.values, job.P)
            store_row(BFLOAT16, memory + job.values, job.P, target + job.D + 4 * (job.D // job.group))


@far("ii")
def work(jobs, thread):
    """One thread: rows until there are none left."""
    job = job_at(jobs)
    memory = job.memory + job.memory_step * thread
    while True:
        task = next_task(job.counter)
        if task >= job.B * job.n:
            break
        b, i = task // job.n, task % job.n
        count = job.n if job.counts == 0 else min(max(get_i32(job.counts, b * job.counts_b), 0), job.n)
        slot = slot_of(job, get_i32(job.lengths, b * job.lengths_b), i, count)
        if slot >= 0:
            write_row(jobs, memory, b, i, slot)


def _side(name, x, form):
    """Address and byte steps of rows or of a pool."""
    heads = form == "copy"
    return {name: address(x), f"{name}_b": x.strides[0], f"{name}_n": x.strides[1] if x.ndim > 2 else 0, f"{name}_h": x.strides[2] if heads else 0, f"{name}_bytes": x.shape[-1] * x.itemsize}


def run(rows, pools, table, lengths, *, place, config, form, page_size, counts=None, ring=None, power_of_two=False):
    B, n = rows[0].shape[:2]
    counter = np.zeros(1, np.int64)
    table = np.ascontiguousarray(table)
    values = dict(counter=address(counter), B=B, n=n, N=len(pools[0]), form=FORM[form], code=CODE.get(rows[0].dtype.name, 0), D=rows[0].shape[-1], group=128, page=page_size,
                  P=rows[1].shape[-1] if form == "latent_fp8" and len(rows) > 1 else 0, table=address(table), table_b=table.shape[1], pages=table.shape[1],
                  lengths=address(lengths), lengths_b=lengths.strides[0] // 4, power=int(power_of_two))
    if counts is not None:
        values |= dict(counts=address(counts), counts_b=counts.strides[0] // 4)
    if ring is not None:
        values |= dict(ring=1, pinned=ring[0], window=ring[1])
    for x, (row, name) in enumerate(zip(rows, ("from0", "from1"))):
        values |= _side(name, row, form)
        if form == "copy":
            values[f"heads{x}"] = row.shape[2]
    for pool, name in zip(pools, ("to0", "to1")):
        values |= _side(name, pool, form)
    job = make_record(JOB, values)
    threads = numba.get_num_threads() if sum(row.nbytes for row in rows) > SMALL else 1
    _memory = scratch(job, threads, values=4 * max(row.shape[-1] for row in rows), scale=4)
    on_threads(work, job, threads)
