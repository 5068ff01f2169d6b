"""The CuPy backend's attention kernels, forward and backward, run on the CPU as they are written (cuda_on_cpu.py) and judged by the numeric policy.

Keys that nobody sees hold NaN, outputs start as NaN, shared memory too; asynchronous copies land as late as the waits allow.
"""
import dataclasses

import block_lists
import ml_dtypes
import numpy as np
import oracle
import pytest
from cuda_on_cpu import CXX, CpuPlace
from hopper_on_cpu import HopperPlace
from judge import answer, decided_late
from numeric import assert_close, assert_same_bits, plain

from sparsetile.backends.contract import Problem
from sparsetile.backends.cupy import (attention_delta, block_attention, block_attention_backward, gather_attention, gather_attention_backward, gather_backward_hopper, gather_union, hopper_parts, merge_attention,
                                      split, two_pass)
from sparsetile.backends.cupy.hopper_axes import axes_of
from sparsetile.backends.cupy.operands import position_values
from sparsetile.ops.lowering import lower
from sparsetile.ops.patterns import Causal, Fixed, Strided, Window

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ compiles the kernels for the CPU, and is not there")
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
KINDS = tuple(TYPES)
SINK = np.array([0.5, -np.inf, 3.0, 300.0], np.float32)
BIG = 2 ** 31 - 1


@pytest.fixture(scope="module")
def place():
    return CpuPlace()


def tensors(rng, kind, B, Hq, Hk, T, S, D, Dv, *, odd=False, shared=False):
    """q, k, v; `odd`: rows that start at odd addresses; `shared`: v is the first columns of k."""
    make = lambda *shape: rng.standard_normal(shape).astype(TYPES[kind])  # noqa: E731
    q, k = (make(B, Hq, T, D + 1)[..., :D], make(B, Hk, S, D + 3)[..., 1:D + 1]) if odd else (make(B, Hq, T, D), make(B, Hk, S, D))
    return q, k, k[..., :Dv] if shared else make(B, Hk, S, Dv)


def token_major(x):
    """[B,H,T,D], whose heads stand side by side."""
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def hide(k, v, count, heads):
    """NaN where no query of the call sees the key."""
    seen = np.broadcast_to(count, (k.shape[0], heads, *count.shape[2:])).reshape(k.shape[0], k.shape[1], -1, *count.shape[2:]).any((2, 3))
    k[~seen], v[~seen] = np.nan, np.nan


def judge(place, run, backward, q, k, v, count, *, scale, sink=None, softcap=None, keep=None, rng=None):
    """Forward and backward against float64, by the policy. keep [B,1,T]: queries that some tile holds."""
    B, Hq, T, D = q.shape
    count = np.broadcast_to(count, (B, Hq, T, k.shape[2])).astype(np.int64)
    given = dict(scale=scale, softcap=softcap, sink_logits=sink)
    out, lse = run(sink)
    truth, formula = oracle.attention(q, k, v, count, **given), plain.attention(q, k, v, count, **given)
    here = np.broadcast_to(True if keep is None else keep, (B, Hq, T))
    clean = lambda x: np.where(here.reshape(here.shape + (1,) * (x.ndim - 3)), x, np.zeros((), x.dtype))  # noqa: E731
    S, Dv = v.shape[2:]
    assert_close("out", clean(out.owner), clean(truth[0]), clean(formula[0]), reduction=S + D)
    assert_close("lse", clean(lse.owner), clean(truth[1]), clean(formula[1]), reduction=S + D)
    dout = clean(rng.standard_normal(out.shape).astype(q.dtype))
    dlse = np.where(np.isneginf(truth[1]) | ~here, 0, rng.standard_normal(lse.shape)).astype(np.float32)
    out, lse = place.put(clean(out.owner)), place.put(clean(lse.owner))
    total, delta, _ = attention_delta.run(out, place.put(dout), lse, place=place, sink_logits=place.put(sink), dlse=place.put(dlse))
    grads = backward(total, delta, place.put(dout))
    truth, formula = (f(q, k, v, count, dout, dlse=dlse, **given) for f in (oracle.attention_gradients, plain.attention_gradients))
    rows = T * Hq // k.shape[1]
    for name, got, true, one, reduction in zip(("dq", "dk", "dv"), grads, truth, formula, (S + D + Dv, rows + D + Dv, rows + D)):
        got = clean(got.owner) if name == "dq" else got.owner
        assert_close(name, got, true, one, reduction=reduction)


# ------------------------------------------------------------------------------------------------------------------ block lists
@dataclasses.dataclass
class Case:
    B: int = 2
    Hq: int = 4
    Hk: int = 2
    T: int = 50
    S: int = 70
    beyond: int = 0                          # keys of the lists past the last one there is
    D: int = 32
    Dv: int = 24
    rule: str = "window"
    lengths: tuple | None = None
    start: int | tuple | None = None
    lists: int = 1
    order: bool = False
    odd: bool = False
    sink: bool = False
    softcap: float | None = None
    scale: float = 0.3
    forward: tuple = (32, 64, 32, 1)        # block_q, block_k, tile_k, row_tiles
    backward: tuple = (32, 64, 32, 32, 1)   # block_q, block_k, tile_k, tile_q, stages

    def __str__(self):
        return "-".join(f"{f.name}={getattr(self, f.name)}".replace(" ", "") for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)


