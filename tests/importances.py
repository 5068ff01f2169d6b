"""What importance_topk is to find, from its definition: what compressed keys got of a query's attention, summed over its group and over blocks."""
import numpy as np


def shares(q, k, lse, scale, kind):
    """[B,Hk,T,C]: what each compressed key got of a query's attention, over the group; in `kind`, element by element."""
    B, Hq, T, _ = q.shape
    keys = np.repeat(k, Hq // k.shape[1], axis=1).astype(kind)
    with np.errstate(all="ignore"):
        x = np.exp(kind(scale) * np.einsum("bhtd,bhcd->bhtc", q.astype(kind), keys) - lse.astype(kind)[..., None])
    return x.reshape(B, k.shape[1], Hq // k.shape[1], T, -1).sum(2, dtype=kind)


def importances(share, key_end, block, stride, select_block, keys):
    """[B,Hk,T,blocks]: a compressed key counts once for each of its strides in a block."""
    found = np.zeros((*share.shape[:3], -(-keys // select_block)), share.dtype)
    for i in range(share.shape[-1]):
        seen = np.where(i < key_end, share[..., i], 0)
        for piece in range(i * stride, i * stride + block, stride):
            if piece // select_block < found.shape[-1]:
                found[..., piece // select_block] += seen
    return found


def ends(B, T, keys, C, block, stride, select_block, kv_length, q_start):
    """key_end, block_end [B,1,T]"""
    both = np.zeros((2, B, 1, T), np.int64)
    for b in range(B):
        limit = keys if kv_length is None else min(max(int(kv_length[b]), 0), keys)
        start = limit - T if q_start is None else int(np.broadcast_to(q_start, (B,))[b])
        for t in range(T):
            stop = min(start + t + 1, limit)
            both[:, b, 0, t] = sum(i * stride + block <= stop for i in range(C)), sum(j * select_block < stop for j in range(-(-keys // select_block)))
    return both
