"""Native Sparse Attention: a coarse look at compressed keys, a fine one at the blocks that mattered there, and a window; gates weigh the three."""
from sparsetile.backends.contract import Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.ops.attention import sparse_attention
from sparsetile.ops.caches.paged import Cache
from sparsetile.ops.importance import importance_topk
from sparsetile.ops.merge import weighted_sum
from sparsetile.ops.patterns import Compressed, Window
from sparsetile.systems.compression import compress, pair

BRANCHES = ("compressed", "selected", "sliding")


def native_sparse_attention(q, k, v, gates, *, compression="mean", block=32, stride=16, select_block=64, top_k=16, force_first=1, force_last=2, window=512,
                            scale=None, kv_length=None, q_start=None, return_selection=False, deterministic=True, backend=None):
    """gates[..., 0] * attention over compressed keys + gates[..., 1] * attention over the top_k blocks chosen by it + gates[..., 2] * attention over the last `window` keys.

    q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] (Hq % Hk == 0, any group; float32, float16, bfloat16, float64 on CPU).
    k, v         one array for all branches, or a triple for (compressed, selected, sliding), as the paper keeps separate keys and values for each
    gates        [B,Hq,T,3], or a triple of [B,Hq,T] of which None leaves that branch out; floats, multiplied as they are (the paper's sigmoid of a linear map is the caller's)
    compression  "mean"; a callable of blocks [B,Hk,C,block,D] -> [B,Hk,C,D], a CompressionMLP or a module of the caller's; or a pair, for keys and for values
    block, stride        compressed key i stands for the keys i * stride ... i * stride + block - 1; it is seen once they all exist at or before the query
    select_block, top_k  blocks of so many keys, and how many of them a query and its group see; both block and select_block are multiples of stride
    force_first, force_last   blocks at the start and at the end of what a query sees that are always taken; they count in top_k
    window       keys of the sliding branch, the query's own counted; 0 leaves the branch out
    scale, kv_length, q_start, deterministic, backend   as in sparse_attention; positions count keys, not compressed ones
    return_selection   also return the Selection [B,Hk,T,top_k] of granularity select_block

    The paper's convention is the default, with a triple of keys and values and learned compression. That of common Triton code (flash-linear-attention): shared k and v,
    block = stride = select_block = 64, compression "mean", force_first=1, force_last=2, window=512.
    Importance is summed over a key head's group by the paper's equations 9 and 10 (importance_topk). Branches are rounded to q's type, weighed and added in float32 (float64
    for float64), rounded once. A query before the first complete block sees nothing in the compressed branch: 0, gradients 0; its blocks then tie and are taken from the start.
    Returns out [B,Hq,T,Dv] [, selection]. Differentiable in PyTorch: q, k, v, gates, the weights of compression; the choice is not. Costs, per query head:
    S / stride products (D + Dv) + S / stride products D for the importance + top_k * select_block + window products (D + Dv); no T x S or T x blocks array is made.
    Source: Native Sparse Attention (arXiv 2502.11089), section 3.
    """
    ks, vs = branches("k", k), branches("v", v)
    coarse = compressed_keys(ks[0], vs[0], compression, block, stride)
    return attend(q, ks, vs, *coarse, gates, block=block, stride=stride, select_block=select_block, top_k=top_k, force_first=force_first, force_last=force_last, window=window,
                  scale=scale, kv_length=kv_length, q_start=q_start, return_selection=return_selection, deterministic=deterministic, backend=backend)


def attend(q, ks, vs, ck, cv, gates, *, block=32, stride=16, select_block=64, top_k=16, force_first=1, force_last=2, window=512, scale=None, kv_length=None, q_start=None,
           return_selection=False, deterministic=True, backend=None):
    """native_sparse_attention where the compressed keys and values ck [B,Hk,C,D], cv [B,Hk,C,Dv] are made already; ks, vs: triples."""
    gates, window = _gates(gates, q), checks.integer("window", window, 0, 2 ** 31 - 1)
    checks.flag("return_selection", return_selection)
    S, T, start, complete = int(ks[1].shape[2]), int(q.shape[2]), q_start, None
    if kv_length is not None:
        checks.lengths("kv_length", kv_length, (int(q.shape[0]),), "[B]")
        kv_length = xp.astype(xp.module(kv_length).clip(kv_length, 0, S), "int32")
        complete = complete_blocks(kv_length, block, stride)
    if start is None:  # positions count keys: the compressed branch, which has fewer, must be told
        start = S - T if kv_length is None else kv_length - T
    options, chosen, outs = dict(scale=scale, q_start=start, deterministic=deterministic, backend=backend), None, [None, None, None]
    if gates[0] is not None or gates[1] is not None or return_selection:
        outs[0], lse = sparse_attention(q, ck, cv, Compressed(block, stride), return_lse=True, kv_length=complete, **options)
    if gates[1] is not None or return_selection:
        chosen = importance_topk(q, ck, lse, top_k, block=block, stride=stride, select_block=select_block, keys=S, scale=scale, kv_length=kv_length, q_start=start,
                                 force_first=force_first, force_last=force_last, backend=backend)
    if gates[1] is not None:
        outs[1] = sparse_attention(q, ks[1], vs[1], chosen, kv_length=kv_length, **options)
    if gates[2] is not None and window:
        outs[2] = sparse_attention(q, ks[2], vs[2], Window(window - 1), kv_length=kv_length, **options)
    out = gated(outs, gates, q, backend)
    return (out, chosen) if return_selection else out


