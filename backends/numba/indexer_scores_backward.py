"""Gradients of the scores of a lightning indexer.

    q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  k_scale [B,S]  key_start, key_end [B,T] int32  dscores [B,T,S] float32  ->  dq [B,H,T,D], dk [B,S,D], dweights [B,H,T] float32

With x = q . k and g = dscores * k_scale where the query sees the key, else 0: dweights = sum_s g relu(x), dA = g weights where x > 0, dq = dA k, dk = sum over heads and
queries of dA^T q. relu has slope 0 at 0. Two passes, x made in both: by queries for dq and dweights, by panels of keys for dk, each sum in one thread and one
order, so results do not depend on the number of threads. Keys that no query of a tile sees are not read.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.convert import fill_zero
from sparsetile.backends.numba.far import far, on_threads, scratch
from sparsetile.backends.numba.indexer_tile import HEADS, KEYS, VECTORS, job_at, load_queries, load_seen, make_indexer
from sparsetile.backends.numba.simd import F, LANES, address, get_f32, get_i64, next_task, op, put_f32

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def _slopes(e, q, q_step, weights, H, D, panel, grads, da, dw, low):
    """dA [heads, KEYS] of one query, and lane by lane its part of dweights added to dw [heads, LANES]. grads [KEYS]."""
    b, low = e.b, e.splat(low)
    g = [e.load(grads, 4 * LANES * n) for n in range(VECTORS)]

    def group(h, _):
        acc = e.gemm(HEADS, VECTORS, e.add(q, e.mul(h, q_step)), q_step, 4, panel, 4 * KEYS, D)
        for r in range(HEADS):
            head = e.add(h, r)
            w, total = e.splat(e.load(weights, e.mul(head, 4), F)), e.load(dw, e.mul(head, 4 * LANES))
            for n in range(VECTORS):
                x = acc[r * VECTORS + n]
                steep = b.fcmp_unordered(">", x, low)  # NaN must be seen
                e.store(b.select(steep, b.fmul(g[n], w), e.f(0)), da, e.add(e.mul(head, 4 * KEYS), 4 * LANES * n))
                total = b.select(steep, e.fma(x, g[n], total), total)
            e.store(total, dw, e.mul(head, 4 * LANES))
        return []
    e.loop(H, [], group, HEADS)


def _columns(e, rows, a, a_row, a_k, b_rows, step, K, out, width):
    """out [rows, width] += A B, A(r, k) at a + r*a_row + k*a_k; rows of B and out `step` bytes apart; width a multiple of LANES."""
    def part(count, first):
        at = e.add(out, e.mul(first, 4))
        for i, x in enumerate(e.gemm(rows, count, a, a_row, a_k, e.add(b_rows, e.mul(first, 4)), step, K)):
            to = e.add(at, e.mul(step, i // count))
            e.store(e.b.fadd(x, e.load(to, i % count * 4 * LANES)), to, i % count * 4 * LANES)
        return []
    whole = e.b.udiv(width, e.i(VECTORS * LANES))
    e.loop(whole, [], lambda n, _: part(VECTORS, e.mul(n, VECTORS * LANES)))
    left = e.mul(whole, VECTORS * LANES)
    e.loop(e.b.sub(width, left), [], lambda d, _: part(1, e.add(left, d)), LANES)


def _queries(e, da, rows, step, heads, dq, width):
    e.loop(heads, [], lambda h, _: (_columns(e, HEADS, e.add(da, e.mul(h, 4 * KEYS)), 4 * KEYS, 4, rows, step, KEYS, e.add(dq, e.mul(h, step)), width), [])[1], HEADS)


def _keys(e, da, qf, step, heads, dk, width):
    e.loop(KEYS, [], lambda s, _: (_columns(e, HEADS, e.add(da, e.mul(s, 4)), 4, 4 * KEYS, qf, step, heads, e.add(dk, e.mul(s, step)), width), [])[1], HEADS)


slopes = op("iiiiiiiiif", _slopes)
add_queries, add_keys = op("iiiiii", _queries), op("iiiiii", _keys)
lane_sum = op("i", lambda e, at: e.sum(e.load(at)), "f")


@far("iiiiii", "i")
def _grads(jobs, b, t, first, count, memory):
    """g of one query and the panel's keys -> grads [KEYS]; whether any is not 0."""
    job = job_at(jobs)
    bounds = job.bounds + 16 * (b * job.T + t)
    start, end, some = get_i64(bounds, 0), get_i64(bounds, 1), 0
    for n in range(KEYS):
        x = np.float32(0)
        if n < count and start <= first + n and first + n < end:
            x = get_f32(job.dscores, (b * job.T + t) * job.S + first + n) * get_f32(memory + job.scale, n)
            some |= x != 0
        put_f32(memory + job.grads, n, x)
    return some


