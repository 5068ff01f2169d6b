"""Parts of one attention joined by their LSE, in the given order: outs N x [B,Hq,T,Dv], lses N x [B,Hq,T], sink_logits [Hq] -> out, lse.

Rows are independent, so the answer does not depend on threads. Sums are float32 (float64 for float64 parts); a row that is empty in every part: out 0, lse -inf.
"""
import numpy as np
from numba import prange

from sparsetile.backends.arrays import numpy_dtype
from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.jit import kernel

TUNABLES = ()
FLOATS = ("float32", "float16", "bfloat16", "float64")


@kernel(parallel=True)
def join(outs, lses, sinks, heads, out, lse):
    """outs [N,rows,Dv], lses [N,rows], sinks [Hq], row r has head r // T % Hq with heads = (T, Hq)"""
    N, rows, _ = outs.shape
    for r in prange(rows):
        row = np.int64(r)
        sink = sinks[row // heads[0] % heads[1]]
        top = -np.inf
        for n in range(N):
            top = max(top, lses[n, row])
        if top == -np.inf:
            lse[row] = -np.inf
            out[row] = 0
            continue
        total = 0.0
        for n in range(N):
            total += np.exp(lses[n, row] - top)
        keys = top + np.log(total)
        lse[row] = keys
        most = max(keys, sink)
        whole = most if np.isinf(most) else most + np.log(np.exp(keys - most) + np.exp(sink - most))
        out[row] = 0
        for n in range(N):
            if lses[n, row] > -np.inf and whole < np.inf:
                share = outs.dtype.type(np.exp(lses[n, row] - whole))
                for d in range(outs.shape[2]):
                    out[row, d] += share * outs[n, row, d]


def supports(problem):
    kind = problem.dtype("out", "float32")
    return None if kind in FLOATS else f"the numba merge takes {', '.join(FLOATS)}, not {kind}; cast the parts"


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(outs, lses, *, place, config, sink_logits=None, out_dtype=None):
    B, Hq, T, Dv = outs[0].shape
    kind = numpy_dtype(out_dtype or outs[0].dtype.name)
    wide = np.float64 if outs[0].dtype == np.float64 else np.float32
    parts = np.stack([np.asarray(x, wide) for x in outs]).reshape(len(outs), B * Hq * T, Dv)
    logs = np.stack([np.asarray(x, np.float64) for x in lses]).reshape(len(outs), B * Hq * T)
    sinks = np.full(Hq, -np.inf) if sink_logits is None else sink_logits.astype(np.float64)
    out, lse = np.empty((B * Hq * T, Dv), wide), np.empty(B * Hq * T)
    join(parts, logs, sinks, (T, Hq), out, lse)
    return out.reshape(B, Hq, T, Dv).astype(kind, copy=False), lse.reshape(B, Hq, T).astype(wide)
