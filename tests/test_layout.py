"""Layouts: what the lists show is what the pattern shows; parts, orders, lists by key; layouts made on a device; time and memory at a million tokens."""
import time
import tracemalloc

import numpy as np
import pytest
from drivers import EVERY
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import to_numpy
from pattern_cases import fine, rules, sizes

from sparsetile.ops import device_lists, dispatch
from sparsetile.ops.layout import Layout, decode
from sparsetile.ops.lowering import lower
from sparsetile.ops.patterns import Blocks, Causal, Dilated, Documents, Fixed, Full, Global, PerHead, RandomBlocks, Sink, Strided, Window

quick = settings(max_examples=60, deadline=None)
shapes = st.tuples(st.sampled_from([32, 48, 64, 128]), st.sampled_from([32, 64, 128]))


def painted(part, T, S, q_start):
    """int [L, T, S]: how often each pair is shown, block by block from contract.Lists' own words; independent of ops/layout.py's decoder."""
    L = part.list_of.max(initial=0) + 1
    out = np.zeros((L, T, S), int)
    column = np.arange(part.block_k)
    for l in range(L):
        for i in range(part.nq):
            x = l * part.nq + i
            for e in range(part.offsets[2 * x], part.offsets[2 * x + 2]):
                kind, j = int(part.kinds[e]), int(part.cols[e])
                assert (kind == -1) == (e < part.offsets[2 * x + 1])
                for r in range(part.block_q):
                    p = (part.first + i) * part.block_q + r if part.q_order is None else int(part.q_order[i * part.block_q + r])
                    t = p - q_start
                    if not 0 <= t < T or (part.q_order is not None and p < 0):
                        continue
                    if kind == -1:
                        seen = column
                    elif kind % 2 == 0:
                        seen = column[part.intervals[kind // 2, r, 0]:part.intervals[kind // 2, r, 1]]
                    else:
                        seen = column[[part.bitmaps[kind // 2, r, c // 32] >> (c % 32) & 1 == 1 for c in column]]
                    keys = seen + j * part.block_k if part.k_order is None else part.k_order[seen + j * part.block_k]
                    out[l, t, keys[(keys >= 0) & (keys < S)]] += 1
    return out


def well_formed(part):
    """The rules of contract.Lists that a picture does not show."""
    L = (len(part.offsets) - 1) // (2 * part.nq) if part.nq else 1
    assert part.offsets[0] == 0 and (np.diff(part.offsets) >= 0).all() and len(part.cols) > part.offsets[-1] and len(part.kinds) > part.offsets[-1]
    assert all(array.dtype == np.int32 for array in (part.offsets, part.cols, part.kinds, part.by_key_offsets, part.by_key_rows, part.by_key_kinds, part.intervals, part.bitmaps, part.list_of))
    by_row = {(l, i, int(part.cols[e]), int(part.kinds[e])) for l in range(L) for i in range(part.nq) for e in range(*part.offsets[2 * (l * part.nq + i)::2][:2])}
    by_key = set()
    for l in range(L):
        for j in range(part.nk):
            x = 2 * (l * part.nk + j)
            for half in (0, 1):
                a, b = part.by_key_offsets[x + half:x + half + 2]
                assert (np.diff(part.by_key_rows[a:b]) > 0).all() and ((part.by_key_kinds[a:b] >= 0) == bool(half)).all()
                by_key |= {(l, int(part.by_key_rows[e]), j, int(part.by_key_kinds[e])) for e in range(a, b)}
            assert part.by_key_offsets[x + 2] - part.by_key_offsets[x] <= part.longest
    assert by_row == by_key and len(by_row) == part.offsets[-1] == part.by_key_offsets[-1]
    assert all(part.offsets[2 * x + 2] - part.offsets[2 * x] <= part.longest for x in range(L * part.nq))
    for order, n in ((part.q_order, part.nq * part.block_q), (part.k_order, part.nk * part.block_k)):
        if order is not None:
            assert len(order) == n and part.first == 0 and order.dtype == np.int32


def check(rule, size, shape):
    T, S, q_start = size
    start = S - T if q_start is None else q_start
    parts, mask = lower(rule, start, start + T, S, *shape), rule.mask(*size)
    for part in parts:
        well_formed(part)
        if part.q_order is not None:
            assert np.array_equal(np.sort(part.q_order[part.q_order >= 0]), np.arange(start, start + T))
    assert np.array_equal(sum(decode(part, T, S, start)[0].astype(int) for part in parts), mask)
    return parts


# ------------------------------------------------------------------------------------------------ patterns
@settings(max_examples=200, deadline=None)
@given(rules, sizes, shapes)
def test_lists_show_the_pattern(rule, size, shape):
    check(rule, size, shape)


@settings(max_examples=100, deadline=None)
@given(fine, st.tuples(st.sampled_from([1, 100, 300]), st.sampled_from([100, 300, 400]), st.sampled_from([None, 0, 60])), shapes)
def test_permuted_parts_show_the_pattern_once(rule, size, shape):
    check(rule, size, shape)


@pytest.mark.parametrize("rule", [Causal(), Causal() & (Window(20) | Strided(7)), Window(9, 9) | Global([3, 70]), Documents([40, 0, 70]) & Causal(), Blocks(np.eye(3, dtype=bool), 30, 40)], ids=str)
@pytest.mark.parametrize("size", [(100, 100, None), (90, 130, None), (40, 33, None)], ids=str)
def test_both_decoders_agree(rule, size):
    T, S, start = size[0], size[1], size[1] - size[0]
    for part in lower(rule, start, start + T, S, 32, 32):
        assert np.array_equal(painted(part, T, S, start), decode(part, T, S, start).astype(int))


@pytest.mark.parametrize("rule", [Causal(), Window(30) | Sink(4), Causal() & Fixed(32, 4), Documents([70, 90]) & Causal(), Dilated(60, 0, 3)], ids=str)
def test_one_query_at_every_offset(rule):
    whole = rule.mask(150, 150)
    for p in range(0, 150, 7):
        parts = lower(rule, p, p + 1, 150, 64, 64)
        assert np.array_equal(sum(decode(part, 1, 150, p)[0].astype(int) for part in parts)[0], whole[p])


def test_a_part_of_the_rows_and_a_growing_cache():
    rule = Window(50) | Sink(3)
    for capacity in (128, 256):  # lists made for more keys serve fewer: the kernel clips
        part, = lower(rule, 0, capacity, capacity, 64, 64)
        assert np.array_equal(decode(part, 20, 100, 80)[0], rule.mask(20, 100))


def test_heads_share_axes_and_tables():
    rule = PerHead([Causal(), Window(3), Causal(), Strided(5)])
    part, = lower(rule, 0, 70, 70, 32, 32, 8)
    assert part.list_of.tolist() == [[0, 0, 1, 1, 0, 0, 2, 2]]
    well_formed(part)
    layout = rule.layout(70, 90, 32, 32)
    assert np.array_equal(layout.mask(), rule.mask(70, 90))
    masks = np.random.default_rng(0).random((2, 3, 3)) < 0.5
    assert np.array_equal(Blocks(masks, 20, 30).layout(60, 90, 32, 32).mask(), Blocks(masks, 20, 30).mask(60, 90))
    with pytest.raises(ValueError, match="4 heads"):
        lower(rule, 0, 4, 4, 32, 32, 6)


def test_what_is_full_and_what_is_an_interval():
    part, = lower(Full(), 0, 100, 100, 64, 64)
    assert (part.kinds[:part.offsets[-1]] == -1).all() and not part.has_intervals and not part.has_bitmaps
    part, = lower(Causal(), 0, 1024, 1024, 128, 128)
    assert part.intervals.shape[0] == 1 and not part.has_bitmaps and part.offsets[-1] == 36  # one picture for the whole diagonal
    part, = lower(Window(1023), 0, 8192, 8192, 128, 128)
    assert part.intervals.shape[0] == 2 and part.longest == 9
    part, = lower(Causal() & Strided(2), 0, 64, 64, 64, 64)
    assert part.has_bitmaps and not part.has_intervals
    assert lower(~Full(), 0, 100, 100, 64, 64)[0].offsets[-1] == 0


@pytest.mark.parametrize("rule", [Causal() & (Window(127) | Strided(128)), Causal() & Fixed(128, 8), Causal() & (Window(99) | Strided(100)), Dilated(1024, 1024, 4), Strided(3),
                                  Window(64, 64) | Global(range(0, 4096, 100))], ids=str)
def test_fine_patterns_keep_about_as_many_blocks_as_their_pairs_fill(rule):
    N = 4096 * 4
    parts = lower(rule, 0, N, N, 128, 128)
    kept = sum(int(part.offsets[-1]) for part in parts)
    assert any(part.q_order is not None for part in parts) and kept <= 1.35 * rule.pairs(N, N) / 128 ** 2 + 3 * N / 128


def test_plain_order_where_it_is_as_good():
    for rule in (Causal() & Strided(1), Window(3) | Global(range(64)), Causal() & Fixed(128, 128), Strided(7) | Full(), Window(300, 300) & Dilated(2, 2, 2)):
        parts = lower(rule, 0, 1000, 1000, 128, 128)
        assert len(parts) == 1 and parts[0].q_order is None


# ------------------------------------------------------------------------------------------------ a million tokens
@pytest.mark.parametrize("causal", [False, True])
def test_a_million_tokens_in_a_second_and_100_megabytes(causal):
    N = 2 ** 20
    rule = Window(1023) | Sink(4) | Global(range(64))
    rule = rule & Causal() if causal else rule
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        part, = lower(rule, 0, N, N, 128, 128)
        best = min(best, time.perf_counter() - start)
    tracemalloc.start()
    lower(rule, 0, N, N, 128, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert best < 1.0 and peak < 100e6, f"{best:.3f} s, {peak / 1e6:.0f} MB"
    rows = 8192
    assert part.offsets[-1] == 9 * rows - 36 + (rows - 9) + (0 if causal else rows - 1)  # the window's blocks, the first block, the global rows


def test_new_documents_are_lowered_quickly():
    rng, times = np.random.default_rng(0), []
    for _ in range(8):
        lengths = []
        while sum(lengths) < 32768:
            lengths.append(int(rng.integers(1024, 16384)))
        lengths[-1] -= sum(lengths) - 32768
        rule = Documents(lengths) & Causal()
        start = time.perf_counter()
        lower(rule, 0, 32768, 32768, 128, 128)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.010, times  # the goal of 2 ms is measured in bench/; this only keeps it from being lost on a busy machine


@quick
@given(st.lists(st.sampled_from([0, 1, 5, 33, 64, 100, 150]), max_size=6), st.lists(st.sampled_from([Causal(), Window(30), Window(5, 9), Window(None, 40), Window(60, None), Sink(70), Documents([50, 80, 70])]), max_size=2),
       sizes, shapes)
def test_packed_sequences_the_short_way(lengths, others, size, shape):
    rule = Documents(lengths)
    for other in others:
        rule = rule & other
    check(rule, size, shape)
    assert rule.pairs(*size) == rule.mask(*size).sum()


@pytest.mark.parametrize("lengths, window, block_q", [
    ([40, 400], Window(56), 32),       # in one block rows that begin 8 keys behind its first, all of them; in another the first of them, the next one a key later
    ([5, 26, 6, 63], Full(), 8),       # keys 5 .. 30 of a block, and 5 .. 31 of the next
    ([64, 64, 128], Causal(), 64),
])
def test_pictures_of_packed_sequences_are_told_apart(lengths, window, block_q):
    N = sum(lengths)
    part, = lower(Documents(lengths) & window, 0, N, N, block_q, 32)
    assert np.array_equal(decode(part, N, N, 0)[0], (Documents(lengths) & window).mask(N, N))
    assert len({picture.tobytes() for picture in part.intervals}) == len(part.intervals)
    empty = part.intervals[..., 0] >= part.intervals[..., 1]
    assert not part.intervals[empty].any()


# ------------------------------------------------------------------------------------------------ made where the data lies
def frameworks(array):
    yield array
    try:
        import torch
        yield torch.from_numpy(array)
    except ModuleNotFoundError:
        pass


def test_made_from_jax_arrays():  # one size each: JAX compiles every operator anew for every shape
    jnp = pytest.importorskip("jax.numpy")
    mask = np.random.default_rng(0).random((2, 3, 3)) < 0.5
    layout = Layout.from_block_mask(jnp.asarray(mask), 32, 32)
    assert np.array_equal(layout.mask(), np.repeat(np.repeat(mask, 32, 1), 32, 2)) and type(layout.parts[0].cols).__module__.startswith("jax")
    assert np.array_equal(Layout.from_documents(jnp.asarray([40, 0, 50]), 100, 32, 32, causal=True).mask(), (Documents([40, 0, 50]) & Causal()).mask(100, 100))
    assert np.array_equal(Layout.from_global_tokens(jnp.asarray([[3, -1, 70]]), 90, 90, 32, 32, window=9).mask(), (Window(9, 9) | Global([3, 70])).mask(90, 90))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2 ** 32 - 1), st.sampled_from([(), (3,), (2, 3), (2, 1)]), st.integers(0, 4), st.integers(0, 4), shapes)
def test_from_block_mask(seed, lead, nq, nk, shape):
    mask = np.random.default_rng(seed).random(lead + (nq, nk)) < 0.4
    want = np.repeat(np.repeat(mask, shape[0], -2), shape[1], -1)
    for given_ in frameworks(mask):
        layout = Layout.from_block_mask(given_, *shape)
        assert np.array_equal(layout.mask(), want) and type(layout.parts[0].cols) is type(given_) and (layout.T, layout.S) == (nq * shape[0], nk * shape[1])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 5, 32, 40, 64, 100]), max_size=6), st.sampled_from([0, 0, 13, -7]), st.booleans(), shapes)
