"""Routing Transformer: every centroid gathers the queries and the keys that are nearest to it, as many each; attention runs within each cluster."""
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.patterns import Causal
from sparsetile.ops.selection import Selection
from sparsetile.systems.scores import best_keys, check, places


def routing(q, k, v, *, centroids, cluster_size=None, causal=True, normalize="layer", kv_length=None, q_start=None, backend=None, **options):
    """Attention within balanced clusters: q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] -> out [B,Hq,T,Dv].

    centroids     [H,C,D], H in {1, Hk, Hq}, of q's framework; keeping them (a moving average in the paper) is the caller's business
    cluster_size  the paper's w: so many queries and so many keys belong to each centroid (fewer where fewer exist); by default ceil(T / C) queries and ceil(S / C) keys
    causal        within a cluster a query sees the keys at or before its position; queries before position 0 and at or past the last key join no cluster
    normalize     what is compared with a centroid: "layer" q and k less their mean, by their standard deviation (the paper); "unit" by their length; None q and k as given.
                  Attention itself takes q and k as given
    The rest as in sparse_attention, but return_lse; with sink_logits each cluster has the sink. `k is q` is the paper's sharing of queries and keys: then causal clusters run as
    blocks, otherwise as a selection. Of equal products with the centroid the earlier member wins; products are float32.

    A query sees w keys for each cluster it is in; its output is the mean over these clusters, 0 if it is in none. Costs C (T + S) products of width D to route and
    C w^2 (D + Dv) to attend: O(T^1.5) for w = sqrt(T). Memory O(C w (D + Dv)), and C w^2 indices for causal attention with k other than q; never T S.
    Differentiable in PyTorch: q, k, v, sink_logits; routing is not (centroids get no gradient). q and k are finite.
    Raises ValueError or TypeError for bad arguments, Unsupported for a limit of the backend. Source: Routing Transformer (arXiv 2003.05997), section 4.1, algorithm 1;
    the mean over clusters is that of its published implementations.
    """
    call = check(q, k, kv_length, q_start, backend)
    B, Hq, Hk, T, S, D, _ = call.sizes
    checks.flag("causal", causal), checks.choice("normalize", normalize, ("layer", "unit", None)), checks.integer("cluster_size", cluster_size, 1, optional=True)
    checks.array("centroids", centroids, 3, "[H,C,D]", ("float32", "float16", "bfloat16", "float64"))
    checks.together(dict(q=q, centroids=centroids))
    checks.same("centroids", "width D of q", D, centroids.shape[2], "they are compared with queries and keys")
    if centroids.shape[0] not in (1, Hk, Hq) or not centroids.shape[1]:
        raise ValueError(f"centroids: expected [H,C,D] with H in {sorted({1, Hk, Hq})} and C >= 1, got {list(centroids.shape)}; give a set for all heads, or one for each")
    if options.pop("return_lse", False):
        raise ValueError("return_lse: expected False, got True; a mean over clusters has no log-sum-exp")
    if not B or not T or not S:
        return sparse_attention(q, k, v, backend=backend, **options)
    lib, C, (start, length) = xp.module(q), centroids.shape[1], places(call)
    wq, wk = (min(-(-n // C) if cluster_size is None else cluster_size, n) for n in (T, S))
    first, last = (lib.clip(-start, 0, T), lib.clip(length - start, 0, T)) if causal else (None, xp.full(call.q, (1, 1), T))
    queries = _members(centroids, call.q, wq, normalize, Hq, last, first, backend)     # [B,C,Hq,wq]
    keys = _members(centroids, call.k, wk, normalize, Hq, length, None, backend)       # [B,C,Hq,wk]
    heads = xp.arange(call.q, Hq)
    gather = lambda x, heads, index: xp.take_rows(x, heads, index).reshape(B * C, Hq, index.shape[3], x.shape[3])  # noqa: E731
    own = heads // (Hq // Hk)
    rule, there = None, None
    if causal and k is q and isinstance(call.q_start, int) and wq == wk:
        rule = Causal()                                                                # the same members in the same order
    elif causal:
        rule = _earlier(queries + start[:, :, None, None], keys)
    else:
        there = xp.astype(lib.broadcast_to(lib.clip(length, 0, wk), (B, C)).reshape(-1), "int32")
    out = sparse_attention(gather(q, heads, queries), gather(k, own, keys), None if v is None else gather(v, own, keys), rule, q_start=0, kv_length=there, backend=backend,
                           **options).reshape(B, C, Hq, wq, -1)
    wide = xp.wide(out)                                                                # below: row T takes what -1 names
    total, count = xp.add_rows(T + 1, queries, wide), xp.add_rows(T + 1, queries, lib.ones_like(wide[..., :1]))
    return xp.as_type_of((total / lib.clip(count, 1, C))[:, :, :T], out)


def _members(centroids, x, size, normalize, Hq, end, start, backend):
    """Rows of x [B,H,N,D] in [start, end) that are best for each centroid: int32 [B,C,Hq,size], ascending, then -1."""
    lib = xp.module(x)
    wide = xp.astype(x, "float32")
    if normalize == "layer":
        wide = wide - wide.mean(3)[..., None]
    if normalize is not None:
        square = (wide * wide).sum(3)[..., None]
        wide = wide / lib.where(square > 0, square, 1) ** 0.5                          # the factor sqrt(D) of "layer" changes no choice
    mu = xp.astype(xp.constant_of(centroids), "float32")
    mu = lib.broadcast_to(mu[None, :, None], (x.shape[0], mu.shape[0], Hq // mu.shape[0], *mu.shape[1:])).reshape(x.shape[0], Hq, *mu.shape[1:])
    return best_keys(mu, wide, size, end, key_start=start, backend=backend).swapaxes(1, 2)


def _earlier(positions, keys) -> Selection:
    """Within every cluster, the members of keys [B,C,H,wk] at or before positions [B,C,H,wq]: since members ascend, so many of the first."""
    lib, (B, C, H, wk), wq = xp.module(keys), keys.shape, positions.shape[3]
    seen = (keys[..., None, :] >= 0) & (keys[..., None, :] <= positions[..., None])    # [B,C,H,wq,wk]
    every = lib.broadcast_to(xp.arange(keys, wk), (B * C, H, wq, wk))
    return Selection(every, lengths=xp.total(xp.astype(seen, "int32"), 4).reshape(B * C, H, wq), distinct=True)
