"""Block kernels on lists that no pattern makes: random masks, full blocks beside intervals and bitmaps, orders with holes, a list per batch and head."""
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import oracle
import pytest
from block_lists import build
from drivers import EVERY, arrays, numpy_dtype, through
from judge import normal
from numeric import assert_close, plain

from sparsetile.backends import places
from sparsetile.backends.contract import Problem
from sparsetile.ops import dispatch

ARRAYS = ("offsets", "cols", "kinds", "by_key_offsets", "by_key_rows", "by_key_kinds", "intervals", "bitmaps", "list_of", "q_order", "k_order")


class Kernels:
    """A backend's kernels, run below the ops: native arrays of a place in, NumPy out."""

    def __init__(self, on):
        on_gpu = on.backend in ("triton", "cupy") and not on.interpreted
        self.on, self.device = on, 0 if on_gpu else None
        self.place = places.place_for(on.package.NATIVE, "torch" if on_gpu or on.interpreted else "numpy", self.device)

    def native(self, x):
        if isinstance(x, np.ndarray):
            return self.place.native(self.on.put(x))
        if hasattr(x, "by_key_rows"):
            kept = dict(x.extras)  # what backends keep of a layout speaks of these arrays, pointers among it
            return replace(x, extras=kept, **{name: self.place.upload(getattr(x, name)) for name in ARRAYS if getattr(x, name) is not None})
        return x

    def run(self, name, *args, dims, dtype, config=None, features=(), by=None, **options):
        """by: the function of the backend that the call must reach; what has one has no excuse on Hopper."""
        if not dispatch.has_kernel(self.on.backend, name):
            pytest.skip(f"{self.on.backend}: {name} is not there")
        kernel = dispatch.kernel(self.on.backend, name)
        problem = Problem.of(name, dims, dict(q=dtype, k=dtype, v=dtype, out=dtype), self.place.arch, features)
        config = {**kernel.default_config(problem), **(config or {})}
        for refusal in (kernel.supports(problem), kernel.resources(problem, config)):
            if isinstance(refusal, str):
                assert by is None or self.place.arch != "sm_90a", refusal
                pytest.skip(f"{self.on.backend}: {refusal}")
        with self.place.guard(), through(by) if by else nullcontext():
            got = kernel.run(*map(self.native, args), place=self.place, config=config, **{k: self.native(v) for k, v in options.items()})
            return arrays(*(None if x is None else self.place.give(x) for x in got))


def masks(style, L, P, S, rng):
    """Blocks of all kinds: empty, full, staircase, two runs a row, random bits."""
    mask = np.zeros((L, P, S), bool)
    for l in range(L):
        for i in range(0, P, 16):
            for j in range(0, S, 32):
                rows, keys = np.arange(i, min(i + 16, P))[:, None], np.arange(j, min(j + 32, S))
                kind = rng.integers(0, 5)
                mask[l, i:i + 16, j:j + 32] = [np.zeros_like(rows + keys), rows >= 0, keys - j <= rows - i, (keys % 7 < 2), rng.random((len(rows), len(keys))) < 0.4][kind]
    return mask


