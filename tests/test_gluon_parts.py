"""What Hopper's copy engine is told of a layout's parts (gluon_parts.py), executed with NumPy: every pair of the pattern once, every row and key where it lies."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import sampled_from
from pattern_cases import fine

from sparsetile import Causal, Dilated, Fixed, Global, Strided, Window
from sparsetile.ops.lowering import lower

pytest.importorskip("triton")
gluon_parts = pytest.importorskip("sparsetile.backends.triton.gluon_parts")
PLACE = SimpleNamespace(upload=lambda x: x)
NAMES = ("offsets", "cols", "kinds", "intervals", "bitmaps", "q_order", "k_order")
CASES = [  # rule, T, S, passes, parts of the last one
    (Causal() & (Window(10) | Strided(8)), 2048, 2048, 2, 1),
    (Causal() & (Window(10) | Strided(8)), 1600, 2000, 2, 1),
    (Causal() & (Window(10) | Strided(8)), 2044, 2051, 2, 1),
    (Causal() & (Window(10) | Strided(8)), 1251, 1251, 2, 1),
    (Causal() & (Window(10) | Strided(32)), 2048, 2048, 2, 1),  # classes of half a block
    (Causal() & Fixed(32, 8), 640, 640, 1, 2),
    (Causal() & Fixed(32, 8), 653, 653, 1, 2),
    (Causal() & Fixed(32, 8), 600, 671, 1, 2),
    (Fixed(32, 8) & Causal(), 400, 640, 1, 2),
    (Causal() & Strided(2), 400, 400, 1, 1),
    (Causal() & (Dilated(100, 0, 4) | Window(5)), 1200, 1200, 1, 1),
]


def known(rule, T, S):
    """The parts with what the host knows of them."""
    parts = lower(rule, S - T, S, S, 128, 128)
    return [dataclasses.replace(part, extras={name: getattr(part, name) for name in NAMES if getattr(part, name) is not None}) for part in parts]


def plan(rule, T, S):
    return gluon_parts.plan_of(known(rule, T, S), T, S, S - T, PLACE)


def boxed(axis, n):
    """[x, y] of the positions 0 .. n - 1 as the engine reads them: the tensor map's shape and strides over an array that holds its own positions."""
    rest = -n % axis.step if axis.ragged and axis.run > 1 else 0
    x = np.append(np.arange(n), np.full(rest, -1))[None, None, :, None] + np.zeros((1, 1, 1, 16), int)
    like = SimpleNamespace(shape=x.shape, ndim=4, stride=lambda: (16 * (n + rest), 16 * (n + rest), 16, 1), element_size=lambda: 2)
    made = gluon_parts.Boxes(like, axis, 16)
    flat = np.ascontiguousarray(x).reshape(-1)
    view = np.lib.stride_tricks.as_strided(flat, made.shape, [8 * step for step in made.strides])[0, 0, :, :, 0]
    return view, made.block_shape[2:4]


def box_at(view, shape, x, y):
    """A box's 128 positions; -1 outside."""
    i, j = (x + np.arange(shape[0]))[:, None], (y + np.arange(shape[1]))[None]
    inside = (i >= 0) & (i < view.shape[0]) & (j >= 0) & (j < view.shape[1])
    return np.where(inside, view[np.where(inside, i, 0), np.where(inside, j, 0)], -1).reshape(-1)


def shown_by(made, kind):
    """[128, 128] what rows see of a block of this kind."""
    c = np.arange(128)
    if kind < 0:
        return np.ones((128, 128), bool)
    if kind % 2:
        return (made.bitmaps[kind >> 1].view(np.uint32)[:, :, None] >> c[:32].astype(np.uint32) & 1).reshape(128, 128) == 1
    low, high = made.intervals[kind >> 1].T[:, :, None]
    return (c >= low) & (c < high)