def test_from_documents(lengths, more, causal, shape):
    total = max(0, sum(lengths) + more)
    rule = Documents(lengths) & Causal() if causal else Documents(lengths)
    want = rule.mask(total, total)
    for given_ in frameworks(np.asarray(lengths, np.int32)):
        assert np.array_equal(Layout.from_documents(given_, total, *shape, causal=causal).mask(), want)
    for given_ in frameworks(np.cumsum([0, *lengths]).astype(np.int32)):
        assert np.array_equal(Layout.from_documents(cu_seqlens=given_, total=total, block_q=shape[0], block_k=shape[1], causal=causal).mask(), want)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2 ** 32 - 1), st.integers(1, 3), st.integers(0, 6), st.sampled_from([1, 50, 64, 100, 200]), st.sampled_from([-20, 0, 0, 30]), st.sampled_from([None, 0, 7, (30, 5), (0, 64)]), st.booleans(), shapes)
def test_from_global_tokens(seed, B, n, S, more, window, causal, shape):
    T = max(0, S + more)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(-1, S + 3, (B, n)).astype(np.int32) if n < 6 else np.tile(np.arange(70, dtype=np.int32), (B, 1))
    want = []
    for row in tokens:
        rule = Global([int(x) for x in row if 0 <= x < S])
        if window is not None:
            rule = rule | (Window(*window) if isinstance(window, tuple) else Window(window, window))
        want.append((rule & Causal() if causal else rule).mask(T, S))
    for given_ in frameworks(tokens):
        got = Layout.from_global_tokens(given_, T, S, *shape, window=window, causal=causal).mask()
        assert np.array_equal(got[:, 0] if B > 1 else got[None], want)


