"""Scores made against what indexer_topk looks at first of a row without storing it, so that the bound made of that fails: for tests and memcheck.

    dealt(S), visited(S)   the keys of Triton's and of CuPy's tiles, in the order that they are looked at [tiles, 128]; those from S on do not exist
    factors(S, k, backend, tiles, few, slope)   [S]: a key scale for positive scores. few: some of the first tiles' keys are best, more than their bound asks for and fewer than k; else all other keys are
                                                better than the first tiles'. Of the others those looked at later are better (slope 1: each passes every bound of what has come before), worse (-1) or alike (0)
"""
from math import gcd

import numpy as np


def step_of(length: int, odd: bool) -> int:
    """Near the golden part of `length`, and without a common factor."""
    step = max(1, int(np.float32(length) * np.float32(0.61803399 if odd else 0.6180339))) | odd
    while gcd(step, length) > 1:
        step += 1
    return step


def dealt(S: int):
    """backends/triton/index_keep.py: a key of each of 128 stretches, at hashed places."""
    length = -(-S // 128)
    i = np.arange(128)
    x = (i + 1) * 0x9E3779B1 % 2 ** 32
    x = (x ^ x >> 15) * 0x85EBCA77 % 2 ** 32
    x = (x ^ x >> 13) * 0xC2B2AE3D % 2 ** 32
    begin = (x ^ x >> 16) * length >> 32
    return i * length + (np.arange(length)[:, None] * step_of(length, True) + begin) % length


def visited(S: int):
    """backends/cupy/indexer_topk_hopper.cu: 16 keys of each of eight runs."""
    tiles = -(-S // 768) * 6
    at = np.arange(tiles) * step_of(tiles, False) % tiles
    return ((np.arange(8)[None, :, None] * tiles + at[:, None, None]) * 16 + np.arange(16)).reshape(tiles, 128)


def factors(S: int, k: int, backend: str, tiles: int, few: bool, slope: int = 1):
    order = dealt(S) if backend == "triton" else visited(S)
    early = order[:tiles][order[:tiles] < S]
    looked_at = np.arange(S) if backend == "triton" else np.argsort(order.ravel(), kind="stable")[:S]  # rows without a bound go through Triton's kernel in order
    found = np.exp((looked_at / looked_at.max() * 80 - 40) * slope)
    found[early] = 1e-25
    if few:
        mean = k * len(early) / S
        found[early[::max(1, len(early) // int(mean + 5 * mean ** 0.5 + 20))]] = 1e30
    return found.astype(np.float32)
