"""linformer_attention: softmax attention over keys and values projected along the length. An approximation, exact for no finite rank in general."""
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.relatives import arguments


def linformer_attention(q, k, v, project_k, project_v=None, *, scale=None):
    """softmax(scale q (E k)^T) (F v): every query attends to R learned mixtures of all S keys. An approximation of attention over the keys themselves.

    q          [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] of one type: float32, float16, bfloat16, float64; Hq a multiple of Hk
    project_k  E, [R,S] or per key head [Hk,R,S], learned with the model for one length S; project_v: F alike, None is E (the paper's key-value sharing)
    scale      of the logits; None is D^-0.5
    Returns [B,Hq,T,Dv] in the type of q; sums are float32 (float64 for float64). With R = 0 there is no key: 0. There is no causal form: every mixture holds every
    position, also later ones. Differentiable by PyTorch and JAX. Time O((S + T) R (D + Dv)), memory O((S + T) R). Source: arXiv 2006.04768, equation 7.
    """
    B, Hq, Hk, T, S, D, Dv = arguments.attention(q, k, v, project_k=project_k, project_v=project_v)
    scale = D ** -0.5 if scale is None else checks.number("scale", scale)
    project_v = project_k if project_v is None else project_v
    for name, x in (("project_k", project_k), ("project_v", project_v)):
        checks.array(name, x, (2, 3), "[R,S] or [Hk,R,S]", arguments.FLOATS)
        shape = [*[Hk] * (x.ndim == 3), project_k.shape[-2], S]
        checks.same(name, f"shape {'[Hk,R,S]' if x.ndim == 3 else '[R,S]'} =", shape, list(x.shape), "it mixes the S keys into R, for every key head")
    lib = xp.module(q)
    if not project_k.shape[-2]:
        return xp.zeros_of(q, (B, Hq, T, Dv))
    keys, values = (xp.wide(e) @ xp.wide(x) for e, x in ((project_k, k), (project_v, v)))  # [B,Hk,R,D]  [B,Hk,R,Dv]
    logits = arguments.grouped(xp.wide(q) * scale, Hk) @ keys[:, :, None].swapaxes(-1, -2)        # [B,Hk,G,T,R]
    weights = lib.exp(logits - xp.highest(logits, -1)[..., None])
    out = weights @ values[:, :, None] / weights.sum(-1)[..., None]
    return xp.as_type_of(out.reshape(B, Hq, T, Dv), q)
