"""A selection as bitmaps of blocks, NumPy.

    indices [B,G,T,K] int32, lengths [B,G,T] or None  ->  bitmaps [B*G*nq*nk, block_q, block_k / 32] int32, kinds [B*G, nq, nk] int32

Row t stands in block t // block_q; bit c % 32 of word c // 32 says whether it sees key j * block_k + c. Kind -2: no row of the block sees a key of it, else 2 n + 1 for row n of the bitmaps.
Holes, `lengths` and causality as in gather_attention; an entry given twice shows once.
"""
import numpy as np

from sparsetile.backends.contract import Resources
from sparsetile.backends.reference.gather_attention import rows

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def run(indices, *, place=None, config=None, S, block_q, block_k, lengths=None, granularity=1, causal=False, kv_length=None, q_start=None):
    B, G, T, K = indices.shape
    nq, nk = -(-T // block_q), -(-S // block_k)
    seen = np.zeros((B * G, nq * block_q, nk * block_k), bool)
    for b, heads, _, t, keys in rows(indices, lengths, granularity, causal, B, G, G, T, S, kv_length, q_start):
        seen[b * G + heads.start, t, keys] = True
    blocks = seen.reshape(B * G, nq, block_q, nk, block_k).swapaxes(2, 3)             # [L, nq, nk, block_q, block_k]
    bitmaps = np.packbits(blocks, axis=-1, bitorder="little").view("<i4").astype(np.int32).reshape(-1, block_q, block_k // 32)
    some = blocks.any((3, 4))
    return bitmaps, np.where(some, 2 * np.arange(some.size).reshape(some.shape) + 1, -2).astype(np.int32)
