"""Keys and values out of the shared latent: two products per head, the rotary part copied behind the keys, everything written once.

    latent [B,S,R]  w_uk [H,R,Dn]  w_uv [H,R,Dv]  k_rope [B,S,P]  latent_scale [B,S,ceil(R/128)]  ->  k [B,H,S,Dn+P], v [B,H,S,Dv] in w_uk's type

k[h] = latent w_uk[h], then the rotary part, the same for every head, bit for bit if it has w_uk's type; v[h] = latent w_uv[h]. latent_scale multiplies groups of 128
latent values. Weights may be transposed views. Sums are float32 (product.py), each output is rounded once; float64 goes through NumPy.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.numba.product import run_product

TUNABLES = ()


def supports(problem):
    if problem.dtype("w_uk") == "float8_e4m3fn":
        return "float8 weights: convert w_uk and w_uv to bfloat16"
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(latent, w_uk, w_uv, *, place, config, k_rope=None, latent_scale=None):
    (B, S, R), (H, _, Dn), Dv, P = latent.shape, w_uk.shape, w_uv.shape[2], 0 if k_rope is None else k_rope.shape[2]
    kind = w_uk.dtype.name
    k, v = place.empty((B, H, S, Dn + P), kind), place.empty((B, H, S, Dv), kind)
    if k.size + v.size == 0:
        return k, v
    if np.float64 in (latent.dtype, w_uk.dtype, w_uv.dtype) or R == 0:
        _run_wide(latent, w_uk, w_uv, k_rope, latent_scale, k, v)
        return k, v
    every_head = lambda x: np.broadcast_to(x[:, None], (B, H, S, x.shape[2]))
    run_product(every_head(latent), (w_uk, w_uv.astype(w_uk.dtype, copy=False)), (k, v), scale=latent_scale, tail=None if P == 0 else every_head(k_rope))
    return k, v


def _run_wide(latent, w_uk, w_uv, k_rope, latent_scale, k, v):
    rows, Dn = latent.astype(np.float64), w_uk.shape[2]
    if latent_scale is not None:
        rows *= np.repeat(latent_scale, 128, axis=2)[:, :, :rows.shape[2]]
    k[..., :Dn] = rows[:, None] @ w_uk.astype(np.float64)
    v[...] = rows[:, None] @ w_uv.astype(np.float64)
    if k_rope is not None:
        k[..., Dn:] = k_rope[:, None]
