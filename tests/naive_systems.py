"""The systems' papers in loops, float64, for tests: which keys each query of each head sees. Shares nothing with systems/.

Every function returns count [B,Hq,T,S]: how often a query's softmax counts a key. starts, lengths: per sample, position of query 0 and number of keys that exist.
"""
import numpy as np


def sizes(q, k, q_start=None, kv_length=None):
    """B, Hq, group, T, S, D, starts, lengths"""
    (B, Hq, T, D), (Hk, S) = q.shape, k.shape[1:3]
    lengths = np.clip(np.full(B, S) if kv_length is None else np.asarray(kv_length), 0, S).astype(int)
    starts = lengths - T if q_start is None else np.broadcast_to(q_start, (B,)).astype(int)
    return B, Hq, Hq // Hk, T, S, D, starts, lengths


def best(scores, count):
    """Keys of a {key: score} by larger score, then smaller key."""
    return sorted(scores, key=lambda s: (-scores[s], s))[:count]


def moba(q, k, *, block, top_k, q_start=None, kv_length=None):
    """arXiv 2502.13189, equations 2-6; the mean is rounded to the type of k, as the published code does."""
    B, Hq, group, T, S, D, starts, lengths = sizes(q, k, q_start, kv_length)
    seen = np.zeros((B, Hq, T, S), int)
    for b, h, t in np.ndindex(B, Hq, T):
        p = starts[b] + t
        if p < 0:
            continue
        own, gates = p // block, {}
        for n in range(own):
            keys = k[b, h // group, n * block:min((n + 1) * block, lengths[b])]
            if len(keys):
                gates[n] = q[b, h, t].astype(np.float64) @ keys.astype(np.float64).mean(0).astype(k.dtype).astype(np.float64)
        for n in best(gates, top_k - 1) + [own]:
            for s in range(n * block, min((n + 1) * block, p + 1, lengths[b])):
                seen[b, h, t, s] = 1
    return seen


def exact_topk(q, k, *, top_k, causal=True, scale=None, q_start=None, kv_length=None):
    B, Hq, group, T, S, D, starts, lengths = sizes(q, k, q_start, kv_length)
    seen = np.zeros((B, Hq, T, S), int)
    for b, h, t in np.ndindex(B, Hq, T):
        keys = range(min(lengths[b], starts[b] + t + 1) if causal else lengths[b])
        products = {s: (1 if scale is None else scale) * (q[b, h, t].astype(np.float64) @ k[b, h // group, s].astype(np.float64)) for s in keys}
        seen[b, h, t, best(products, top_k)] = 1
    return seen


def routing(q, k, v, centroids, cluster_size, *, dtype, causal=True, normalize="layer", q_start=None, kv_length=None):
    """arXiv 2003.05997, algorithm 1 -> out, and q, k, v as leaves for autograd; members are chosen in float64, attention is computed in torch's dtype."""
    import torch
    B, Hq, group, T, S, D, starts, lengths = sizes(q, k, q_start, kv_length)
    leaves = [torch.tensor(x.astype(np.float64), dtype=dtype, requires_grad=True) for x in (q, k, v)]

    def near(mu, x, rows):
        x = x.astype(np.float64)
        if normalize == "layer":
            x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        elif normalize == "unit":
            x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return sorted(best({r: mu.astype(np.float64) @ x[r] for r in rows}, cluster_size))
    rows = {}
    for b, h, c in np.ndindex(B, Hq, centroids.shape[1]):
        mu = centroids[h * len(centroids) // Hq, c]
        members = near(mu, q[b, h], [t for t in range(T) if not causal or 0 <= starts[b] + t < lengths[b]])
        keys = near(mu, k[b, h // group], range(lengths[b]))
        for t in members:
            seen = [s for s in keys if not causal or s <= starts[b] + t]
            part = torch.zeros(v.shape[3], dtype=dtype)
            if seen:
                p = torch.softmax(leaves[1][b, h // group, seen] @ leaves[0][b, h, t] * D ** -0.5, 0)
                part = p @ leaves[2][b, h // group, seen]
            rows.setdefault((b, h, t), []).append(part)
    nothing = torch.zeros(v.shape[3], dtype=dtype)
    out = torch.stack([sum(rows[at]) / len(rows[at]) if at in rows else nothing for at in np.ndindex(B, Hq, T)]).reshape(B, Hq, T, -1)
    return out, leaves


def reformer(buckets, *, chunk, chunks_before=1, chunks_after=0, same_bucket=False, causal=True, kv_length=None):
    """arXiv 2001.04451, section 2, for buckets [B,H,rounds,T]. same_bucket False: the chunks of trax, one sequence of all rounds that wraps around."""
    B, H, R, T = buckets.shape
    lengths = np.full(B, T) if kv_length is None else kv_length
    seen = np.zeros((B, H, T, T), int)
    for b, h in np.ndindex(B, H):
        spans = [sorted(((r, t >= lengths[b], buckets[b, h, r, t], t) for t in range(T)), key=lambda x: x) for r in range(R)]
        if not same_bucket:
            spans = [sum(spans, [])]
        for span in spans:
            n = -(-len(span) // chunk)
            for i, (_, _, bucket, t) in enumerate(span):
                for o in range(-chunks_before, chunks_after + 1):
                    c = i // chunk + o
                    if same_bucket and not 0 <= c < n:
                        continue
                    for _, _, other, s in span[c % n * chunk:(c % n + 1) * chunk]:
                        if s != t and s < lengths[b] and (s <= t or not causal):
                            if not same_bucket:
                                seen[b, h, t, s] += 1
                            elif other == bucket:
                                seen[b, h, t, s] = 1
        for t in range(lengths[b]):
            if not seen[b, h, t].any():
                seen[b, h, t, t] = 1
    return seen


def shared_attention(q, v, count, *, dtype):
    """out of softmax(q k^T) v with k = q / |q|, keys counted by count; q, v leaves of autograd."""
    import torch
    q, v = (torch.tensor(x.astype(np.float64), dtype=dtype, requires_grad=True) for x in (q, v))
    k = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt() / q.shape[-1] ** 0.5
    logits = q @ k.mT + torch.from_numpy(count).to(dtype).log()
    return torch.softmax(logits, -1) @ v, (q, v)


def infllm_v2(q, k, *, block, stride, select_block, top_k, force_first=1, force_last, scale=None, q_start=None, kv_length=None):
    """arXiv 2509.24663, section 3: softmax over complete windows, summed over the group, a block's score the largest of the windows that overlap it."""
    B, Hq, group, T, S, D, starts, lengths = sizes(q, k, q_start, kv_length)
    seen = np.zeros((B, Hq, T, S), int)
    for b, g, t in np.ndindex(B, Hq // group, T):
        end = min(starts[b] + t + 1, lengths[b])
        windows = [range(i, i + block) for i in range(0, end - block + 1, stride)]
        weights = np.zeros(len(windows))
        for h in range(g * group, (g + 1) * group) if windows else ():
            means = np.stack([k[b, g, list(w)].astype(np.float64).mean(0).astype(k.dtype).astype(np.float64) for w in windows])
            e = np.exp(means @ q[b, h, t].astype(np.float64) * (D ** -0.5 if scale is None else scale))
            weights += e / e.sum()
        blocks = [range(start, min(start + select_block, end)) for start in range(0, max(end, 0), select_block)]
        scores = {j: max([w for w, window in zip(weights, windows) if window[0] < (j + 1) * select_block and window[-1] >= j * select_block], default=0) for j in range(len(blocks))}
        forced = {*range(min(force_first, len(blocks))), *range(max(0, len(blocks) - force_last), len(blocks))}
        free = {j: s for j, s in scores.items() if j not in forced}
        for j in [*forced, *best(free, top_k - len(forced))]:
            seen[b, g * group:(g + 1) * group, t, list(blocks[j])] = 1
    return seen


def vertical_slash(q, k, *, vertical, slash, last_q, force_vertical, force_slash, scale=None, q_start=None, kv_length=None):
    """arXiv 2407.02490, algorithm 1, with the first keys and the nearest distances always taken, as the published code does."""
    B, Hq, group, T, S, D, starts, lengths = sizes(q, k, q_start, kv_length)
    seen = np.zeros((B, Hq, T, S), int)
    for b, h in np.ndindex(B, Hq):
        columns = {s: np.inf if s < force_vertical else 0.0 for s in range(lengths[b])}
        distances = {starts[b] + t - s: 0.0 for t in range(max(0, T - last_q), T) for s in range(S) if s <= starts[b] + t}
        for t in range(max(0, T - last_q), T):
            keys = range(min(starts[b] + t + 1, lengths[b]))
            if len(keys):
                logits = k[b, h // group, list(keys)].astype(np.float64) @ q[b, h, t].astype(np.float64) * (D ** -0.5 if scale is None else scale)
                for s, weight in zip(keys, np.exp(logits) / np.exp(logits).sum()):
                    columns[s] += weight
                    distances[starts[b] + t - s] += weight
        ordered = {-d: np.inf if d < min(force_slash, slash) else w for d, w in distances.items()}  # of equal sums the larger distance
        verticals, slashes = best(columns, vertical), [-d for d in best(ordered, slash)]
        for t in range(T):
            p = starts[b] + t
            for s in range(min(p + 1, lengths[b])):
                seen[b, h, t, s] = s in verticals or p - s in slashes
    return seen


def pooled_blocks(q, k, *, block, top_k, q_start=None, kv_length=None):
    """arXiv 2407.02490, algorithm 2: block means of queries and keys, rounded to their types, the best blocks of each row of blocks."""
    B, Hq, group, T, S, D, starts, lengths = sizes(q, k, q_start, kv_length)
    mean = lambda x: x.astype(np.float64).mean(0).astype(x.dtype).astype(np.float64)  # noqa: E731
    seen = np.zeros((B, Hq, T, S), int)
    for b, h, i in np.ndindex(B, Hq, -(-T // block)):
        row = mean(q[b, h, i * block:(i + 1) * block])
        own = starts[b] // block + i
        scores = {j: row @ mean(k[b, h // group, j * block:min((j + 1) * block, lengths[b])]) for j in range(own + 1) if j * block < lengths[b]}
        for j in best(scores, top_k):
            for t in range(i * block, min((i + 1) * block, T)):
                seen[b, h, t, j * block:min((j + 1) * block, lengths[b], starts[b] + t + 1)] = 1
    return seen
