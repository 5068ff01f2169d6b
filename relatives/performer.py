"""performer_attention: softmax attention approximated by positive orthogonal random features (FAVOR+)."""
import math
from functools import lru_cache

import numpy as np

from sparsetile.backends import arrays
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.relatives import arguments, chunks


def performer_attention(q, k, v, *, features: int = 256, seed: int = 0, projection=None, scale=None, causal: bool = False, chunk: int = 128):
    """Softmax attention with exp(scale q . k) estimated by `features` random features: an approximation, whose error falls with the square root of their number.

    q           [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] of one type: float32, float16, bfloat16, float64; Hq a multiple of Hk
    features    M, random features of all heads; seed: they are drawn from (one seed is the same on every framework; torch.compile cannot trace the drawing: give projection there)
    projection  [M,D] in the caller's framework instead of drawn ones: then features and seed say nothing
    scale       of the logits, > 0; None is D^-0.5
    causal      query t stands at S - T + t and sees the keys up to there; chunk: queries of a step, which changes the order of summation only
    Returns [B,Hq,T,Dv] in the type of q; features and sums are float32 (float64 for float64). A query without keys, or whose estimated weights all underflow, gets 0.
    The estimate of one weight has no bias and at most the variance (exp(|x + y|^2) - 1) exp(2 x . y) / M for x = sqrt(scale) q, y = sqrt(scale) k: long queries and keys need
    many features. Differentiable by PyTorch and JAX (under jit the chunks are unrolled). Time O(T M (D + Dv)), memory O(T (M + Dv + chunk)).
    Source: "Rethinking Attention with Performers", arXiv 2009.14794, lemma 1 (positive features), section 2.4 (orthogonal), lemma 2 and theorem 2 (variance).
    """
    B, Hq, Hk, T, _, D, Dv = arguments.attention(q, k, v, projection=projection)
    causal, chunk = checks.flag("causal", causal), checks.integer("chunk", chunk, 1)
    root = (D ** -0.5 if scale is None else checks.number("scale", scale, 0)) ** 0.5
    w = _projection(q, D, features, seed, projection)
    lib = xp.module(q)
    log_q, log_k = log_features(xp.wide(q) * root, w), log_features(xp.wide(k) * root, w)
    fq = lib.exp(log_q - xp.highest(log_q, -1)[..., None])  # a factor of a query's own cancels in the quotient
    top = xp.highest(log_k, -1)
    out = chunks.attend(arguments.grouped(fq, Hk), lib.exp(log_k - top[..., None]), xp.wide(v), top, causal=causal, chunk=chunk)
    return xp.as_type_of(out.reshape(B, Hq, T, Dv), q)


def log_features(x, w):
    """log phi(x) = w x - |x|^2 / 2 - log(M) / 2, so that phi(x) . phi(y) estimates exp(x . y) without bias. x [...,D], w [M,D] -> [...,M]"""
    return x @ w.swapaxes(-1, -2) - (x * x).sum(-1)[..., None] / 2 - math.log(len(w)) / 2


@lru_cache(64)
def orthogonal_features(features: int, D: int, seed: int) -> np.ndarray:
    """[M,D] float64: rows as long as Gaussian ones, orthogonal within each group of D (arXiv 2009.14794, section 2.4)."""
    rng = np.random.default_rng(seed)
    blocks = []
    for _ in range(-(-features // D)):
        basis, triangle = np.linalg.qr(rng.standard_normal((D, D)))
        blocks.append(basis * np.sign(np.diag(triangle)))  # without the signs the basis is not uniform over all rotations
    return np.concatenate(blocks)[:features] * np.linalg.norm(rng.standard_normal((features, D)), axis=1, keepdims=True)


def _projection(q, D, features, seed, projection):
    if projection is None:
        features, seed = checks.integer("features", features, 1), checks.integer("seed", seed, 0)
        return xp.wide(xp.constant(orthogonal_features(features, D, seed).astype(np.float64 if arrays.dtype_name(q) == "float64" else np.float32), q))
    checks.array("projection", projection, 2, "[M,D]", arguments.FLOATS)
    checks.same("projection", "width D of q", D, projection.shape[1], "one column for each of q's")
    if not len(projection):
        raise ValueError("projection: expected at least one feature [M,D], got none; draw some, or leave it out")
    return xp.wide(projection)
