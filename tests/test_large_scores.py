"""Scores so large that one rounding of a logit is more than a bit: where one key decides, the answer is its value, as the plain formula's is."""
import ml_dtypes
import numpy as np
import oracle
import pytest
from drivers import EVERY
from judge import attention, normal

import sparsetile as st

KINDS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SIZES = {"1e3": 12, "1e5": 120, "2^33": 2 ** 15}  # what logits are about


def rows_alike(rng, H, n, D, size, kind):
    """Keys that hardly differ in size but in direction: each query decides for its own."""
    x = normal(rng, (1, H, n, D), np.float32) if size < 1000 else rng.choice([-1, 1], (1, H, n, D))
    return (x * size).astype(KINDS[kind])


def two(p, s):
    return (s == p) | (s == p - 1)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("T", [70, 3], ids=["prefill", "decode"])
def test_one_key_decides(on, backend, T, size, kind, rng):
    S = 200
    k, v = rows_alike(rng, 2, S, 64, SIZES[size], kind), normal(rng, (1, 2, S, 64), KINDS[kind])
    attention(on, k[:, :, S - T:], k, v, st.Window(1), np.broadcast_to(oracle.visible(1, T, S, rule=two), (1, 2, T, S)))


@pytest.mark.parametrize("backend", [EVERY[2]])
@pytest.mark.parametrize("size, maps", [*((size, False) for size in SIZES), ("1e3", True), ("1e5", True)])  # by maps from 2^33 on: open
def test_one_key_decides_in_triton_s_portable_source(on, backend, size, maps, rng, monkeypatch):
    from sparsetile.backends.triton import block_attention
    monkeypatch.setattr(block_attention, "MAPPED", (*block_attention.MAPPED, "cpu"))
    k, v = rows_alike(rng, 1, 70, 64, SIZES[size], "float16"), normal(rng, (1, 1, 70, 64), np.float16)
    config = dict(path="portable", block_q=64, block_k=32, num_warps=4, num_stages=1, maps=maps)
    attention(on, k, k, v, st.Window(1), np.broadcast_to(oracle.visible(1, 70, 70, rule=two), (1, 1, 70, 70)), config=config)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("Hq, D", [(2, 64), (70, 576), (32, 576), (8, 576)], ids=["keys", "latent-70", "latent-32", "latent-8"])
def test_one_chosen_key_decides(on, backend, Hq, D, size, rng):
    """Lists of 40 keys, among them the query's own."""
    T, S, K = 5, 90, 40
    k = rows_alike(rng, 1, S, D, SIZES[size], "float16")
    own = rng.permutation(S)[:Hq * T % S or 1]
    at = own[np.arange(Hq * T) % len(own)].reshape(1, Hq, T)
    q = k[0, 0][at]
    indices = np.stack([rng.permutation(S) for _ in range(T)]).astype(np.int32)[None, None]
    indices = np.concatenate([indices, -np.ones((1, 1, T, K), np.int32)], -1)
    count = np.ones((1, Hq, T, S), int)
    values = None if D == 576 else normal(rng, (1, 1, S, D), np.float16)
    attention(on, q, k, values, on.selection(indices), count, value_width=512 if D == 576 else None)
