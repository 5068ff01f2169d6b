"""One small matrix per head, NumPy float64: absorbing queries into the latent width and taking outputs out of it.

    x [B,H,T,N]  w [H,M,N] (any strides)  tail [B,H,T,P]  ->  [B,H,T,M+P]: x w^T, then the tail as it is; inner_heads: their sum over heads [B,1,T,M]
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference.attend import wide
from sparsetile.backends.reference.positions import dtype_of

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(x, w, *, place=None, config=None, tail=None, out_dtype=None, inner_heads=False):
    kind = dtype_of(out_dtype, x.dtype)
    with np.errstate(all="ignore"):
        product = np.einsum("bhtn,hmn->btm" if inner_heads else "bhtn,hmn->bhtm", wide(x), wide(w)).astype(kind)
    if inner_heads:
        return product[:, None]
    return product if tail is None else np.concatenate([product, tail.astype(kind)], axis=-1)
