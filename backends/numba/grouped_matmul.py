"""One small matrix per head: queries into the latent width, outputs out of it.

    x [B,H,T,N]  w [H,M,N] (one of its last two axes contiguous)  tail [B,H,T,P]  ->  [B,H,T,M+P]: out[..., m] = sum_n x[..., n] w[h,m,n], then the tail

Sums are float32, rounded once to out_dtype (x's); the tail is copied. float64 goes through NumPy.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.product import run_product

TUNABLES = ()


def supports(problem):
    if "inner_heads" in problem.features:
        return "Numba multiplies heads one by one; set them side by side as inner elements of one"
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(x, w, *, place, config, tail=None, out_dtype=None):
    (B, H, T, N), M, P = x.shape, w.shape[1], 0 if tail is None else tail.shape[3]
    out = place.empty((B, H, T, M + P), out_dtype or (x.dtype.name if x.dtype.name != "float8_e4m3fn" else "bfloat16"))
    if out.size == 0:
        return out
    if np.float64 in (x.dtype, w.dtype, out.dtype) or N == 0:
        out[..., :M] = x.astype(np.float64) @ w.astype(np.float64).swapaxes(1, 2)
        if P:
            out[..., M:] = tail
        return out
    run_product(x, (w.swapaxes(1, 2),), (out,), tail=tail if P else None)
    return out
