"""Reformer: queries that are their own keys are hashed by random rotations, sorted by bucket and cut into chunks; each sees its chunk and the one before."""
import numpy as np

from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.selection import Selection
from sparsetile.systems.scores import best_keys, check, places

LAST = 2 ** 31 - 1  # the bucket of what does not exist


def lsh_buckets(q, *, n_buckets=None, rounds=1, chunk=64, seed=0, rotations=None, backend=None):
    """Angular locality-sensitive hashing: bucket of x = argmax [x R, -x R], int32 [B,H,rounds,T].

    q [B,H,T,D]; n_buckets even, by default the power of two at or below 2 T / chunk, as the published code takes it.
    rotations   R [H or 1, D, rounds, n_buckets / 2] of q's framework; by default normal numbers drawn on the host by `seed`, the same for all heads and on every machine
                (torch.compile cannot trace the drawing: give them there). Given ones say how many rounds and buckets there are
    Of equal products the smaller bucket wins; products are float32 or of q's type. Costs T * rounds * n_buckets / 2 products of width D, memory O(T * rounds).
    Not differentiable. Source: Reformer (arXiv 2001.04451), section 2, "LSH attention".
    """
    call = check(q, q, None, 0, backend)
    B, H, _, T, _, D, _ = call.sizes
    if rotations is None:
        n_buckets = 1 << max(1, (2 * (T // checks.integer("chunk", chunk, 1))).bit_length() - 1) if n_buckets is None else checks.integer("n_buckets", n_buckets, 2, 2 ** 24)
        if n_buckets % 2:
            raise ValueError(f"n_buckets: expected an even number, a rotation gives two buckets, got {n_buckets}; use {n_buckets + 1}")
        drawn = np.random.default_rng(checks.integer("seed", seed, 0)).standard_normal((1, D, checks.integer("rounds", rounds, 1), n_buckets // 2))
        rotations = xp.constant(drawn.astype(np.float32), call.q)
    elif n_buckets is not None:
        raise ValueError(f"n_buckets: expected None beside rotations, got {n_buckets}; their last axis says how many there are")
    checks.array("rotations", rotations, 4, "[H or 1, D, rounds, n_buckets / 2]", ("float32", "float16", "bfloat16", "float64"))
    checks.together(dict(q=q, rotations=rotations))
    if rotations.shape[0] not in (1, H) or rotations.shape[1] != D or 0 in rotations.shape:
        raise ValueError(f"rotations: expected [1 or {H}, {D}, rounds, n_buckets / 2], got {list(rotations.shape)}; draw them for q's heads and width")
    lib, half = xp.module(call.q), xp.as_type_of(xp.constant_of(rotations), call.q)
    both = lib.moveaxis(lib.concatenate([half, -half], 3), 1, 3)                       # [H or 1, rounds, n_buckets, D]
    ends = xp.full(call.q, (1, 1), both.shape[2])
    of = lambda r: best_keys(call.q, lib.broadcast_to(both[None, :, r], (B, H, both.shape[2], D)), 1, ends, backend=backend)[..., 0]  # noqa: E731
    return lib.stack([of(r) for r in range(both.shape[1])], 2)


def reformer_selection(q, *, buckets=None, n_buckets=None, rounds=1, chunk=64, chunks_before=1, chunks_after=0, same_bucket=False, causal=True, seed=0, kv_length=None,
                       backend=None) -> Selection:
    """The keys of every query, which are the queries themselves: q [B,H,T,D] -> Selection [B,H,T,rounds * chunks * chunk] of single keys.

    buckets       int32 [B,H,rounds,T], any numbers; by default lsh_buckets(q, n_buckets=, rounds=, chunk=, seed=). Given ones say how many rounds there are
    chunk         in every round positions are sorted by bucket, then position, and cut into chunks of so many, the last one ragged; keys past kv_length are sorted last
    chunks_before, chunks_after   how many neighbours of its own chunk a query looks at
    same_bucket   False, the convention of trax and Hugging Face: all rounds are one sequence of chunks, which wraps around; keys of other buckets in these chunks are seen
                  too; a key found more than once counts as often, as merging the rounds by their log-sum-exp does. T <= chunk: all keys once.
                  True, the strict one of the paper (equations 2 and 6): only keys of the query's bucket, chunks of its own round, a key found in several rounds counts once
    causal        only keys at or before the query
    A query does not see itself, unless it sees nothing else (their score -1e5). Queries stand at 0 .. T - 1: there is no q_start, and no decoding by this selector.
    Memory O(T * rounds * chunks * chunk) indices. Not differentiable. Raises ValueError or TypeError for bad arguments, Unsupported where the backend has no indexer_topk.
    Source: Reformer (arXiv 2001.04451), section 2.
    """
    for name, value, least in (("rounds", rounds, 1), ("chunk", chunk, 1), ("chunks_before", chunks_before, 0), ("chunks_after", chunks_after, 0)):
        checks.integer(name, value, least)
    checks.flag("same_bucket", same_bucket), checks.flag("causal", causal)
    call = check(q, q, kv_length, 0, backend)
    B, H, _, T, _, _, _ = call.sizes
    lib, length = xp.module(call.q), places(call)[1]
    if T <= chunk and not same_bucket:  # as Hugging Face does
        buckets, chunk, chunks_before, chunks_after = xp.full(call.q, (B, H, 1, T), 0), max(T, 1), 0, 0
    elif buckets is not None and n_buckets is not None:
        raise ValueError(f"n_buckets: expected None beside buckets, got {n_buckets}; it is for drawing them")
    elif buckets is None:
        buckets = lsh_buckets(call.q, n_buckets=n_buckets, rounds=rounds, chunk=chunk, seed=seed, backend=backend)
    checks.array("buckets", buckets, 4, "[B,H,rounds,T]", ("int32",))
    checks.same("buckets", "shape [B,H,T] of q", [B, H, T], [*buckets.shape[:2], buckets.shape[3]], "one bucket for each query and round")
    buckets = lib.where((xp.arange(call.q, T) < length)[:, None, None], buckets, LAST)
    keys = _neighbours(buckets, chunk, range(-chunks_before, chunks_after + 1), same_bucket)  # [B,R,H,T,W]
    here = xp.arange(call.q, T)[:, None]
    seen = (keys >= 0) & (keys != here) & (keys < length[:, :, None, None, None])
    keys = lib.where(seen & (keys <= here) if causal else seen, keys, -1)
    keys = lib.moveaxis(keys, 1, 3).reshape(B, H, T, keys.shape[1] * keys.shape[4])    # [B,H,T,R*W]
    if same_bucket:
        keys = xp.along(keys, xp.argsort(keys))
        keys = lib.where(lib.concatenate([keys[..., :1] < -1, keys[..., 1:] == keys[..., :-1]], 3), -1, keys)
    alone = (xp.highest(keys, 3) < 0)[..., None] & (xp.arange(keys, keys.shape[3]) == 0)
    return Selection(xp.astype(lib.where(alone, here, keys), "int32"))


def _neighbours(buckets, chunk, offsets, same_bucket):
    """Positions that stand in the neighbouring chunks of each query, [B,R,H,T,W], -1 for none; buckets [B,H,R,T]."""
    lib, (B, H, R, T) = xp.module(buckets), buckets.shape
    order = xp.argsort(buckets)                                                        # position at each rank
    rank, r = xp.argsort(order), xp.arange(buckets, R)[:, None]
    n = -(-(T if same_bucket else R * T) // chunk)                                     # chunks of a span of ranks: a round, or all rounds

    def of_chunks(x):
        x = x.reshape(B, H, R if same_bucket else 1, T if same_bucket else R * T)
        x = lib.concatenate([x, xp.full(x, (*x.shape[:3], n * chunk - x.shape[3]), -1)], 3).reshape(*x.shape[:3], n, chunk)
        at = xp.arange(x, n)[:, None]
        shifted = [lib.roll(x, -o, 3) for o in offsets]
        if same_bucket:  # no span reaches into another
            shifted = [lib.where((at + o >= 0) & (at + o < n), y, -1) for o, y in zip(offsets, shifted)]
        return lib.concatenate(shifted, 4).reshape(B, H, n * (R if same_bucket else 1), len(offsets) * chunk)

    at = (rank // chunk + r * n if same_bucket else (rank + r * T) // chunk).swapaxes(1, 2)
    pick = lambda x: xp.take_rows(of_chunks(x), xp.arange(x, H), at)  # noqa: E731
    keys = pick(order)
    return lib.where(pick(xp.along(buckets, order)) == buckets.swapaxes(1, 2)[..., None], keys, -1) if same_bucket else keys


def reformer(q, k, v, *, buckets=None, n_buckets=None, rounds=1, chunk=64, chunks_before=1, chunks_after=0, same_bucket=False, causal=True, seed=0, scale=1.0, kv_length=None,
             backend=None, **options):
    """Attention over what reformer_selection chooses, with keys q / |q|: q [B,H,T,D], k None, v [B,H,T,Dv] -> out [B,H,T,Dv] [, lse].

    k      None: queries and keys are shared; key t is q[t] * (mean(q[t]^2) + 1e-6)^-0.5 * D^-0.5, of length 1, as trax and Hugging Face make it
    scale  of the products; 1, since keys have length 1
    The rest as in reformer_selection and sparse_attention. A query that sees only itself: out v, LSE its product with its own key.
    Costs T * rounds * chunks * chunk (D + Dv) products. Differentiable in PyTorch: q (as query and as key), v, sink_logits; the hash is not.
    """
    if k is not None:
        raise ValueError("k: expected None, got an array; in Reformer queries are their own keys: pass None")
    chosen = reformer_selection(q, buckets=buckets, n_buckets=n_buckets, rounds=rounds, chunk=chunk, chunks_before=chunks_before, chunks_after=chunks_after,
                                same_bucket=same_bucket, causal=causal, seed=seed, kv_length=kv_length, backend=backend)
    wide = xp.wide(q)
    unit = wide * ((wide * wide).mean(3)[..., None] + 1e-6) ** -0.5 * q.shape[3] ** -0.5
    return sparse_attention(q, xp.as_type_of(unit, q), v, chosen, scale=scale, kv_length=kv_length, q_start=0, backend=backend, **options)
