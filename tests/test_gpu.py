"""What only a real chip shows, on both GPU backends: CUDA graphs, the caller's stream, other frameworks' arrays, a second device, compiled calls, long rows, many runs."""
import importlib
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from drivers import through
from numeric import assert_close, assert_same_bits, plain, to_numpy
from without_torch import answers

import sparsetile as st

torch = pytest.importorskip("torch")

from sparsetile.backends import tape  # noqa: E402
from sparsetile.ci import misled  # noqa: E402
from sparsetile.ops import dispatch, ready  # noqa: E402

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the memory that the other processes of this suite use
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
both = pytest.mark.parametrize("backend", ["triton", "cupy"])


def hoppers(name):
    """On Hopper what stands inside takes the function that is named (drivers.through); other chips have their own paths."""
    dispatch.clear_plans()  # a plan repeats launches without it
    return through(name) if torch.cuda.get_device_capability() == (9, 0) else nullcontext()


class Make:
    """Inputs of one kind, again and again, on one device."""

    def __init__(self, rng, device=0):
        self.generator, self.device = torch.Generator(f"cuda:{device}").manual_seed(int(rng.integers(2 ** 31))), f"cuda:{device}"

    def normal(self, *shape, dtype=torch.bfloat16, gradient=False):
        return lambda: torch.randn(shape, generator=self.generator, device=self.device).to(dtype).requires_grad_(gradient)

    def integers(self, low, high, *shape):
        return lambda: torch.randint(low, high, shape, generator=self.generator, device=self.device).to(torch.int32)


def cases(make):
    """name -> (makers of the inputs, call(backend, *inputs) -> tensors)"""
    def qkv(T=50, S=90, D=64, **how):
        return [make.normal(2, 4, T, D, **how), make.normal(2, 2, S, D, **how), make.normal(2, 2, S, D, **how)]
    window, fine = st.Window(40) | st.Sink(3), st.Causal() & (st.Window(8) | st.Strided(8))
    attend = lambda backend, q, k, v, rule, **how: st.sparse_attention(q, k, v, rule, return_lse=True, backend=backend, **how)  # noqa: E731

    def gradients(backend, rule, *x, **how):
        out, lse = attend(backend, *x[:3], rule, **how)
        return (out, lse, *torch.autograd.grad([out, lse], x[:3], [x[3], x[4]]))
    cotangents, many = ([make.normal(2, 4, T, 64), make.normal(2, 4, T, dtype=torch.float32)] for T in (50, 2300))
    entries = make.integers(-2, 95, 2, 1, 50, 17)
    indexer = [make.normal(2, 8, 50, 64), make.normal(2, 400, 64), make.normal(2, 8, 50, dtype=torch.float32)]
    latent = [make.normal(2, 90, 128), make.normal(4, 128, 64), make.normal(4, 128, 64), make.normal(2, 90, 32)]
    heads = [make.normal(2, 4, 50, 64), make.normal(2, 4, 50, 32)]
    index = dict(zip(("index_q", "index_k", "index_weights"), (make.normal(2, 8, 50, 64), make.normal(2, 90, 64), make.normal(2, 8, 50, dtype=torch.float32))))
    eight = lambda x: x.to(torch.float8_e4m3fn)  # noqa: E731
    chosen = lambda s: (s.indices, s.lengths)  # noqa: E731
    paged_indexer = lambda b, q, keys, w: (st.indexer_scores(q, keys, w, backend=b), *(x for k in (40, 900) for x in chosen(st.indexer_topk(q, keys, w, k, backend=b))))  # noqa: E731
    absorbed = lambda mode: lambda b, qn, qr, c, uk, uv, r: [st.latent_attention(qn, qr, c, r, uk, uv, st.Causal(), mode=mode, backend=b)]  # noqa: E731
    return {
        "window": (qkv(), lambda b, q, k, v: attend(b, q, k, v, window)),
        "strided": (qkv(), lambda b, q, k, v: attend(b, q, k, v, fine)),
        "lengths": ([*qkv(T=1), make.integers(0, 91, 2)], lambda b, q, k, v, n: attend(b, q, k, v, window, kv_length=n)),
        "positions": ([*qkv(T=5), make.integers(0, 85, 2)], lambda b, q, k, v, p: attend(b, q, k, v, window, q_start=p)),
        "decode": ([make.normal(3, 8, 4, 128), make.normal(3, 2, 3000, 128), make.normal(3, 2, 3000, 128), make.integers(0, 3001, 3)],
                   lambda b, q, k, v, n: attend(b, q, k, v, st.Window(700) | st.Sink(4), kv_length=n)),
        "latent-decode": ([make.normal(3, 70, 2, 576), make.normal(3, 1, 1500, 576), make.integers(0, 1501, 3)],
                          lambda b, q, k, n: attend(b, q, k, None, st.Causal(), value_width=512, kv_length=n)),
        "selection": ([*qkv(), entries], lambda b, q, k, v, i: attend(b, q, k, v, st.Selection(i))),
        # enough queries for the path on which neighbours share blocks
        "blocks": ([*qkv(1100, 1200), make.integers(-2, 40, 2, 2, 1100, 7)], lambda b, q, k, v, i: attend(b, q, k, v, st.Selection(i, 32, causal=True))),
        "window-gradients": ([*qkv(gradient=True), *cotangents], lambda b, *x: gradients(b, window, *x)),
        "strided-gradients": ([*qkv(gradient=True), *cotangents], lambda b, *x: gradients(b, fine, *x)),
        # more than 64 queries, and a key block that far more rows see than others: Hopper's own backward
        "sinks-gradients": ([*qkv(2300, 4096, gradient=True), *many, make.integers(0, 4097, 2)], lambda b, *x: gradients(b, window, *x[:5], kv_length=x[5])),
        "selection-gradients": ([*qkv(gradient=True), *cotangents, entries], lambda b, *x: gradients(b, st.Selection(x[5]), *x)),
        "pages": ([make.normal(3, 8, 4, 128), make.normal(40, 16, 2, 128), make.normal(40, 16, 2, 128), make.integers(-2, 42, 3, 190), make.integers(0, 3041, 3)],
                  lambda b, q, k, v, table, n: attend(b, q, st.PagedKV(k, v, table, n), None, st.Window(700) | st.Sink(4))),
        "pages-prefill": ([make.normal(2, 4, 70, 64), make.normal(40, 48, 2, 64), make.normal(40, 48, 2, 64), make.integers(-2, 42, 2, 9), make.integers(0, 433, 2)],
                          lambda b, q, k, v, table, n: attend(b, q, st.PagedKV(k, v, table, n), None, st.Causal())),
        "pages-of-latents": ([make.normal(3, 20, 2, 576), make.normal(50, 32, 576), make.integers(-2, 52, 3, 47), make.integers(0, 1505, 3)],
                             lambda b, q, c, table, n: attend(b, q, st.PagedLatent(c, table, n, rank=512, rotary=64), None, st.Causal())),
        # bytes that make small finite numbers of float8, float32 and bfloat16 alike
        "float8-latents": ([make.normal(3, 20, 2, 576), make.integers(0, 63, 50, 32, 656), make.integers(-2, 52, 3, 47), make.integers(0, 1505, 3)],
                           lambda b, q, c, table, n: attend(b, q, st.PagedLatent(c.to(torch.uint8), table, n, rank=512, rotary=64), None, st.Causal())),
        "float8-latents-selection": ([make.normal(3, 20, 2, 576), make.integers(0, 63, 50, 32, 656), make.integers(-2, 52, 3, 47), make.integers(0, 1505, 3), make.integers(-2, 1510, 3, 1, 2, 300)],
                                     lambda b, q, c, table, n, i: attend(b, q, st.PagedLatent(c.to(torch.uint8), table, n, rank=512, rotary=64), None, st.Selection(i))),
        "quantised": ([*qkv(140, 300), make.normal(2, 2, 3, dtype=torch.float32), make.normal(2, 2, 3, dtype=torch.float32)], lambda b, q, k, v, a, c: attend(b, q, *map(eight, (k, v)), window, k_scale=a, v_scale=c)),
        "quantised-decode": ([make.normal(3, 8, 4, 128), make.normal(3, 2, 3000, 128), make.normal(3, 2, 3000, 128), make.normal(3, 8, 4, dtype=torch.float32), make.integers(0, 3001, 3)],
                             lambda b, q, k, v, a, n: attend(b, *map(eight, (q, k, v)), st.Window(700) | st.Sink(4), q_scale=a, kv_length=n)),
        "pages-of-indexer-keys": ([make.normal(2, 64, 3, 128), make.integers(0, 63, 30, 64 * 132), make.normal(2, 64, 3, dtype=torch.float32), make.integers(-2, 32, 2, 15), make.integers(0, 961, 2)],
                                  lambda b, q, k, w, table, n: paged_indexer(b, q.to(torch.float8_e4m3fn), st.IndexerKeys(k.to(torch.uint8), table, n), w)),
        "pages-of-two-levels": (indexer, lambda b, *x: chosen(st.dsa_two_level_selection(*x, top_k=33, block=8, blocks=6, backend=b))),
        "indexer-scores": (indexer, lambda b, q, k, w: [st.indexer_scores(q, k, w, backend=b)]),
        "indexer-topk": (indexer, lambda b, q, k, w: chosen(st.indexer_topk(q, k, w, 33, backend=b))),
        "indexer-blocks": (indexer, lambda b, q, k, w: chosen(st.indexer_topk(q, k, w, 5, pool=16, force_first=1, force_last=1, backend=b))),
        "topk": ([make.normal(2, 9, 5000, dtype=torch.float32)], lambda b, s: chosen(st.topk(s, 100, backend=b))),
        "decompress": (latent, lambda b, c, uk, uv, r: st.latent_decompress(c, uk, uv, k_rope=r, backend=b)),
        "absorbed": ([*heads, *latent], absorbed("absorbed")),
        "decompressed": ([*heads, *latent], absorbed("decompressed")),
        "dsa": ([*qkv(), *index.values()], lambda b, q, k, v, *i: st.dsa_attention(q, k, v, **dict(zip(index, i)), top_k=20, return_lse=True, backend=b)),
        "dsa-dense": ([*qkv(), *index.values()], lambda b, q, k, v, *i: [st.dsa_attention(q, k, v, **dict(zip(index, i)), top_k=90, backend=b)]),
        "dsa-lengths": ([*qkv(), *index.values(), make.integers(0, 91, 2)],
                        lambda b, q, k, v, *i: st.dsa_attention(q, k, v, **dict(zip(index, i)), top_k=20, kv_length=i[3], return_lse=True, backend=b)),
        "dsa-latent": ([*heads, *latent, *index.values()], lambda b, qn, qr, c, uk, uv, r, *i: [st.dsa_latent_attention(qn, qr, c, r, uk, uv, **dict(zip(index, i)), top_k=20, backend=b)]),
        "merge": ([make.normal(2, 4, 50, 64) for _ in range(2)] + [make.normal(2, 4, 50, dtype=torch.float32) for _ in range(2)],
                  lambda b, o, p, e, f: st.merge_attention([o, p], [e, f], backend=b)),
    }