@far("iiiiiii", "i")
def _slopes_of(jobs, b, t, n, first, count, memory):
    """dA of query t, the n-th in memory; 0 if it has none."""
    job = job_at(jobs)
    if _grads(jobs, b, t, first, count, memory) == 0:
        return 0
    slopes(memory + job.qf + 4 * job.padded * job.heads * n, 4 * job.padded, memory + job.wf + 4 * job.heads * n, job.H, job.D, memory + job.panel,
           memory + job.grads, memory + job.da, memory + job.dw + 4 * LANES * job.heads * n, np.float32(job.low))
    return 1


@far("ii")
def by_queries(jobs, thread):
    """One thread: tiles of queries, all keys each: dq, dweights."""
    job = job_at(jobs)
    memory, tiles, size = job.memory + job.memory_step * thread, (job.T + job.queries - 1) // job.queries, job.heads * job.padded
    while True:
        task = next_task(job.counter)
        if task >= job.B * tiles:
            break
        b, t0 = task // tiles, task % tiles * job.queries
        count = min(job.queries, job.T - t0)
        load_queries(jobs, b, t0, count, memory)
        fill_zero(memory + job.dqf, count * size)
        fill_zero(memory + job.dw, count * job.heads * LANES)
        fill_zero(memory + job.da, job.heads * KEYS)
        for first in range(0, job.S, KEYS):
            keys = min(KEYS, job.S - first)
            if load_seen(jobs, b, t0, count, first, keys, memory) == 0:
                continue
            for n in range(count):
                if _slopes_of(jobs, b, t0 + n, n, first, keys, memory) != 0:
                    add_queries(memory + job.da, memory + job.rows, 4 * job.padded, job.heads, memory + job.dqf + 4 * size * n, job.padded)
        for n in range(count):
            for h in range(job.H):
                at = (b * job.H + h) * job.T + t0 + n
                put_f32(job.dweights, at, lane_sum(memory + job.dw + 4 * LANES * (n * job.heads + h)))
                for d in range(job.D):
                    put_f32(job.dq, at * job.D + d, get_f32(memory + job.dqf, n * size + h * job.padded + d))


@far("ii")
def by_keys(jobs, thread):
    """One thread: panels of keys, all queries each: dk."""
    job = job_at(jobs)
    memory, panels = job.memory + job.memory_step * thread, (job.S + KEYS - 1) // KEYS
    while True:
        task = next_task(job.counter)
        if task >= job.B * panels:
            break
        b, first = task // panels, task % panels * KEYS
        keys = min(KEYS, job.S - first)
        fill_zero(memory + job.dkf, KEYS * job.padded)
        fill_zero(memory + job.da, job.heads * KEYS)
        if load_seen(jobs, b, 0, job.T, first, keys, memory) != 0:
            for t0 in range(0, job.T, job.queries):
                count = min(job.queries, job.T - t0)
                load_queries(jobs, b, t0, count, memory)
                for n in range(count):
                    if _slopes_of(jobs, b, t0 + n, n, first, keys, memory) != 0:
                        add_keys(memory + job.da, memory + job.qf + 4 * job.heads * job.padded * n, 4 * job.padded, job.heads, memory + job.dkf, job.padded)
        for n in range(keys):
            for d in range(job.D):
                put_f32(job.dk, (b * job.S + first + n) * job.D + d, get_f32(memory + job.dkf, n * job.padded + d))


def run(q, k, weights, dscores, *, place, config, k_scale=None, key_start=None, key_end=None, causal=True, q_start=0, activation="relu"):
    (B, H, T, D), S = q.shape, k.shape[1]
    dq, dk, dweights = place.empty((B, H, T, D), "float32"), place.empty((B, S, D), "float32"), place.empty((B, H, T), "float32")
    job, alive = make_indexer(q, k, weights, k_scale=k_scale, key_start=key_start, key_end=key_end, causal=causal, q_start=q_start, activation=activation)
    seen = np.empty((B, T, 2), np.int64)
    seen[..., 0] = 0 if key_start is None else np.maximum(key_start, 0)
    seen[..., 1] = S if key_end is None else np.minimum(key_end, S)
    if causal:
        seen[..., 1] = np.minimum(seen[..., 1], np.reshape(q_start, (-1, 1)).astype(np.int64) + np.arange(T) + 1)
    queries, heads, padded, threads = (int(job[name][0]) for name in ("queries", "heads", "padded", "threads"))
    _memory = scratch(job, threads, qf=4 * queries * heads * padded, wf=4 * queries * heads, rows=4 * KEYS * padded, panel=4 * KEYS * padded, scale=4 * KEYS, grads=4 * KEYS,
                      da=4 * heads * KEYS, dw=4 * LANES * queries * heads, dqf=4 * queries * heads * padded, dkf=4 * KEYS * padded)
    for name, x in dict(bounds=seen, dscores=dscores, dq=dq, dk=dk, dweights=dweights).items():
        job[name] = address(x)
    on_threads(by_queries, job)
    alive[0]["counter"][0] = 0
    on_threads(by_keys, job)
    return dq, dk, dweights