def met_by(made, T, S):
    """[T, S] how often a plan meets each pair; every row stands in one tile of each pass, and nothing that a row sees is cleared."""
    met = np.zeros((T, S), int)
    for one in made.passes:
        queries = [boxed(axis, T) for axis in gluon_parts.ends(one.rows)]
        keys, covered = [boxed(axis, S) for axis in one.keys], np.zeros(T, int)
        for t, first, plain, count, x, y in one.items:
            rows = box_at(*queries[-1 if x >= T % one.rows.step else 0], x, y)
            line = t + (one.rows.step if one.rows.run == 1 else 1) * np.arange(128)
            assert (np.where((line >= 0) & (line < T), line, -1) == rows).all() and (t >= 0 or one.before)
            covered[rows[rows >= 0]] += 1
            for e, (kx, ky, kind, left, part, *seen) in enumerate(one.entries[first:first + count]):
                columns, there = box_at(*keys[part], kx, ky), np.arange(128) < left
                shown = shown_by(made, kind) & there & (rows >= 0)[:, None]
                words = np.unpackbits(np.array(seen, np.int32).view(np.uint8), bitorder="little") == 1
                assert ((columns >= 0) == there).all() and (e >= plain) == (kind >= 0 or left < 128)
                assert e < plain or (words == (shown.any(0) | ~there)).all()
                i, j = np.nonzero(shown)
                np.add.at(met, (rows[i], columns[j]), 1)
        assert (covered == 1).all()
    return met


@pytest.mark.parametrize("rule, T, S, passes, parts", CASES, ids=lambda x: str(x).replace(" ", ""))
def test_every_pair_once(rule, T, S, passes, parts):
    made = plan(rule, T, S)
    assert len(made.passes) == passes and len(made.passes[-1].keys) == parts
    assert (met_by(made, T, S) == rule.visible(S - T + np.arange(T)[:, None], np.arange(S), S)).all()


@pytest.mark.parametrize("rule, T, S, passes, parts", CASES, ids=lambda x: str(x).replace(" ", ""))
def test_every_pass_is_launched(rule, T, S, passes, parts, monkeypatch):
    """With maps of arrays that end with whole steps, of keys inside wider rows too."""
    torch, kernel = pytest.importorskip("torch"), pytest.importorskip("sparsetile.backends.triton.block_attention_parts_gluon")
    launched, make = [], lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype))
    place = SimpleNamespace(upload=torch.from_numpy, empty=make, zeros=make, sms=4)
    monkeypatch.setattr(kernel.relaunch, "launch", lambda fn, grid, place, pointers, numbers, constants, kinds, maps: launched.append((constants, maps)))
    q, k, v = (torch.zeros(1, 2, n, 72, dtype=torch.bfloat16)[..., :64] for n in (T, S, S))
    assert kernel.run(q, k, v, known(rule, T, S), place=place, scale=1.0, q_start=S - T) is not None
    assert [(made["AGAIN"], made["LAST"]) for made, _ in launched] == [(n > 0, n == passes - 1) for n in range(passes)] and launched[-1][0]["PARTS"] == parts
    assert all((maps[-1] is not None) == made["LAST"] for made, maps in launched)


@settings(max_examples=40, deadline=None)
@given(fine, sampled_from([130, 400, 512, 777, 1024]), sampled_from([0, 8, 100, 256]))
def test_every_pair_once_or_no_plan(rule, T, more):
    made, S = plan(rule, T, T + more), T + more
    if made is not None:
        assert (met_by(made, T, S) == rule.visible(more + np.arange(T)[:, None], np.arange(S), S)).all()


@pytest.mark.parametrize("rule, T, S", [(Causal() & Strided(8), 2044, 2044), (Causal() & (Strided(4) | Global(range(0, 500, 5))), 1024, 1024)],
                         ids=["results", "globals"])
def test_what_is_left_to_the_portable_path(rule, T, S):
    assert plan(rule, T, S) is None


@pytest.mark.parametrize("T", [8192, 20011, 20096, 32768])
def test_lengths_that_are_taken(T):
    """The Sparse Transformer's stride where its classes end within a block, or one position apart: both GPU backends address them, without a copy of a whole array."""
    axes, rule = pytest.importorskip("sparsetile.backends.cupy.hopper_axes"), Causal() & (Window(127) | Strided(128))
    parts = known(rule, T, T)
    made = gluon_parts.plan_of(parts, T, T, 0, PLACE)
    assert [one.rows.step for one in made.passes] == [128, 128] and [one.rows.run for one in made.passes] == [1, 128] and len(made.passes[0].keys) == 1 + (T % 128 > 0)
    x = SimpleNamespace(shape=(1, 1, T, 64))
    assert all(gluon_parts.stretched(x, axis) is x for one in made.passes for axis in (one.rows, *one.keys))
    assert [axes.axes_of(part, 0, T, T).row_step for part in parts] == [1, 128]