NAMES = list(cases(type("Names", (), {"normal": lambda self, *a, **k: None, "integers": lambda self, *a: None})()))
every_case = pytest.mark.parametrize("name", NAMES)


def run(case, backend, inputs):
    try:
        return [x.detach() for x in case[1](backend, *inputs)]
    except st.Unsupported as refusal:
        pytest.skip(f"{backend}: {refusal}")


def refill(inputs, makers):
    with torch.no_grad():
        for x, make in zip(inputs, makers):
            x.copy_(make())


@both
@every_case
def test_a_graph_is_replayed_with_new_inputs(backend, name, rng):
    case = cases(Make(rng))[name]
    inputs = [make() for make in case[0]]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(case, backend, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, backend, inputs)
    for _ in range(3):
        refill(inputs, case[0])
        graph.replay()
        torch.cuda.synchronize()
        for n, (got, want) in enumerate(zip(captured, run(case, backend, inputs))):
            assert_same_bits(f"result {n}", got, want)


PATHS = {"decode": dict(triton="triton.block_attention_decode.run", cupy="cupy.split.run"),
         "latent-decode": dict(triton="triton.block_attention_latent.launch", cupy="cupy.split.run_latent"),
         "blocks": dict(cupy="cupy.gather_union.run"),
         "quantised": dict(cupy="cupy.block_attention.run_hopper"),
         "sinks-gradients": dict(triton="triton.block_attention_backward_gluon.launch", cupy="cupy.two_pass.run")}


@pytest.mark.parametrize("name, backend", [(name, backend) for name, of in PATHS.items() for backend in of])
def test_cases_take_the_paths_that_they_are_for(name, backend, rng):
    case = cases(Make(rng))[name]
    inputs = [make() for make in case[0]]
    with hoppers(PATHS[name][backend]):
        run(case, backend, inputs)


@both
@every_case
def test_work_stands_on_the_callers_stream(backend, name, rng):
    case = cases(Make(rng))[name]
    inputs = [make() for make in case[0]]
    wanted, right = run(case, backend, inputs), [x.detach().clone() for x in inputs]
    refill(inputs, case[0])
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream reads the other inputs
        for x, y in zip(inputs, right):
            x.copy_(y)
        with torch.enable_grad():
            got = run(case, backend, inputs)
    side.synchronize()
    for n, (a, b) in enumerate(zip(got, wanted)):
        assert_same_bits(f"result {n}", a, b)


@both
@every_case
def test_twenty_runs_give_the_same_bits(backend, name, rng):
    case = cases(Make(rng))[name]
    inputs = [make() for make in case[0]]
    first = run(case, backend, inputs)
    for _ in range(19):
        for n, (a, b) in enumerate(zip(run(case, backend, inputs), first)):
            assert_same_bits(f"result {n}", a, b)


@both
@every_case
def test_on_the_second_device_while_the_first_is_current(backend, name, rng):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    case = cases(Make(rng, 1))[name]
    inputs = [make() for make in case[0]]
    got = run(case, backend, inputs)
    with torch.cuda.device(1):
        for n, (a, b) in enumerate(zip(got, run(case, backend, inputs))):
            assert a.device == inputs[0].device
            assert_same_bits(f"result {n}", a, b)


@both
@every_case
def test_on_a_thread_that_is_new(backend, name, rng):
    """What the allocator hands out a second time asks nothing of the runtime, so nothing but us gives the new thread a context."""
    case = cases(Make(rng))[name]
    inputs = [make() for make in case[0]]
    first, found = run(case, backend, inputs), []
    del first
    first = run(case, backend, inputs)
    torch.cuda.synchronize()

    def there():
        try:
            found.extend(run(case, backend, inputs))
        except Exception as error:
            found.append(error)
    thread = threading.Thread(target=there)
    thread.start()
    thread.join()
    assert not found or not isinstance(found[-1], Exception), found[-1]
    for n, (a, b) in enumerate(zip(found, first, strict=True)):
        assert_same_bits(f"result {n}", a, b)


FORWARD = [name for name in NAMES if "gradients" not in name]
CACHED = [name for name in NAMES if name.startswith("pages") or name.startswith("float8")]  # JAX arrays are immutable, and a compiled call takes tensors: refused, as tests/test_caches.py and tests/test_dsa_two_level.py assert
BYTES = ("float8-latents", "float8-latents-selection", "pages-of-indexer-keys", "quantised", "quantised-decode")  # their cases make bytes and float8 in torch's words


def from_torch(x, to):
    return to.from_dlpack(x.detach().contiguous())


@both
@pytest.mark.parametrize("name", [name for name in FORWARD if name not in BYTES])
def test_cupy_arrays(backend, name, rng):
    cupy = pytest.importorskip("cupy")
    case = cases(Make(rng))[name]
    inputs = [x.half() if x.dtype == torch.bfloat16 else x for x in (make() for make in case[0])]  # CuPy has no bfloat16
    wanted = run(case, backend, inputs)
    torch.cuda.synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        got = case[1](backend, *(from_torch(x, cupy) for x in inputs))
    stream.synchronize()
    for n, (a, b) in enumerate(zip(got, wanted)):
        assert isinstance(a, cupy.ndarray)
        assert_same_bits(f"result {n}", cupy.asnumpy(a), b)


