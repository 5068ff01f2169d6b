"""The score of the lightning indexer, once for `indexer_scores` and `indexer_topk`: that is why both give the same bits.

score[t, s] = k_scale[s] * sum_h weights[h, t] * relu(q[h, t] . k[s]).   Lanes are keys, register rows are heads. Every score is one chain of
multiply-adds over D per head, then one over heads in their order: no tile size, window, batch or thread changes it.
"""
import numba
import numpy as np

from sparsetile.backends.numba.convert import CODE, F32_CODE
from sparsetile.backends.numba.far import far, record_at, scratch
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.rows import load_row, load_rows
from sparsetile.backends.numba.selector import FLOOR, window
from sparsetile.backends.numba.simd import F, LANES, REGISTERS, address, ask_row, get_f32, get_i32, get_i64, op, put_f32, transpose_tile

HEADS, VECTORS = 4, 3          # 12 accumulators, 3 keys' vectors, 1 broadcast: AVX2's 16 registers
MORE = HEADS * (2 if REGISTERS == 32 else 1)  # heads at a time while there are so many
KEYS = VECTORS * LANES         # of a panel [D, KEYS], which stays in the first cache while all queries of a tile pass over it
CHUNK = 8 * KEYS               # keys whose scores are held before they compete


def _score(e, q, q_step, weights, H, D, panel, scale, out, low):
    """KEYS scores of one query. q: rows of heads, q_step bytes apart, rows up to a multiple of HEADS readable."""
    b, low = e.b, e.splat(low)

    def group(heads, h, sums, all_there=True):
        acc = e.gemm(heads, VECTORS, e.add(q, e.mul(h, q_step)), q_step, 4, panel, 4 * KEYS, D)
        for r in range(heads):
            w = e.splat(e.load(weights, e.mul(e.add(h, r), 4), F))
            there = b.icmp_signed("<", e.add(h, r), H)  # a head that pads must not turn an infinite key into NaN
            # max(low, x) is x where x is NaN: it must be seen, so that it is never chosen
            new = [e.fma(e.max(low, acc[r * VECTORS + n]), w, s) for n, s in enumerate(sums)]
            sums = new if all_there else [b.select(there, x, s) for x, s in zip(new, sums)]
        return sums
    main = b.and_(H, e.i(-MORE))
    sums = e.loop(main, [e.f(0)] * VECTORS, lambda h, s: group(MORE, h, s), MORE)
    for n, x in enumerate(e.loop(b.sub(H, main), sums, lambda h, s: group(HEADS, e.add(main, h), s, False), HEADS)):
        e.store(b.fmul(x, e.load(scale, 4 * LANES * n)), out, 4 * LANES * n)


score_keys = op("iiiiiiiif", _score)


INDEXER = np.dtype([(name, "i8") for name in (
    "counter", "q", "q_b", "q_h", "q_t", "q_code", "k", "k_b", "k_s", "k_code", "weights", "k_scale", "key_start", "key_end", "causal", "q_start", "q_starts", "table", "table_b", "page", "pages", "scale_b",
    "B", "H", "T", "S", "D", "padded", "heads", "queries", "memory", "memory_step", "qf", "wf", "rows", "panel", "scale", "scores", "bounds",
    "given", "shares", "share", "state", "candidates", "room", "top_k", "keep", "pool", "force_first", "force_last", "forced", "parts",
    "indices", "lengths", "chosen", "out", "threads", "dscores", "dq", "dk", "dweights", "grads", "da", "dw", "dqf", "dkf", "row", "row_bytes", "blocks", "reach", "step")]
                   + [("low", "f8"), ("factor", "f8")])
"""x: address of an array; x_b, x_h, x_t, x_s: bytes from batch to batch, head to head, row to row; x_code: its element type. Absent: 0.
memory: float32 scratch of a thread, memory_step bytes; qf, wf, rows, panel, scale, scores: offsets in it. low: 0 for relu, else -inf."""
job_at = record_at(INDEXER)


