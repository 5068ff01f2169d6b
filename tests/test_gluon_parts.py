"""What Hopper's copy engine is told of a layout's parts (gluon_parts.py), executed with NumPy: every pair of the pattern once, every row and key where it lies."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from sparsetile import Causal, Dilated, Fixed, Global, Strided, Window
from sparsetile.ops.lowering import lower

pytest.importorskip("triton")
gluon_parts = pytest.importorskip("sparsetile.backends.triton.gluon_parts")
PLACE = SimpleNamespace(upload=lambda x: x)
NAMES = ("offsets", "cols", "kinds", "intervals", "bitmaps", "q_order", "k_order")
CASES = [  # rule, T, S, passes, parts of the last one
    (Causal() & (Window(10) | Strided(8)), 2048, 2048, 2, 1),
    (Causal() & (Window(10) | Strided(8)), 1600, 2000, 2, 1),
    (Causal() & Fixed(32, 8), 640, 640, 1, 2),
    (Fixed(32, 8) & Causal(), 400, 640, 1, 2),
    (Causal() & Strided(2), 400, 400, 1, 1),
    (Causal() & (Dilated(100, 0, 4) | Window(5)), 1200, 1200, 1, 1),
]


def plan(rule, T, S):
    parts = lower(rule, S - T, S, S, 128, 128)
    known = [dataclasses.replace(part, extras={name: getattr(part, name) for name in NAMES if getattr(part, name) is not None}) for part in parts]
    return gluon_parts.plan_of(known, T, S, S - T, PLACE)


def boxed(axis, n):
    """[x, y] of the positions 0 .. n - 1 as the engine reads them: the tensor map's shape and strides over an array that holds its own positions."""
    x = np.arange(n)[None, None, :, None] + np.zeros((1, 1, 1, 16), int)
    like = SimpleNamespace(shape=x.shape, ndim=4, stride=lambda: (16 * n, 16 * n, 16, 1), element_size=lambda: 2)
    made = gluon_parts.Boxes(like, axis, 16)
    flat = np.ascontiguousarray(x).reshape(-1)
    view = np.lib.stride_tricks.as_strided(flat, made.shape, [8 * step for step in made.strides])[0, 0, :, :, 0]
    return view, made.block_shape[2:4]


def box_at(view, shape, x, y):
    """A box's 128 positions; -1 outside."""
    i, j = (x + np.arange(shape[0]))[:, None], (y + np.arange(shape[1]))[None]
    inside = (i >= 0) & (i < view.shape[0]) & (j >= 0) & (j < view.shape[1])
    return np.where(inside, view[np.where(inside, i, 0), np.where(inside, j, 0)], -1).reshape(-1)


@pytest.mark.parametrize("rule, T, S, passes, parts", CASES, ids=lambda x: str(x).replace(" ", ""))
def test_every_pair_once(rule, T, S, passes, parts):
    made, met, bits = plan(rule, T, S), np.zeros((T, S), int), 1 << np.arange(32)
    assert len(made.passes) == passes and len(made.passes[-1].keys) == parts
    for one in made.passes:
        queries, shape = boxed(one.rows, T)
        keys, covered = [boxed(axis, S) for axis in one.keys], np.zeros(T, int)
        for t, first, plain, count, x, y in one.items:
            rows = box_at(queries, shape, x, y)
            step = one.rows.step if one.rows.run == 1 else 1
            line = t + step * np.arange(128)
            assert (np.where((line >= 0) & (line < T), line, -1) == rows).all() and (t >= 0 or one.before)
            covered[rows[rows >= 0]] += 1
            for e, (kx, ky, kind, left, part, *seen) in enumerate(one.entries[first:first + count]):
                columns = box_at(*keys[part], kx, ky)
                there = np.arange(128) < left
                assert ((columns >= 0) == there).all() and (e >= plain) == (kind >= 0 or left < 128)
                shown = np.ones((128, 128), bool)
                if kind >= 0 and kind % 2:
                    shown = (made.bitmaps[kind >> 1].view(np.uint32)[:, :, None] & bits.astype(np.uint32) != 0).reshape(128, 128)
                elif kind >= 0:
                    low, high = made.intervals[kind >> 1].T[:, :, None]
                    shown = (np.arange(128) >= low) & (np.arange(128) < high)
                shown = shown & there & (rows >= 0)[:, None]
                words = (np.array(seen).view(np.uint32)[:, None] & bits.astype(np.uint32) != 0).reshape(-1) if np.array(seen).dtype == np.int32 else None
                assert (words == (shown.any(0) | ~there)).all() or e < plain
                i, j = np.nonzero(shown)
                np.add.at(met, (rows[i], columns[j]), 1)
        assert (covered == 1).all()
    assert (met == rule.visible(S - T + np.arange(T)[:, None], np.arange(S), S)).all()


@pytest.mark.parametrize("rule, T, S", [(Causal() & (Window(10) | Strided(8)), 2044, 2044), (Causal() & (Window(10) | Strided(8)), 2048, 2052), (Causal() & (Strided(4) | Global(range(0, 500, 5))), 1024, 1024)],
                         ids=["queries", "keys", "globals"])
def test_what_is_left_to_the_portable_path(rule, T, S):
    assert plan(rule, T, S) is None