@both
@pytest.mark.parametrize("name", [name for name in FORWARD if name not in (*CACHED, *BYTES)])
def test_jax_arrays(backend, name, rng):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU")
    torch.cuda.set_device(0)  # JAX leaves the last device current that it looked at
    case = cases(Make(rng))[name]
    inputs = [make() for make in case[0]]
    wanted = run(case, backend, inputs)
    torch.cuda.synchronize()
    for n, (a, b) in enumerate(zip(case[1](backend, *(from_torch(x, jax.dlpack) for x in inputs)), wanted)):
        assert isinstance(a, jax.Array)
        assert_same_bits(f"result {n}", np.asarray(a), b)


@pytest.mark.parametrize("caller, of_caller", [("cupy", False), ("cupy", True), ("jax", False)])
def test_torch_works_on_the_stream_of_other_frameworks(caller, of_caller):
    """Also where that is the default stream, whose pointer is 0: results came back before they were written while torch had made a stream of its own there."""
    from sparsetile.backends import places
    cupy = pytest.importorskip("cupy")
    with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) if of_caller else cupy.cuda.Stream.null as stream:
        place = places.place_for("torch", caller, 0)
        with place.guard():
            assert torch.cuda.current_stream(0).cuda_stream == place.stream == stream.ptr
            assert torch.empty(1, device="cuda").device.index == 0


@pytest.mark.parametrize("caller", ["cupy", "jax"])
def test_results_for_other_frameworks_wait_for_the_default_stream(caller, rng):
    """Other work stands before ours on the default stream, and the caller reads at once."""
    cupy, jax = pytest.importorskip("cupy"), pytest.importorskip("jax")
    if caller == "jax" and jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU")
    torch.cuda.set_device(0)
    case = cases(Make(rng))["strided"]
    inputs = [make().half() for make in case[0]]
    wanted = run(case, "triton", inputs)
    torch.cuda.synchronize()
    given = [from_torch(x, cupy if caller == "cupy" else jax.dlpack) for x in inputs]
    for _ in range(2):  # the second call goes straight to compiled kernels
        torch.cuda._sleep(200_000_000)
        got = [np.asarray(x) if caller == "jax" else cupy.asnumpy(x) for x in case[1]("triton", *given)]
        for n, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert_same_bits(f"result {n}", a, b)


@both
@pytest.mark.parametrize("name", [name for name in NAMES if name not in CACHED])
def test_compiled_whole(backend, name, rng):
    torch.compiler.reset()
    case = cases(Make(rng))[name]
    inputs = [make() for make in case[0]]
    wanted = run(case, backend, inputs)
    if "gradients" in name:
        window, fine = st.Window(40) | st.Sink(3), st.Causal() & (st.Window(8) | st.Strided(8))
        rule = {"window": window, "sinks": window, "strided": fine}.get(name.partition("-")[0])
        attend = torch.compile(lambda q, k, v, i=None, n=None: st.sparse_attention(q, k, v, rule or st.Selection(i), kv_length=n, return_lse=True, backend=backend), fullgraph=True, backend="aot_eager")
        results = attend(*inputs[:3], *([None] if rule else []), *inputs[5:])
        got = [*results, *torch.autograd.grad(results, inputs[:3], inputs[3:5])]
    else:
        got = torch.compile(lambda *x: case[1](backend, *x), fullgraph=True, backend="aot_eager")(*inputs)
    for n, (a, b) in enumerate(zip(got, wanted)):
        assert_same_bits(f"result {n}", a, b)


@both
def test_more_queries_than_a_grid_has_rows(backend, rng):
    """T = 70000 against the limit of 65535 on two of a grid's three axes; a sample of the rows against float64."""
    make = Make(rng)
    T, D = 70000, 64
    q, k, v = (make.normal(1, h, T, D)() for h in (2, 1, 1))
    out = st.sparse_attention(q, k, v, st.Window(20), backend=backend)
    chosen = st.sparse_attention(q, k, v, st.Selection(torch.arange(T, device=q.device, dtype=torch.int32)[None, None, :, None] - torch.arange(21, device=q.device, dtype=torch.int32)), backend=backend)
    scores = st.topk(make.normal(1, T, 40, dtype=torch.float32)(), 3, backend=backend)
    assert (scores.lengths == 3).all()
    rows = torch.tensor([0, 5, 65535, 65536, T - 1], device=q.device)
    for got in (out, chosen):
        for t in rows.tolist():
            lo = max(0, t - 20)
            judge_row(got[0, :, t], q[0, :, t], k[0, 0, lo:t + 1], v[0, 0, lo:t + 1])


def judge_row(got, q, k, v):
    """One query of every head against a few keys: [H,D], [n,D], [n,Dv]."""
    import oracle
    from numeric import to_numpy
    q, k, v = (to_numpy(x) for x in (q[None, :, None], k[None, None], v[None, None]))
    count, how = np.ones((1, q.shape[1], 1, k.shape[2])), dict(scale=q.shape[-1] ** -0.5)
    assert_close("row", to_numpy(got)[None, :, None], oracle.attention(q, k, v, count, **how)[0], plain.attention(q, k, v, count, **how)[0], reduction=k.shape[2] + q.shape[-1])


