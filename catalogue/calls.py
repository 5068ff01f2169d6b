"""How the systems of the catalogue are called on its inputs, and what these calls count. `x` is an Inputs, `v` its values or those that show who is seen."""
import numpy as np

import sparsetile as st

LARGE = 64  # shapes with so many chosen keys take the papers' sizes; smaller ones are for pictures and checks


def attend(x, rule):
    """A pattern or a selection over grouped heads."""
    return st.sparse_attention(x.q, x.k, x.v, rule)


def latent(x, rule, mode):
    return st.latent_attention(x.q_nope, x.q_rope, x.latent, x.k_rope, x.w_uk, x.w_uv, rule, mode=mode)


def indexed(x):
    """The lightning indexer's choice."""
    return st.indexer_topk(x.index_q, x.index_k, x.index_w, x.shape.top_k)


def exact(x, v):
    return st.exact_topk(x.q, x.k, v, top_k=x.shape.top_k)


def moba(x, v):
    """Four blocks of a quarter of top_k; of small shapes, three of two keys."""
    block = max(2, x.shape.top_k // 4)
    return st.moba(x.q, x.k, v, block=block, top_k=x.shape.top_k // block)


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