RULES = {
    "window": lambda p, s, rng: (s <= p) & (s >= p - 20),
    "causal": lambda p, s, rng: s <= p,
    "full": lambda p, s, rng: np.ones(np.broadcast_shapes(p.shape, s.shape), bool),
    "random": lambda p, s, rng: rng.random((len(p), s.shape[1])) < 0.3,
    "mixed": lambda p, s, rng: ((rng.random((len(p) // 32 + 1, s.shape[1] // 32 + 1)) < 0.4).repeat(32, 0).repeat(32, 1)[:len(p), :s.shape[1]] | (s <= p) & (s > p - 9)) & (p % 13 != 5),
    "window128": lambda p, s, rng: (s <= p) & (s > p - 128),
    "blocks": lambda p, s, rng: (rng.random((p[-1, 0] // 128 + 1, s.shape[1] // 128 + 1)) < 0.5).repeat(128, 0).repeat(128, 1)[p[:, 0], :s.shape[1]],
    "holes": lambda p, s, rng: (p // 128 % 2 == 1) & (p % 7 != 3) & (s < 100),
    "late": lambda p, s, rng: (s < 100) | (s >= 128) & (p >= 0),
    "quarter": lambda p, s, rng: (s < 128) | (s // 128 == p // 512),
    "columns": lambda p, s, rng: (s < 384) | (s // 128 == p // 128),
    "global": lambda p, s, rng: (p < 128) | (s < 128) & (s <= p),
}
BLOCK_CASES = [
    Case(),
    Case(rule="causal", D=40, Dv=17, forward=(32, 64, 64, 1), backward=(32, 64, 64, 16, 2), sink=True),
    Case(rule="random", lengths=(33, 70), forward=(32, 32, 32, 1), backward=(32, 32, 32, 32, 2)),
    Case(rule="mixed", T=90, lengths=(5, 300), forward=(64, 64, 32, 1), backward=(64, 64, 64, 16, 2), softcap=1.5),
    Case(rule="full", T=1, S=200, lengths=(0, 131), D=31, Dv=33, sink=True),
    Case(rule="mixed", T=64, S=100, lengths=(77, 100), start=0, order=True, softcap=2.0, backward=(32, 64, 32, 32, 2)),
    Case(rule="mixed", T=40, S=150, start=(3, 77), lists=3, odd=True),
    Case(rule="mixed", T=70, S=150, start=60, lists=2, D=64, Dv=64, scale=-0.2, forward=(64, 128, 64, 2), backward=(64, 128, 128, 64, 2)),
    Case(B=1, Hq=2, Hk=1, rule="causal", T=20, S=60, D=208, Dv=300, scale=0.1, backward=(32, 64, 32, 16, 1)),
    Case(B=1, Hq=3, Hk=3, rule="window", T=5, S=3, D=1, Dv=1),
]


def scene(c, kind, rng, place):
    """q, k, v with NaN where nobody sees, who sees what, arguments of both directions, and lists for a config."""
    q, k, v = tensors(rng, kind, c.B, c.Hq, c.Hk, c.T, c.S, c.D, c.Dv, odd=c.odd)
    limit = np.full(c.B, c.S) if c.lengths is None else np.clip(c.lengths, 0, c.S)
    starts = np.broadcast_to(limit - c.T if c.start is None else c.start, (c.B,))
    first, P = int(starts.min()), int(starts.max() - starts.min()) + c.T
    masks = np.stack([RULES[c.rule](first + np.arange(P)[:, None], np.arange(c.S + c.beyond)[None], rng) for _ in range(c.lists)])
    q_order = k_order = None
    if c.order:  # slots in any order, some of them empty; a position or key without a slot is seen nowhere
        slots = lambda n, m: rng.permutation(np.concatenate((np.arange(n), np.full(-n % m + m, -1))))  # noqa: E731
        q_order, k_order = slots(P, 128), slots(c.S, 128)
        k_order = np.where(k_order == 7, -1, k_order)
        masks[:, :, 7] = False
    list_of = rng.integers(0, c.lists, (c.B if c.lists > 2 else 1, c.Hq if c.lists > 1 and c.Hq > 1 else 1))
    count = np.zeros((c.B, c.Hq, c.T, c.S), bool)
    for b in range(c.B):
        for h in range(c.Hq):
            count[b, h] = masks[list_of[b % len(list_of), h % list_of.shape[1]]][starts[b] - first:][:c.T, :c.S] & (np.arange(c.S) < limit[b])
    hide(k, v, count, c.Hq)
    at = dict(place=place, scale=c.scale, softcap=c.softcap, kv_length=None if c.lengths is None else place.put(np.array(c.lengths, np.int32)),
              q_start=place.put(np.array(c.start, np.int32)) if isinstance(c.start, tuple) else c.start)

    def lists(config):
        made = block_lists.build(masks, first, config["block_q"], config["block_k"], q_order=q_order, k_order=k_order, list_of=list_of, bitmaps=c.rule == "random")
        arrays = {f.name: place.put(getattr(made, f.name)) for f in dataclasses.fields(made) if isinstance(getattr(made, f.name), np.ndarray)}
        return dataclasses.replace(made, **arrays, extras={name: getattr(made, name) for name in ("offsets", "by_key_offsets", "by_key_rows")})

    return q, k, v, count, at, lists


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BLOCK_CASES, ids=str)
def test_block_attention(case, kind, rng, place):
    c = case
    q, k, v, count, at, lists = scene(c, kind, rng, place)
    forward = dict(zip(("path", "block_q", "block_k", "tile_k", "row_tiles"), ("portable", *c.forward)))
    backward = dict(zip(("path", "block_q", "block_k", "tile_k", "tile_q", "stages"), ("portable", *c.backward)))
    if kind == "float32":
        forward.update(tile_k=32, row_tiles=1)
        backward.update(tile_k=32, tile_q=32, stages=1)
    operands = tuple(map(place.put, (q, k, v)))
    judge(place, lambda sink: block_attention.run(*operands, lists(forward), config=forward, sink_logits=place.put(sink), **at),
          lambda lse, delta, dout: block_attention_backward.run(*operands, lists(backward), lse, delta, dout, config=backward, **at),
          q, k, v, count, scale=c.scale, sink=SINK[:c.Hq] if c.sink else None, softcap=c.softcap, rng=rng)


HOPPER_CASES = [
    Case(B=1, Hq=2, Hk=1, rule="causal", T=300, S=300, D=128, Dv=128),
    Case(B=2, Hq=2, Hk=2, rule="window128", T=200, S=420, D=64, Dv=64, sink=True),
    Case(B=1, Hq=4, Hk=2, rule="blocks", T=400, S=520, D=128, Dv=128, lists=2, start=0),
    Case(B=2, Hq=2, Hk=1, rule="random", T=150, S=300, D=96, Dv=72, lengths=(33, 300), sink=True),
    Case(B=2, Hq=2, Hk=1, rule="full", T=130, S=390, D=192, Dv=128, lengths=(200, 1000), start=(-7, 300)),
    Case(B=3, Hq=2, Hk=2, rule="mixed", T=140, S=260, D=64, Dv=128, lists=3, lengths=(0, 77, 260), scale=0.1),
    Case(B=1, Hq=3, Hk=3, rule="holes", T=500, S=300, D=8, Dv=8, start=30),
    Case(B=1, Hq=2, Hk=1, rule="global", T=1300, S=1300, D=16, Dv=16),
    Case(B=2, Hq=1, Hk=1, rule="late", T=130, S=600, D=16, Dv=64, lengths=(200, 600)),
    Case(B=2, Hq=1, Hk=1, rule="causal", T=100, S=256, D=64, Dv=64, start=(0, 100)),
    Case(B=2, Hq=1, Hk=1, rule="window", T=5, S=3, D=16, Dv=16),
]


@pytest.mark.parametrize("static", [True, False], ids=["static", "device"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("case, block_q", [pytest.param(c, 128, id=str(c)) for c in HOPPER_CASES] + [pytest.param(c, 192, id=f"{c}-192") for c in HOPPER_CASES if max(c.D, c.Dv) <= 64])
def test_block_attention_on_hopper(case, block_q, kind, static, rng):
    """Warpgroup products and the copy engine: full, partial and cut blocks, tiles at any position, empty rows and lists; order of items from the host or not."""
    place = HopperPlace()
    place.refused = "block_attention"  # what takes the portable path here is a mistake
    q, k, v, count, at, lists = scene(case, kind, rng, place)
    q, k, v = (token_major(x) for x in (q, k, v))
    config = dict(path="hopper", block_q=block_q, block_k=128, tile_k=32, row_tiles=1)
    made, sink = lists(config), SINK[:case.Hq] if case.sink else None
    if not static:
        made.extras.clear()
    out, lse = block_attention.run(*map(place.put, (q, k, v)), made, config=config, sink_logits=place.put(sink), **at)
    given = dict(scale=case.scale, sink_logits=sink)
    truth, formula = oracle.attention(q, k, v, count.astype(np.int64), **given), plain.attention(q, k, v, count.astype(np.int64), **given)
    for name, got, true, one in zip(("out", "lse"), (out, lse), truth, formula):
        assert_close(name, got.owner, true, one, reduction=case.S)


PART_CASES = [  # queries of a tile, rule, T, S, Hq, Hk, keys that exist
    (128, Causal() & (Window(10) | Strided(8)), 2048, 2048, 2, 1, None),
    (128, Causal() & (Window(10) | Strided(8)), 1600, 1600, 1, 1, 1593),
    (128, Causal() & Fixed(32, 8), 640, 640, 2, 2, None),
    (128, Fixed(32, 8) & Causal(), 384, 640, 2, 1, 630),
    (128, Causal() & Strided(2), 400, 400, 1, 1, None),
    (192, Causal() & (Window(10) | Strided(8)), 1536, 1536, 1, 1, 1530),
    (192, Fixed(32, 8) & Causal(), 384, 640, 2, 1, 630),
    (128, Causal() & (Window(10) | Strided(32)), 2048, 2048, 1, 1, None),  # classes of half a block
]
RAGGED_CASES = [  # classes one longer than others
    (128, Causal() & (Window(10) | Strided(8)), 1251, 1251, 2, 1, None),
    (128, Causal() & (Window(10) | Strided(8)), 1245, 1251, 1, 1, None),
    (128, Causal() & Strided(2), 401, 401, 1, 1, None),
    (128, Causal() & (Window(34) | Strided(32)), 2053, 2053, 2, 1, None),
]


def parts_of(made, place):
    """On the place, with what the host knows of them."""
    names = ("offsets", "cols", "kinds", "intervals", "bitmaps", "by_key_offsets", "by_key_rows", "q_order", "k_order")
    return [dataclasses.replace(part, **{f.name: place.put(np.ascontiguousarray(getattr(part, f.name))) for f in dataclasses.fields(part) if isinstance(getattr(part, f.name), np.ndarray)},
                                extras={name: getattr(part, name) for name in names if getattr(part, name) is not None}) for part in made]


@pytest.mark.parametrize("block_q, rule, T, S, Hq, Hk, length", PART_CASES + RAGGED_CASES, ids=lambda x: str(x).replace(" ", ""))
def test_parts_on_hopper(block_q, rule, T, S, Hq, Hk, length, rng):
    """Residue classes and summaries as boxes of the copy engine, each part starting from the sums of the one before; in one launch where the keys that exist are known."""
    place = HopperPlace()
    place.refused = "block_attention"
    q, k, v = tensors(rng, "bfloat16", 1, Hq, Hk, T, S, 16, 16)
    parts = parts_of(lower(rule, S - T, S, S, block_q, 128), place)
    count = rule.visible(S - T + np.arange(T)[:, None], np.arange(S), S) & (np.arange(S) < (length or S))
    hide(k, v, count[None, None], Hq)
    sink, at = SINK[:Hq], dict(place=place, scale=0.3, q_start=S - T, kv_length=None if length is None else place.put(np.array([length], np.int32)))
    config = dict(path="hopper", block_q=block_q, block_k=128, tile_k=32, row_tiles=1)
    got = block_attention.run_parts(*map(place.put, (q, k, v)), parts, config=config, sink_logits=place.put(sink), **at)
    count = np.broadcast_to(count, (1, Hq, T, S)).astype(np.int64)
    truth, formula = oracle.attention(q, k, v, count, scale=0.3, sink_logits=sink), plain.attention(q, k, v, count, scale=0.3, sink_logits=sink)
    for name, x, true, one in zip(("out", "lse"), got, truth, formula):
        assert_close(name, x.owner, true, one, reduction=S)


def judge_gradients_of_parts(rule, T, S, Hq, Hk, length, kind, rng, D=16, Dv=16):
    place, at_portable = HopperPlace(), CpuPlace()
    place.refused = "block_attention_backward"
    q, k, v = tensors(rng, kind, 1, Hq, Hk, T, S, D, Dv)
    parts = parts_of(lower(rule, S - T, S, S, 128, 128), place)
    count = rule.visible(S - T + np.arange(T)[:, None], np.arange(S), S) & (np.arange(S) < (length or S))
    hide(k, v, count[None, None], Hq)
    at = dict(place=place, scale=0.3, q_start=S - T, kv_length=None if length is None else place.put(np.array([length], np.int32)))
    config = dict(path="two_pass", block_q=128, block_k=128, tile_k=32, tile_q=32, stages=1, heads=2, scratch=1)
    forward = dict(path="hopper", block_q=128, block_k=128, tile_k=32, row_tiles=1)
    operands = tuple(map(place.put, (q, k, v)))
    judge(at_portable, lambda sink: block_attention.run_parts(*operands, parts, config=forward, sink_logits=place.put(sink), **at),
          lambda lse, delta, dout: block_attention_backward.run_parts(*operands, parts, lse, delta, dout, config=config, **at),
          q, k, v, count[None, None], scale=0.3, sink=SINK[:Hq], rng=rng)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("piece", ["all", "a head"])
@pytest.mark.parametrize("rule, T, S, Hq, Hk, length", [case[1:] for case in PART_CASES + RAGGED_CASES if case[0] == 128], ids=lambda x: str(x).replace(" ", ""))
def test_gradients_of_parts_on_hopper(rule, T, S, Hq, Hk, length, piece, kind, rng, monkeypatch):
    """The same parts backward: dQ, dK and dV of all in float32, rounded once."""
    if piece == "a head":
        monkeypatch.setattr(two_pass, "GIB", 1)
        monkeypatch.setattr(two_pass, "SECTIONS", 2)
    judge_gradients_of_parts(rule, T, S, Hq, Hk, length, kind, rng)


@pytest.mark.parametrize("D, Dv", [(16, 16), (192, 128)])
@pytest.mark.parametrize("step, positions", [(32, 64), (32, 67), (8, 97), (8, 127), (8, 129), (8, 157), (8, 191), (8, 192), (8, 193)])
def test_gradients_of_classes_that_end_anywhere(step, positions, D, Dv, rng):
    """Of a class's last block some quarters hold no position, and some lanes of a warp no key."""
    judge_gradients_of_parts(Causal() & (Window(step + 2) | Strided(step)), step * positions, step * positions, 1, 1, None, "bfloat16", rng, D, Dv)


@pytest.mark.parametrize("columns", [1, 2, 4, 16])
def test_gradients_of_summaries_of_any_width(columns, rng):
    """Some lanes of a warp start from sums of the part before, the others from nothing."""
    judge_gradients_of_parts(Causal() & Fixed(32, columns), 640, 640, 2, 1, None, "bfloat16", rng)


def test_parts_that_hopper_leaves():
    """What the copy engine cannot address is None: positions known on the device only, rows of globals out of order; ragged classes are said to be ragged."""
    rule = Causal() & (Window(10) | Strided(8))
    known = lambda part: dataclasses.replace(part, extras={name: getattr(part, name) for name in ("offsets", "q_order", "k_order") if getattr(part, name) is not None})  # noqa: E731
    plainly, classes = map(known, lower(rule, 0, 2048, 2048, 128, 128))
    assert axes_of(classes, 0, 2048, 2048).row_step == 8 and axes_of(plainly, 0, 2048, 2048).row_step == 1
    assert axes_of(classes, None, 2048, 2048) is None and axes_of(classes, 0, 2040, 2048) is None
    ragged = [axes_of(known(part), 0, 2047, 2047) for part in lower(rule, 0, 2047, 2047, 128, 128)]
    assert [(at.ragged_rows, at.ragged_keys) for at in ragged] == [(False, False), (True, True)]


def test_tiles_of_parts_follow_each_other():
    """Every tile once for every head; a tile that starts from sums stands behind all tiles of its head that leave them, and waits for each of their two groups of threads."""
    place, heads = CpuPlace(), 3
    parts = parts_of(lower(Causal() & (Window(10) | Strided(8)), 0, 2048, 2048, 128, 128), place)
    plan = hopper_parts.plan_of(parts, [axes_of(part, 0, 2048, 2048) for part in parts], 2048, 2048, 0, place)
    assert len(plan.axes) == 2
    taken, left = [], {}
    for number in range((heads + 1) * len(plan.items.owner)):
        t, number_of_pass, _, entries, _, head, wait, leaves = plan.items.owner[number % len(plan.items.owner)].tolist()
        head += number // len(plan.items.owner)
        if not 0 <= head < heads:
            continue
        taken.append((head, number_of_pass, t))
        if leaves:
            left.setdefault(head, []).append(t + 8 * np.arange(128))
        else:
            assert wait == 2 * len(left[head]) == 2 * 16 and np.isin(t + np.arange(128), left[head]).all() and entries
    assert len(taken) == len(set(taken)) == heads * 32


DECODE_CASES = [
    Case(T=1, S=500, Hq=8, D=64, Dv=64, rule="window128", sink=True),
    Case(T=1, S=700, D=64, Dv=64, rule="full", lengths=(130, 700)),
    Case(B=3, T=4, S=300, Hq=6, D=40, Dv=24, rule="causal", lengths=(0, 77, 1000), sink=True),
    Case(T=5, S=300, Hq=4, Hk=1, D=72, Dv=72, rule="mixed", lengths=(33, 290), softcap=1.5),
    Case(T=16, S=400, Hq=16, Hk=2, D=32, Dv=48, rule="random", start=(3, 377)),              # two row tiles of 64
    Case(T=3, S=300, rule="late", lists=3, odd=True, start=(130, 200)),                      # each head has its own list
    Case(B=1, T=2, S=200, Hq=20, Hk=1, D=96, Dv=64, rule="causal", start=-1, scale=-0.2),    # one query before the first key
    Case(B=1, T=1, S=260, Hq=3, Hk=3, D=16, Dv=16, rule="window"),
    Case(B=1, T=5, S=3, Hq=2, Hk=1, D=1, Dv=1, rule="window"),
    Case(B=1, T=40, S=130, Hq=2, Hk=1, D=32, Dv=32, rule="causal"),                          # queries of two tiles
]


def attended(place, q, k, v, lists, config, *, sink, count, at, reduction):
    """out and lse of one path against float64; twice the same bits."""
    how = dict(config=config, sink_logits=place.put(sink), **at)
    out, lse = (x.owner.copy() for x in block_attention.run(*map(place.put, (q, k, v)), lists, **how))
    given = dict(scale=at["scale"], softcap=at["softcap"], sink_logits=sink)
    truth, formula = oracle.attention(q, k, v, count.astype(np.int64), **given), plain.attention(q, k, v, count.astype(np.int64), **given)
    for name, got, true, one in zip(("out", "lse"), (out, lse), truth, formula):
        assert_close(name, got, true, one, reduction=reduction)
    for first, again in zip((out, lse), block_attention.run(*map(place.put, (q, k, v)), lists, **how)):
        assert_same_bits("again", again.owner, first)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("block_k, tile_k", [(128, 64), (64, 32)])
@pytest.mark.parametrize("case", DECODE_CASES, ids=str)
def test_few_queries(case, block_k, tile_k, kind, rng):
    """Heads as rows of one tile, keys split over the chip and merged."""
    place = CpuPlace()
    place.refused = "block_attention"
    q, k, v, count, at, lists = scene(case, kind, rng, place)
    config = dict(path="decode", block_q=32, block_k=block_k, tile_k=tile_k, row_tiles=1)
    attended(place, q, k, v, lists(config), config, sink=np.resize(SINK, case.Hq) if case.sink else None, count=count, at=at, reduction=case.S + case.D)


@pytest.mark.parametrize("D, Dv, heads, tile_k", [(576, 512, 16, 64), (576, 512, 20, 32), (80, 64, 8, 64), (40, 17, 4, 32)])
def test_few_queries_of_a_shared_latent(D, Dv, heads, tile_k, rng):
    """Values that are the first columns of the keys; also where their padded width is not within that of the keys."""
    place, S = CpuPlace(), 300
    place.refused = "block_attention"
    q, k, v = tensors(rng, "bfloat16", 2, heads, 1, 2, S, D, Dv, shared=True)
    made, lengths = block_lists.build(np.ones((1, S, S), bool), 0, 32, 128), np.array([133, S], np.int32)
    made = dataclasses.replace(made, **{f.name: place.put(getattr(made, f.name)) for f in dataclasses.fields(made) if isinstance(getattr(made, f.name), np.ndarray)})
    count = np.broadcast_to(np.arange(S) < lengths[:, None, None, None], (2, heads, 2, S))
    k[~count[:, :1, 0]] = np.nan
    config = dict(path="decode", block_q=32, block_k=128, tile_k=tile_k, row_tiles=1)
    attended(place, q, k, v, made, config, sink=None, count=count, at=dict(place=place, scale=0.05, softcap=None, kv_length=place.put(lengths), q_start=None), reduction=S + D)


LATENT_CASES = [
    Case(T=2, S=300, Hq=70, Hk=1, D=576, Dv=512, rule="causal", lengths=(133, 290), sink=True, scale=0.04),
    Case(B=3, T=1, S=500, Hq=17, Hk=1, D=576, Dv=512, rule="random", lengths=(0, 77, 500), scale=0.04),
    Case(B=1, T=1, S=700, Hq=64, Hk=1, D=576, Dv=512, rule="window128", scale=0.04),
    Case(B=2, T=3, S=200, Hq=5, Hk=1, D=576, Dv=512, rule="mixed", start=(-1, 150), scale=0.04),
    Case(B=5, T=1, S=128, Hq=3, Hk=1, D=576, Dv=512, rule="full", scale=0.04),
]


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
def test_few_queries_of_a_latent_on_hopper(case, kind, rng):
    """64 heads of a query a tile by warpgroup products, keys through the copy engine and split over the chip."""
    place = HopperPlace()
    q, k, v, count, at, lists = scene(case, kind, rng, place)
    k[..., :512] = np.where(np.isnan(v), v, k[..., :512])
    config = dict(path="latent", block_q=32, block_k=128, tile_k=64, row_tiles=1)
    place.refused = "block_attention_decode"
    attended(place, q, k, k[..., :512], lists(config), config, sink=np.resize(SINK, case.Hq) if case.sink else None, count=count, at=at, reduction=case.S + case.D)


@pytest.mark.parametrize("lines", [1, 8])
@pytest.mark.parametrize("parts, sink", [(1, None), (2, 19.0), (33, None), (300, 25.0)])
def test_parts_of_one_item_are_merged(place, parts, sink, lines, rng, monkeypatch):
    """One query of 5 heads with a part in every share, some of them empty; nothing is written where there is one part: it stood there already."""
    H, Dv, jobs = 5, 512, 1
    monkeypatch.setattr(split, "merged_lines", lambda rows: lines)
    split_of = split.split_values(place, 2 * parts, split.LATENT_HEADS, Dv, jobs, 1, parts)
    sums, rows, starts = (x.owner for x in split_of[0])
    sums, rows = sums.reshape(parts, 2, split.LATENT_HEADS, Dv), rows.reshape(parts, 2, split.LATENT_HEADS, 2)
    starts[:] = 0, parts  # a unit each
    outs, lses = rng.standard_normal((parts, 1, H, 1, Dv)).astype(np.float32), (5 * rng.standard_normal((parts, 1, H, 1)) + 20).astype(np.float32)
    empty = rng.random((parts, 1, H, 1)) < 0.3
    empty[:, :, 2] = True
    outs[empty], lses[empty] = 0, -np.inf
    top = np.where(empty, 0, lses - 0.7).astype(np.float32)
    total = np.where(empty, 0, np.exp(lses.astype(float) - top)).astype(np.float32)
    rows[:, 0, :H] = np.stack([np.where(empty, -np.inf, top), total], -1)[:, 0, :, 0]
    sums[:, 0, :H] = (outs * total[..., None])[:, 0, :, 0]
    out, lse, sinks = place.empty((1, H, 1, Dv), "bfloat16"), place.empty((1, H, 1), "float32"), None if sink is None else np.full(H, sink, np.float32)
    split.merge(place, split.latent_merge_defines("bfloat16", H), Dv, out, lse, place.put(sinks), split_of[1], position_values(1, 64, None, 0), (H, Dv, H, 1, 1, 1, 1))
    if parts == 1:
        assert np.isnan(out.owner.astype(float)).all()
        return
    for name, x, true, one in zip(("out", "lse"), (out, lse), *(f.merge_attention(outs, lses, sink_logits=sinks) for f in (oracle, plain))):
        assert_close(name, x.owner, true, one.astype(TYPES["bfloat16"]) if name == "out" else one, reduction=parts)


BACKWARD_CASES = [dataclasses.replace(c, B=16) if c.T * c.S < 100 else c for c in HOPPER_CASES if max(c.D, c.Dv) <= 128] + [  # fifteen rounded gradients of scores are chance
    Case(B=1, Hq=4, Hk=2, rule="causal", T=300, S=300, D=128, Dv=128, odd=False, sink=True),
    Case(B=2, Hq=4, Hk=2, rule="mixed", T=260, S=300, D=128, Dv=64, lists=3, lengths=(130, 300), scale=0.1),
    Case(B=1, Hq=1, Hk=1, rule="global", T=2300, S=2300, D=16, Dv=16),  # a key block in sections
    Case(B=2, Hq=2, Hk=1, rule="quarter", T=400, S=3500, D=16, Dv=16, start=(0, 3072), lengths=(3500, 256)),  # sections without queries, and behind key blocks past the last key
    Case(B=1, Hq=1, Hk=1, rule="full", T=3200, S=400, D=16, Dv=16),     # with two sums: even and odd key blocks
]


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=str)
def test_block_attention_backward_on_hopper(case, kind, rng):
    """One pass, dQ added in order: full, partial and cut blocks, tiles at any position, empty rows, columns and lists, lists by head and by sample."""
    place, at_portable = HopperPlace(), CpuPlace()
    place.refused = "block_attention_backward"
    q, k, v, count, at, lists = scene(case, kind, rng, place)
    q, k, v = (token_major(x) for x in (q, k, v))
    backward = dict(path="hopper", block_q=128, block_k=128, tile_k=32, tile_q=32, stages=1, heads=2, sums=2 if case.T > 2000 else 1, section=8, walk="freest" if kind == "bfloat16" else "ascending" if case.Hq == case.Hk else "abreast" if case.rule == "blocks" else "turning")
    operands, made = tuple(map(place.put, (q, k, v))), lists(backward)
    forward = dict(path="portable", block_q=128, block_k=128, tile_k=32, row_tiles=1)
    judge(place, lambda sink: block_attention.run(*operands, made, config=forward, sink_logits=place.put(sink), **{**at, "place": at_portable}),
          lambda lse, delta, dout: block_attention_backward.run(*operands, made, lse, delta, dout, config=backward, **at),
          q, k, v, count, scale=case.scale, sink=SINK[:case.Hq] if case.sink else None, rng=rng)


TWO_PASS_CASES = [  # how much is worked on at a time, and the case
    ("all", Case(B=1, Hq=4, Hk=2, rule="causal", T=300, S=300, D=192, Dv=128, sink=True)),
    ("a block", Case(B=2, Hq=4, Hk=2, rule="mixed", T=260, S=300, D=192, Dv=72, lists=3, lengths=(130, 300), scale=0.1)),
    ("a head", Case(B=2, Hq=2, Hk=1, rule="full", T=130, S=390, D=136, Dv=128, lengths=(200, 1000), start=(-7, 300))),
    ("all", Case(B=1, Hq=4, Hk=2, rule="blocks", T=400, S=520, D=128, Dv=128, lists=2, start=0)),
    ("a block", Case(B=2, Hq=2, Hk=1, rule="random", T=150, S=300, D=96, Dv=72, lengths=(33, 300), sink=True)),
    ("a head", Case(B=1, Hq=3, Hk=3, rule="holes", T=500, S=300, D=8, Dv=8, start=30)),
    ("all", Case(B=1, Hq=2, Hk=2, rule="holes", T=256, S=256, D=16, Dv=16)),  # whole tiles, and keys of a block that none of them sees
    ("all", Case(B=1, Hq=2, Hk=2, rule="global", T=600, S=2300, D=16, Dv=16)),  # key blocks and rows far longer than others: sections
    ("all", Case(B=2, Hq=2, Hk=1, rule="global", T=400, S=600, D=16, Dv=8, start=(300, 812), lengths=(600, 90))),  # of two heads; without queries; of keys that do not exist
    ("all", Case(B=1, Hq=1, Hk=1, rule="columns", T=600, S=200, beyond=4920, D=16, Dv=16, start=0)),  # more key blocks are far longer than there are
    ("a block", Case(B=2, Hq=1, Hk=1, rule="late", T=130, S=600, D=16, Dv=64, lengths=(200, 600))),
    ("all", Case(B=2, Hq=1, Hk=1, rule="causal", T=100, S=256, D=64, Dv=64, start=(0, 100))),
    ("all", Case(B=16, Hq=2, Hk=1, rule="window", T=5, S=3, D=16, Dv=16)),
]


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("piece, case", TWO_PASS_CASES, ids=str)
def test_block_attention_backward_in_two_passes(case, piece, kind, rng, monkeypatch):
    """dS kept, all of it, of one key head or of one key block at a time."""
    place, at_portable = HopperPlace(), CpuPlace()
    place.refused = "block_attention_backward"
    q, k, v, count, at, lists = scene(case, kind, rng, place)
    q, k, v = (token_major(x) for x in (q, k, v))
    backward = dict(path="two_pass", block_q=128, block_k=128, tile_k=32, tile_q=32, stages=1, heads=1, scratch=1)
    operands, made = tuple(map(place.put, (q, k, v))), lists(backward)
    if kind == "float16":  # as lists made on the device: the host knows no entry
        made.extras.clear()
    if piece != "all":
        entries = (made.nq if piece == "a block" else made.nq * made.nk) * case.Hq // case.Hk
        monkeypatch.setattr(two_pass, "GIB", entries * 2 ** 15)
    forward = dict(path="portable", block_q=128, block_k=128, tile_k=32, row_tiles=1)
    judge(place, lambda sink: block_attention.run(*operands, made, config=forward, sink_logits=place.put(sink), **{**at, "place": at_portable}),
          lambda lse, delta, dout: block_attention_backward.run(*operands, made, lse, delta, dout, config=backward, **at),
          q, k, v, count, scale=case.scale, sink=SINK[:case.Hq] if case.sink else None, rng=rng)


STEPS = {"rising": (-3e30, -1e6, -300, 3, 250, 260, 1e6, 2e30), "falling": (2e30, 1e6, 3, -1e6), "huge": (1e36, 1e36), "dominant": (4, 4), "small": (-3e-30, 2e-30)}


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("path", ["portable", "hopper", "two_pass"])
def test_large_scores_on_hopper(path, steps, kind, rng):
    """Scores of any finite size, from key block to key block; what the backward of either path makes of that lse. The scale carries what float16 cannot."""
    place, sizes, T = HopperPlace(), np.array(STEPS[steps]), 70
    place.refused = "block_attention"
    S, scale = 128 * len(sizes), float(np.abs(sizes).max())
    q, k, v = tensors(rng, kind, 1, 2, 1, T, S, 16, 16)
    if steps == "dominant":
        k[:, :, 77] *= 30
    else:
        q[..., 0], q[..., 1:] = 1, q[..., 1:] * 2 ** -5
        k[..., 0] = (sizes / scale).repeat(128) * (1 + 2 ** -7 * rng.integers(0, 8, S))
        k[..., 1:] = np.minimum(np.abs(sizes / scale), 0.1).repeat(128)[:, None] * rng.standard_normal((S, 15))
    made = block_lists.build(np.ones((1, T, S), bool), 0, 128, 128)
    made = dataclasses.replace(made, **{f.name: place.put(getattr(made, f.name)) for f in dataclasses.fields(made) if isinstance(getattr(made, f.name), np.ndarray)})
    forward, backward = dict(path="hopper", block_q=128, block_k=128, tile_k=32, row_tiles=1), dict(path=path, block_q=128, block_k=128, tile_k=32, tile_q=32, stages=1, heads=1, sums=1, section=0, walk="descending", scratch=1)
    operands, at = tuple(map(place.put, (q, k, v))), dict(place=place, scale=scale, q_start=0)
    judge(place, lambda sink: block_attention.run(*operands, made, config=forward, **at),
          lambda lse, delta, dout: block_attention_backward.run(*operands, made, lse, delta, dout, config=backward, **at), q, k, v, np.ones((1, 1, T, S), bool), scale=scale, rng=rng)


def test_expanded_and_unit_inputs(rng, place):
    """Zero strides everywhere: an expanded v, and the dout of out.sum()."""
    q, k, v = tensors(rng, "bfloat16", 2, 2, 2, 33, 40, 32, 32)
    v, dout = np.broadcast_to(v[:1, :1], v.shape), np.broadcast_to(np.ones((), q.dtype), (2, 2, 33, 32))
    mask = np.ones((1, 33, 40), bool)
    lists = block_lists.build(mask, 7, 32, 64)
    lists = dataclasses.replace(lists, **{f.name: place.put(getattr(lists, f.name)) for f in dataclasses.fields(lists) if isinstance(getattr(lists, f.name), np.ndarray)})
    put, count = place.put, np.ones((2, 2, 33, 40), np.int64)
    forward, backward = dict(path="portable", block_q=32, block_k=64, tile_k=32, row_tiles=1), dict(path="portable", block_q=32, block_k=64, tile_k=32, tile_q=32, stages=1)
    out, lse = block_attention.run(put(q), put(k), put(v), lists, place=place, config=forward, scale=0.2)
    total, delta, _ = attention_delta.run(out, put(dout), lse, place=place)
    grads = block_attention_backward.run(put(q), put(k), put(v), lists, total, delta, put(dout), place=place, config=backward, scale=0.2)
    for name, got, true, one in zip(("dq", "dk", "dv"), grads, oracle.attention_gradients(q, k, v, count, dout, scale=0.2), plain.attention_gradients(q, k, v, count, dout, scale=0.2)):
        assert_close(name, got.owner, true, one, reduction=100)


# ------------------------------------------------------------------------------------------------------------------ selections
@dataclasses.dataclass
class Chosen:
    B: int = 2
    Hq: int = 4
    Hk: int = 2
    G: int = 1
    T: int = 5
    S: int = 90
    D: int = 32
    Dv: int = 24
    K: int = 40
    granularity: int = 1
    causal: bool = False
    kv: tuple | None = None
    lengths: bool = False
    start: tuple | None = None
    odd: bool = False
    shared: bool = False
    sink: bool = False
    softcap: float | None = None
    scale: float = 0.3
    forward: tuple = (16, 32, 1, 1)        # heads, tile_k, key_warps, stages
    backward: tuple = (16, 32, 1, 16, 256)  # heads, tile_k, key_warps, tile_q, chunk

    __str__ = Case.__str__


CHOSEN_CASES = [
    Chosen(),
    Chosen(Hq=6, Hk=1, K=150, S=200, lengths=True, softcap=2.0, forward=(16, 64, 4, 2), backward=(16, 64, 4, 32, 128)),
    Chosen(B=1, Hq=2, T=300, K=20, S=200, causal=True, G=2, backward=(16, 64, 2, 64, 128)),
    Chosen(G=4, causal=True, T=9, kv=(33, 90), sink=True, forward=(16, 64, 2, 2), backward=(16, 64, 2, 32, 256)),
    Chosen(G=2, granularity=16, K=5, causal=True, T=9, kv=(33, 90), lengths=True, forward=(16, 32, 2, 1), backward=(16, 32, 2, 16, 256)),
    Chosen(granularity=7, K=12, causal=True, T=9, S=61, kv=(3, 61), D=31, Dv=33, scale=-0.1, forward=(16, 32, 1, 2)),
    Chosen(granularity=100, K=3, T=9, S=361, D=16, Dv=16),
    Chosen(B=1, Hq=40, Hk=1, D=80, Dv=64, shared=True, T=3, forward=(32, 32, 1, 2), backward=(32, 32, 1, 16, 256)),
    Chosen(B=1, Hq=20, Hk=1, D=352, Dv=320, shared=True, T=2, scale=0.1, forward=(32, 32, 2, 1), backward=(32, 32, 2, 16, 256)),
    Chosen(odd=True, start=(3, 80), causal=True, forward=(16, 32, 1, 2), backward=(16, 32, 1, 32, 256)),
    Chosen(start=(2 ** 31 - 3, -2 ** 31), causal=True), Chosen(granularity=7, K=12, start=(2 ** 31 - 1, 2 ** 31 - 6), causal=True),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CHOSEN_CASES, ids=str)
def test_gather_attention(case, kind, rng, place):
    """Entries of every garbage, holes and duplicates anywhere, rows without any key."""
    c = case
    q, k, v = tensors(rng, kind, c.B, c.Hq, c.Hk, c.T, c.S, c.D, c.Dv, odd=c.odd, shared=c.shared)
    blocks = -(-c.S // c.granularity)
    indices = np.stack([rng.permutation(max(blocks, c.K))[:c.K] for _ in range(c.B * c.G * c.T)]).reshape(c.B, c.G, c.T, c.K).astype(np.int32)
    luck = rng.random(indices.shape)
    indices[luck < 0.25] = rng.choice(np.array([-1, -1, -1, BIG, -BIG - 1, -123456, c.S, blocks, BIG // c.granularity, 2 ** 30 + 1]), (luck < 0.25).sum())
    indices[..., -2:] = indices[..., :2]
    indices[0, 0, 0] = -1
    lengths = rng.integers(-2, c.K + 5, (c.B, c.G, c.T)).astype(np.int32) if c.lengths else None
    count = oracle.selection_count(indices, c.S, c.Hq, lengths=lengths, granularity=c.granularity, causal=c.causal, kv_length=c.kv, q_start=c.start if c.kv or c.start else c.S - c.T)
    hide(k, v, count, c.Hq)
    put = place.put
    at = dict(place=place, lengths=put(lengths), granularity=c.granularity, causal=c.causal, scale=c.scale, softcap=c.softcap,
              kv_length=None if c.kv is None else put(np.array(c.kv, np.int32)), q_start=None if c.start is None else put(np.array(c.start, np.int32)))
    forward = dict(zip(("path", "heads", "tile_k", "key_warps", "stages"), ("portable", *c.forward)))
    backward = dict(zip(("path", "heads", "tile_k", "key_warps", "tile_q", "chunk"), ("portable", *c.backward)))
    if kind == "float32":
        forward = dict(path="portable", heads=32, tile_k=32, key_warps=1, stages=1)
        backward.update(heads=32, tile_k=32, key_warps=1, tile_q=32)
    operands = (*map(put, (q, k, v)), put(indices))
    judge(place, lambda sink: gather_attention.run(*operands, config=forward, sink_logits=put(sink), **at),
          lambda lse, delta, dout: gather_attention_backward.run(*operands, lse, delta, dout, config=backward, **at),
          q, k, v, count, scale=c.scale, sink=SINK[:c.Hq] if c.sink else None, softcap=c.softcap, rng=rng)


@pytest.mark.parametrize("case, kind", [(Chosen(T=100, backward=(16, 32, 1, 16, 32)), "bfloat16"), (Chosen(T=70, G=2, K=6, granularity=16, causal=True, kv=(33, 90), backward=(16, 64, 4, 32, 32)), "float16"),
                                        (Chosen(T=70, G=4, D=16, Dv=16, backward=(16, 32, 1, 32, 32)), "bfloat16"), (Chosen(B=1, Hq=2, T=130, G=2, lengths=True, backward=(16, 32, 2, 16, 32)), "bfloat16"),
                                        (Chosen(T=70, D=16, Dv=16, backward=(32, 32, 1, 32, 32)), "float32")], ids=lambda x: str(x))
def test_keys_that_many_queries_chose(case, kind, rng, place, monkeypatch):
    """Tiles of keys cut into parts, whole chunks of queries to a part, of which some are left without; lists of single heads and float32 are not cut."""
    monkeypatch.setattr(gather_attention_backward, "share_of", lambda items, tiles: 100)
    test_gather_attention(case, kind, rng, place)


UNIONS = [
    Chosen(B=1, Hq=4, Hk=1, T=20, S=400, D=64, Dv=64, K=5, granularity=64, causal=True),
    Chosen(Hq=6, Hk=2, G=2, T=17, S=330, D=128, Dv=128, K=4, granularity=64, causal=True, kv=(100, 330), lengths=True, sink=True),
    Chosen(B=1, Hq=16, Hk=1, T=16, S=200, D=72, Dv=40, K=6, granularity=32, softcap=2.0, start=(70,), causal=True),
    Chosen(B=1, Hq=20, Hk=1, T=9, S=150, D=32, Dv=128, K=9, granularity=16, scale=-0.1),
    Chosen(B=1, Hq=40, Hk=1, T=5, S=700, D=40, Dv=24, K=3, granularity=192, causal=True),
    Chosen(B=1, Hq=2, Hk=2, G=2, T=18, S=17000, D=16, Dv=16, K=40, granularity=16, causal=True),  # more blocks than a table holds
    Chosen(B=1, Hq=4, Hk=1, T=5, S=100, D=64, Dv=64, K=3, granularity=64, shared=True, scale=30.0),
]


@pytest.mark.parametrize("eager", [False, True], ids=["late", "eager"])
@pytest.mark.parametrize("kind", ("bfloat16", "float16"))
@pytest.mark.parametrize("case", UNIONS, ids=str)
def test_gather_attention_of_shared_blocks(case, kind, eager, rng, monkeypatch):
    """Unions of unsorted lists with entries of every garbage, holes, repeats (an entry three times), queries without keys, neighbours that are alike and that share nothing; NaN in what nobody sees."""
    c, place = case, HopperPlace()
    if eager:
        monkeypatch.setenv("SPARSETILE_EMULATE_EAGER", "1")
    q, k, v = tensors(rng, kind, c.B, c.Hq, c.Hk, c.T, c.S, c.D, c.Dv, shared=c.shared)
    blocks = -(-c.S // c.granularity)
    indices = np.stack([rng.permutation(max(blocks, c.K))[:c.K] for _ in range(c.B * c.G * c.T)]).reshape(c.B, c.G, c.T, c.K).astype(np.int32)
    luck = rng.random(indices.shape)
    indices[luck < 0.2] = rng.choice(np.array([-1, -1, BIG, -BIG - 1, -123456, c.S, blocks, BIG // c.granularity + 1]), (luck < 0.2).sum())
    indices[:, :, 1::3, 0] = rng.integers(0, min(blocks, 2), indices[:, :, 1::3, 0].shape)
    indices[:, :, 1::3, -2:] = indices[:, :, 1::3, :1]
    indices[:, :, -1, 1] = blocks - 1
    indices[:, :, -2, 1] = 2 ** 32 // 3 + 1  # three times that is 2 in 32 bits
    indices[0, 0, 0] = -1
    lengths = rng.integers(-2, c.K + 5, (c.B, c.G, c.T)).astype(np.int32) if c.lengths else None
    count = oracle.selection_count(indices, c.S, c.Hq, lengths=lengths, granularity=c.granularity, causal=c.causal, kv_length=c.kv, q_start=c.start if c.kv or c.start else c.S - c.T)
    assert count.max() > 1
    hide(k, v, count, c.Hq)
    put, sink = place.put, SINK[np.arange(c.Hq) % 4] if c.sink else None
    problem = Problem.of("gather_attention", dict(B=c.B, Hq=c.Hq, Hk=c.Hk, T=c.T, S=c.S, D=c.D, Dv=c.Dv, K=c.K), dict(q=kind, k=kind, v=kind), "sm_90a", ("softcap",) * (c.softcap is not None), 1.0, c.granularity)
    config = {**gather_attention.default_config(problem), "path": "union"}
    assert not isinstance(gather_attention.resources(problem, config), str)
    operands = *map(put, (token_major(q), k, v)), put(indices)
    assert gather_union.takes(*operands, kind)
    place.refused = "gather_attention"
    at = dict(place=place, lengths=put(lengths), granularity=c.granularity, causal=c.causal, scale=c.scale, softcap=c.softcap,
              kv_length=None if c.kv is None else put(np.array(c.kv, np.int32)), q_start=None if c.start is None else put(np.array(c.start, np.int32)))
    out, lse = gather_attention.run(*operands, config=config, sink_logits=put(sink), **at)
    given, count = dict(scale=c.scale, softcap=c.softcap, sink_logits=sink), np.broadcast_to(count, (c.B, c.Hq, c.T, c.S)).astype(np.int64)
    truth, formula = oracle.attention(q, k, v, count, **given), plain.attention(q, k, v, count, **given)
    assert_close("out", out.owner, truth[0], formula[0], reduction=c.S)
    assert_close("lse", lse.owner, truth[1], formula[1], reduction=c.S)
    if eager or kind == "float16":
        return
    dout = rng.standard_normal(formula[0].shape).astype(q.dtype)
    total, delta, _ = attention_delta.run(put(formula[0]), put(dout), put(formula[1]), place=place, sink_logits=put(sink))
    place.refused = None
    backward = {**gather_attention_backward.default_config(problem), "path": "union"}
    assert not isinstance(gather_attention_backward.resources(problem, backward), str)
    grads = gather_attention_backward.run(*operands, total, delta, put(token_major(dout)), config=backward, **at)
    true, one = (f(q, k, v, count, dout, **given) for f in (oracle.attention_gradients, plain.attention_gradients))
    for name, got, n in zip(("dq", "dk", "dv"), range(3), (c.S, c.T * c.Hq, c.T * c.Hq)):
        assert_close(name, grads[got].owner, true[got], one[got], reduction=n + c.D + c.Dv)


@pytest.mark.parametrize("kernel", [gather_attention, gather_attention_backward], ids=["forward", "backward"])
def test_paths_of_selected_blocks(kernel):
    """Which problems take the path that shares blocks, and why others do not; few queries may be given it."""
    sizes, kinds = dict(B=1, Hq=64, Hk=4, T=4096, S=4096, D=128, Dv=128, K=16), dict.fromkeys("qkv", "bfloat16")
    of = lambda change=None, dtypes=kinds, arch="sm_90a", granularity=64: Problem.of("gather_attention", {**sizes, **(change or {})}, dtypes, arch, (), 1.0, granularity)  # noqa: E731
    for granularity in (16, 32, 64, 128):
        assert kernel.default_config(of(granularity=granularity))["path"] == "union"
    few = kernel.default_config(of(dict(T=1)))
    assert few["path"] == "portable" and not isinstance(kernel.resources(of(dict(T=1)), {**few, "path": "union"}), str)
    for problem in (of(arch="sm_80"), of(dtypes=dict.fromkeys("qkv", "float32")), of(dict(D=192)), of(dict(Dv=100)), of(dict(Hq=512)), of(granularity=1), of(granularity=24), of(dict(K=2048)), of(granularity=2 ** 20)):
        config = kernel.default_config(problem)
        assert config["path"] == "portable" and "portable" in kernel.resources(problem, {**config, "path": "union"})


@dataclasses.dataclass
class Latent:
    """DeepSeek's shapes: keys of width 576, values their first 512 columns, one list for all heads."""
    B: int = 1
    Hq: int = 3
    T: int = 2
    S: int = 90
    K: int = 70
    causal: bool = False
    kv: tuple | None = None
    lengths: bool = False
    start: tuple | None = None
    sink: tuple = ()
    scale: float = 0.05
    softcap: float | None = None
    sms: int = 3
    keys: str = "any"
    token_major: bool = False
    offset: int = 0     # keys whose rows start so many elements after a multiple of 16 bytes
    portable: bool = False

    __str__ = Case.__str__


LATENTS = [
    Latent(),
    Latent(B=2, Hq=70, T=3, lengths=True, causal=True, kv=(33, 90), sms=1),
    Latent(B=2, Hq=64, T=5, S=61, K=33, causal=True, kv=(3, 61), token_major=True, sms=7),
    Latent(Hq=4, K=1, T=1, sink=(0.5, -np.inf, np.inf, 3e38)),
    Latent(Hq=130, T=1, S=300, K=260, keys="ascending"),
    Latent(Hq=4, S=300, K=200, keys="late", sink=(300.0, -3e38, 0.0, 1.0)),
    Latent(Hq=4, S=200, K=200, keys="huge", sink=(0.0, 1e9, -1e9, 5.0)),
    Latent(B=2, T=9, lengths=True, causal=True, start=(3, 80), scale=0.5, sms=2),
    Latent(B=2, Hq=70, T=1, S=300, K=260, lengths=True, sms=7),                                                        # lists split over the chip, two parts of heads
    Latent(B=3, Hq=4, T=2, S=300, K=200, keys="late", causal=True, kv=(33, 300, 200), sink=(300.0, -np.inf, np.inf, 1.0), sms=13),
    Latent(scale=-0.05, portable=True),
    Latent(softcap=2.0, portable=True),
    Latent(offset=4, portable=True),
]
FEW = [  # heads as columns of a product: 8, 16, 32; tiles in pairs and alone, at the ring's end and in its middle
    Latent(Hq=8, S=700, K=650, T=2, keys="late", sms=1),
    Latent(B=2, Hq=16, S=300, K=260, T=3, lengths=True, causal=True, sms=2),
    Latent(Hq=17, S=500, K=420, T=2, keys="ascending", sms=1),
    Latent(Hq=9, S=300, K=200, T=9, keys="huge", lengths=True, sms=1),
    Latent(Hq=7, S=500, K=450, T=9, keys="ascending", lengths=True, causal=True, sms=2),  # the reference passes from group to group at every step, of long lists and short ones
]


def latents(c, kind, rng):
    """q, k, indices, lengths, count: holes of every garbage and duplicates anywhere, rows without keys, NaN behind holes."""
    q = rng.standard_normal((c.B, c.T, c.Hq, 576) if c.token_major else (c.B, c.Hq, c.T, 576)).astype(TYPES[kind])
    q = q.transpose(0, 2, 1, 3) if c.token_major else q
    k = rng.standard_normal((c.B, 1, c.S, 584)).astype(TYPES[kind])[..., c.offset:c.offset + 576]
    indices = np.stack([rng.permutation(max(c.S, c.K))[:c.K] for _ in range(c.B * c.T)]).reshape(c.B, 1, c.T, c.K).astype(np.int32)
    if c.keys == "ascending":
        k *= np.linspace(0, 8, c.S).astype(k.dtype)[:, None]
        indices[:] = np.sort(indices, axis=-1)
    elif c.keys == "huge":
        q, k = q * q.dtype.type(200), k * k.dtype.type(200)
    luck = rng.random(indices.shape)
    indices[luck < 0.25] = rng.choice(np.array([-1, -1, BIG, -BIG - 1, -123456, c.S]), (luck < 0.25).sum())
    indices[..., -2:] = indices[..., :2]
    indices[indices == 0] = -1  # what a careless hole would read
    if c.keys == "late":
        indices[..., :170] = -1
    elif c.T > 1:
        indices[0, 0, 0] = -1
    lengths = rng.integers(-2, c.K + 5, (c.B, 1, c.T)).astype(np.int32) if c.lengths else None
    count = oracle.selection_count(indices, c.S, c.Hq, lengths=lengths, causal=c.causal, kv_length=c.kv, q_start=c.start if c.kv or c.start else c.S - c.T)
    hide(k, k, count, c.Hq)
    return q, k, indices, lengths, count


def latent_options(c, place, lengths):
    return dict(place=place, lengths=place.put(lengths), causal=c.causal, scale=c.scale, softcap=c.softcap,
                kv_length=None if c.kv is None else place.put(np.array(c.kv, np.int32)), q_start=None if c.start is None else place.put(np.array(c.start, np.int32)))


def latent_problem(c, kind, op):
    return Problem.of(op, dict(B=c.B, Hq=c.Hq, Hk=1, T=c.T, S=c.S, D=576, Dv=512, K=c.K), dict(q=kind, k=kind, v=kind), "sm_90a", ("shared_kv",))


@pytest.mark.parametrize("eager", [False, True], ids=["late", "eager"])
@pytest.mark.parametrize("kind", ("bfloat16", "float16"))
@pytest.mark.parametrize("path, case", [("hopper", c) for c in LATENTS] + [("tokens", c) for c in LATENTS + FEW], ids=str)
def test_gather_attention_on_hopper(path, case, kind, eager, rng, monkeypatch):
    """Warpgroup products, ring and turns; holes of every garbage anywhere, NaN behind them; maxima that move in every tile; scores of which one decides; what it does not take."""
    c, place = case, HopperPlace()
    place.sms = c.sms
    if eager:
        monkeypatch.setenv("SPARSETILE_EMULATE_EAGER", "1")
    q, k, indices, lengths, count = latents(c, kind, rng)
    v, put = k[..., :512], place.put
    problem = latent_problem(c, kind, "gather_attention")
    config = {**gather_attention.default_config(problem), "path": path, "split": int(path == "hopper")}
    assert not isinstance(gather_attention.resources(problem, config), str)
    operands = *map(put, (q, k, v)), put(indices)
    assert gather_attention.hopper_takes(*operands, 1, c.scale, c.softcap, kind) != c.portable
    sink = np.array(c.sink, np.float32) if c.sink else None
    out, lse = gather_attention.run(*operands, config=config, sink_logits=put(sink), **latent_options(c, place, lengths))
    given = dict(scale=c.scale, softcap=c.softcap, sink_logits=sink)
    truth, formula = oracle.attention(q, k, v, count, **given), plain.attention(q, k, v, count, **given)
    assert_close("out", out.owner, truth[0], formula[0], reduction=c.S)
    assert_close("lse", lse.owner, truth[1], formula[1], reduction=c.S)


@pytest.mark.parametrize("kind", ("bfloat16", "float16"))
@pytest.mark.parametrize("way, heads", [("hopper", 5), ("split", 5), ("dense", 5), ("tokens", 32), ("tokens", 16), ("tokens", 8)])
def test_one_key_decides_behind_a_reference_that_lags(way, heads, kind, rng):
    """Its value is the answer, whatever 16 bits keep of its probability."""
    place, T, S = HopperPlace(), 1 if way in ("split", "dense") else 3, 700
    q, k, scale = decided_late(rng, TYPES[kind], heads, T, S)
    v, count = k[..., :512], np.ones((1, heads, T, S), np.int64)
    operands, at = tuple(map(place.put, (q, k, v))), dict(place=place, scale=scale)
    if way == "dense":
        place.refused = "block_attention_decode"
        made = block_lists.build(np.ones((1, T, S), bool), 0, 32, 128)
        made = dataclasses.replace(made, **{f.name: place.put(getattr(made, f.name)) for f in dataclasses.fields(made) if isinstance(getattr(made, f.name), np.ndarray)})
        out, lse = block_attention.run(*operands, made, config=dict(path="latent", block_q=32, block_k=128, tile_k=64, row_tiles=1), q_start=0, **at)
    else:
        config = dict(gather_attention.default_config(latent_problem(Latent(Hq=heads, T=T, S=S, K=S), kind, "gather_attention")), path="tokens" if way == "tokens" else "hopper", split=int(way == "split"))
        indices = np.broadcast_to(np.arange(S, dtype=np.int32), (1, 1, T, S)).copy()
        out, lse = gather_attention.run(*operands, place.put(indices), config=config, **at)
    answer(out.owner, lse.owner, q, k, v, count, scale=scale)


@pytest.mark.parametrize("case", [FEW[0], FEW[2], FEW[4]], ids=str)
@pytest.mark.parametrize("slow", range(5), ids=["gather", "scores", "next scores", "values", "herald"])
def test_groups_of_few_heads_that_lag(slow, case, rng, monkeypatch):
    """Whichever of the groups falls behind, the others wait before they come round the ring again."""
    monkeypatch.setenv("SPARSETILE_EMULATE_SLOW", str(slow))
    test_gather_attention_on_hopper("tokens", case, "bfloat16", True, rng, monkeypatch)


# the backward knows neither sinks nor split lists; one call is enough to see that the other path takes what this one does not
GRADIENTS = [pytest.param(c, kind, eager, id=f"{c}-{kind}-{'eager' if eager else 'late'}") for c in LATENTS if not c.sink and (c.B, c.T) != (2, 1)
             for kind in ("bfloat16", "float16")[:2 - c.portable] for eager in (False, True)[:2 - c.portable]]


@pytest.mark.parametrize("case, kind, eager", GRADIENTS)
def test_gather_attention_backward_on_hopper(case, kind, eager, rng, monkeypatch):
    """Gradients of the latent as one sum, chunk by chunk of queries; the same bits whoever adds first."""
    c, place = case, HopperPlace()
    place.sms = c.sms
    if eager:
        monkeypatch.setenv("SPARSETILE_EMULATE_EAGER", "1")
    q, k, indices, lengths, count = latents(c, kind, rng)
    v, put = k[..., :512], place.put
    config = {**gather_attention_backward.default_config(latent_problem(c, kind, "gather_attention_backward")), "path": "hopper"}
    operands, options = (*map(put, (q, k, v)), put(indices)), latent_options(c, place, lengths)
    given, hold = dict(scale=c.scale, softcap=c.softcap), np.broadcast_to(count, (c.B, c.Hq, c.T, c.S)).astype(np.int64)
    out, lse = plain.attention(q, k, v, hold, **given)[:2]
    dout = rng.standard_normal(out.shape).astype(q.dtype)
    dlse = np.where(np.isneginf(lse), 0, rng.standard_normal(lse.shape)).astype(np.float32)
    total, delta, _ = attention_delta.run(put(out), put(dout), put(lse), place=place, dlse=put(dlse))
    assert gather_backward_hopper.takes(*operands[:3], put(dout), operands[3], 1, c.scale, c.softcap) != c.portable
    if c.T > 2:
        monkeypatch.setattr(gather_backward_hopper, "SCRATCH", 2 * c.B * -(-c.Hq // 128) * -(-c.K // 64) * 2 ** 15)  # two queries (four where all heads fit one block) at a time
    runs = []
    for sms in (c.sms, 5):
        place.sms = sms
        runs.append(gather_attention_backward.run(*operands, total, delta, put(dout), config=config, **options))
    dq, dk, dv = (x if x is None else x.owner for x in runs[0])
    both = lambda dk, dv: np.concatenate(((dk[..., :512].astype(np.promote_types(dk.dtype, np.float32)) + dv).astype(dk.dtype), dk[..., 512:]), -1)  # noqa: E731
    assert all(np.array_equal(a.owner, b.owner) for a, b in zip(*runs) if a is not None)
    if c.portable:
        dk, dv = both(dk, dv), None
    assert dv is None
    (dq_true, dk_true, dv_true), (dq_plain, dk_plain, dv_plain) = (f(q, k, v, hold, dout, dlse=dlse, **given)[:3] for f in (oracle.attention_gradients, plain.attention_gradients))
    assert_close("dq", dq, dq_true, dq_plain, reduction=c.S + 576 + 512)
    assert_close("dk + dv", dk, both(dk_true, dv_true), both(dk_plain, dv_plain), reduction=c.T * c.Hq + 576 + 512)


@pytest.mark.parametrize("kernel", [gather_attention, gather_attention_backward], ids=["forward", "backward"])
def test_gather_attention_refuses_what_hopper_lacks(kernel):
    """A config that names the path runs it or says why not."""
    sizes, kinds = dict(B=1, Hq=64, Hk=1, T=4, S=90, D=576, Dv=512, K=40), dict(q="bfloat16", k="bfloat16", v="bfloat16")
    given = ("sm_90a", ("shared_kv",))
    assert kernel.default_config(Problem.of("gather_attention", sizes, kinds, *given))["path"] == "hopper"
    for change, dtypes, arch, features, granularity in (({}, kinds, "sm_80", ("shared_kv",), 1), ({}, dict.fromkeys("qkv", "float32"), *given, 1), ({}, kinds, "sm_90a", (), 1),
                                                        (dict(D=512), kinds, *given, 1), (dict(Hk=2), kinds, *given, 1), ({}, kinds, *given, 64), ({}, kinds, "sm_90a", ("shared_kv", "softcap"), 1)):
        problem = Problem.of("gather_attention", {**sizes, **change}, dtypes, arch, features, granularity=granularity)
        config = kernel.default_config(problem)
        assert config["path"] == "portable"
        for path in {"hopper", *kernel.TUNABLES[0].values} - {"portable"}:
            assert f"path {path}" in kernel.resources(problem, {**config, "path": path}) and "portable" in kernel.resources(problem, {**config, "path": path})
    if kernel is gather_attention:
        assert kernel.resources(Problem.of("gather_attention", sizes, kinds, *given), {**kernel.default_config(problem), "path": "tokens", "split": 1}) == "split is for path hopper; the others take 0"


# ------------------------------------------------------------------------------------------------------------------ delta, merge
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("expanded", [False, True])
def test_attention_delta(kind, expanded, rng, place):
    """From given outputs: rows without keys, sinks of -inf and +inf, the dout of out.sum()."""
    B, H, T, Dv = 2, 4, 300, 33 if expanded else 40
    out, lse = rng.standard_normal((B, H, T, Dv)).astype(TYPES[kind]), rng.standard_normal((B, H, T)).astype(np.float32)
    out[0, 0, :5], lse[0, 0, :5] = 0, -np.inf
    dout = np.broadcast_to(np.ones((), out.dtype), out.shape) if expanded else rng.standard_normal(out.shape).astype(out.dtype)
    dlse = np.broadcast_to(np.float32(1), lse.shape) if expanded else rng.standard_normal(lse.shape).astype(np.float32)
    sink = np.array([0.5, -np.inf, np.inf, 3], np.float32)
    total, delta, dsink = attention_delta.run(*map(place.put, (out, dout, lse)), place=place, sink_logits=place.put(sink), dlse=place.put(dlse))

    def formula(real):
        s, keys = sink.astype(real)[None, :, None], lse.astype(real)
        whole, mean = np.logaddexp(keys, s), (out.astype(real) * dout.astype(real)).sum(-1)
        some, finite = np.isfinite(keys), np.isfinite(s)
        term = np.where(some & finite, np.exp(np.where(finite, s, 0) - whole) * mean, 0)
        return whole, np.where(some, mean - dlse * np.exp(whole - keys), 0), -term.sum((0, 2))

    with np.errstate(all="ignore"):
        truth, plainly = formula(np.float64), formula(np.float32)
    heads = [0, 1, 3]  # P of an infinite sink's head is 0 but for what dlse brings: only finite numbers are promised
    for name, got, true, one in zip(("lse_total", "delta"), (total, delta), truth, plainly):
        assert_close(name, got.owner[:, heads], true[:, heads], one[:, heads], reduction=Dv)
        assert np.isfinite(delta.owner).all()
    assert_close("dsink", dsink.owner, truth[2], plainly[2], reduction=B * T * Dv)


@pytest.mark.parametrize("sink", [None, np.array([-np.inf, 2], np.float32)], ids=["no sink", "sink"])
def test_attention_delta_of_nan(sink, place):
    out, lse = np.ones((1, 2, 9, 16), np.float32), np.zeros((1, 2, 9), np.float32)
    out[:, :, 4], lse[:, :, 4] = np.nan, np.nan
    total, delta, _ = attention_delta.run(*map(place.put, (out, np.ones_like(out), lse)), place=place, sink_logits=None if sink is None else place.put(sink))
    for x in (total, delta):
        assert np.array_equal(np.isnan(x.owner), np.isnan(lse))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts, Dv, sink", [(1, 40, True), (2, 33, False), (5, 40, True), (30, 24, True)])
def test_merge_attention(kind, parts, Dv, sink, rng, place):
    outs = [rng.standard_normal((2, 4, 11, Dv)).astype(TYPES[kind]) for _ in range(parts)]
    lses = [(3 * rng.standard_normal((2, 4, 11))).astype(np.float32) for _ in range(parts)]
    for out, lse in zip(outs, lses):  # rows that no part knows
        out[0, 0, :4], lse[0, 0, :4] = 0, -np.inf
    outs[0][1], lses[0][1] = 0, -np.inf
    given = dict(sink_logits=SINK if sink else None)
    got = merge_attention.run([*map(place.put, outs)], [*map(place.put, lses)], place=place, sink_logits=place.put(given["sink_logits"]))
    for name, x, true, one in zip(("out", "lse"), got, oracle.merge_attention(outs, lses, **given), plain.merge_attention(outs, lses, **given)):
        assert_close(name, x.owner, true, one, reduction=parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gates", KINDS)
@pytest.mark.parametrize("parts, Dv", [(1, 40), (3, 33), (5, 40)])
def test_merge_attention_with_given_weights(kind, gates, parts, Dv, rng, place):
    outs = [rng.standard_normal((2, 4, 11, Dv)).astype(TYPES[kind]) for _ in range(parts)]
    weights = rng.standard_normal((2, 4, 11, parts)).astype(TYPES[gates])
    got, lse = merge_attention.run([*map(place.put, outs)], None, place=place, weights=[place.put(weights[..., n:n + 1]) for n in range(parts)])
    terms = lambda real: sum(weights[..., n:n + 1].astype(real) * outs[n].astype(real) for n in range(parts))  # noqa: E731
    assert lse is None
    assert_close("out", got.owner, terms(np.float64), terms(np.float32).astype(TYPES[kind]), reduction=parts)
