"""The plain formula of every op in the types of its inputs: the measure of the numeric policy (autotune/numeric.py).

It rounds where the op must and nowhere else: inputs (they come rounded); probabilities and dS before their products; outputs; delta from the rounded
output; absorbed queries and the output in the latent width before w_uv; float8 values. Everything between is float32 (float64 for float64 inputs).
`count` [B,Hq,T,S] (or what broadcasts to it) says how often a query sees a key.
"""
import ml_dtypes
import numpy as np


def working(x):
    """The type sums are made in."""
    return np.float64 if x.dtype == np.float64 else np.float32


def rounded(x, dtype):
    """Through the narrow type and back."""
    return x.astype(dtype).astype(x.dtype)


def spread(x, heads):
    """[B,Hk,...] -> [B,Hq,...]: every query head beside its key head, in the working type."""
    return np.repeat(x.astype(working(x)), heads // x.shape[1], axis=1)


def _without_unseen(x, count):
    """Keys that no query sees become 0: they are not read."""
    return np.where((count > 0).any(axis=2)[..., None], x, 0).astype(x.dtype)


def _scores(q, k, scale, softcap):
    x = (q @ k.swapaxes(-1, -2)) * q.dtype.type(scale)
    if softcap is None:
        return x, np.ones_like(x)
    squashed = np.tanh(x / x.dtype.type(softcap))
    return x.dtype.type(softcap) * squashed, 1 - squashed ** 2


def _softmax(x, count, sink_logits):
    """Probabilities (sink in the denominator) and the lse of the keys alone."""
    x = np.where(count > 0, x, -np.inf)
    top = x.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0).astype(x.dtype)
    weights = np.exp(x - top) * count.astype(x.dtype)
    total = weights.sum(axis=-1, keepdims=True)
    lse = (top + np.log(total))[..., 0].astype(x.dtype)
    sink = np.full(x.shape[1], -np.inf, x.dtype) if sink_logits is None else np.asarray(sink_logits).astype(x.dtype)
    lse_total = np.logaddexp(lse, sink[:, None])
    scaled = np.where(np.isfinite(lse_total), lse_total, 0)[..., None]
    p = np.where((count > 0) & np.isfinite(lse_total)[..., None], np.exp(x - scaled) * count.astype(x.dtype), 0)
    return p.astype(x.dtype), lse, lse_total.astype(x.dtype)


def attention(q, k, v, count, *, scale, softcap=None, sink_logits=None, out_dtype=None, q_scale=None, k_scale=None, v_scale=None):
    """q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  ->  out [B,Hq,T,Dv], lse [B,Hq,T]

    float8: products of its values are exact; scores are multiplied by q_scale [B,Hq,T] and k_scale [B,Hk,ceil(S/128)]; probabilities by v_scale, and rounded to bfloat16, whose range holds that.
    """
    Hq = q.shape[1]
    if "float8" in k.dtype.name:
        return _attention_float8(q, k, v, count, scale, softcap, sink_logits, out_dtype, (q_scale, k_scale, v_scale))
    count = np.broadcast_to(count, (q.shape[0], Hq, q.shape[2], k.shape[2]))
    with np.errstate(all="ignore"):
        wk, wv = _without_unseen(spread(k, Hq), count), _without_unseen(spread(v, Hq), count)
        x, _ = _scores(q.astype(working(q)), wk, scale, softcap)
        p, lse, _ = _softmax(x, count, sink_logits)
        return (rounded(p, v.dtype) @ wv).astype(out_dtype or q.dtype), lse


