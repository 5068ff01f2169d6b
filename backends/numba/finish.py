"""The end of a tile of block attention: sums divided, rows written with their lse, rows that float32 could not hold marked."""
import math

import numpy as np

from sparsetile.backends.numba import tiles
from sparsetile.backends.numba.exact import row_factor
from sparsetile.backends.numba.far import far
from sparsetile.backends.numba.job import job_at
from sparsetile.backends.numba.panels import store_panel
from sparsetile.backends.numba.simd import get_f32, get_i32, get_i64, put_byte, put_f32, put_i64
from sparsetile.backends.numba.tiles import PANEL, STEP


@far("iiiii")
def write_tile(jobs, memory, b, h, inside):
    """Divide by the sums, write rows and their lse; mark rows that float32 could not hold."""
    job = job_at(jobs)
    Dv, width, flat = job.Dv, job.width, memory + job.flat
    unit = job.unit / np.float64(get_f32(job.constants, 0))  # of maxima in use; ln 2 but for the rounding of c
    for p in range(job.panels):
        rows, state, o = memory + job.rows + 8 * PANEL * p, memory + job.state + 4 * STEP * p, memory + job.ot + STEP * width * p
        full = get_i64(memory + job.rows, job.panels * (PANEL + 1) + p)
        if job.sink == 0:
            tiles.row_ends(state, unit)
        for n in range(PANEL if job.sink != 0 else 0):
            total = np.float64(get_f32(state, 2 * PANEL + n))
            top = np.float64(get_f32(state, PANEL + n)) * unit if total != 0 else -math.inf
            t = get_i64(rows, n)
            put_f32(state, n, np.float32(row_factor(job, h + t // job.T, top, total) if t >= 0 else 0.0))
            put_f32(state, PANEL + n, np.float32(top + math.log(total) if total > 0 else -math.inf))
        tiles.scale_panel(o, width, state, state + 3 * STEP)
        store_panel(o, width, flat, rows, job.out + b * job.out_b + h * job.out_h, job.out_h, job.out_t, job.T, job.out_code, Dv)
        for n in range(PANEL):
            t = get_i64(rows, n)
            if t >= 0:
                at = (b * job.Hq + h) * job.T + t
                put_f32(job.lse, at, get_f32(state, PANEL + n))
                seen = full != 0 or get_i32(memory + job.saw, p * PANEL + n) != 0
                if inside != 0 and (get_f32(state, 3 * PANEL + n) != 0 or seen and get_f32(state, 2 * PANEL + n) == 0):
                    put_byte(job.lost, at, 1)
                    put_i64(job.odd, 0, 1)
