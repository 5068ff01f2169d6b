"""JAX on the CPU: eager arrays, and every op under jit."""
import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="JAX is not installed: pip install 'sparsetile[jax]'")
import jax.numpy as jnp  # noqa: E402

import sparsetile as st  # noqa: E402
from sparsetile.autotune import numeric  # noqa: E402


@pytest.fixture
def make(rng):
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


def both(function, *arrays):
    """A call with NumPy arrays, with JAX arrays, and under jit: the same bits, each in its own type."""
    want, eager, traced = function(*arrays), function(*map(jnp.asarray, arrays)), jax.jit(function)(*map(jnp.asarray, arrays))
    for a, b, c in zip(*(x if isinstance(x, tuple) else (x,) for x in (want, eager, traced))):
        assert isinstance(a, np.ndarray) and isinstance(b, jax.Array) and isinstance(c, jax.Array)
        numeric.assert_same_bits("eager", a, np.asarray(b))
        numeric.assert_same_bits("jit", a, np.asarray(c))


def test_sparse_attention(make):
    both(lambda q, k, v, sink: st.sparse_attention(q, k, v, st.Window(9) | st.Sink(2), sink_logits=sink, return_lse=True), make(1, 4, 20, 16), make(1, 2, 33, 16), make(1, 2, 33, 8), make(4))


def test_lengths_and_starts(make):
    both(lambda q, k, v, n: st.sparse_attention(q, k, v, st.Causal(), kv_length=n), make(2, 2, 5, 8), make(2, 2, 20, 8), make(2, 2, 20, 8), np.array([3, 20], np.int32))


def test_indexer_to_attention(make):
    def pipeline(q, k, v, iq, ik, w):
        return st.sparse_attention(q, k, v, st.indexer_topk(iq, ik, w, 6))
    both(pipeline, make(1, 2, 12, 8), make(1, 2, 30, 8), make(1, 2, 30, 8), make(1, 3, 12, 16), make(1, 30, 16), make(1, 3, 12))


def test_a_selection_alone_is_traced(make):
    """q, k and v are known when tracing, the entries are not."""
    q, k, v, entries = make(1, 2, 6, 8), make(1, 2, 20, 8), make(1, 2, 20, 8), np.arange(18, dtype=np.int32).reshape(1, 1, 6, 3)
    both(lambda i: st.sparse_attention(*(map(jnp.asarray, (q, k, v)) if not isinstance(i, np.ndarray) else (q, k, v)), st.Selection(i, causal=True) & st.Window(9)), entries)


def test_a_layout_of_a_traced_mask(make):
    call, given = lambda q, k, m: st.sparse_attention(q, k, k, st.Layout.from_block_mask(m, 32, 32)), (make(1, 2, 40, 8), make(1, 2, 50, 8), np.array([[True, False], [True, True]]))  # noqa: E731
    numeric.assert_same_bits("jit", call(*given), np.asarray(jax.jit(call)(*map(jnp.asarray, given))))


def test_vmap_is_a_loop(make):
    q, k = make(3, 1, 2, 6, 8), make(3, 1, 2, 9, 8)
    got = jax.vmap(lambda q, k: st.sparse_attention(q, k, k, st.Causal()))(jnp.asarray(q), jnp.asarray(k))
    numeric.assert_same_bits("vmap", np.stack([st.sparse_attention(a, b, b, st.Causal()) for a, b in zip(q, k)]), np.asarray(got))


def test_scores_and_topk(make):
    both(lambda q, k, w: st.topk(st.indexer_scores(q, k, w), 5).indices, make(1, 3, 12, 16), make(1, 30, 16), make(1, 3, 12))


def test_latent(make):
    weights = make(2, 24, 8), make(2, 24, 6)
    both(lambda c, uk, uv, r: st.latent_decompress(c, uk, uv, k_rope=r), make(1, 10, 24), *weights, make(1, 10, 4))
    for mode in ("absorbed", "decompressed"):
        both(lambda qn, qr, c, r, uk, uv: st.latent_attention(qn, qr, c, r, uk, uv, st.Causal(), mode=mode),
             make(1, 2, 7, 8), make(1, 2, 7, 4), make(1, 10, 24), make(1, 10, 4), *weights)
        both(lambda qn, c, uk, uv, i: st.latent_attention(qn, None, c, None, uk, uv, st.Selection(i), mode=mode), make(1, 2, 7, 8), make(1, 10, 24), *weights, np.arange(14, dtype=np.int32).reshape(1, 1, 7, 2))


def test_merge(make):
    both(lambda a, b, x, y: st.merge_attention([a, b], [x, y]), make(1, 2, 5, 4), make(1, 2, 5, 4), make(1, 2, 5), make(1, 2, 5))


def test_bfloat16_stays_bfloat16(make):
    q = jnp.asarray(make(1, 2, 9, 8), jnp.bfloat16)
    assert st.sparse_attention(q, q, q, st.Causal()).dtype == jnp.bfloat16