def _attention_float8(q, k, v, count, scale, softcap, sink_logits, out_dtype, scales):
    Hq, (S, one) = q.shape[1], (k.shape[2], np.float32(1))
    count = np.broadcast_to(count, (q.shape[0], Hq, q.shape[2], S))
    seen = (count > 0).any(axis=2)
    by_query, by_key, by_value = one if scales[0] is None else scales[0][..., None], *(
        one if x is None else np.where(seen, np.repeat(spread(x, Hq), 128, axis=2)[..., :S], one)[:, :, None] for x in scales[1:])
    with np.errstate(all="ignore"):
        wk, wv = _without_unseen(spread(k, Hq), count), _without_unseen(spread(v, Hq), count)
        x = q.astype(np.float32) @ wk.swapaxes(-1, -2) * (by_query * by_key * np.float32(scale))
        x = x if softcap is None else np.float32(softcap) * np.tanh(x / np.float32(softcap))
        p, lse, _ = _softmax(x, count, sink_logits)
        return (rounded(p * by_value, ml_dtypes.bfloat16) @ wv).astype(out_dtype or (ml_dtypes.bfloat16 if "float8" in q.dtype.name else q.dtype)), lse


def attention_gradients(q, k, v, count, dout, *, dlse=None, scale, softcap=None, sink_logits=None):
    """-> dq, dk, dv in the types of q, k, v; dsink [Hq] float32 or None"""
    (B, Hq, T, D), Hk = q.shape, k.shape[1]
    count = np.broadcast_to(count, (B, Hq, T, k.shape[2]))
    with np.errstate(all="ignore"):
        wq, wk, wv = q.astype(working(q)), _without_unseen(spread(k, Hq), count), _without_unseen(spread(v, Hq), count)
        g = dout.astype(working(q))
        x, slope = _scores(wq, wk, scale, softcap)
        p, lse, lse_total = _softmax(x, count, sink_logits)
        out = (rounded(p, v.dtype) @ wv).astype(q.dtype)
        delta0 = (g * out.astype(g.dtype)).sum(axis=-1)
        ds = p * (g @ wv.swapaxes(-1, -2) - delta0[..., None])
        if dlse is not None:  # the lse's own gradient is spread over the keys by their share among keys
            share = np.where(count > 0, np.exp(np.where(count > 0, x, -np.inf) - np.where(np.isfinite(lse), lse, 0)[..., None]) * count, 0)
            ds = ds + share.astype(g.dtype) * np.where(np.isfinite(lse), dlse, 0).astype(g.dtype)[..., None]
        ds = rounded(ds * slope, q.dtype)
        dq = (ds @ wk) * g.dtype.type(scale)
        dk = (ds.swapaxes(-1, -2) @ wq) * g.dtype.type(scale)
        dv = rounded(p, v.dtype).swapaxes(-1, -2) @ g
        group = lambda x: x.reshape(B, Hk, Hq // Hk, *x.shape[2:]).sum(axis=2)
        dsink = None
        if sink_logits is not None:
            sink = np.asarray(sink_logits).astype(g.dtype)
            share = np.where(np.isfinite(sink)[:, None], np.exp(sink[:, None] - lse_total), 0)
            dsink = -(share * delta0).sum(axis=(0, 2)).astype(np.float32)
    return dq.astype(q.dtype), group(dk).astype(k.dtype), group(dv).astype(v.dtype), dsink


def indexer_scores(q, k, weights, *, k_scale=None, visible=None, activation="relu"):
    """q [B,H,T,D]  k [B,S,D]  weights [B,H,T]  ->  [B,T,S] float32, -inf where not visible"""
    with np.errstate(all="ignore"):
        x = q.astype(np.float32) @ k.astype(np.float32)[:, None].swapaxes(-1, -2)
        x = np.where(x < 0, np.float32(0), x) if activation == "relu" else x
        total = (x * weights.astype(np.float32)[..., None]).sum(axis=1)
        if k_scale is not None:
            total = total * k_scale.astype(np.float32)[:, None]
    return total if visible is None else np.where(visible, total, np.float32(-np.inf))


def indexer_gradients(q, k, weights, dscores, *, k_scale=None, visible=None, activation="relu"):
    """dscores [B,T,S]  ->  dq, dk, dweights float32"""
    with np.errstate(all="ignore"):
        wq, wk, g = q.astype(np.float32), k.astype(np.float32), dscores.astype(np.float32)
        g = g if k_scale is None else g * k_scale.astype(np.float32)[:, None]
        g = g if visible is None else np.where(visible, g, 0)
        x = wq @ wk[:, None].swapaxes(-1, -2)
        steep = x > 0 if activation == "relu" else np.ones_like(x, bool)
        dweights = np.where(steep, x * g[:, None], 0).sum(axis=-1)
        da = rounded(np.where(steep, g[:, None] * weights.astype(np.float32)[..., None], 0), q.dtype)
        return da @ wk[:, None], np.einsum("bhts,bhtd->bsd", da, wq), dweights


def grouped_gradients(dout, x, w):
    """dout [B,H,T,M]  ->  dx, dw in the types of x, w"""
    kind = working(x)
    with np.errstate(all="ignore"):
        g = dout.astype(kind)
        return (g @ w.astype(kind)).astype(x.dtype), (g.swapaxes(-1, -2) @ x.astype(kind)).sum(axis=0).astype(w.dtype)


def latent_gradients(dk, dv, latent, w_uk, w_uv, *, k_rope=None, latent_scale=None):
    """dk [B,H,S,Dn+P]  dv [B,H,S,Dv]  ->  dlatent in w_uk's type, dw_uk, dw_uv, dk_rope"""
    kind, Dn = working(w_uk), w_uk.shape[2]
    with np.errstate(all="ignore"):
        c, gk, gv, scale = latent.astype(kind), dk[..., :Dn].astype(kind), dv.astype(kind), None
        if latent_scale is not None:
            scale = np.repeat(latent_scale, 128, axis=-1)[..., :c.shape[-1]].astype(kind)
            c = rounded(c * scale, w_uk.dtype)
        dc = (gk @ w_uk.astype(kind).swapaxes(-1, -2) + gv @ w_uv.astype(kind).swapaxes(-1, -2)).sum(axis=1)
        weights = ((c[:, None].swapaxes(-1, -2) @ g).sum(axis=0).astype(w_uk.dtype) for g in (gk, gv))
        drope = None if k_rope is None else dk[..., Dn:].astype(kind).sum(axis=1).astype(k_rope.dtype)
        return ((dc if scale is None else dc * scale).astype(w_uk.dtype), *weights, drope)


def grouped_matmul(x, w, *, tail=None, out_dtype=None):
    """x [B,H,T,N]  w [H,M,N]  ->  [B,H,T,M+P]"""
    with np.errstate(all="ignore"):
        y = (x.astype(working(x)) @ w.astype(working(x)).swapaxes(-1, -2)).astype(out_dtype or x.dtype)
    return y if tail is None else np.concatenate([y, tail.astype(y.dtype)], axis=-1)


def importances(workload, q, k, lse, rows):
    """importance_topk of a workload (32 at stride 16, blocks of 64): q [B,Hq,n,D], lse [B,Hq,n] of the queries `rows`, k [B,Hk,C,D] -> [B,Hk,n,blocks]"""
    B, Hk, S, C, kind = q.shape[0], k.shape[1], workload["S"], k.shape[2], working(q)
    end = np.clip((S - workload["T"] + rows + 1 - 32) // 16 + 1, 0, C)
    with np.errstate(all="ignore"):
        x = kind(q.shape[-1] ** -0.5) * (q.reshape(B, Hk, -1, *q.shape[2:]).astype(kind) @ k[:, :, None].astype(kind).swapaxes(-1, -2))
        share = np.where(np.arange(C) < end[:, None], np.exp(x - lse.reshape(B, Hk, -1, len(rows), 1).astype(kind)), 0).sum(2, dtype=kind)
    pieces = np.zeros((*share.shape[:-1], -(-S // 64) * 4 + 1), kind)                # of 16 keys
    pieces[..., :C] += share
    pieces[..., 1:C + 1] += share
    return pieces[..., :-1].reshape(*share.shape[:-1], -1, 4).sum(-1, dtype=kind)


def forced_blocks(workload, rows):
    """(forced, seen) [n, blocks] of the queries `rows`: the first block and the last two that a query sees."""
    last, j = (workload["S"] - workload["T"] + rows)[:, None] // 64, np.arange(-(-workload["S"] // 64))
    return (j == 0) | (j >= last - 1), j <= last


def seen_by_bits(bitmaps, kinds, T, S):
    """What a selection's blocks show: bitmaps [blocks, block_q, words], kinds [L, nq, nk] -> [L,T,S] bool. A block without a row of the bitmaps shows nothing."""
    blocks = np.unpackbits(np.ascontiguousarray(bitmaps).view(np.uint8), axis=-1, bitorder="little")[np.maximum(kinds, 1) // 2] * (kinds >= 0)[..., None, None]
    (L, nq, nk), (block_q, block_k) = kinds.shape, blocks.shape[3:]
    return blocks.swapaxes(2, 3).reshape(L, nq * block_q, nk * block_k)[:, :T, :S].astype(bool)


def latent_decompress(latent, w_uk, w_uv, *, k_rope=None, latent_scale=None):
    """latent [B,S,R]  w_uk [H,R,Dn]  w_uv [H,R,Dv]  ->  k [B,H,S,Dn+P], v [B,H,S,Dv] in w_uk's type"""
    with np.errstate(all="ignore"):
        c = latent.astype(working(w_uk))
        if latent_scale is not None:
            # A float8 latent times its scale is a value of w_uk's type before the product, as it would be in an uncompressed cache.
            c = rounded(c * np.repeat(latent_scale, 128, axis=-1)[..., :c.shape[-1]].astype(c.dtype), w_uk.dtype)
        k, v = ((c[:, None] @ w.astype(c.dtype)).astype(w_uk.dtype) for w in (w_uk, w_uv))
    if k_rope is not None:
        k = np.concatenate([k, np.broadcast_to(k_rope[:, None], (*k.shape[:3], k_rope.shape[-1])).astype(k.dtype)], axis=-1)
    return k, v


def latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, count, *, mode, scale, latent_scale=None, softcap=None, sink_logits=None):
    """mode "absorbed" or "decompressed" -> out [B,H,T,Dv], lse [B,H,T]"""
    if mode == "decompressed":
        k, v = latent_decompress(latent, w_uk, w_uv, k_rope=k_rope, latent_scale=latent_scale)
        return attention(np.concatenate([q_nope, q_rope], axis=-1), k, v, count, scale=scale, softcap=softcap, sink_logits=sink_logits)
    c = latent
    if latent_scale is not None:
        c = (latent.astype(np.float32) * np.repeat(latent_scale, 128, axis=-1)[..., :latent.shape[-1]]).astype(w_uk.dtype)
    q = grouped_matmul(q_nope, w_uk, tail=q_rope)
    keys = np.concatenate([c, k_rope.astype(c.dtype)], axis=-1)[:, None]
    out, lse = attention(q, keys, keys[..., :c.shape[-1]], count, scale=scale, softcap=softcap, sink_logits=sink_logits)
    return grouped_matmul(out, w_uv.swapaxes(-1, -2)), lse


def merge_attention(outs, lses, *, sink_logits=None, out_dtype=None):
    """outs: N arrays [B,H,T,Dv], lses: N arrays [B,H,T] -> out, lse"""
    kind = working(lses[0])
    with np.errstate(all="ignore"):
        parts = np.stack([e.astype(kind) for e in lses])
        lse = np.logaddexp.reduce(parts, axis=0)
        total = lse if sink_logits is None else np.logaddexp(lse, np.asarray(sink_logits).astype(kind)[:, None])
        weights = np.where((parts == -np.inf) | ~np.isfinite(total), 0, np.exp(parts - np.where(np.isfinite(total), total, 0)))
        out = sum(w[..., None] * np.where((e == -np.inf)[..., None], 0, o.astype(kind)) for w, e, o in zip(weights, parts, outs))
    return out.astype(out_dtype or outs[0].dtype), lse.astype(kind)