@pytest.mark.parametrize("B, S", [(3, 1000), (66, 66000)])
def test_deepseeks_scores_are_the_same_alone_and_in_pages(B, S, rng):
    """The bits of a score depend neither on the queries beside it nor on where its key lies, and what is chosen without scores agrees with them (S 66000: in one kernel)."""
    make, pages = Make(rng), -(-S // 64)
    q, w = make.normal(B, 64, 2, 128)().to(torch.float8_e4m3fn), make.normal(B, 64, 2, dtype=torch.float32)()
    pool = torch.randint(0, 120, (B * pages, 64 * 132), dtype=torch.uint8, device="cuda", generator=make.generator)
    pool[:, 64 * 128:].view(torch.float32).uniform_(0.05, 0.15, generator=make.generator)
    table = torch.randperm(B * pages, device="cuda", generator=make.generator).view(B, pages).to(torch.int32)
    cache = st.IndexerKeys(pool, table, torch.full((B,), S, dtype=torch.int32, device="cuda"))
    k, scale = cache.gather()
    k, scale = k[:, :S].contiguous(), scale[:, :S].contiguous()
    one = torch.cat([st.indexer_scores(q[:, :, t:t + 1], k, w[:, :, t:t + 1], k_scale=scale, causal=False, backend="cupy") for t in range(2)], 1)
    assert torch.equal(one, st.indexer_scores(q, k, w, k_scale=scale, causal=False, backend="cupy"))
    assert torch.equal(one[:, 1:], st.indexer_scores(q[:, :, 1:], cache, w[:, :, 1:], backend="cupy")[:, :, :S])
    with hoppers("cupy.indexer_topk.run_fused") if S > 65536 else nullcontext():
        chosen = st.indexer_topk(q, k, w, 2048, k_scale=scale, causal=False, backend="cupy")
    known = st.topk(one, 2048, backend="cupy")
    assert torch.equal(chosen.indices, known.indices) and torch.equal(chosen.lengths, known.lengths)


@pytest.mark.parametrize("case", ["plain", "causal", "windows", "equal", "nan"])
def test_choice_without_scores_in_memory(case, rng):
    """Triton, rows so long that only what may be chosen is stored: the set and the order of topk of the scores, twice the same bits."""
    make, T, S = Make(rng), 300, 40_003
    q, k = (make.normal(1, *shape)().to(torch.float8_e4m3fn) for shape in ((64, T, 128), (S, 128)))
    w, scale, options = make.normal(1, 64, T, dtype=torch.float32)(), make.normal(1, S, dtype=torch.float32)().abs(), dict(causal=case == "causal")
    if case == "windows":
        options |= dict(key_start=make.integers(0, 9000, 1, T)(), key_end=make.integers(8000, S + 9, 1, T)())
    if case == "equal":
        k, scale = k[:, :1].expand(1, S, 128).contiguous(), torch.ones_like(scale)
    if case == "nan":
        scale[:, ::3] = float("nan")
    if case == "causal":
        options["q_start"] = S - T
    with through("triton.index_keep.launch"):
        chosen = [st.indexer_topk(q, k, w, 2048, k_scale=scale, backend="triton", **options) for _ in range(2)]
    known = st.topk(st.indexer_scores(q, k, w, k_scale=scale, backend="triton", **options), 2048, backend="triton")
    for x in chosen:
        assert torch.equal(x.indices, known.indices) and torch.equal(x.lengths, known.lengths)


@both
@pytest.mark.parametrize("few", [True, False], ids=["too few pass", "too many pass"])
@pytest.mark.parametrize("S, slope", [(32_768, 1), (70_001, 1), (70_001, -1), (70_001, 0)])
def test_bounds_that_fail(backend, S, few, slope, rng):
    """Scores made against what is looked at first: rows whose bound fails choose the set of topk of the scores."""
    make, T = Make(rng), 300
    q, k, w = make.normal(1, 64, T, 128)().to(torch.float8_e4m3fn), make.normal(1, S, 128)().to(torch.float8_e4m3fn), make.normal(1, 64, T, dtype=torch.float32)().abs()
    scale = torch.from_numpy(misled.factors(S, 2048, backend, dict(cupy=18, triton=64)[backend], few, slope)[None]).cuda()
    options = dict(k_scale=scale, causal=False, backend=backend)
    with through(dict(cupy="cupy.indexer_topk.run_fused", triton="triton.index_keep.launch")[backend]):
        chosen = st.indexer_topk(q, k, w, 2048, config=dict(path=dict(cupy="fused", triton="kept")[backend]), **options)
    known = st.topk(st.indexer_scores(q, k, w, **options), 2048, backend=backend)
    assert torch.equal(chosen.indices, known.indices) and torch.equal(chosen.lengths, known.lengths)


@both
@pytest.mark.slow
def test_offsets_past_two_to_the_31(backend, rng):
    """3.8 million keys of width 576: the last ones lie past 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 12 * 2 ** 30:
        pytest.skip("less than 12 GiB of GPU memory are free")
    make = Make(rng)
    S, D, Dv = 3_800_000, 576, 512
    k = torch.empty(1, 1, S, D, device="cuda", dtype=torch.bfloat16)
    for part in k[0, 0].split(2 ** 19):
        part.normal_(generator=make.generator)
    q = make.normal(1, 16, 2, D)()
    indices = torch.tensor([[0, 7, S // 2, S - 3, S - 1, S, 2 ** 31 - 1, -5], [S - 2, S - 1, -1, 5, 3, 1, 0, S]], dtype=torch.int32, device="cuda")
    chosen = st.sparse_attention(q, k, None, st.Selection(indices[None, None]), value_width=Dv, backend=backend)
    window = st.sparse_attention(q, k, None, st.Window(30), value_width=Dv, backend=backend)
    for t in range(2):
        keys = k[0, 0, indices[t][(indices[t] >= 0) & (indices[t] < S)].long()]
        judge_row(chosen[0, :, t], q[0, :, t], keys, keys[:, :Dv])
        keys = k[0, 0, S - 32 + t:S - 1 + t]
        judge_row(window[0, :, t], q[0, :, t], keys, keys[:, :Dv])


@pytest.mark.parametrize("path", ["cublas", "hopper"])
@pytest.mark.parametrize("B, T, is_turned", [(1, 300, False), (3, 1, True), (2, 70, False)])
def test_products_alone_and_in_a_graph(B, T, is_turned, path, rng):
    """The same call alone and recorded, where the portable path stands for cuBLAS."""
    from sparsetile.backends.cupy import grouped_matmul
    from sparsetile.ops import latent
    make = Make(rng)
    x, tail, w = make.normal(B, 4, T, 128)(), make.normal(B, 4, T, 64)(), make.normal(4, 128, 512)().transpose(1, 2) if is_turned else make.normal(4, 512, 128)()
    problem = latent.product_problem(x, w, tail, 0)
    config = {**grouped_matmul.default_config(problem), "path": path}
    if isinstance(refused := grouped_matmul.resources(problem, config), str):
        pytest.skip(refused)
    call = lambda: latent.matmul(x, w, tail, "cupy", "torch", 0, config)  # noqa: E731
    with through(dict(cublas="cupy.grouped_matmul.multiply", hopper="cupy.grouped_matmul_hopper.run")[path]):
        alone = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    held = [to_numpy(one) for one in (x, w, tail)]
    truth, formula = plain.grouped_matmul(*(one.astype(np.float64) for one in held[:2]), tail=held[2].astype(np.float64)), plain.grouped_matmul(*held[:2], tail=held[2])
    for name, got in (("alone", alone), ("captured", captured)):
        assert_close(name, to_numpy(got), truth, formula, reduction=128)
        assert torch.equal(got[..., 512:], tail)


def rows_of_every_kind(make, T, S):
    """scores [1,T,S]: normal, sorted both ways, many equal, rounded, close together, with NaN and -inf; some through windows. start, end [1,T]."""
    x = make.normal(1, T, S, dtype=torch.float32)()
    x[:, 1::8], x[:, 2::8], x[:, 3::8] = x[:, 1::8].sort(-1).values, x[:, 2::8].sort(-1, descending=True).values, (x[:, 3::8] - 1.8).relu()
    x[:, 4::8], x[:, 5::8], x[:, 6::8] = x[:, 4::8].round(), x[:, 5::8] * 1e-3 + 5, torch.where(x[:, 6::8] > 1.5, np.nan, torch.where(x[:, 6::8] < -1, -np.inf, x[:, 6::8]))
    t = torch.arange(T, device=x.device)
    return x, torch.where(t % 3 == 1, make.integers(0, S, 1, T)(), 0).int(), torch.where(t % 5 > 2, make.integers(0, S + 9, 1, T)(), S).int()


def assert_largest(got, x, start, end, k):
    """Exactly what a stable sort in float64 puts first."""
    T, S = x.shape[1:]
    at = torch.arange(S, device=x.device)
    given = torch.where((at >= start[..., None]) & (at < end[..., None]) & ~x.isnan(), x.double(), -np.inf)
    order = given.sort(dim=-1, descending=True, stable=True)
    chosen = torch.where(order.values[..., :k] > -np.inf, order.indices[..., :k], S).sort(-1).values
    assert torch.equal(got.indices.view(1, T, k).long(), torch.where(chosen < S, chosen, -1))
    assert torch.equal(got.lengths.view(1, T).long(), (chosen < S).sum(-1))


@both
@pytest.mark.parametrize("T, S, k", [(40, 131072, 2048), (600, 33003, 2048), (600, 16384, 100), (300, 20000, 3900)])
def test_the_largest_of_long_rows(backend, T, S, k, rng):
    x, start, end = rows_of_every_kind(Make(rng), T, S)
    assert_largest(st.topk(x, k, key_start=start, key_end=end, backend=backend), x, start, end, k)


@pytest.mark.parametrize("warps, programs", [(16, 1), (8, 2)])
@pytest.mark.parametrize("T, S, k", [(1, 2 ** 20, 1), (1, 2 ** 20, 2048), (1, 2 ** 20, 2 ** 20), (9, 2 ** 20 + 3, 5000), (300, 40001, 7), (300, 33003, 64), (64, 65536, 513),
                                     (40, 4099, 4099), (9, 700, 513), (3, 1, 1)])
def test_the_largest_by_gluon(T, S, k, warps, programs, rng):
    """Far from DeepSeek's 2048: one, fewer than a warp, more than a program's registers hold, whole rows; the path is named, since the default is another for some. CuPy's chooses the same."""
    x, start, end = rows_of_every_kind(Make(rng), T, S)
    config = dict(path="gluon", capacity=4096, sample=4096, select_warps=warps, programs=programs)
    where = dict(key_start=start, key_end=end)
    problem = st.explain("topk", x, k, **where).problem
    kernel = dispatch.kernel("triton", "topk")
    if isinstance(refused := kernel.resources(problem, {**kernel.default_config(problem), **config}), str):
        assert torch.cuda.get_device_capability() != (9, 0), refused
        pytest.skip(refused)
    with through("triton.topk_gluon.launch"):
        got = st.topk(x, k, **where, backend="triton", config=config)
    assert_largest(got, x, start, end, k)
    other = st.topk(x, k, **where, backend="cupy")
    assert torch.equal(got.indices, other.indices) and torch.equal(got.lengths, other.lengths)


@both
@pytest.mark.parametrize("kind, B, S, H, P, is_turned, windows", [("bfloat16", 1, 4096, 128, 64, False, 4), ("float16", 2, 700, 3, 16, True, 2), ("bfloat16", 1, 300, 2, 0, False, 1), ("bfloat16", 3, 1000, 5, 8, True, 8)])
def test_keys_and_values_of_deepseeks_latent(backend, kind, B, S, H, P, is_turned, windows, rng):
    """By Hopper's own instructions: ragged ends, several visits of a block of threads, weights either way round, latents and rotary part inside wider rows; a sample of the rows against float64."""
    import oracle
    make, dtype = Make(rng), getattr(torch, kind)
    latent, rope = make.normal(B, S, 640, dtype=dtype)()[..., :512], make.normal(B, S, 72, dtype=dtype)()[..., :P] if P else None
    w_uk, w_uv = (make.normal(H, 128, 512, dtype=dtype)().transpose(1, 2) if is_turned else make.normal(H, 512, 128, dtype=dtype)() for _ in range(2))
    problem = st.explain("latent_decompress", latent, w_uk, w_uv, k_rope=rope).problem
    config = {**dispatch.kernel(backend, "latent_decompress").default_config(problem), "windows": windows}
    with hoppers(dict(cupy="cupy.latent_decompress.run_hopper", triton="triton.latent_decompress_gluon.launch")[backend]):
        k, v = st.latent_decompress(latent, w_uk, w_uv, k_rope=rope, backend=backend, config=config)
    rows = torch.tensor([0, 1, 63, 64, 127, 128, S // 2, S - 2, S - 1], device="cuda")
    held = [to_numpy(x) for x in (latent[:, rows], w_uk, w_uv)]
    tail = None if rope is None else to_numpy(rope[:, rows])
    for name, got, true, one in zip("kv", (k, v), oracle.latent_decompress(*held, k_rope=tail), plain.latent_decompress(*held, k_rope=tail)):
        assert_close(name, to_numpy(got[:, :, rows]), true, one, reduction=512)
    if P:
        assert torch.equal(k[..., 128:], rope[:, None].expand(B, H, S, P))


@both
@pytest.mark.parametrize("T, mode", [(64, "absorbed"), (128, "absorbed"), (192, "decompressed")])
def test_auto_over_latents_in_pages_is_the_mode_named(backend, T, mode, rng):
    """512 tokens: a step that graphs record, and both sides of the cheaper mode (tests/test_deepseek_cache.py counts it)."""
    make = Make(rng)
    cache = st.PagedLatent.empty(make.normal(1)(), sequences=2, pages=20, page_size=64)
    cache.append(make.normal(2, 512, 512)(), make.normal(2, 512, 64)())
    given = make.normal(2, 4, T, 128)(), make.normal(2, 4, T, 64)(), cache, None, make.normal(4, 512, 128)(), make.normal(4, 512, 128)(), st.Causal()
    with through(dict(absorbed=f"{backend}.grouped_matmul.run", decompressed=f"{backend}.latent_decompress.run")[mode]):
        dispatch.clear_plans()
        got = st.latent_attention(*given, backend=backend)
    assert_same_bits(mode, got, st.latent_attention(*given, mode=mode, backend=backend))
    other = dict(absorbed="decompressed", decompressed="absorbed")[mode]
    assert not torch.equal(got, st.latent_attention(*given, mode=other, backend=backend))


@both
@pytest.mark.parametrize("Hq, D, Dv, granularity, K", [(32, 128, 128, 64, 12), (40, 64, 128, 32, 20), (6, 128, 64, 128, 5), (66, 96, 40, 16, 40)])
def test_blocks_that_neighbours_share(backend, Hq, D, Dv, granularity, K, rng):
    """Native Sparse Attention's shapes: long unions, repeats, entries of every garbage, queries without keys, a length inside a block, NaN behind it."""
    import oracle
    T, S, make = 1100, 1237, Make(rng)
    q, k, v = make.normal(1, Hq, T, D)(), make.normal(1, 2, S, D)(), make.normal(1, 2, S, Dv)()
    k[:, :, 1209:], v[:, :, 1209:] = np.nan, np.nan
    indices = rng.integers(-2, S // granularity + 3, (1, 2, T, K)).astype(np.int32)
    indices[..., 0], indices[:, :, 7::97] = 0, -5
    length = np.array([1209], np.int32)
    chosen = st.Selection(torch.from_numpy(indices).cuda(), granularity, causal=True)
    with hoppers("cupy.gather_union.run") if backend == "cupy" else nullcontext():
        out, lse = st.sparse_attention(q, k, v, chosen, kv_length=torch.from_numpy(length).cuda(), return_lse=True, backend=backend)
    count = oracle.selection_count(indices, S, Hq, granularity=granularity, causal=True, kv_length=length, q_start=length - T)
    count, given = np.broadcast_to(count, (1, Hq, T, S))[..., :1209].astype(np.int64), [to_numpy(x)[:, :, :1209] for x in (q, k, v)]
    truth, formula = (f(*given, count, scale=D ** -0.5)[:2] for f in (oracle.attention, plain.attention))
    for name, got, true, one in zip(("out", "lse"), (out, lse), truth, formula):
        assert_close(name, to_numpy(got), true, one, reduction=S)


# rule, T, S, Hq, Hk, D, Dv, sink, softcap
PARTS = {"strided": (st.Causal() & (st.Window(15) | st.Strided(16)), 2048, 2048, 4, 2, 128, 128, True, None),
         "strided-cap": (st.Causal() & (st.Window(10) | st.Strided(8)), 1600, 2000, 2, 1, 64, 40, False, 3.0),
         "strided-float16": (st.Causal() & (st.Window(9) | st.Strided(10)), 1280, 1280, 2, 2, 192, 128, False, None),
         "strided-ragged": (st.Causal() & (st.Window(10) | st.Strided(8)), 2045, 2051, 4, 2, 128, 64, True, None),
         "strided-halves": (st.Causal() & (st.Window(15) | st.Strided(32)), 2048, 2048, 2, 1, 128, 128, False, None),  # classes of half a block
         "strided-157": (st.Causal() & (st.Window(15) | st.Strided(16)), 2500, 2500, 2, 2, 128, 128, False, None),
         "fixed-ragged": (st.Causal() & st.Fixed(32, 8), 650, 671, 2, 1, 64, 64, False, None),
         "fixed": (st.Causal() & st.Fixed(128, 8), 1024, 1024, 2, 1, 128, 128, False, None),
         "fixed-before": (st.Causal() & st.Fixed(32, 8), 400, 640, 4, 2, 192, 128, True, None),
         "one": (st.Causal() & st.Strided(2), 400, 400, 2, 2, 96, 72, True, None),
         "dilated": (st.Causal() & st.Dilated(1000, 0, 8), 1984, 1984, 2, 1, 128, 64, False, None),
         "empty-rows": (st.Causal() & st.Strided(8) & ~st.Window(39), 1024, 1024, 2, 1, 64, 64, True, None)}


@both
@pytest.mark.parametrize("name", PARTS)
def test_parts_together(backend, name, rng, monkeypatch):
    """Residue classes and summaries by Hopper's copy engine, each part from the sums of the one before: ragged ends, rows without keys, NaN in what nobody sees, keys inside wider rows; twice the same bits."""
    import oracle
    rule, T, S, Hq, Hk, D, Dv, sink, cap = PARTS[name]
    make, kind = Make(rng), torch.float16 if name.endswith("float16") else torch.bfloat16
    q, k, v = make.normal(2, T, Hq, D, dtype=kind)().transpose(1, 2), make.normal(2, Hk, S, D + 8, dtype=kind)()[..., :D], make.normal(2, Hk, S, Dv, dtype=kind)()
    seen = rule.visible(S - T + np.arange(T)[:, None], np.arange(S), S)
    nobody = torch.from_numpy(~seen.any(0)).cuda()
    given = [to_numpy(x) for x in (q, k, v)]
    k[:, :, nobody], v[:, :, nobody] = np.nan, np.nan
    sinks = make.normal(Hq, dtype=torch.float32)() if sink else None
    kernel, answers = dispatch.kernel(backend, "block_attention"), []
    problem = st.explain("sparse_attention", q, k, v, rule, sink_logits=sinks, softcap=cap, backend=backend).problem
    config = kernel.default_config(problem)
    if isinstance(refused := kernel.resources(problem, {**config, "path": dict(triton="gluon", cupy="hopper")[backend]}), str):
        pytest.skip(refused)
    together = kernel.run_parts
    monkeypatch.setattr(kernel, "run_parts", lambda *a, **how: answers.append(together(*a, **how)) or answers[-1])
    call = lambda: st.sparse_attention(q, k, v, rule, sink_logits=sinks, softcap=cap, return_lse=True, backend=backend, config=config)  # noqa: E731
    (out, lse), again = call(), call()
    assert backend == "cupy" and (cap is not None or name == "fixed-ragged") or len(answers) == 2 and None not in answers
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    count, how = np.broadcast_to(seen, (2, Hq, T, S)).astype(np.int64), dict(scale=D ** -0.5, sink_logits=None if sinks is None else to_numpy(sinks), softcap=cap)
    truth, formula = (f(*given, count, **how)[:2] for f in (oracle.attention, plain.attention))
    for what, got, true, one in zip(("out", "lse"), (out, lse), truth, formula):
        assert_close(what, to_numpy(got), true, one, reduction=S)


@both
@pytest.mark.parametrize("rule, T, S, Hq, Hk", [(st.Causal() & (st.Window(15) | st.Strided(16)), 2500, 2500, 2, 2), (st.Causal() & (st.Window(10) | st.Strided(8)), 2045, 2051, 4, 2),
                                                (st.Causal() & (st.Window(10) | st.Strided(8)), 1256, 1256, 2, 1), (st.Causal() & st.Fixed(32, 4), 672, 672, 2, 1)], ids=["156-157", "ragged", "157", "fixed-4"])
def test_gradients_of_parts_of_any_length(backend, rule, T, S, Hq, Hk, rng, monkeypatch):
    """Classes that end within a block or one position apart, and summaries of four keys: together in one launch, and twice the same bits."""
    import oracle
    kernel, answers, make = dispatch.kernel(backend, "block_attention_backward"), [], Make(rng)
    together = kernel.run_parts
    monkeypatch.setattr(kernel, "run_parts", lambda *a, **how: answers.append(together(*a, **how)) or answers[-1])
    q, k, v = (make.normal(1, H, n, 128)().requires_grad_() for H, n in ((Hq, T), (Hk, S), (Hk, S)))
    dout = make.normal(1, Hq, T, 128)()
    out = st.sparse_attention(q, k, v, rule, backend=backend)
    first, again = (torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    if torch.cuda.get_device_capability() == (9, 0):
        assert answers and None not in answers
    seen = rule.visible(S - T + np.arange(T)[:, None], np.arange(S), S)
    count, given = np.broadcast_to(seen, (1, Hq, T, S)).astype(np.int64), [to_numpy(x.detach()) for x in (q, k, v)]
    truth, formula = (f(*given, count, to_numpy(dout), scale=128 ** -0.5) for f in (oracle.attention_gradients, plain.attention_gradients))
    for name, got, true, one, n in zip(("dq", "dk", "dv"), first, truth, formula, (S + 256, T * Hq // Hk + 256, T * Hq // Hk + 256)):
        assert_close(name, to_numpy(got), true, one, reduction=n)


@both
@pytest.mark.parametrize("G", [1, 2])
def test_gradients_of_a_block_that_every_query_sees(backend, G, rng):
    """Native Sparse Attention's first block: its long sums are cut into parts, and twice the same call gives the same bits."""
    import oracle
    T, make = 3000, Make(rng)
    q, k, v, dout = make.normal(1, 4, T, 64)().requires_grad_(), make.normal(1, 2, T, 64)().requires_grad_(), make.normal(1, 2, T, 64)().requires_grad_(), make.normal(1, 4, T, 64)()
    indices = rng.integers(0, T // 64 + 1, (1, G, T, 5)).astype(np.int32)
    indices[..., 0] = 0
    out = st.sparse_attention(q, k, v, st.Selection(torch.from_numpy(indices).cuda(), 64, causal=True), backend=backend)
    with hoppers("cupy.gather_union.run_rows") if backend == "cupy" else nullcontext():
        first, again = (torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    count = np.broadcast_to(oracle.selection_count(indices, T, 4, granularity=64, causal=True, q_start=0), (1, 4, T, T)).astype(np.int64)
    given = [to_numpy(x.detach()) for x in (q, k, v)]
    truth, formula = (f(*given, count, to_numpy(dout), scale=0.125) for f in (oracle.attention_gradients, plain.attention_gradients))
    for name, got, true, one, n in zip(("dq", "dk", "dv"), first, truth, formula, (T + 128, 2 * T + 128, 2 * T + 128)):
        assert_close(name, to_numpy(got), true, one, reduction=n)


@both
@pytest.mark.parametrize("T, S, group", [(2000, 2000, 2), (2100, 2100, 3), (700, 2000, 2)])  # rounds that turn, of more items than multiprocessors; abreast
def test_gradients_of_groups_of_heads(backend, T, S, group, rng):
    """Causal, more items than a round has: the policy for one key head, and twice the same bits."""
    import oracle
    Hk, D, head, make = 10, dict(cupy=64, triton=96)[backend], int(rng.integers(10)), Make(rng)
    q, k, v, dout = make.normal(1, Hk * group, T, D)().requires_grad_(), make.normal(1, Hk, S, D)().requires_grad_(), make.normal(1, Hk, S, D)().requires_grad_(), make.normal(1, Hk * group, T, D)()
    out = st.sparse_attention(q, k, v, st.Causal(), backend=backend)
    with hoppers(dict(cupy="cupy.block_attention_backward.run_hopper", triton="triton.block_attention_backward_gluon.launch_ordered")[backend]):
        first, again = (torch.autograd.grad(out, (q, k, v), dout, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    rows, keys = slice(head * group, (head + 1) * group), slice(head, head + 1)
    given = [to_numpy(x.detach()[:, of]) for x, of in ((q, rows), (k, keys), (v, keys))]
    count = np.broadcast_to(np.tri(T, S, S - T, dtype=np.int64), (1, group, T, S))
    truth, formula = (f(*given, count, to_numpy(dout[:, rows]), scale=D ** -0.5) for f in (oracle.attention_gradients, plain.attention_gradients))
    for name, got, of, true, one, n in zip(("dq", "dk", "dv"), first, (rows, keys, keys), truth, formula, (S + 2 * D, group * T + 2 * D, group * T + 2 * D)):
        assert_close(name, to_numpy(got[:, of]), true, one, reduction=n)


@both
@pytest.mark.parametrize("Hq", [128, 70, 3])
def test_gradients_of_the_latent(backend, Hq, rng, monkeypatch):
    """DeepSeek's shapes, several chunks of queries, holes, duplicates and lengths, NaN in keys that nobody names: the policy, and the same bits whoever adds first."""
    import oracle
    chunks = importlib.import_module(dict(cupy="sparsetile.backends.cupy.gather_backward_hopper", triton="sparsetile.backends.triton.gather_backward_gluon")[backend])
    monkeypatch.setattr(chunks, "SCRATCH", 50 << 17)
    T, S, K, make = 200, 300, 100, Make(rng)
    q, k, dout = make.normal(1, Hq, T, 576)().requires_grad_(), make.normal(1, 1, S, 576)(), make.normal(1, Hq, T, 512)()
    k[:, :, S - 6:] = float("nan")
    k.requires_grad_()
    indices = np.stack([rng.permutation(S - 6)[:K] for _ in range(T)]).astype(np.int32)[None, None]
    indices[rng.random(indices.shape) < 0.2] = -5
    indices[..., -2:] = indices[..., :2]
    lengths = np.where(rng.random((1, 1, T)) < 0.2, rng.integers(-1, K + 9, (1, 1, T)), K).astype(np.int32)
    chosen = st.Selection(torch.from_numpy(indices).cuda(), lengths=torch.from_numpy(lengths).cuda(), causal=True)
    out = st.sparse_attention(q, k, None, chosen, value_width=512, backend=backend)
    with hoppers(dict(cupy="cupy.gather_backward_hopper.run", triton="triton.gather_backward_gluon.run")[backend]):
        first, again = (torch.autograd.grad(out, (q, k), dout, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    count = oracle.selection_count(indices, S, Hq, lengths=lengths, causal=True, q_start=S - T)
    count = np.broadcast_to(count, (1, Hq, T, S)).astype(np.int64)
    given = [to_numpy(x.detach()) for x in (q, k)]
    given[1][:, :, S - 6:] = 0
    truth, formula = (f(*given, given[1][..., :512], count, to_numpy(dout), scale=576 ** -0.5) for f in (oracle.attention_gradients, plain.attention_gradients))
    summed = lambda dk, dv: np.concatenate(((dk[..., :512].astype(np.promote_types(dk.dtype, np.float32)) + dv).astype(dk.dtype), dk[..., 512:]), -1)  # noqa: E731
    assert_close("dq", to_numpy(first[0]), truth[0], formula[0], reduction=S + 576 + 512)
    assert_close("dk + dv", to_numpy(first[1]), summed(*truth[1:3]), summed(*formula[1:3]), reduction=T * Hq + 576 + 512)


@both
@pytest.mark.parametrize("rule, Hk, D", [(st.Causal(), 2, 128), (st.Causal(), 1, 128), (st.Window(100), 2, 128), (st.Window(100), 2, 64), (st.Window(100), 2, 192),
                                         (st.Causal() & (st.Window(15) | st.Strided(16)), 2, 128)], ids=["causal", "grouped", "window", "window-64", "window-192", "strided"])
def test_gradients_of_a_key_of_nan(backend, rule, Hk, D, rng):
    """Who sees it has NaN, and so have the keys that such a query sees; other tiles of queries and keys have none of it."""
    T, make = 512, Make(rng)
    q, k, v, dout = make.normal(1, 2, T, D)(), make.normal(1, Hk, T, D)(), make.normal(1, Hk, T, 128)(), make.normal(1, 2, T, 128)()
    k[:, :, 300] = float("nan")
    out = st.sparse_attention(*(x.requires_grad_() for x in (q, k, v)), rule, sink_logits=None if D == 128 else torch.full((2,), -np.inf, device="cuda"), backend=backend)
    dq, dk, dv = (x.isnan().transpose(1, 2).flatten(2).cpu().numpy()[0] for x in torch.autograd.grad(out, (q, k, v), dout))
    seen, tiles = rule.visible(np.arange(T)[:, None], np.arange(T), T), np.arange(T) // 128
    rows = seen[:, 300]
    keys, near = seen[rows].any(0), np.isin(tiles, tiles[rows])
    assert dq[rows].all() and dk[keys].all() and dv[keys].all()
    if "Strided" not in str(rule):
        far = ~np.isin(tiles, tiles[seen[near].any(0)])
        assert not dq[~near].any() and not dk[far].any() and not dv[far].any()


@both
@pytest.mark.parametrize("Hq", [128, 16])
def test_gradients_of_a_chosen_key_of_nan(backend, Hq, rng):
    T, S, K, make = 60, 200, 40, Make(rng)
    q, k, dout = make.normal(1, Hq, T, 576)().requires_grad_(), make.normal(1, 1, S, 576)(), make.normal(1, Hq, T, 512)()
    k[:, :, 7] = float("nan")
    indices = np.stack([rng.permutation(S)[:K] for _ in range(T)]).astype(np.int32)
    out = st.sparse_attention(q, k.requires_grad_(), None, st.Selection(torch.from_numpy(indices[None, None]).cuda()), value_width=512, backend=backend)
    dq, dk = (x.isnan()[0].transpose(0, 1).flatten(1).cpu().numpy() for x in torch.autograd.grad(out, (q, k), dout))
    rows = (indices == 7).any(1)
    keys = np.isin(np.arange(S), indices[rows])
    assert dq[rows].all() and not dq[~rows].any() and dk[keys].all() and not dk[~keys].any()


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way, Hq", [("selection", 64), ("blocks", 64), ("selection", 32), ("selection", 8)])
def test_a_latent_that_decides_by_a_few_bits(backend, way, Hq, kind, rng):
    """Two keys, the second one ahead by up to 8 bits, of every query by itself: what its probability is rounded to must not be what the sum has not."""
    T, S, make = 16, 160, Make(rng)
    lead = torch.from_numpy(rng.uniform(3, 8.3, (1, Hq, T)) / 1.4426950408889634).cuda()
    q, k = torch.zeros(1, Hq, T, 576, dtype=kind, device="cuda"), make.normal(1, 1, S, 576, dtype=kind)()
    k[..., 512:] = 0
    k[:, :, 40, 512:514], q[..., 512] = 1, lead.to(kind)
    q[..., 513] = (lead - q[..., 512]).to(kind)
    keys, rule = [0, 40], st.Full()
    if way == "selection":
        indices = np.full((1, 1, T, S), -1, np.int32)
        indices[..., keys] = keys
        rule = st.Selection(torch.from_numpy(indices).cuda())
    else:
        q[..., 514], k[..., 514] = -300, 1  # the others are nowhere
        k[:, :, keys, 514] = 0
    out = to_numpy(st.sparse_attention(q, k, None, rule, value_width=512, scale=1.0, backend=backend))
    held, count = [to_numpy(x) for x in (q, k)], np.zeros((1, Hq, T, S), np.int64)
    count[..., keys] = 1
    wide = [x.astype(np.float64) for x in held]
    truth, formula = (plain.attention(x, y, y[..., :512], count, scale=1.0)[0] for x, y in (wide, held))
    for h in range(Hq):
        for t in range(T):
            assert_close(f"head {h}, query {t}", out[:1, h:h + 1, t:t + 1], truth[:, h:h + 1, t:t + 1], formula[:, h:h + 1, t:t + 1], reduction=S + 576)


@both
@pytest.mark.parametrize("way", ["selection", "blocks"])
def test_scores_that_grow_along_a_list_of_latents(backend, way, rng):
    """Of another slope for each head: what probabilities are relative to moves in every tile of keys, in some, in none; among them keys that nobody sees, and whole tiles of those."""
    import judge
    Hq, T, S, make = 70, 3, 430, Make(rng)
    q, k = make.normal(2, Hq, T, 576)(), make.normal(2, 1, S, 576)()
    q[..., 0], k[..., 0] = torch.linspace(-60, 60, Hq, device="cuda")[:, None], torch.linspace(-40, 40, S, device="cuda")
    indices = np.stack([np.stack([np.arange(S), np.arange(S)[::-1], rng.permutation(S)])] * 2)[:, None].astype(np.int32)
    indices[rng.random(indices.shape) < 0.05] = -1
    indices[..., 64:96] = indices[0, ..., :32] = -1
    count = np.stack([np.stack([np.bincount(line[line >= 0], minlength=S) for line in lines[0]]) for lines in indices])[:, None]
    where = {"triton": {"selection": "triton.gather_attention_gluon.launch", "blocks": "triton.block_attention_latent.launch"}}.get(backend, {}).get(way)
    rule = st.Selection(torch.from_numpy(indices).cuda()) if way == "selection" else st.Full()
    with hoppers(where) if where else nullcontext():
        out, lse = st.sparse_attention(q, k, None, rule, value_width=512, return_lse=True, backend=backend)
    held = [to_numpy(x) for x in (q, k)]
    judge.answer(to_numpy(out), to_numpy(lse), *held, held[1][..., :512], np.broadcast_to(count if way == "selection" else 1, (2, Hq, T, S)).astype(np.int64))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("way, Hq, T", [("selection", 128, 70), ("selection", 70, 1), ("selection", 32, 70), ("selection", 16, 70), ("selection", 8, 70), ("blocks", 70, 1), ("bytes", 70, 1), ("chosen bytes", 70, 70)])
def test_one_key_decides_behind_a_reference_that_lags(way, Hq, T, kind, rng):
    """Its value is the answer, whatever 16 bits keep of its probability."""
    import judge
    S, put = 700, lambda x: torch.from_numpy(x.astype(np.float32)).cuda().to(getattr(torch, kind))
    q, k, scale = judge.decided_late(rng, to_numpy(torch.zeros(1, dtype=getattr(torch, kind))).dtype, Hq, T, S)
    keys = put(k)
    if "bytes" in way:
        cache = st.PagedLatent.empty(put(q[:1]), sequences=1, pages=16, dtype="float8")
        cache.append(keys[:, 0, :, :512], keys[:, 0, :, 512:])
        k = to_numpy(torch.cat(cache.gather(kind), -1))[:, None, :S]
    entries = torch.arange(S, dtype=torch.int32, device="cuda").expand(1, 1, T, S).contiguous()
    given = dict() if "bytes" in way else dict(value_width=512)
    out, lse = st.sparse_attention(put(q), cache if "bytes" in way else keys, None, st.Full() if way in ("blocks", "bytes") else st.Selection(entries), scale=scale, return_lse=True, backend="cupy", **given)
    judge.answer(to_numpy(out), to_numpy(lse), q, k, k[..., :512], np.ones((1, Hq, T, S), np.int64), scale=scale)


@both
@pytest.mark.parametrize("Hq", [64, 16])
def test_queries_near_the_last_position_see_all_that_is_chosen(backend, Hq, rng):
    q, k, entries = (x() for x in (Make(rng).normal(1, Hq, 5, 576), Make(rng).normal(1, 1, 300, 576), Make(rng).integers(0, 300, 1, 1, 5, 100)))
    start = torch.tensor([2 ** 31 - 3], dtype=torch.int32, device="cuda")
    late, all_ = (st.sparse_attention(q, k, None, st.Selection(entries, causal=causal), value_width=512, backend=backend, **how) for causal, how in ((True, dict(q_start=start)), (False, {})))
    assert torch.equal(late, all_)


@both
@pytest.mark.parametrize("Hq", [40, 32, 17, 16, 8, 1])
def test_few_heads_of_the_latent(backend, Hq, rng):
    """Tokens as rows: lists from none to several steps after each other in a block of threads, holes, duplicates, NaN in keys that nobody names, sinks, caches of several lengths: the policy, and the
    same bits twice."""
    import oracle
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("path tokens is for sm_90a")
    B, T, S, K, make = 2, 230, 500, 300, Make(rng)
    q, k, kv = make.normal(B, Hq, T, 576)(), make.normal(B, 1, S, 576)(), [S - 6, 260]
    k[:, :, S - 6:] = float("nan")
    indices = np.stack([rng.permutation(S - 6)[:K] for _ in range(B * T)]).astype(np.int32).reshape(B, 1, T, K)
    indices[rng.random(indices.shape) < 0.2] = -5
    indices[..., 60:62] = indices[..., :2]
    indices[0, 0, :9, :] = -1
    lengths = np.where(rng.random((B, 1, T)) < 0.5, rng.choice([-1, 0, 1, 63, 64, 65, 128, 129, 192, 256], (B, 1, T)), K + 7).astype(np.int32)
    sink = make.normal(Hq, dtype=torch.float32)()
    given = dict(value_width=512, kv_length=torch.tensor(kv, dtype=torch.int32, device="cuda"), sink_logits=sink, return_lse=True, backend=backend, config=dict(path="tokens"))
    call = lambda: st.sparse_attention(q, k, None, st.Selection(torch.from_numpy(indices).cuda(), lengths=torch.from_numpy(lengths).cuda(), causal=True), **given)  # noqa: E731
    with hoppers(dict(cupy="cupy.gather_tokens_hopper.run", triton="triton.gather_attention_gluon.launch")[backend]):
        first, again = call(), call()
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    heads = sorted({0, Hq // 2, Hq - 1})
    count = oracle.selection_count(indices, S, len(heads), lengths=lengths, causal=True, kv_length=kv)
    rows, keys = to_numpy(q[:, heads]), to_numpy(k)
    keys[:, :, S - 6:] = 0
    truth, formula = (f(rows, keys, keys[..., :512], count, scale=576 ** -0.5, sink_logits=to_numpy(sink[heads])) for f in (oracle.attention, plain.attention))
    for what, got, true, one in zip(("out", "lse"), first, truth, formula):
        assert_close(what, to_numpy(got[:, heads]), true, one, reduction=S + 576)


# ------------------------------------------------------------------------------------------------------------------ ready calls
READY = {"tiny": ((1, 2, 16, 64), (1, 2, 16, 64)), "one-query": ((2, 16, 1, 128), (2, 4, 1500, 128))}


@both
@pytest.mark.parametrize("name", READY)
def test_a_repeated_run_is_the_run(backend, name, rng, monkeypatch):
    """Launches from notes (backends/tape.py): the same bits as the long way's, on the caller's stream, in a graph."""
    make, (rows, keys) = Make(rng), READY[name]
    draw = lambda: [make.normal(*shape)() for shape in (rows, keys, keys)]  # noqa: E731
    call = lambda x, length: st.sparse_attention(*x, st.Window(900), kv_length=length, backend=backend, return_lse=True)  # noqa: E731
    lengths = [torch.full((rows[0],), n, dtype=torch.int32, device="cuda") for n in (keys[2], keys[2] // 2, 7)]
    repeated, play = [], tape.Tape.__call__
    monkeypatch.setattr(tape.Tape, "__call__", lambda *a: repeated.append(play(*a)) or repeated[-1])
    dispatch.clear_plans()

    def same(got, x, length):
        with monkeypatch.context() as patch:
            patch.setattr(ready, "key_of", lambda *a: None)
            for n, (a, b) in enumerate(zip(got, call(x, length))):
                assert_same_bits(f"result {n}", a, b)

    for n in range(6):
        x, length = draw(), lengths[n % 3]
        same(call(x, length), x, length)
    assert len(repeated) == 4 and all(repeated)  # the first takes the long way, the second is noted
    x, y, side = draw(), draw(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for a, b in zip(x, y):
            a.copy_(b)
        got = call(x, lengths[0])
    side.synchronize()
    same(got, y, lengths[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(x, lengths[1])
    for a, b in zip(x, draw()):
        a.copy_(b)
    graph.replay()
    same(got, x, lengths[1])
    assert len(repeated) == 6 and all(repeated)


@both
def test_repeated_runs_of_a_selector_are_the_runs(backend, rng, monkeypatch):
    """Native Sparse Attention's choice, the attention over it and its gates from notes: the same bits as the long way's, with memory that is another one each time; gates that lie side by side."""
    from sparsetile.ops.importance import importance_topk
    from sparsetile.ops.merge import weighted_sum
    make = Make(rng)
    repeated, play = [], tape.Tape.__call__
    monkeypatch.setattr(tape.Tape, "__call__", lambda *a: repeated.append(play(*a)) or repeated[-1])
    dispatch.clear_plans()

    def parts(q, k, ck, lse, gates):
        chosen = importance_topk(q, ck, lse, 5, keys=700, backend=backend)
        out = st.sparse_attention(q, k, k, chosen, backend=backend)
        return chosen.indices, chosen.lengths, out, weighted_sum((out, q), gates.unbind(-1), backend)
    with torch.no_grad():
        for _ in range(6):
            x = [make.normal(1, heads, n, 64)() for heads, n in ((64, 700), (4, 700), (4, 42))] + [make.normal(1, 64, 700, dtype=torch.float32)() + 4, make.normal(1, 64, 700, 3)()[..., :2]]
            got = parts(*x)
            with monkeypatch.context() as patch:
                patch.setattr(ready, "key_of", lambda *a: None)
                for n, (a, b) in enumerate(zip(got, parts(*x))):
                    assert_same_bits(f"result {n}", a, b)
    assert backend == "cupy" or len(repeated) == 12 and all(repeated)  # of three kernels the first call takes the long way, the second is noted, four are repeated


def test_cupy_arrays_need_no_torch(tmp_path):
    pytest.importorskip("cupy")
    tests, path = Path(__file__).resolve().parent, tmp_path / "answers.npz"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    got = subprocess.run([sys.executable, str(tests / "without_torch.py"), str(path)], env=env, capture_output=True, text=True, timeout=250)
    assert got.returncode == 0, got.stderr[-3000:]
    with np.load(path) as without:
        for name, array in answers(lambda x: torch.from_numpy(x).cuda(), backend="cupy").items():
            for backend in ("cupy", "auto"):
                assert_same_bits(f"{backend} {name}", without[f"{backend}.{name}"], to_numpy(array))
