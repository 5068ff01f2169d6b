"""What every relative checks alike, and how query heads stand beside their key heads."""
from sparsetile.ops import checks

FLOATS = ("float64", "float32", "float16", "bfloat16")


def attention(q, k, v, **others):
    """Checks q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] and that `others` lie beside them. Returns B, Hq, Hk, T, S, D, Dv."""
    for name, x, axes in (("q", q, "[B,Hq,T,D]"), ("k", k, "[B,Hk,S,D]"), ("v", v, "[B,Hk,S,Dv]")):
        checks.array(name, x, 4, axes, FLOATS)
        checks.same(name, "element type of q", str(q.dtype), str(x.dtype), "convert all three to one type")
    (B, Hq, T, D), (_, Hk, S, Dv) = q.shape, v.shape
    checks.same("k", "shape [B,Hk,S,D] =", [B, Hk, S, D], list(k.shape), "k has the batch and width of q, the heads and length of v")
    checks.same("v", "batch of q", B, v.shape[0], "all three are of one batch")
    if not Hk or Hq % Hk:
        raise ValueError(f"k: expected a number of heads that divides q's {Hq}, got {Hk}; repeat or drop heads")
    checks.together({"q": q, "k": k, "v": v, **others})
    return B, Hq, Hk, T, S, D, Dv


def grouped(q, Hk: int):
    """[B,Hq,T,D] -> [B,Hk,G,T,D]: the query heads of each key head."""
    B, Hq, T, D = q.shape
    return q.reshape(B, Hk, Hq // Hk, T, D)
