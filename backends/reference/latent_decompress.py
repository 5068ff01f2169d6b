"""Keys and values out of the shared latent, NumPy float64.

    latent [B,S,R]  w_uk [H,R,Dn]  w_uv [H,R,Dv]  k_rope [B,S,P]  latent_scale [B,S,ceil(R/128)]  ->  k [B,H,S,Dn+P], v [B,H,S,Dv] in w_uk's dtype

k[h] = latent w_uk[h], followed by the rotary part, the same for every head; v[h] = latent w_uv[h].
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference.attend import wide

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(latent, w_uk, w_uv, *, place=None, config=None, k_rope=None, latent_scale=None):
    (B, S, R), H = latent.shape, w_uk.shape[0]
    with np.errstate(all="ignore"):
        c = wide(latent)
        if latent_scale is not None:
            c = c * np.repeat(wide(latent_scale), 128, axis=-1)[..., :R]
        k = np.einsum("bsr,hrd->bhsd", c, wide(w_uk)).astype(w_uk.dtype)
        v = np.einsum("bsr,hrd->bhsd", c, wide(w_uv)).astype(w_uk.dtype)
    if k_rope is not None:
        rotary = np.broadcast_to(k_rope[:, None], (B, H, S, k_rope.shape[-1])).astype(k.dtype)
        k = np.concatenate([k, rotary], axis=-1)
    return k, v
