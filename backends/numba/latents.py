"""The fp8 layout of latent caches: the tokens that a call names, once each, as rows of the queries' type for kernels that read such.

    rows [N,bytes] uint8, numbers [n] int64  ->  [n,R + P]        bytes of a token: R float8_e4m3fn, R/128 float32 scales, P bfloat16

Each value times its scale is rounded once, as the cache's gather() rounds it. Tokens that nobody names are not read.
"""
import numba
import numpy as np

from sparsetile.backends.numba.convert import CODE
from sparsetile.backends.numba.far import far, make_record, on_threads, record_at, scratch
from sparsetile.backends.numba.rows import load_row, store_row
from sparsetile.backends.numba.simd import address, get_f32, get_i64, next_task, put_f32

GROUP, RUN, SMALL = 128, 64, 256  # values that share a scale; rows of a task; rows that one thread converts faster than others are woken
JOB = np.dtype([(name, "i8") for name in ("counter", "rows", "step", "numbers", "count", "R", "P", "code", "out", "out_step", "wide", "memory", "memory_step")])
job_at = record_at(JOB)
FLOAT8, BFLOAT16 = CODE["float8_e4m3fn"], CODE["bfloat16"]


def refusal(kinds):
    """Why latents in bytes are not read for these element types of q, k, v."""
    if "latent_fp8" in kinds and kinds[0] not in CODE:
        return f"numba reads the fp8 layout of a latent cache for queries of float32, float16 and bfloat16, not {kinds[0]}; pass cache.gather()"
    return None


@far("ii")
def work(jobs, thread):
    """One thread: runs of rows until there are none left."""
    job = job_at(jobs)
    wide = job.memory + job.memory_step * thread + job.wide
    while True:
        first = next_task(job.counter) * RUN
        if first >= job.count:
            break
        for n in range(first, min(job.count, first + RUN)):
            row = job.rows + get_i64(job.numbers, n) * job.step
            load_row(FLOAT8, row, job.R, wide, job.R)
            for d in range(job.R):
                put_f32(wide, d, get_f32(wide, d) * get_f32(row + job.R, d // GROUP))
            load_row(BFLOAT16, row + job.R + 4 * (job.R // GROUP), job.P, wide + 4 * job.R, job.P)
            store_row(job.code, wide, job.R + job.P, job.out + n * job.out_step)


def numbers_of(chosen, most: int):
    """(numbers [n] int64 that stand in `chosen`, each once, ascending; chosen with each as its place among them). What is not one of 0 .. most - 1 becomes -1."""
    legal = (chosen >= 0) & (chosen < most)
    used = np.zeros(most, bool)
    used[chosen[legal]] = True
    place = np.cumsum(used, dtype=np.int32) - 1
    return np.flatnonzero(used), np.where(legal, place[np.where(legal, chosen, 0)], np.int32(-1)).astype(np.int32)


def converted(rows, numbers, kind, R: int, P: int):
    """rows [N,bytes], numbers [n] -> [n,R + P]; of no row one of zeros, for every kernel has a key to point at."""
    out = np.empty((len(numbers), R + P), kind) if len(numbers) else np.zeros((1, R + P), kind)
    counter = np.zeros(1, np.int64)
    job = make_record(JOB, dict(counter=address(counter), rows=address(rows), step=rows.strides[0], numbers=address(numbers), count=len(numbers), R=R, P=P, code=CODE[out.dtype.name],
                                out=address(out), out_step=out.strides[0]))
    threads = numba.get_num_threads() if len(numbers) > SMALL else 1
    _memory = scratch(job, threads, wide=4 * (R + P) + 64)
    on_threads(work, job, threads)
    return out


def selected(k, indices, kind, latent):
    """Rows of a pool k [B,1,N,bytes], whose batches are one memory, and entries of granularity 1 -> (k [B,1,n,R + P], v its first R columns, entries)."""
    numbers, indices = numbers_of(indices, k.shape[2])
    keys = converted(k[0, 0], numbers, kind, *latent)
    keys = np.broadcast_to(keys, (k.shape[0], 1, *keys.shape))
    return keys, keys[..., :latent[0]], indices


def in_pages(k, table, kv_length, kind, latent):
    """Pages k [N,1,page,bytes] and their table [B,pages] -> (k [n,1,page,R + P], v its first R columns, table). Pages past kv_length are left out."""
    page = k.shape[2]
    if kv_length is not None:
        table = np.where(np.arange(table.shape[1]) < -(-np.asarray(kv_length, np.int64)[:, None] // page), table, np.int32(-1))
    numbers, table = numbers_of(table, len(k))
    rows = np.lib.stride_tricks.as_strided(k, (len(k) * page, k.shape[3]), (k.strides[2], 1)) if k.strides[0] == page * k.strides[2] else np.ascontiguousarray(k).reshape(-1, k.shape[3])
    keys = converted(rows, (numbers[:, None] * page + np.arange(page)).ravel(), kind, *latent)
    keys = keys.reshape(-1, 1, page, keys.shape[1]) if len(numbers) else np.zeros((1, 1, page, keys.shape[1]), keys.dtype)
    return keys, keys[..., :latent[0]], table
