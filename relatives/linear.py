"""linear_attention: the softmax replaced by a product of feature maps. It is another function than softmax attention, not an exact form of it."""
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.relatives import arguments, chunks


def linear_attention(q, k, v, *, causal: bool = False, feature_map=None, chunk: int = 128):
    """out[t] = sum_s w(t, s) v[s] / sum_s w(t, s) with w(t, s) = phi(q[t]) . phi(k[s]), over all keys or (causal) those up to t. It is no approximation of the softmax:
    it replaces it.

    q            [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] of one type: float32, float16, bfloat16, float64; Hq a multiple of Hk
    causal       query t stands at S - T + t and sees the keys up to there
    feature_map  phi, a function of the caller's own arrays [...,D] -> [...,M], nowhere negative; None is the paper's elu(x) + 1. Queries and keys come unscaled, as there
    chunk        queries of a causal step; it changes the order of summation, not the answer
    Returns [B,Hq,T,Dv] in the type of q; sums are float32 (float64 for float64). A query without keys gets 0. Differentiable by PyTorch and JAX (under jit the
    chunks are unrolled). Time O(T M Dv), memory O(T (M + Dv + chunk)). Source: "Transformers are RNNs", arXiv 2006.16236, equations 4-7.
    """
    B, Hq, Hk, T, _, _, Dv = arguments.attention(q, k, v)
    causal, chunk = checks.flag("causal", causal), checks.integer("chunk", chunk, 1)
    if feature_map is not None and not callable(feature_map):
        raise TypeError(f"feature_map: expected a function of arrays [...,D], got {type(feature_map).__name__}; None is elu(x) + 1")
    fq, fk = (_mapped(elu_plus_one if feature_map is None else feature_map, xp.wide(x)) for x in (q, k))
    out = chunks.attend(arguments.grouped(fq, Hk), fk, xp.wide(v), xp.module(k).zeros_like(fk[..., 0]), causal=causal, chunk=chunk)
    return xp.as_type_of(out.reshape(B, Hq, T, Dv), q)


def _mapped(phi, x):
    features = phi(x)
    if list(getattr(features, "shape", ()))[:-1] != list(x.shape[:-1]):
        raise ValueError(f"feature_map: expected [...,M] for {list(x.shape)}, got {list(getattr(features, 'shape', ()))}; map the last axis alone")
    return features


def elu_plus_one(x):
    """x + 1 above 0, exp(x) below: positive everywhere, with a gradient everywhere (arXiv 2006.16236, equation 7)."""
    lib = xp.module(x)
    return lib.where(x > 0, x + 1, lib.exp(x.clip(max=0)))
