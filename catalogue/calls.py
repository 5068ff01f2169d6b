"""How the systems of the catalogue are called on its inputs, and what these calls count. `x` is an Inputs, `v` its values or those that show who is seen."""
import numpy as np

import sparsetile as st
from sparsetile.catalogue.system import Inputs

LARGE = 64  # shapes with so many chosen keys take the papers' sizes; smaller ones are for pictures and checks


def attend(x, rule):
    """A pattern or a selection over grouped heads."""
    return st.sparse_attention(x.q, x.k, x.v, rule)


def latent(x, rule, mode):
    return st.latent_attention(x.q_nope, x.q_rope, x.latent, x.k_rope, x.w_uk, x.w_uv, rule, mode=mode)


def indexed(x):
    """The lightning indexer's arrays, and how many keys it chooses."""
    return dict(index_q=x.index_q, index_k=x.index_k, index_weights=x.index_w, top_k=x.shape.top_k)


def dsa(x, v):
    return st.dsa_attention(x.q, x.k, v, **indexed(x))


def dsa_latent(x):
    return st.dsa_latent_attention(x.q_nope, x.q_rope, x.latent, x.k_rope, x.w_uk, x.w_uv, **indexed(x))


def exact(x, v):
    return st.exact_topk(x.q, x.k, v, top_k=x.shape.top_k)


def moba(x, v):
    """Four blocks of a quarter of top_k; of small shapes, three of two keys."""
    block = max(2, x.shape.top_k // 4)
    return st.moba(x.q, x.k, v, block=block, top_k=x.shape.top_k // block)


def infllm(x, v):
    """Blocks of 64, a third of them the nearest ones, as published; of small shapes, three of two keys."""
    k = x.shape.top_k
    sizes = dict(top_k=k // 64, force_last=k // 64 // 3) if k >= LARGE else dict(block=4, stride=2, select_block=2, top_k=k // 2, force_last=1)
    return st.infllm_v2(x.q, x.k, v, **sizes)


def vertical_slash(x, v):
    """A quarter of top_k are vertical lines; of small shapes, fewer lines are forced."""
    k = x.shape.top_k
    return st.vertical_slash(x.q, x.k, v, vertical=k // 4, slash=k - k // 4, **({} if k >= LARGE else dict(force_vertical=1, force_slash=2)))


def pooled_blocks(x, v):
    return st.pooled_blocks(x.q, x.k, v, top_k=max(2, x.shape.top_k // 64))


def blocks_of_picture(x):
    """[T,S] booleans of the first head, each a block of 32 queries and 32 keys: blocks cannot be smaller."""
    side = 32
    large = Inputs(x.shape, side * x.tokens)
    seen = st.pooled_blocks_layout(large.q, large.k, block=side, top_k=x.shape.top_k).mask()[0]
    return seen.reshape(x.tokens, side, x.tokens, side).any((1, 3))


def routing(x, v):
    return st.routing(x.q, x.k, v, centroids=x.centroids, cluster_size=x.shape.top_k)


def reformer(x, v):
    """One round of chunks of 64; of small shapes, of 4. Every head has values of its own."""
    return st.reformer(x.q, None, v, chunk=64 if x.shape.top_k >= LARGE else 4)


def native(x, v, gates):
    """The paper's sizes; of small shapes, three blocks of four and a window of three."""
    sizes = {} if x.shape.top_k >= LARGE else dict(block=4, stride=2, select_block=4, top_k=3, force_last=1, window=3)
    return st.native_sparse_attention(x.q, x.k, v, gates, **sizes)


def seen(x, call, heads="Hk") -> np.ndarray:
    """[T,S] booleans of the first head: with one-hot values, call(v) shows which keys went into each output."""
    v = np.broadcast_to(np.eye(x.tokens, dtype=np.float32), (1, getattr(x.shape, heads), x.tokens, x.tokens))
    return np.asarray(call(v))[0, 0] > 0


def first_pairs(most: int, N: int) -> int:
    """Pairs of N causal queries that see at most so many keys."""
    k = min(most, N)
    return k * (k + 1) // 2 + (N - k) * k


def score_operations(shape, pairs: int) -> int:
    """Of an attention over so many pairs a head, scores and values."""
    return 4 * pairs * shape.Hq * shape.D


def exact_topk_operations(s, N: int, *, top_k, causal=True) -> int:
    """All scores, and attention over the keys chosen."""
    scored, chosen = (N * (N + 1) // 2, first_pairs(top_k, N)) if causal else (N * N, N * min(top_k, N))
    return 2 * scored * s.Hq * s.D + score_operations(s, chosen)


def moba_operations(s, N: int, *, block, top_k) -> int:
    """Products with the means of earlier blocks, and attention over the blocks chosen."""
    return N * N * s.Hq * s.D // block + score_operations(s, first_pairs(block * top_k, N))


def infllm_operations(s, N: int, *, stride, select_block, top_k) -> int:
    """Products with compressed keys, and attention over the blocks chosen."""
    return N * N * s.Hq * s.D // stride + score_operations(s, first_pairs(select_block * top_k, N))


def vertical_slash_operations(s, N: int, *, vertical, slash, last_q) -> int:
    """Scores of the last queries, and attention over so many lines; a key on two lines is counted twice."""
    return 2 * min(last_q, N) * N * s.Hq * s.D + score_operations(s, first_pairs(vertical + slash, N))


def pooled_blocks_operations(s, N: int, *, block, top_k) -> int:
    """Products of means of blocks, and attention over the blocks chosen."""
    return N * N * s.Hq * s.D // block ** 2 + score_operations(s, first_pairs(block * top_k, N))


COUNTS = {"exact_topk": exact_topk_operations, "moba": moba_operations, "infllm_v2": infllm_operations, "vertical_slash": vertical_slash_operations, "pooled_blocks": pooled_blocks_operations}
"""By function: operations of a call's forward over N tokens, all heads, from the call's own arguments."""