@far("iiiii")
def load_queries(jobs, b, t0, count, memory):
    """Queries t0 .. t0 + count as float32: qf [count, heads, padded], wf [count, heads]; zeros past H."""
    job = job_at(jobs)
    for n in range(count):
        for h in range(job.heads):
            row = memory + job.qf + 4 * job.padded * (n * job.heads + h)
            there = h < job.H
            load_row(job.q_code, job.q + b * job.q_b + h * job.q_h + (t0 + n) * job.q_t, job.D if there else 0, row, job.padded)
            put_f32(memory + job.wf, n * job.heads + h, get_f32(job.weights, (b * job.H + h) * job.T + t0 + n) if there else np.float32(0))


@kernel
def page_of(job, b, s):
    """The page that holds key s, -1 in a hole of the page table."""
    page = get_i32(job.table, b * job.table_b + s // job.page)
    return page if page < job.pages else -1


@far("iiiii", "i")
def load_key(jobs, b, s, n, memory):
    """Key s (-1: zeros) as the n-th of the panel: rows [KEYS, padded], scale [KEYS]. 1 if the page table has a hole there, else 0."""
    job = job_at(jobs)
    page, hole = b, 0
    if job.table != 0 and s >= 0:
        page, s = page_of(job, b, s), s % job.page
        if page < 0:
            s, hole = -1, 1
    load_row(job.k_code, job.k + page * job.k_b + max(s, 0) * job.k_s, job.D if s >= 0 else 0, memory + job.rows + 4 * job.padded * n, job.padded)
    put_f32(memory + job.scale, n, get_f32(job.k_scale + page * job.scale_b, s) if job.k_scale != 0 and s >= 0 else np.float32(1))
    return hole


@far("iiii")
def turn_panel(jobs, rows, step, memory):
    """KEYS float32 rows [padded], `step` bytes apart -> panel [padded, KEYS]."""
    job = job_at(jobs)
    for n in range(0, KEYS, LANES):
        for d in range(0, job.padded, LANES):
            transpose_tile(rows + step * n + 4 * d, step, memory + job.panel + 4 * (KEYS * d + n), 4 * KEYS)


@far("iiiii", "i")
def load_keys(jobs, b, s, last, memory):
    """Keys s .. s + KEYS -> panel and scale; zeros from `last` on. How many of them lie in holes of the page table."""
    job = job_at(jobs)
    rows, step, holes = memory + job.rows, 4 * job.padded, 0
    if job.table == 0 and s + KEYS <= last:
        source = job.k + b * job.k_b + s * job.k_s
        if job.k_code == F32_CODE and job.D == job.padded:  # read in place
            rows, step = source, job.k_s
        else:
            load_rows(job.k_code, source, job.k_s, KEYS, job.D, job.padded, rows, step)
        for n in range(KEYS):
            put_f32(memory + job.scale, n, get_f32(job.k_scale + b * job.scale_b, s + n) if job.k_scale != 0 else np.float32(1))
    else:
        for n in range(KEYS):
            holes += load_key(jobs, b, s + n if s + n < last else -1, n, memory)
    turn_panel(jobs, rows, step, memory)
    return holes


@far("iiiiiii", "i")
def load_seen(jobs, b, t0, count, first, keys, memory):
    """Keys first .. first + keys -> rows, panel and scale; zeros for those that none of `count` queries from t0 on sees (job.bounds). How many are seen."""
    job = job_at(jobs)
    there = 0
    for n in range(KEYS):
        s = -1
        for t in range(t0, t0 + count if n < keys else t0):
            bounds = job.bounds + 16 * (b * job.T + t)
            if get_i64(bounds, 0) <= first + n and first + n < get_i64(bounds, 1):
                s = first + n
                there += 1
                break
        load_key(jobs, b, s, n, memory)
    if there > 0:
        turn_panel(jobs, memory + job.rows, 4 * job.padded, memory)
    return there


@far("iiiiiiiiii")
def score_chunk(jobs, b, t0, count, first, last, starts, ends, memory, fresh):
    """Scores of `count` queries from t0 on and keys first .. last -> memory's scores [count, CHUNK]. Keys outside a query's [starts, ends) hold anything.
    fresh: these queries are not in memory yet."""
    job = job_at(jobs)
    if fresh:
        load_queries(jobs, b, t0, count, memory)
    for s in range(first, last, KEYS):
        seen = False
        for n in range(count):
            seen |= get_i64(starts, n) < s + KEYS and get_i64(ends, n) > s
        if not seen:
            continue
        holes = load_keys(jobs, b, s, last, memory)
        ahead = job.k + b * job.k_b + (s + KEYS) * job.k_s if job.table == 0 and s + 2 * KEYS <= job.S else 0
        for n in range(count):
            for x in range(n * KEYS // count, (n + 1) * KEYS // count if ahead != 0 else 0):
                ask_row(ahead + x * job.k_s, job.row_bytes)
            if get_i64(starts, n) < s + KEYS and get_i64(ends, n) > s:
                score_keys(memory + job.qf + 4 * job.padded * job.heads * n, 4 * job.padded, memory + job.wf + 4 * job.heads * n, job.H, job.D,
                           memory + job.panel, memory + job.scale, memory + job.scores + 4 * (CHUNK * n + s - first), np.float32(job.low))
                for x in range(KEYS if holes > 0 else 0):
                    if s + x < last and page_of(job, b, s + x) < 0:
                        put_f32(memory + job.scores, CHUNK * n + s - first + x, FLOOR)


@kernel
def seen_by(job, b, t):
    """The keys [start, end) that query t of batch b sees."""
    start, end = window(b * job.T + t, job.key_start, job.key_end, job.S)
    if job.causal:
        first = job.q_start
        if job.q_starts != 0:
            first = get_i32(job.q_starts, b)
        end = min(end, first + t + 1)
    return start, max(start, end)


def make_indexer(q, k, weights, *, table=None, k_scale, key_start, key_end, causal, q_start, activation, row=CHUNK):
    """(record [1], arrays to keep alive while it is used). table [B,pages]: k [N,page,D] and k_scale [N,page] are pages. row: scores of a query that are held at a time."""
    (B, H, T, D), page, threads = q.shape, k.shape[1], numba.get_num_threads()
    S = page if table is None else page * table.shape[1]
    queries, padded, heads = tile_of(H, T), -(-D // LANES) * LANES, -(-H // HEADS) * HEADS
    each = not isinstance(q_start, (int, np.integer))
    job = np.zeros(1, INDEXER)
    memory = scratch(job, threads, qf=4 * queries * heads * padded, wf=4 * queries * heads, rows=4 * KEYS * padded, panel=4 * KEYS * padded, scale=4 * KEYS,
                     scores=4 * queries * row)
    alive = dict(table=table, counter=np.zeros(1, np.int64), bounds=np.empty((threads, 2, queries), np.int64),
                 q=q, k=k, weights=weights, k_scale=k_scale, key_start=key_start, key_end=key_end, q_starts=q_start if each else None)
    values = {name: address(x) for name, x in alive.items()}
    values |= dict(zip(("q_b", "q_h", "q_t"), q.strides)) | dict(zip(("k_b", "k_s"), k.strides))
    values |= dict(q_code=CODE.get(q.dtype.name, 0), k_code=CODE.get(k.dtype.name, 0), causal=int(causal), q_start=0 if each else int(q_start), B=B, H=H, T=T, S=S, D=D, threads=threads,
                   padded=padded, heads=heads, queries=queries, row=row, row_bytes=D * k.itemsize, low=0.0 if activation == "relu" else -np.inf)
    values |= dict(page=page, pages=len(k), table_b=0 if table is None else table.shape[1], scale_b=0 if k_scale is None else k_scale.strides[0])
    for name, x in values.items():
        job[name] = x
    return job, [alive, memory]


def wide_scores(q, k, weights, k_scale, activation, t0, t1):
    """float64 arguments: scores of queries t0 .. t1 of one batch with all its keys [t1 - t0, S], by NumPy. The same slices for both ops: the same bits."""
    total = np.zeros((t1 - t0, k.shape[0]))
    keys = k.astype(np.float64).T
    for h in range(q.shape[0]):
        product = q[h, t0:t1].astype(np.float64) @ keys
        if activation == "relu":
            product[product < 0] = 0
        total += weights[h, t0:t1, None] * product
    return (total if k_scale is None else total * k_scale).astype(np.float32)


def tile_of(H: int, T: int) -> int:
    """Queries that share a panel: enough rows to pay for transposing it, few enough to stay in the second cache."""
    return max(1, min(T, 32, -(-512 // H)))
