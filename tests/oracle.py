"""Truth for tests, from a dense count of how often each query sees each key; written apart from backends/reference, sharing nothing with it.

Everything is float64 (long double where the inputs are float64, so that float64 answers can be judged too) and in closed form over whole arrays:
`count` [B,Hq,T,S] or what broadcasts to it; q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv].
"""
import numpy as np


def widen(x):
    return x.astype(np.longdouble if x.dtype == np.float64 else np.float64)


def dequantised(x, scale, rows):
    """float8 x [B,H,N,width] with scale [B,H,ceil(N/rows)], one for `rows` of its rows; None is 1"""
    return widen(x) if scale is None else widen(x) * np.stack([widen(scale)[..., n // rows] for n in range(x.shape[2])], axis=-1)[..., None]


def _prepared(q, k, v, count, scale, softcap):
    """k and v per query head, scores masked with -inf, derivative of the softcap. Keys nobody sees are 0 before anything is computed."""
    group = q.shape[1] // k.shape[1]
    count = np.broadcast_to(np.asarray(count), (*q.shape[:3], k.shape[2])).astype(np.float64)
    used = (count.sum(axis=2) > 0)[..., None]
    k, v = (np.where(used, np.repeat(widen(x), group, axis=1), 0) for x in (k, v))
    logits = np.einsum("bhtd,bhsd->bhts", widen(q), k) * scale
    derivative = np.ones_like(logits)
    if softcap is not None:
        derivative = 1 / np.cosh(np.clip(logits / softcap, -300, 300)) ** 2
        logits = softcap * np.tanh(logits / softcap)
    return widen(q), k, v, count, np.where(count > 0, logits, -np.inf), derivative


def _denominators(logits, count, sink_logits):
    """(max, sum over keys relative to it, sum with the sink). Rows without keys and without a finite sink have sum 0."""
    sink = np.full(logits.shape[1], -np.inf) if sink_logits is None else np.asarray(sink_logits, np.float64)
    sink = sink.astype(logits.dtype)[None, :, None, None]
    highest = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    highest = np.where(np.isfinite(highest), highest, 0)
    keys = (count * np.exp(logits - highest)).sum(axis=-1, keepdims=True)
    return highest, keys, keys + np.exp(sink - highest)


def attention(q, k, v, count, *, scale, softcap=None, sink_logits=None):
    """-> out [B,Hq,T,Dv], lse [B,Hq,T], the lse over keys alone"""
    with np.errstate(all="ignore"):
        q, k, v, count, logits, _ = _prepared(q, k, v, count, scale, softcap)
        highest, keys, everything = _denominators(logits, count, sink_logits)
        weights = count * np.exp(logits - highest) / everything
        out = np.einsum("bhts,bhse->bhte", np.where(keys > 0, weights, 0), v)
        return out, (highest + np.log(keys))[..., 0]


def attention_gradients(q, k, v, count, dout, *, dlse=None, scale, softcap=None, sink_logits=None):
    """Gradients of sum(out * dout) + sum(lse * dlse) -> dq, dk, dv, dsink"""
    with np.errstate(all="ignore"):
        shape_k, shape_v = k.shape, v.shape
        q, k, v, count, logits, derivative = _prepared(q, k, v, count, scale, softcap)
        highest, keys, everything = _denominators(logits, count, sink_logits)
        e = count * np.exp(logits - highest)
        alive = keys > 0
        p = np.where(alive, e / everything, 0)
        dout = widen(dout)
        along = np.einsum("bhte,bhse->bhts", dout, v)                      # how the loss moves with each probability
        mean = (p * along).sum(axis=-1, keepdims=True)
        dlogits = p * (along - mean)
        if dlse is not None:
            dlogits = dlogits + np.where(alive, e / keys, 0) * np.where(alive[..., 0], widen(dlse), 0)[..., None]
        dlogits = np.where(count > 0, dlogits * derivative, 0) * scale
        dq = np.einsum("bhts,bhsd->bhtd", dlogits, k)
        dk = np.einsum("bhts,bhtd->bhsd", dlogits, q).reshape(shape_k[0], shape_k[1], -1, *shape_k[2:]).sum(axis=2)
        dv = np.einsum("bhts,bhte->bhse", p, dout).reshape(shape_v[0], shape_v[1], -1, *shape_v[2:]).sum(axis=2)
        dsink = None
        if sink_logits is not None:
            sink = np.asarray(sink_logits, np.float64)[None, :, None]
            share = np.where(np.isfinite(sink), 1 / (1 + keys[..., 0] * np.exp(highest[..., 0] - sink)), 0)  # this way round for sinks of 3e38
            dsink = -(share * mean[..., 0]).sum(axis=(0, 2))
        return dq, dk, dv, dsink


def selection_count(indices, S, Hq, *, lengths=None, granularity=1, causal=False, kv_length=None, q_start=None):
    """indices [B,G,T,K] -> how often each of Hq heads' queries names each key, [B,Hq,T,S]; one entry at a time."""
    B, G, T, K = indices.shape
    count = np.zeros((B, Hq, T, S), np.int64)
    for b in range(B):
        limit = S if kv_length is None else min(max(int(kv_length[b]), 0), S)
        start = limit - T if q_start is None else int(np.broadcast_to(q_start, (B,))[b])
        for g in range(G):
            for t in range(T):
                stop = K if lengths is None else min(max(int(lengths[b, g, t]), 0), K)
                for entry in map(int, indices[b, g, t, :stop]):
                    if entry < 0:
                        continue
                    for key in range(entry * granularity, entry * granularity + granularity):
                        if key >= limit:
                            break
                        if not causal or key <= start + t:
                            count[b, g * Hq // G:(g + 1) * Hq // G, t, key] += 1
    return count


def visible(B, T, S, *, kv_length=None, q_start=None, rule=None):
    """[B,1,T,S] booleans: rule(p, s) on absolute positions, for keys that exist."""
    seen = np.zeros((B, 1, T, S), bool)
    for b in range(B):
        limit = S if kv_length is None else min(max(int(kv_length[b]), 0), S)
        start = limit - T if q_start is None else int(np.broadcast_to(q_start, (B,))[b])
        p, s = start + np.arange(T)[:, None], np.arange(S)[None, :]
        seen[b, 0] = (np.ones((T, S), bool) if rule is None else rule(p, s)) & (s < limit)
    return seen


def indexer_scores(q, k, weights, *, k_scale=None, seen=None, activation="relu"):
    """q [B,H,T,D]  k [B,S,D]  weights [B,H,T] -> [B,T,S] float64, -inf where not seen"""
    with np.errstate(all="ignore"):
        dots = np.einsum("bhtd,bsd->bhts", q.astype(np.float64), k.astype(np.float64))
        if activation == "relu":
            dots = np.maximum(dots, 0)
        total = np.einsum("bhts,bht->bts", dots, weights.astype(np.float64))
        if k_scale is not None:
            total = total * k_scale.astype(np.float64)[:, None, :]
        return total if seen is None else np.where(seen, total, -np.inf)


def indexer_gradients(q, k, weights, dscores, *, k_scale=None, seen=None, activation="relu"):
    """-> dq [B,H,T,D], dk [B,S,D], dweights [B,H,T], one head at a time"""
    g = dscores.astype(np.float64) * (1 if k_scale is None else k_scale.astype(np.float64)[:, None, :])
    g = np.where(np.broadcast_to(True if seen is None else seen, g.shape), g, 0)
    dq, dk, dweights = np.zeros(q.shape), np.zeros(k.shape), np.zeros(weights.shape)
    for h in range(q.shape[1]):
        dots = np.einsum("btd,bsd->bts", q[:, h].astype(np.float64), k.astype(np.float64))
        slope = np.heaviside(dots, 0) if activation == "relu" else 1.0
        dweights[:, h] = (g * dots * slope).sum(axis=2)
        moved = g * slope * weights[:, h].astype(np.float64)[..., None]
        dq[:, h] = np.einsum("bts,bsd->btd", moved, k.astype(np.float64))
        dk += np.einsum("bts,btd->bsd", moved, q[:, h].astype(np.float64))
    return dq, dk, dweights


def pooled(scores, seen, pool):
    """[B,T,S] scores of keys -> maxima and visibility of blocks of `pool` keys, [B,T,ceil(S/pool)]; NaN and unseen keys passed over."""
    blocks = [slice(start, start + pool) for start in range(0, scores.shape[-1], pool)]
    usable = np.where(seen & ~np.isnan(scores), scores, -np.inf)
    return np.stack([usable[..., b].max(axis=-1) for b in blocks], axis=-1), np.stack([seen[..., b].any(axis=-1) for b in blocks], axis=-1)


def grouped_matmul(x, w):
    return np.einsum("bhtn,hmn->bhtm", widen(x), widen(w))


def latent_decompress(latent, w_uk, w_uv, *, k_rope=None, latent_scale=None):
    c = widen(latent)
    if latent_scale is not None:
        c = c * np.stack([widen(latent_scale)[..., r // 128] for r in range(c.shape[-1])], axis=-1)
    k, v = (np.einsum("bsr,hrd->bhsd", c, widen(w)) for w in (w_uk, w_uv))
    if k_rope is not None:
        k = np.concatenate([k, np.broadcast_to(widen(k_rope)[:, None], (*k.shape[:3], k_rope.shape[-1]))], axis=-1)
    return k, v


def grouped_gradients(dout, x, w):
    return np.einsum("bhtm,hmn->bhtn", widen(dout), widen(w)), np.einsum("bhtm,bhtn->hmn", widen(dout), widen(x))


def latent_gradients(dk, dv, latent, w_uk, w_uv, *, k_rope=None, latent_scale=None):
    c, Dn = widen(latent), w_uk.shape[-1]
    scale = np.ones_like(c) if latent_scale is None else np.stack([widen(latent_scale)[..., r // 128] for r in range(c.shape[-1])], axis=-1)
    gk, gv = widen(dk[..., :Dn]), widen(dv)
    dlatent = (np.einsum("bhsd,hrd->bsr", gk, widen(w_uk)) + np.einsum("bhsd,hrd->bsr", gv, widen(w_uv))) * scale
    dw_uk, dw_uv = (np.einsum("bsr,bhsd->hrd", c * scale, g) for g in (gk, gv))
    return dlatent, dw_uk, dw_uv, None if k_rope is None else widen(dk[..., Dn:]).sum(axis=1)


def latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, count, *, scale, latent_scale=None, softcap=None, sink_logits=None):
    k, v = latent_decompress(latent, w_uk, w_uv, k_rope=k_rope, latent_scale=latent_scale)
    return attention(np.concatenate([widen(q_nope), widen(q_rope)], axis=-1), k, v, count, scale=scale, softcap=softcap, sink_logits=sink_logits)


def merge_attention(outs, lses, *, sink_logits=None):
    with np.errstate(all="ignore"):
        logs = np.stack([widen(e) for e in lses])
        highest = np.where(np.isfinite(logs.max(axis=0)), logs.max(axis=0), 0)
        shares = np.exp(logs - highest)
        keys = shares.sum(axis=0)
        sink = 0 if sink_logits is None else np.exp(np.asarray(sink_logits, np.float64)[None, :, None] - highest)
        total = sum(np.where((s > 0)[..., None], s[..., None] * widen(o), 0) for s, o in zip(shares, outs))
        out = np.where((keys > 0)[..., None], total / (keys + sink)[..., None], 0)
        return out, highest + np.log(keys)
