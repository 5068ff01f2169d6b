"""Gradients of layouts of several parts in Gluon: the lists by key block executed with NumPy, and on a chip every gradient against the float64 formula."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from numeric import assert_close, assert_same_bits, plain, to_numpy

from sparsetile import Causal, Fixed, Strided, Window, sparse_attention
from sparsetile.ops.lowering import lower

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
backward = pytest.importorskip("sparsetile.backends.triton.block_backward_parts")
PLACE = SimpleNamespace(upload=lambda x: x)
NAMES = ("offsets", "cols", "kinds", "intervals", "bitmaps", "q_order", "k_order")
STRIDED, FIXED = Causal() & (Window(10) | Strided(8)), Causal() & Fixed(32, 8)


def known(rule, T, S):
    parts = lower(rule, S - T, S, S, 128, 128)
    return [dataclasses.replace(part, extras={name: getattr(part, name) for name in NAMES if getattr(part, name) is not None}) for part in parts]


@pytest.mark.parametrize("rule, T, S, parts", [(STRIDED, 2048, 2048, 2), (STRIDED, 1600, 2000, 2), (STRIDED, 1603, 2005, 2), (FIXED, 640, 640, 2), (FIXED, 300, 640, 2), (Causal() & Strided(2), 400, 400, 1)], ids=str)
def test_lists_by_key(rule, T, S, parts):
    """Every pair once; a part adds to the sums of keys that parts before it hold, and to no others."""
    made = backward.by_key(known(rule, T, S), T, S, S - T, PLACE)
    assert len(made) == parts
    met, held, r = np.zeros((T, S), int), np.zeros(S, bool), np.arange(128)
    for n, part in enumerate(made):
        assert n == 0 or (held if part.held is None else held == part.held).all()
        for key, first, _, count, x, y in part.items:
            keys = key + r // part.keys.run * part.keys.step + r % part.keys.run
            assert (x, y) == tuple(part.keys.at(key))
            held[keys[keys < S]] = True
            for t, _, _, kind in part.entries[first:first + count]:
                rows = t + r * (part.rows.step if part.rows.run == 1 else 1)
                inside = (rows >= 0) & (rows < T)
                bits = (part.seen[kind].view(np.uint32)[:, r // 32] >> (r % 32) & 1).astype(bool) if kind >= 0 else np.broadcast_to(inside, (128, 128))
                assert not bits[:, ~inside].any()
                b, a = np.nonzero(bits & (keys < S)[:, None])
                np.add.at(met, (rows[a], keys[b]), 1)
    assert (met == rule.mask(T, S)).all() and held.all()


@pytest.mark.parametrize("rule, S", [(Strided(2), 400), (Strided(8), 2000), (STRIDED, 2048)], ids=str)
def test_keys_that_end_within_full_blocks_are_masked(rule, S, monkeypatch):
    """Such lists may have no table of masks at all."""
    parts, made, make = known(rule, S, S), [], lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype))
    place = SimpleNamespace(upload=torch.from_numpy, empty=make, zeros=make, sms=4)
    monkeypatch.setattr(backward.relaunch, "launch", lambda fn, grid, place, pointers, numbers, constants, *rest: made.append(constants))
    q = torch.zeros(1, 1, S, 64, dtype=torch.bfloat16)
    plan = backward.plans(q, q, q, q, parts, 0, None, place)
    backward.launch(q, q, q, q, plan, *[torch.zeros(1, 1, S)] * 2, q, q, q, place, 1.0)
    for at, constants in zip(plan[0].passes, made):
        assert not at.masked or constants["INTERVALS"] or constants["BITMAPS"]


def test_what_boxes_cannot_hold():
    """Gradients of a class whose keys end within a step do not leave by the copy engine: such a call runs on the portable path."""
    assert backward.by_key(known(Causal() & Strided(2), 401, 401), 401, 401, 0, PLACE) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU")
@pytest.mark.parametrize("rule, B, Hq, Hk, T, S, D, Dv, kind", [
    (STRIDED, 1, 2, 1, 1024, 1024, 128, 128, "bfloat16"),
    (STRIDED, 2, 2, 1, 800, 1200, 64, 64, "float16"),
    (STRIDED, 1, 4, 2, 803, 1205, 128, 64, "bfloat16"),
    (Causal() & Fixed(128, 8), 1, 2, 2, 1024, 1024, 128, 128, "bfloat16"),
    (Causal() & Fixed(128, 8), 1, 2, 1, 300, 896, 128, 128, "float16"),
    (Fixed(32, 8) & Window(300, 20), 2, 4, 2, 384, 640, 72, 40, "bfloat16"),
    (Causal() & Strided(4), 1, 2, 2, 1200, 1200, 128, 96, "bfloat16"),
    (Strided(2), 1, 2, 1, 400, 400, 64, 64, "opposed"),
], ids=str)
def test_gradients(monkeypatch, rule, B, Hq, Hk, T, S, D, Dv, kind, rng):
    """The path really runs; keys that nobody sees are NaN; the same bits twice. Opposed queries and keys (float16) have logsumexps of which a key that is not there would make infinities."""
    apart, kind = (10 if kind == "opposed" else 0), "float16" if kind == "opposed" else kind
    calls, launch = [], backward.launch
    monkeypatch.setattr(backward, "launch", lambda *args: (calls.append(args), launch(*args)))
    q, k, v, dout = (torch.from_numpy(rng.standard_normal((B, heads, n, width)).astype(np.float32)).to(getattr(torch, kind)).cuda() for heads, n, width in ((Hq, T, D), (Hk, S, D), (Hk, S, Dv), (Hq, T, Dv)))
    mask = rule.mask(T, S)
    q, k = q + apart / 2, k - apart / 2
    for x in (k, v):
        x[:, :, torch.from_numpy(~mask.any(0)).cuda()] = 0
    given, how = [*map(to_numpy, (q, k, v)), np.broadcast_to(mask, (B, Hq, T, S)).astype(int), to_numpy(dout)], dict(scale=D ** -0.5)
    truths, measures = oracle.attention_gradients(*given, **how), plain.attention_gradients(*given, **how)
    for x in (k, v):
        x[:, :, torch.from_numpy(~mask.any(0)).cuda()] = float("nan")
    inputs = [x.requires_grad_() for x in (q, k, v)]
    first, again = (torch.autograd.grad(sparse_attention(*inputs, rule, backend="triton"), inputs, dout) for _ in range(2))
    assert len(calls) == 2
    for name, got, twice, truth, measure in zip(("dq", "dk", "dv"), first, again, truths, measures):
        assert_close(name, to_numpy(got), truth, measure, reduction=S + T * Hq // Hk + D)
        assert_same_bits(name, got, twice)