def compressed_keys(k, v, compression, block: int, stride: int):
    """k [B,Hk,S,D], v [B,Hk,S,Dv] -> compressed k [B,Hk,C,D], v [B,Hk,C,Dv]."""
    block, stride = checks.integer("block", block, 1, 2 ** 30), checks.integer("stride", stride, 1, 2 ** 30)
    of_k, of_v = pair(compression)
    return compress("k", k, of_k, block, stride), compress("v", v, of_v, block, stride)


def complete_blocks(kv_length, block: int, stride: int):
    """[B] lengths in keys -> how many compressed keys are complete, int32."""
    return xp.astype(xp.module(kv_length).clip((kv_length - block) // stride + 1, 0, None), "int32")


def gated(outs, gates, q, backend=None):
    """Sum of the branches that are there, each [B,Hq,T,Dv] weighed by its gate [B,Hq,T], in float32 (float64 for float64), rounded once to q's type."""
    there = [(out, gate) for out, gate in zip(outs, gates) if out is not None and gate is not None]
    if not there:
        raise ValueError("gates: expected at least one branch, got none; pass gates [B,Hq,T,3] or a gate for a branch that is there (window=0 leaves the sliding one out)")
    outs, gates = zip(*there)
    if any(str(gate.dtype) != str(q.dtype) for gate in gates):
        wide = "float64" if "float64" in str(q.dtype) else "float32"
        gates = [xp.astype(gate, wide) for gate in gates]
    return weighted_sum(outs, gates, backend)


def branches(name, x):
    """The arrays of the three branches."""
    if isinstance(x, Cache):
        raise Unsupported(f"{name}: expected arrays, got a {type(x).__name__}, which keeps no compressed keys; use NativeSparseCache, or pass the arrays of cache.gather()")
    if not isinstance(x, (tuple, list)):
        return checks.array(name, x, 4, "[B,Hk,S,D]"), x, x
    if len(x) != 3:
        raise ValueError(f"{name}: expected one array or three, for the branches {', '.join(BRANCHES)}, got {len(x)}; pass the same array for branches that share it")
    for n, part in zip(BRANCHES, x):
        checks.array(f"{name} ({n})", part, 4, "[B,Hk,S,D]")
        checks.same(f"{name} ({n})", "number of heads and keys of the compressed branch", list(x[0].shape[1:3]), list(part.shape[1:3]), "all branches hold the same positions")
    return tuple(x)


def _gates(gates, q):
    """Three gates [B,Hq,T] or None."""
    rows = list(checks.array("q", q, 4, "[B,Hq,T,D]").shape[:3])
    if not isinstance(gates, (tuple, list)):
        checks.array("gates", gates, 4, "[B,Hq,T,3]", ("float32", "float16", "bfloat16", "float64"))
        checks.together(dict(q=q, gates=gates))
        checks.same("gates", "shape [B,Hq,T,3]", [*rows, 3], list(gates.shape), f"one value for each of the branches {', '.join(BRANCHES)}")
        return gates[..., 0], gates[..., 1], gates[..., 2]
    if len(gates) != 3:
        raise ValueError(f"gates: expected an array [B,Hq,T,3] or three of [B,Hq,T] or None, got {len(gates)}; the branches are {', '.join(BRANCHES)}")
    for n, gate in zip(BRANCHES, gates):
        if gate is not None:
            checks.array(f"gates ({n})", gate, 3, "[B,Hq,T]", ("float32", "float16", "bfloat16", "float64"))
            checks.together({"q": q, f"gates ({n})": gate})
            checks.same(f"gates ({n})", "shape [B,Hq,T] of q", rows, list(gate.shape), "one value for each query and head")
    return tuple(gates)