def test_device_layouts_need_no_host_round_trip():
    """Under fake tensors there are no values, so anything that read one on the host would fail; shapes follow from shapes alone."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        made = [Layout.from_block_mask(torch.empty(2, 3, 8, 8, dtype=torch.bool), 64, 64), Layout.from_documents(torch.empty(9, dtype=torch.int32), 1000, causal=True),
                Layout.from_documents(cu_seqlens=torch.empty(9, dtype=torch.int32), total=1000), Layout.from_global_tokens(torch.empty(2, 5, dtype=torch.int32), 700, 900, window=(100, 100))]
    for layout in made:
        part, = layout.parts
        assert part.offsets.shape[0] == 2 * part.list_of.shape[0] * part.list_of.shape[1] * part.nq + 1 and part.cols.dtype == torch.int32


GRIDS = [(1, 1, 1), (2, 5, 7), (1, 33, 9), (2, 0, 4), (2, 3, 0)]


def grid_of(rng, shape):
    """Kinds: -2 absent, -1 full, else a row of a table; some rows and columns without a block, one row full of them."""
    grid = np.where(rng.random(shape) < 0.4, -2, rng.integers(-1, 6, shape)).astype(np.int32)
    if grid.size:
        grid[0, 0], grid[:, :, -1], grid[-1, -1] = -2, -2, -1
    return grid


def assert_same_lists(got, want):
    """As far as the offsets speak of entries."""
    for offsets, *entries in (("offsets", "cols", "kinds"), ("by_key_offsets", "by_key_rows", "by_key_kinds")):
        found, right = (to_numpy(x[offsets]) for x in (got, want))
        assert np.array_equal(found, right) and found.dtype == np.int32
        for name in entries:
            assert np.array_equal(to_numpy(got[name])[:right[-1]], to_numpy(want[name])[:right[-1]]) and got[name].shape == want[name].shape, name


@pytest.mark.parametrize("backend", [one for one in EVERY if one.id != "numba"])  # which has no such kernel
@pytest.mark.parametrize("shape", GRIDS, ids=str)
def test_lists_by_a_kernel_are_those_of_the_operators(on, backend, shape, rng, monkeypatch):
    """Tensors' lists are made by the kernel `layout`, once a layout; NumPy's by operators."""
    pytest.importorskip("torch")
    monkeypatch.setenv("SPARSETILE_BACKEND", backend)
    kernel, ran = dispatch.kernel(backend, "layout"), []
    right = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *args, **rest: ran.append(args) or right(*args, **rest))
    grid = grid_of(rng, shape)
    got, want = (vars(device_lists.lists(x, 32, 64, (shape[0], 1))) for x in (on.tensor(grid), grid))
    assert len(ran) == 1 and type(got["cols"]).__module__ == "torch"
    assert_same_lists(got, want)


@pytest.mark.gpu
def test_made_inside_a_cuda_graph():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    on = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")  # noqa: E731
    lengths, tokens, mask = on([300, 0, 500, 200]), on([[3, 70, -1], [1023, 3, 3]]), on(np.random.default_rng(0).random((2, 3, 8, 8)) < 0.5) > 0
    make = lambda: [Layout.from_documents(lengths, 1024, causal=True), Layout.from_global_tokens(tokens, 1024, 1024, window=100), Layout.from_block_mask(mask)]  # noqa: E731
    make()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layouts = make()
    for new in (([300, 0, 500, 200], [[3, 70, -1], [1023, 3, 3]]), ([10, 900, 0, 20], [[-1, -1, -1], [0, 1, 2]])):
        lengths.copy_(on(new[0]))
        tokens.copy_(on(new[1]))
        mask.copy_(~mask)
        graph.replay()
        torch.cuda.synchronize()
        assert np.array_equal(layouts[0].mask(), (Documents(new[0]) & Causal()).mask(1024, 1024))
        for b in range(2):
            assert np.array_equal(layouts[1].mask()[b, 0], (Window(100, 100) | Global([t for t in new[1][b] if t >= 0])).mask(1024, 1024))
        assert np.array_equal(layouts[2].mask(), np.repeat(np.repeat(mask.cpu().numpy(), 128, -2), 128, -1))


@pytest.mark.gpu
def test_made_from_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device")
    assert np.array_equal(Layout.from_documents(cupy.asarray([300, 0, 500], dtype=cupy.int32), 1000).mask(), Documents([300, 0, 500]).mask(1000, 1000))
    assert np.array_equal(Layout.from_global_tokens(cupy.asarray([[3, 70, -1]], dtype=cupy.int32), 500, 500, window=9).mask(), (Window(9, 9) | Global([3, 70])).mask(500, 500))
    rule = Causal() & (Window(9) | Global([3])) | Documents([30, 40])
    assert np.array_equal(cupy.asnumpy(rule.visible(cupy.arange(90)[:, None], cupy.arange(90), 90)), rule.mask(90, 90))


def test_random_blocks_and_bigbird_lower_alike_in_any_tiling():
    rule = Window(1, 1, block=48) | Global(range(48)) | RandomBlocks(2, 48, 3, exclude=[Window(1, 1, block=48) | Global(range(48))])
    for shape in ((32, 32), (48, 32), (128, 64), (96, 96)):
        check(rule, (500, 500, None), shape)


BAD = [
    (lambda: Layout.from_block_mask(np.ones(3, bool)), "mask", "[nq,nk]"), (lambda: Layout.from_block_mask(np.ones((2, 2), bool), 64, 48), "block_k", "32"),
    (lambda: Layout.from_block_mask(np.ones((2, 2), bool), 64, 64, T=300), "T", "mask's last row"), (lambda: Layout.from_documents(), "cu_seqlens", "neither"),
    (lambda: Layout.from_documents([3], cu_seqlens=[0, 3]), "cu_seqlens", "both"), (lambda: Layout.from_documents([-1]), "lengths", "tokens of each"), (lambda: Layout.from_documents([3], -1), "total", ">= 0"),
    (lambda: Layout.from_global_tokens(np.zeros(3, np.int32), 4, 4), "tokens", "[B, n]"), (lambda: Layout.from_global_tokens(np.zeros((1, 3), np.int32), 4, 4, window=(1, 2, 3)), "window", "(left, right)"),
    (lambda: Layout.from_global_tokens(np.zeros((1, 3), np.int32), 4, 4, window=-1), "window", ">= 0"), (lambda: Layout.from_block_mask(np.ones((2, 3, 2, 2), bool)).check(3, 3), "B = 3", "as many"),
    (lambda: Layout.from_block_mask(np.ones((3, 2, 2), bool)).check(1, 4), "Hq = 4", "as many"), (lambda: lower(Causal(), 5, 4, 3), "first_pos", "<="), (lambda: lower(Causal(), 0, 4, 3, 128, 16), "block_k", "multiple of 32"),
]


@pytest.mark.parametrize("call, argument, remedy", BAD, ids=range(len(BAD)))
def test_bad_arguments_are_named_with_a_remedy(call, argument, remedy):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert argument in str(caught.value) and remedy in str(caught.value)


def test_the_decoder_sees_broken_lists():
    from dataclasses import replace
    part, = lower(Causal(), 0, 300, 300, 64, 64)
    assert decode(part, 300, 300, 0).any()
    twice = replace(part, cols=np.where(part.cols == 1, 0, part.cols))
    flipped = replace(part, kinds=-1 - part.kinds)
    for wrong in (twice, flipped):
        with pytest.raises(ValueError):
            decode(wrong, 300, 300, 0)


@pytest.mark.parametrize("rule, most", [(Window(40, 40) | Global(range(3)), (1, 1)), (Causal(), (0, 0)), (Window(40, 40), (0, 0))], ids=str)
def test_lines_that_are_far_longer_than_the_mean(rule, most):
    """Of rows and of keys, against the blocks of the dense mask; keys past the last one there is are left out of the mean where so many lines are taken; nothing of lists that the host does not know."""
    part = lower(rule, 0, 1000, 1600, 32, 64)[0]
    assert part.far_longer("offsets") == (0, 0)
    for name in ("offsets", "by_key_offsets"):
        part.extras[name] = getattr(part, name)
    mask = np.zeros((32 * part.nq, 64 * part.nk), bool)
    mask[:1000, :1600] = rule.visible(np.arange(1000)[:, None], np.arange(1600), 1600)
    kept = mask.reshape(part.nq, 32, part.nk, 64).any((1, 3))
    for name, length in (("offsets", kept.sum(1)), ("by_key_offsets", kept.sum(0))):
        for taken in (None, 16):
            line = length[:taken]
            assert part.far_longer(name, taken) == part.far_longer(name, taken) == ((line > 4 * line.mean()).sum(), line.max())
    assert (part.far_longer("offsets")[0], part.far_longer("by_key_offsets")[0]) == most
