"""Rows times the weights of a head, for `latent_decompress` and `grouped_matmul`: float32 register tiles over weights packed once per task.

A task is one head and a run of rows. Its weights become panels [inner, COLUMNS] of float32, from any type and either order in memory; rows come ROWS at a time
as float32; each output element is one chain of multiply-adds per DEPTH inner elements, those summed in order, and is rounded once.
"""
import numba
import numpy as np

from sparsetile.backends.numba.convert import CODE
from sparsetile.backends.numba.far import far, make_record, on_threads, record_at, scratch
from sparsetile.backends.numba.gather_tiles import scale_row
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.rows import load_row, store_row, store_rows
from sparsetile.backends.numba.simd import I8, LANES, VECTORS, address, get_f32, next_task, op, transpose_tile

TILE = 6                      # times VECTORS: the accumulators that registers hold
COLUMNS = VECTORS * LANES
DEPTH = 8192 // COLUMNS       # a panel's part of 32 KB stays in the nearest cache
ROWS = 8 * TILE

PRODUCT = np.dtype([(name, "i8") for name in (
    "a", "a_b", "a_h", "a_t", "a_code", "scale", "B", "H", "T", "K", "run", "counter",
    "w0", "w0_h", "w0_k", "w0_n", "N0", "out0", "out0_b", "out0_h", "out0_t",
    "w1", "w1_h", "w1_k", "w1_n", "N1", "out1", "out1_b", "out1_h", "out1_t",
    "w_code", "w_size", "out_code", "out_size", "tail", "tail_b", "tail_h", "tail_t", "tail_code", "tail_bytes", "P",
    "memory", "memory_step", "flat", "tiles", "rows", "panels", "panels_step")])
"""a [B,H,T,K], scale [B,T,ceil(K/128)] of its groups; w0, w1: elements (k, n) of head h at w + h*w_h + k*w_k + n*w_n (bytes); out0 [..., N0 + P], the tail behind;
run: rows of a task. Absent: 0."""
job_at = record_at(PRODUCT)


def _tile(e, a, a_step, panel, depth, out, out_step, fresh):
    """TILE x COLUMNS of the output from `depth` inner elements: stored if fresh, else added."""
    acc = e.gemm(TILE, VECTORS, a, a_step, 4, panel, 4 * COLUMNS, depth)
    for r in range(TILE):
        for n in range(VECTORS):
            at, x = e.add(out, e.mul(out_step, r)), acc[r * VECTORS + n]
            old = e.load(at, 4 * LANES * n)
            e.store(e.b.select(e.b.icmp_signed("!=", fresh, e.i(0)), x, e.b.fadd(x, old)), at, 4 * LANES * n)


def _copy(e, source, target, count):
    e.loop(count, [], lambda k, _: (e.store(e.load(e.add(source, k), 0, I8), e.add(target, k)), [])[1])


product_tile = op("iiiiiii", _tile)
copy_bytes = op("iii", _copy)


@far("iiiiiiiii")
def pack(code, size, w, w_k, w_n, K, N, flat, panels):
    """Weights (k, n) -> panels [ceil(N / COLUMNS), K, COLUMNS], zeros past N. flat: scratch [COLUMNS, K padded]."""
    padded = (K + LANES - 1) // LANES * LANES
    for n in range(0, N, COLUMNS):
        panel = panels + 4 * K * n
        count = min(COLUMNS, N - n)
        if w_n == size or N == 1:
            for k in range(K):
                load_row(code, w + k * w_k + n * w_n, count, panel + 4 * COLUMNS * k, COLUMNS)
        else:
            for c in range(COLUMNS):
                load_row(code, w + (n + c) * w_n, K if c < count else 0, flat + 4 * padded * c, padded)
            for k in range(0, padded, LANES):
                for c in range(0, COLUMNS, LANES):  # the last rows run over into the next panel, which is written later
                    transpose_tile(flat + 4 * (padded * c + k), 4 * padded, panel + 4 * (COLUMNS * k + c), 4 * COLUMNS)


@far("iiiiiiii")
def multiply(a, a_step, count, K, panels, N, out, out_step):
    """`count` <= ROWS float32 rows [.., K] times panels -> out [ROWS, N padded]."""
    for n in range(0, N, COLUMNS):
        for k in range(0, K, DEPTH):
            for r in range(0, count, TILE):
                product_tile(a + r * a_step + 4 * k, a_step, panels + 4 * (K * n + COLUMNS * k), min(DEPTH, K - k), out + r * out_step + 4 * n, out_step, 1 if k == 0 else 0)