STYLES = {"first block inside": dict(p0=37), "first negative": dict(p0=-29), "bitmaps only": dict(p0=3, bitmaps=True, full=False), "a list for each": dict(p0=0, each=True), "orders": dict(p0=0, orders=True)}
BLOCKS = [(32, 64), (16, 32), (64, 64), (128, 128)]


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("style, block", [(s, BLOCKS[n % 4]) for n, s in enumerate(STYLES)] + [("orders", BLOCKS[1]), ("a list for each", BLOCKS[2])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lists(on, backend, style, block, dtype, rng):
    options = STYLES[style]
    B, Hq, Hk, T, S, D, Dv = 2, 4, 2, 53, 150, 48, 32
    L, p0 = (3, 0) if options.get("each") else (1, options["p0"])
    list_of = rng.integers(0, L, (B, Hq)) if options.get("each") else np.zeros((1, 1), int)
    mask = masks(style, L, T, S, rng)
    if options.get("orders"):
        q, k = (np.full(-(-n // b) * b + 2 * b, -1) for n, b in ((T, block[0]), (S, block[1])))
        q[rng.permutation(len(q))[:T]], k[rng.permutation(len(k))[:S]] = rng.permutation(T), rng.permutation(S)
        lists = build(mask, 0, *block, q_order=q, k_order=k)
    else:
        lists = build(mask, p0, *block, list_of=list_of, bitmaps=options.get("bitmaps", False), full=options.get("full", True))
    kernels = Kernels(on)
    kind = numpy_dtype(dtype)
    q, k, v, dout = normal(rng, (B, Hq, T, D), kind), normal(rng, (B, Hk, S, D), kind), normal(rng, (B, Hk, S, Dv), kind), normal(rng, (B, Hq, T, Dv), kind)
    lengths = np.array([S, 101], np.int32)
    count = np.broadcast_to(mask[list_of], (B, Hq, T, S)) & (np.arange(S) < lengths[:, None, None, None])
    features = [w for w, there in (("interval", lists.has_intervals), ("bitmap", lists.has_bitmaps), ("order", lists.q_order is not None), ("per_head", L > 1), ("per_batch", L > 1)) if there]
    common = dict(dims=dict(B=B, Hq=Hq, Hk=Hk, T=T, S=S, D=D, Dv=Dv), dtype=dtype)
    where = dict(config=dict(block_q=block[0], block_k=block[1]), scale=D ** -0.5, kv_length=lengths, q_start=p0, features=[*features, "kv_length", "lse"])
    out, lse = kernels.run("block_attention", q, k, v, lists, **where, **common)
    how = dict(scale=D ** -0.5)
    for name, got, truth, measure in zip(("out", "lse"), (out, lse), oracle.attention(q, k, v, count, **how), plain.attention(q, k, v, count, **how)):
        assert_close(name, got, truth, measure, reduction=S + D)
    total, delta, _ = kernels.run("attention_delta", out, dout, lse, **common)
    grads = kernels.run("block_attention_backward", q, k, v, lists, total, delta, dout, **where, **common)
    truths, measures = oracle.attention_gradients(q, k, v, count, dout, **how), plain.attention_gradients(q, k, v, count, dout, **how)
    for name, got, truth, measure in zip(("dq", "dk", "dv"), grads, truths, measures):
        assert_close(name, got, truth, measure, reduction=S + T * Hq // Hk + D)


VARIANTS = {"triton-gluon": dict(path="gluon", block_q=128, block_k=128, num_warps=8, num_stages=2),
            "triton-maps": dict(path="portable", block_q=16, block_k=32, maps=True, num_warps=4),  # makes the next block's scores ahead
            "triton-maps-in-order": dict(path="portable", block_q=16, block_k=32, maps=True, num_warps=8),
            "cupy-hopper": dict(path="hopper", block_q=128, block_k=128)}
ENTRIES = {"triton-gluon": "triton.block_attention_gluon.launch", "triton-maps": "triton.block_attention_maps.launch", "triton-maps-in-order": "triton.block_attention_maps.launch",
           "cupy-hopper": "cupy.block_attention.run_hopper"}


OF_THE_FORWARD = pytest.mark.parametrize("variant, backend", [pytest.param(name, name.partition("-")[0], marks=pytest.mark.interp if "maps" in name else ()) for name in VARIANTS])


@OF_THE_FORWARD
@pytest.mark.parametrize("style", ["first negative", "bitmaps only", "a list for each"])
def test_variants_of_the_forward(on, backend, variant, style, rng):
    """Paths that the lists above do not reach by default: ragged tiles, keys that nobody sees are NaN, a device length of 0."""
    options, config = STYLES[style], VARIANTS[variant]
    B, Hq, Hk, T, S, D, Dv = 3, 4, 2, 53 if config["block_q"] < 64 else 203, 150, 72, 40
    L, p0 = (3, 0) if options.get("each") else (1, options["p0"])
    list_of = rng.integers(0, L, (B, Hq)) if options.get("each") else np.zeros((1, 1), int)
    mask = masks(style, L, T, S, rng)
    lists = build(mask, p0, config["block_q"], config["block_k"], list_of=list_of, bitmaps=options.get("bitmaps", False), full=options.get("full", True))
    q, k, v = (normal(rng, (B, heads, n, width), numpy_dtype("bfloat16")) for heads, n, width in ((Hq, T, D), (Hk, S, D), (Hk, S, Dv)))
    lengths = np.array([S, 101, 0], np.int32)
    k[1, :, 101:] = v[1, :, 101:] = np.nan
    count = np.broadcast_to(mask[list_of], (B, Hq, T, S)) & (np.arange(S) < lengths[:, None, None, None])
    got = Kernels(on).run("block_attention", q, k, v, lists, dims=dict(B=B, Hq=Hq, Hk=Hk, T=T, S=S, D=D, Dv=Dv), dtype="bfloat16", config=config, by=ENTRIES[variant],
                          scale=D ** -0.5, kv_length=lengths, q_start=p0, features=["interval", "bitmap", "kv_length", "lse"])
    k[1, :, 101:] = v[1, :, 101:] = 0
    how = dict(scale=D ** -0.5)
    for name, x, truth, measure in zip(("out", "lse"), got, oracle.attention(q, k, v, count, **how), plain.attention(q, k, v, count, **how)):
        assert_close(name, x, truth, measure, reduction=S + D)


@OF_THE_FORWARD
@pytest.mark.parametrize("style", ["first block inside", "bitmaps only"])
def test_values_of_keys_that_nobody_sees(on, backend, variant, style, rng):
    """They stand in blocks of which other keys are seen, and are no numbers."""
    options, config = STYLES[style], VARIANTS[variant]
    Hq, Hk, T, S, D, Dv = 2, 1, 53 if config["block_q"] < 64 else 203, 150, 72, 40
    mask = masks(style, 1, T, S, rng)
    hidden = rng.random(S) < 0.2
    mask[:, :, hidden] = False
    lists = build(mask, options["p0"], config["block_q"], config["block_k"], bitmaps=options.get("bitmaps", False), full=options.get("full", True))
    q, k, v = (normal(rng, (1, heads, n, width), numpy_dtype("bfloat16")) for heads, n, width in ((Hq, T, D), (Hk, S, D), (Hk, S, Dv)))
    truths, measures = (attend(q, k, v, np.broadcast_to(mask[None], (1, Hq, T, S)), scale=D ** -0.5) for attend in (oracle.attention, plain.attention))
    k[:, :, hidden], v[:, :, hidden] = np.nan, np.where(rng.random((hidden.sum(), Dv)) < 0.5, np.nan, -np.inf)
    got = Kernels(on).run("block_attention", q, k, v, lists, dims=dict(B=1, Hq=Hq, Hk=Hk, T=T, S=S, D=D, Dv=Dv), dtype="bfloat16", config=config, by=ENTRIES[variant],
                          scale=D ** -0.5, q_start=options["p0"], features=["interval", "bitmap", "lse"])
    for name, x, truth, measure in zip(("out", "lse"), got, truths, measures):
        assert_close(name, x, truth, measure, reduction=S + D)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.interp)])
@pytest.mark.parametrize("maps", [False, True])
def test_far_longer_rows_come_first(on, backend, maps, rng):
    """Where the host knows the lists, one of several heads' tiles that is far longer than the others starts before all of these: each tile is done all the same."""
    Hq, T, S, D = 3, 320, 320, 64
    mask = np.abs(np.arange(T)[:, None] - np.arange(S)) < 9
    mask[40:44] = True
    lists = build(mask[None], 0, 16, 32)
    lists.extras["offsets"] = lists.offsets
    assert lists.far_longer("offsets")[0] == 1
    q, k, v = (normal(rng, (1, Hq, n, D), np.float16) for n in (T, S, S))
    count = np.broadcast_to(mask, (1, Hq, T, S))
    got = Kernels(on).run("block_attention", q, k, v, lists, dims=dict(B=1, Hq=Hq, Hk=Hq, T=T, S=S, D=D, Dv=D), dtype="float16", scale=D ** -0.5, q_start=0, features=["interval", "lse"],
                          config=dict(path="portable", block_q=16, block_k=32, maps=maps, num_warps=4), by=f"triton.{'block_attention_maps' if maps else 'block_attention'}.turns")
    for name, x, truth, measure in zip(("out", "lse"), got, oracle.attention(q, k, v, count, scale=D ** -0.5), plain.attention(q, k, v, count, scale=D ** -0.5)):
        assert_close(name, x, truth, measure, reduction=S + D)


BACKWARD = {"triton-portable": dict(path="portable", block_q=128, block_k=128, num_warps=8, num_stages=1, chunk=64, columns=64),  # where a call of those below needs it
            "triton-gluon": dict(path="gluon", block_q=128, block_k=128, num_warps=8, num_stages=1, chunk=64, columns=64),
            "triton-wide": dict(path="gluon", block_q=128, block_k=128, num_warps=8, num_stages=1, chunk=64, columns=64, width=136),
            "triton-ordered": dict(path="gluon_ordered", block_q=128, block_k=128, num_warps=8, num_stages=1, chunk=64, columns=64),
            "triton-ascending": dict(path="gluon_ordered", heads=2, walk="ascending", block_q=128, block_k=128, num_warps=8, num_stages=1, chunk=64, columns=64),
            "triton-abreast": dict(path="gluon_ordered", walk="abreast", block_q=128, block_k=128, num_warps=8, num_stages=1, chunk=64, columns=64),
            "cupy-hopper": dict(path="hopper", block_q=128, block_k=128), "cupy-turning": dict(path="hopper", walk="turning", block_q=128, block_k=128),
            "cupy-two_pass": dict(path="two_pass", heads=1, sums=1, section=0, walk="descending", block_q=128, block_k=128)}
BACKWARD_ENTRIES = {"triton-portable": "triton.block_attention_backward._plan", "triton-gluon": "triton.block_attention_backward_gluon.launch", "triton-wide": "triton.block_attention_backward_gluon.launch",
                    "triton-ordered": "triton.block_attention_backward_gluon.launch_ordered", "triton-ascending": "triton.block_attention_backward_gluon.launch_ordered",
                    "triton-abreast": "triton.block_attention_backward_gluon.launch_ordered",
                    "cupy-hopper": "cupy.block_attention_backward.run_hopper", "cupy-turning": "cupy.block_attention_backward.run_hopper", "cupy-two_pass": "cupy.two_pass.run"}


@pytest.mark.parametrize("variant, backend, style", [(name, name.partition("-")[0], style) for name in BACKWARD for style in ("first negative", "bitmaps only", "a list for each", "a list for each of a group")
                                                     if not (name in ("cupy-turning", "triton-abreast") and style == "a list for each")])  # refused: every head has its own key head there
@pytest.mark.parametrize("ends", [True, False])
def test_variants_of_the_backward(on, backend, variant, style, ends, rng):
    """Rows at no multiple of 16 bytes, queries before the lists' first, keys that nobody sees are NaN, a device length of 0; the same bits twice."""
    options, config, grouped = STYLES[style.removesuffix(" of a group")], dict(BACKWARD[variant]), style.endswith("group")
    B, T, S, D, Dv = 3, 203, 330, config.pop("width", 72), 40
    Hq, Hk = (4, 4) if options.get("each") and not grouped else (4, 2)
    by = "triton.block_attention_backward_gluon.launch" if grouped and backend == "triton" and config["path"] != "portable" else BACKWARD_ENTRIES[variant]  # heads of a group that go by lists of their own add to dQ in orders of their own
    L, p0 = (3, 0) if options.get("each") else (1, options["p0"])
    list_of = rng.integers(0, L, (B, Hq)) if options.get("each") else np.zeros((1, 1), int)
    mask = masks(style, L, T, S, rng)
    mask[:, :, 200:] &= np.arange(200, S) % 32 != 5
    lists = build(mask, p0, 128, 128, list_of=list_of, bitmaps=options.get("bitmaps", False), full=options.get("full", True))
    q, k, v, dout = (normal(rng, (B, heads, n, width), numpy_dtype("bfloat16")) for heads, n, width in ((Hq, T, D), (Hk, S, D), (Hk, S, Dv), (Hq, T, Dv)))
    lengths = np.array([S, 101, 0], np.int32) if ends else np.full(3, S, np.int32)
    count = np.broadcast_to(mask[list_of], (B, Hq, T, S)) & (np.arange(S) < lengths[:, None, None, None])
    seen = count.reshape(B, Hk, Hq // Hk, T, S).any((2, 3))
    k[~seen] = v[~seen] = 0
    how = dict(scale=D ** -0.5)
    out, lse = oracle.attention(q, k, v, count, **how)
    truths, measures = oracle.attention_gradients(q, k, v, count, dout, **how), plain.attention_gradients(q, k, v, count, dout, **how)
    k[~seen] = v[~seen] = np.nan
    args = (q, k, v, lists, lse.astype(np.float32), (out * dout.astype(float)).sum(-1).astype(np.float32), dout)
    twice = [Kernels(on).run("block_attention_backward", *args, dims=dict(B=B, Hq=Hq, Hk=Hk, T=T, S=S, D=D, Dv=Dv), dtype="bfloat16", config=config, by=by,
                             scale=D ** -0.5, kv_length=lengths if ends else None, q_start=p0, features=["interval", "bitmap", "lse"] + ["kv_length"] * ends) for _ in range(2)]
    for name, got, again, truth, measure in zip(("dq", "dk", "dv"), *twice, truths, measures):
        assert_close(name, got, truth, measure, reduction=S + T * Hq // Hk + D)
        assert np.array_equal(got.view(np.uint16), again.view(np.uint16)), name


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("D, ends", [(40, False), (72, True), (136, False)])
def test_far_longer_lists_come_in_sections(on, backend, D, ends, rng, monkeypatch):
    """Path gluon: a tile of queries that see all keys, a block of keys that all queries see; two key heads are too few for one multiprocessor each to do such a list alone."""
    from sparsetile.backends.triton import block_backward_two_gluon as gluon
    found, sections_of = [], gluon.sections_of
    monkeypatch.setattr(gluon, "sections_of", lambda *args: found.append(sections_of(*args)) or found[-1])
    B, Hq, Hk, T, S, Dv = 1, 2, 1, 1500, 1500, 40
    p, s = np.arange(T)[:, None], np.arange(S)
    mask = ((np.abs(p - s) <= 3) & (p // 128 == s // 128) | (s < 20) | (p < 70))[None]
    lists = build(mask, 0, 128, 128)
    lists.extras.update(offsets=lists.offsets, by_key_offsets=lists.by_key_offsets)
    q, k, v, dout = (normal(rng, (B, heads, n, width), numpy_dtype("bfloat16")) for heads, n, width in ((Hq, T, D), (Hk, S, D), (Hk, S, Dv), (Hq, T, Dv)))
    lengths = np.array([1401], np.int32) if ends else None
    count = np.broadcast_to(mask, (B, Hq, T, S)) & (np.arange(S) < (lengths[0] if ends else S))
    how = dict(scale=D ** -0.5)
    out, lse = oracle.attention(q, k, v, count, **how)
    truths, measures = oracle.attention_gradients(q, k, v, count, dout, **how), plain.attention_gradients(q, k, v, count, dout, **how)
    args = (q, k, v, lists, lse.astype(np.float32), (out * dout.astype(float)).sum(-1).astype(np.float32), dout)
    twice = [Kernels(on).run("block_attention_backward", *args, dims=dict(B=B, Hq=Hq, Hk=Hk, T=T, S=S, D=D, Dv=Dv), dtype="bfloat16", config=BACKWARD["triton-gluon"], by=BACKWARD_ENTRIES["triton-gluon"],
                             scale=D ** -0.5, kv_length=lengths, q_start=0, features=["interval", "bitmap", "lse"] + ["kv_length"] * ends) for _ in range(2)]
    assert len(found) == 4 and min(found) > 1, f"sections of queries and of keys: {found}"
    for name, got, again, truth, measure in zip(("dq", "dk", "dv"), *twice, truths, measures):
        assert_close(name, got, truth, measure, reduction=S + T * Hq // Hk + D)
        assert np.array_equal(got.view(np.uint16), again.view(np.uint16)), name
