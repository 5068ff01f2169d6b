"""Compressed keys and values: blocks of `block` neighbours, one every `stride`, each made into one row. Differentiable in PyTorch by its own autograd."""
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsetile.ops import array_operators as xp


def windows(x, block: int, stride: int):
    """x [B,H,S,D] -> its complete blocks [B,H,C,block,D], C = (S - block) // stride + 1, S >= block. A view where the framework has one."""
    if xp.kind(x) == "torch":
        return x.unfold(2, block, stride).transpose(-1, -2)
    if xp.kind(x) == "jax":
        first = np.arange(0, x.shape[2] - block + 1, stride)
        return x[:, :, first[:, None] + np.arange(block)]
    return xp.module(x).lib.stride_tricks.sliding_window_view(x, block, 2)[:, :, ::stride].swapaxes(-1, -2)


def mean(blocks):
    """[B,H,C,block,D] -> [B,H,C,D]: the mean over a block, summed in float32 (float64 for float64) and rounded once."""
    wide = "float64" if "float64" in str(blocks.dtype) else "float32"
    lib = xp.module(blocks)
    if xp.kind(blocks) == "torch":
        return blocks.mean(3, dtype=getattr(lib, wide)).to(blocks.dtype)
    return blocks.mean(3, dtype=wide).astype(blocks.dtype)


@dataclass(frozen=True, eq=False)
class CompressionMLP:
    """The paper's learned compression of one block to one row: w2^T gelu(w1^T vec(x + position) + b1) + b2 (GELU in its tanh form), or w1^T vec(x + position) + b1 without w2.

    position [block,D] or [H,block,D]: what is added to the rows of a block by their place in it; w1 [block * D, M] or [H, block * D, M], vec counts rows first;
    w2 [M, D] or [H, M, D]; b1 [M] or [H,1,M], b2 [D] or [H,1,D]; None where there is none. M is D without w2. H are the key heads, which share what has no axis for them.
    All of one framework and, in PyTorch, differentiated. The products are the framework's own. Source: Native Sparse Attention (arXiv 2502.11089), section 3.3.1.
    """
    position: Any
    w1: Any
    b1: Any = None
    w2: Any = None
    b2: Any = None

    def __call__(self, blocks):
        """[B,H,C,block,D] -> [B,H,C,D]"""
        x = blocks if self.position is None else blocks + (self.position if self.position.ndim == 2 else self.position[:, None])
        x = _affine(x.reshape(*x.shape[:3], x.shape[3] * x.shape[4]), self.w1, self.b1)
        if self.w2 is not None:
            x = _affine(_gelu(x), self.w2, self.b2)
        return x.to(blocks.dtype) if xp.kind(x) == "torch" else x.astype(blocks.dtype)


def _affine(x, w, b):
    x = x @ w
    return x if b is None else x + b


def _gelu(x):
    """GELU in its tanh form, which every framework can write."""
    if xp.kind(x) == "torch":
        import torch
        return torch.nn.functional.gelu(x, approximate="tanh")
    wide = x if "float64" in str(x.dtype) else x.astype("float32")
    return (0.5 * wide * (1 + xp.module(x).tanh((2 / math.pi) ** 0.5 * (wide + 0.044715 * wide ** 3)))).astype(x.dtype)


def pair(compression):
    """"mean", a callable of blocks [B,H,C,block,D], or a pair of these -> what is used for keys and for values."""
    both = tuple(compression) if isinstance(compression, (tuple, list)) and len(compression) == 2 else (compression, compression)
    for how in both:
        if not callable(how) and not (isinstance(how, str) and how == "mean"):
            raise TypeError(f"compression: expected \"mean\", a callable of blocks [B,Hk,C,block,D] or a pair of these for keys and values, got {how!r}; see sparsetile.CompressionMLP")
    return both


def compress(name: str, x, how, block: int, stride: int):
    """x [B,H,S,D] -> [B,H,C,D] by what `pair` gives."""
    return x[:, :, :0] if x.shape[2] < block else rows_of(name, windows(x, block, stride), how)


def rows_of(name: str, blocks, how):
    """[B,H,C,block,D] -> [B,H,C,D]; what a callable answers is checked."""
    got = how(blocks) if callable(how) else mean(blocks)
    wanted = [int(n) for n in (*blocks.shape[:3], blocks.shape[4])]
    if list(getattr(got, "shape", ())) != wanted or str(got.dtype) != str(blocks.dtype):
        raise ValueError(f"compression: expected {wanted} {blocks.dtype} for the blocks of {name}, one row [D] for each block [block,D], got {list(getattr(got, 'shape', ()))} "
                         f"{getattr(got, 'dtype', type(got).__name__)}; reduce over the block's axis")
    return got