@kernel
def _load(job, h, row, target):
    """Row `row` (of all batches) as float32, its groups scaled."""
    K = job.K
    load_row(job.a_code, job.a + row // job.T * job.a_b + h * job.a_h + row % job.T * job.a_t, K, target, K)
    if job.scale != 0:
        groups = (K + 127) // 128
        for g in range(groups):  # whole vectors: what follows the row is not loaded yet
            scale_row(target + 512 * g, min(128, K - 128 * g), get_f32(job.scale, row * groups + g))


@kernel
def _tail(job, h, row, flat):
    """The tail of a row goes behind the first product."""
    b, t = row // job.T, row % job.T
    source, to = job.tail + b * job.tail_b + h * job.tail_h + t * job.tail_t, job.out0 + b * job.out0_b + h * job.out0_h + t * job.out0_t
    if job.tail_bytes > 0:
        copy_bytes(source, to + job.N0 * job.out_size, job.tail_bytes)
    else:
        load_row(job.tail_code, source, job.P, flat, job.P)
        store_row(job.out_code, flat, job.P, to + job.N0 * job.out_size)


@far("iiiiiii")
def _product(jobs, memory, h, start, count, a, a_step):
    """Both products of `count` rows from row `start` on, which stand at `a` as float32: into the output where whole register tiles fit it, else by way of scratch."""
    job = job_at(jobs)
    whole, tiles = start % job.T + ROWS <= job.T and count == ROWS, memory + job.tiles
    for part in range(2):
        out, out_b, out_h, out_t, N = (job.out0, job.out0_b, job.out0_h, job.out0_t, job.N0) if part == 0 else (job.out1, job.out1_b, job.out1_h, job.out1_t, job.N1)
        panels, step, base = memory + job.panels + part * job.panels_step, 4 * ((N + COLUMNS - 1) // COLUMNS * COLUMNS), out + h * out_h
        first = base + start // job.T * out_b + start % job.T * out_t
        if whole and job.out_code == 0 and N % COLUMNS == 0:
            multiply(a, a_step, count, job.K, panels, N, first, out_t)
            continue
        multiply(a, a_step, count, job.K, panels, N, tiles, step)
        if whole:
            store_rows(job.out_code, tiles, step, count, N, first, out_t)
        else:
            for n in range(count):
                store_row(job.out_code, tiles + step * n, N, base + (start + n) // job.T * out_b + (start + n) % job.T * out_t)


@far("ii")
def work(jobs, thread):
    """One thread: heads' runs of rows until there are none left."""
    job = job_at(jobs)
    K, total, memory = job.K, job.B * job.T, job.memory + job.memory_step * thread
    rows, flat, panels = memory + job.rows, memory + job.flat, memory + job.panels
    runs = (total + job.run - 1) // job.run
    while True:
        task = next_task(job.counter)
        if task >= job.H * runs:
            break
        h, first = task // runs, task % runs * job.run
        for part in range(2):
            w, w_k, w_n, N = (job.w0 + h * job.w0_h, job.w0_k, job.w0_n, job.N0) if part == 0 else (job.w1 + h * job.w1_h, job.w1_k, job.w1_n, job.N1)
            pack(job.w_code, job.w_size, w, w_k, w_n, K, N, flat, panels + part * job.panels_step)
        for start in range(first, min(first + job.run, total), ROWS):
            count, a, a_step = min(ROWS, total - start), rows, 4 * K
            if job.a_code == 0 and job.scale == 0 and count == ROWS and start % job.T + ROWS <= job.T:  # read in place
                a, a_step = job.a + start // job.T * job.a_b + h * job.a_h + start % job.T * job.a_t, job.a_t
            else:
                for n in range(count):
                    _load(job, h, start + n, rows + 4 * K * n)
            if job.P > 0:
                for n in range(count):
                    _tail(job, h, start + n, flat)
            _product(jobs, memory, h, start, count, a, a_step)


def run_product(rows, weights, outputs, *, scale=None, tail=None):
    """rows [B,H,T,K] times each of one or two weights [H,K,N] into outputs [B,H,T,N (+ P)], all NumPy; tail [B,H,T,P] goes behind the first product."""
    (B, H, T, K), threads = rows.shape, numba.get_num_threads()
    counter, total = np.zeros(1, np.int64), B * T
    # A run packs the weights anew: long ones, but enough of them for all threads.
    run = total if H >= 4 * threads else max(min(total, 512), -(-total * H // (4 * threads)))
    values = dict(a=address(rows), a_code=CODE[rows.dtype.name], scale=address(scale), B=B, H=H, T=T, K=K, run=-(-run // ROWS) * ROWS, counter=address(counter),
                  w_code=CODE[weights[0].dtype.name], w_size=weights[0].itemsize, out_code=CODE[outputs[0].dtype.name], out_size=outputs[0].itemsize)
    values |= dict(zip(("a_b", "a_h", "a_t"), rows.strides))
    for n, (w, out) in enumerate(zip(weights, outputs)):
        values |= {f"w{n}": address(w), **dict(zip((f"w{n}_h", f"w{n}_k", f"w{n}_n"), w.strides)), f"N{n}": w.shape[2]}
        values |= {f"out{n}": address(out), **dict(zip((f"out{n}_b", f"out{n}_h", f"out{n}_t"), out.strides))}
    if tail is not None:
        values |= dict(tail=address(tail), tail_code=CODE[tail.dtype.name], P=tail.shape[3], tail_bytes=tail.shape[3] * tail.itemsize * (tail.dtype == outputs[0].dtype),
                       **dict(zip(("tail_b", "tail_h", "tail_t"), tail.strides)))
    columns = -(-max(w.shape[2] for w in weights) // COLUMNS) * COLUMNS
    values["panels_step"] = 4 * (columns * K + COLUMNS * LANES)
    job = make_record(PRODUCT, values)
    # Whole vectors are scaled and transposed: a little more than a row or a panel.
    _memory = scratch(job, threads, rows=4 * (ROWS * K + LANES), tiles=4 * ROWS * columns, panels=2 * values["panels_step"],
                      flat=4 * max(COLUMNS * (K + LANES), 0 if tail is None else tail.shape[3]))
    on_threads(work, job, min(threads, -(-total // run) * H))
