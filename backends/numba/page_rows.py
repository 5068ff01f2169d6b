"""Entries of a selection as rows of a cache's pool, on the CPU, in one pass.

    indices [B,G,T,K] int32  table [B,pages] int32  kv_length [B] int32  lengths [B,G,T] int32 or None  ->  rows [B,G,T,K * granularity] int32

Entry e stands for keys e * granularity ... + granularity - 1; key s of sequence b is row table[b, s // page_size] * page_size + s % page_size. -1 for what does not exist: past
`lengths`, outside the sequence's keys, past the query where causal (query t stands at q_start + t, by default at kv_length - T + t), in a page that is none of 0 .. pages_of_pool - 1.

A task is one list.
"""
import numba
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.far import far, make_record, on_threads, record_at
from sparsetile.backends.numba.simd import address, get_i32, next_task, put_i32

TUNABLES = ()
SMALL = 1 << 14  # rows that one thread finds faster than others are woken
JOB = np.dtype([(name, "i8") for name in ("counter", "indices", "table", "kv_length", "lengths", "starts", "rows", "B", "G", "T", "K", "pages", "page", "N", "granularity", "causal",
                                          "start", "from_length")])
job_at = record_at(JOB)


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=1)


def default_config(problem):
    return {}


@far("iiiiii")
def find_rows(jobs, line, b, count, limit, last):
    """The rows of one list: `count` of its entries, keys below `limit` and not past `last`."""
    job = job_at(jobs)
    to = line * job.K * job.granularity
    for e in range(job.K):
        entry = get_i32(job.indices, line * job.K + e) if e < count else -1
        for g in range(job.granularity):
            key, row = np.int64(entry) * job.granularity + g, -1
            if entry >= 0 and key < limit and key <= last:
                page = np.int64(get_i32(job.table, b * job.pages + key // job.page))
                if page >= 0 and page < job.N:
                    row = page * job.page + key % job.page
            put_i32(job.rows, to + e * job.granularity + g, row)


@far("ii")
def work(jobs, thread):
    """One thread: lists until there are none left."""
    job = job_at(jobs)
    while True:
        line = next_task(job.counter)
        if line >= job.B * job.G * job.T:
            break
        b, t = line // (job.G * job.T), line % job.T
        limit = min(max(np.int64(get_i32(job.kv_length, b)), 0), job.pages * job.page)
        start = limit - job.T if job.from_length else job.start if job.starts == 0 else np.int64(get_i32(job.starts, b))
        count = job.K if job.lengths == 0 else np.int64(get_i32(job.lengths, line))
        find_rows(jobs, line, b, count, limit, start + t if job.causal else limit)


def run(indices, table, kv_length, *, place, config, page_size, pages_of_pool, lengths=None, granularity=1, causal=False, q_start=None):
    B, G, T, K = indices.shape
    rows, counter = place.empty((B, G, T, K * granularity), "int32"), np.zeros(1, np.int64)
    given = None if q_start is None or isinstance(q_start, int) else q_start
    job = make_record(JOB, dict(
        counter=address(counter), indices=address(indices), table=address(table), kv_length=address(kv_length), lengths=0 if lengths is None else address(lengths),
        starts=0 if given is None else address(given), rows=address(rows), B=B, G=G, T=T, K=K, pages=table.shape[1], page=page_size, N=pages_of_pool, granularity=granularity,
        causal=int(causal), start=q_start if given is None and q_start is not None else 0, from_length=int(q_start is None)))
    on_threads(work, job, numba.get_num_threads() if rows.size > SMALL else 1)
    return rows
