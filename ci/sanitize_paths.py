"""Calls that take the paths of one architecture and the caches' kernels, each named with the function it must come to: python -m sparsetile.ci.sanitize_paths [cupy|triton] [--only NAME ...] [--portable]

A program to run under compute-sanitizer (ci/gpu.sh sanitize paths); tests/test_gpu_sanitize.py asserts that the paths are taken. Indices, tables and lengths hold garbage where a caller's may.
--portable: calls that racecheck can judge. It watches reads and writes of shared memory by threads, so left out is all whose tiles the copy engine writes or warpgroup products read behind the threads'
back, ordered by mbarriers that inline assembly arrives at: every kernel of CuPy whose file is named *_hopper, gather_attention_union, gather_backward_union and the two forms of
block_attention_latent, and every kernel in Gluon. Triton's portable kernels are ordered by its compiler.
"""
import argparse
import os
from contextlib import ExitStack
from importlib import import_module
from unittest import mock

import sparsetile as st
from sparsetile.ci import misled
from sparsetile.ops import dispatch, selected_blocks
from sparsetile.ops.importance import importance_topk

LATENT = dict(cupy="gather_attention.run_hopper", triton="gather_attention_gluon.launch")
DECODE = dict(cupy="split.run", triton="block_attention_decode.run")
HOPPERS = ("block_attention.run_hopper", "block_attention_backward.run_hopper", "two_pass.run", "hopper_parts.run", "gather_attention.run_hopper", "gather_backward_hopper.run", "gather_tokens_hopper.run",
           "gather_union.run", "gather_union.run_rows", "grouped_matmul_hopper.run", "importance_topk.run_fused", "indexer_topk.run_fused", "indexer_scores.launch_hopper", "latent_decompress.run_hopper",
           "split.run_latent")


class Make:
    """Inputs of one seed."""

    def __init__(self, torch, device="cuda"):
        self.torch, self.device, self.generator = torch, device, torch.Generator(device).manual_seed(0)
        self.garbage = torch.tensor([2 ** 31 - 1, -2 ** 31, -123456, 10 ** 9], dtype=torch.int32, device=device)

    def normal(self, *shape, dtype="bfloat16"):
        return self.torch.randn(shape, generator=self.generator, device=self.device).to(getattr(self.torch, dtype))

    def integers(self, low, high, *shape, dtype="int32"):
        return self.torch.randint(low, high, shape, generator=self.generator, device=self.device).to(getattr(self.torch, dtype))

    def entries(self, S, *shape):
        """Some of S, some of no key at all."""
        found = self.integers(-5, S + 9, *shape)
        found[..., 1], found[..., 2] = self.garbage[0], self.garbage[1]
        return found

    def distinct(self, S, *shape):
        return self.torch.rand((*shape[:-1], S), generator=self.generator, device=self.device).topk(shape[-1], dim=-1).indices.to(self.torch.int32)

    def attention(self, B, Hq, Hk, T, S, D, Dv=None):
        return self.normal(B, Hq, T, D), self.normal(B, Hk, S, D), self.normal(B, Hk, S, Dv or D)


def attend(q, k, v, rule, backend, gradients=False, **how):
    """Forward, and backward where asked."""
    given = [x if x is None or not gradients else x.requires_grad_() for x in (q, k, v)]
    out = st.sparse_attention(*given, rule, backend=backend, **how)
    if gradients:
        out.float().sum().backward()


def mislead(m, b, few: bool):
    """indexer_topk of rows whose bound fails."""
    S, (k, tiles) = 4100, dict(cupy=(512, 18), triton=(200, 4))[b]
    q, keys, w = m.normal(1, 64, 37, 128).to(m.torch.float8_e4m3fn), m.normal(1, S, 128).to(m.torch.float8_e4m3fn), m.normal(1, 64, 37, dtype="float32").abs()
    scale = m.torch.from_numpy(misled.factors(S, k, b, tiles, few)[None]).to(m.device)
    config = dict(cupy=dict(path="fused"), triton=dict(path="kept", capacity=1024, sample=512, select_warps=4, queries=16))[b]
    st.indexer_topk(q, keys, w, k, k_scale=scale, causal=False, config=config, backend=b)


def paths(m, b) -> dict:
    """name -> (the functions it comes to by backend, the call)"""
    torch = m.torch
    eight = lambda x: x.to(torch.float8_e4m3fn)  # noqa: E731
    mask = m.integers(0, 2, 2, 1, 5, 5) > 0
    latents = lambda: st.PagedLatent(m.integers(0, 63, 50, 64, 656, dtype="uint8"), m.integers(-2, 52, 3, 24), m.integers(0, 1505, 3), rank=512, rotary=64)  # noqa: E731
    keys = lambda: st.IndexerKeys(m.integers(0, 63, 30, 64 * 132, dtype="uint8"), m.integers(-2, 32, 2, 15), m.integers(0, 961, 2))  # noqa: E731
    pages = lambda: st.PagedKV(m.normal(40, 16, 2, 128), m.normal(40, 16, 2, 128), m.integers(-2, 42, 3, 190), m.integers(0, 3041, 3))  # noqa: E731
    both = lambda name: dict(cupy=name, triton=name)  # noqa: E731
    strided, window = st.Causal() & (st.Window(15) | st.Strided(16)), st.Window(40) | st.Sink(3)
    appended = both("append.run")
    return {
        "parts": (dict(cupy=("block_attention.run_parts", "block_attention_backward.run_parts"), triton=("block_attention.run_parts", "block_attention_backward.run_parts")),
                  lambda: attend(*m.attention(1, 2, 1, 2048, 2048, 128), strided, b, True)),
        "parts of any length": (dict(cupy="two_pass.run", triton="block_attention_backward.run_parts"), lambda: [attend(*m.attention(1, 2, 1, T, T, 128), rule, b, True) for rule, T in
                                                                                                                ((strided, 2500), (st.Causal() & st.Fixed(32, 4), 672))]),
        "ordered": (dict(cupy=("block_attention.run_hopper", "block_attention_backward.run_hopper"), triton=("block_attention_gluon.launch", "block_attention_backward_gluon.launch_ordered")),
                    lambda: attend(*m.attention(2, 4, 2, 600, 600, 128), st.Layout.from_block_mask(mask, T=600, S=600), b, True)),
        "far longer rows": (dict(cupy="two_pass.run", triton="block_attention_backward_gluon.launch"), lambda: attend(*m.attention(1, 4, 2, 2300, 4096, 64), window, b, True)),
        "by maps": (dict(triton=("block_attention_maps.launch", "block_backward_maps.launch")), lambda: [attend(*m.attention(2, 4, 2, 60, 300, D, Dv), rule, b, True, softcap=20.0)
                                                                                                        for D, Dv, rule in ((128, 128, window), (64, 16, window), (64, 32, st.RandomBlocks(1, 16, seed=1)))]),
        "layouts": (both("layout.run"), lambda: (st.Layout.from_block_mask(mask), st.Layout.from_documents(m.integers(0, 300, 4), 1000, causal=True),
                                                 st.Layout.from_global_tokens(m.entries(1000, 2, 4), 1000, 1000, window=100))),
        "float8": (dict(cupy="block_attention.run_hopper"), lambda: attend(*map(eight, m.attention(2, 4, 2, 140, 300, 128)), window, b, k_scale=m.normal(2, 2, 3, dtype="float32"))),
        "float8 decode": (DECODE,
                          lambda: attend(*map(eight, m.attention(4, 8, 2, 4, 1000, 128)), st.Window(700) | st.Sink(4), b, kv_length=m.garbage, q_scale=m.normal(4, 8, 4, dtype="float32"))),
        "decode": (DECODE, lambda: attend(*m.attention(4, 8, 2, 4, 3000, 128), st.Window(700) | st.Sink(4), b, kv_length=m.garbage)),
        "latent decode": (dict(cupy="split.run_latent", triton="block_attention_latent.launch"),
                          lambda: attend(m.normal(4, 70, 2, 576), m.normal(4, 1, 1500, 576), None, st.Causal(), b, value_width=512, kv_length=m.garbage)),
        "pages": (DECODE, lambda: attend(m.normal(3, 8, 4, 128), pages(), None, st.Window(700) | st.Sink(4), b)),
        "pages, prefill": ({}, lambda: attend(m.normal(3, 8, 70, 128), pages(), None, st.Causal(), b)),
        "rows of bytes": (dict(cupy="split.run_latent", triton="block_attention_decode.run"), lambda: attend(m.normal(3, 20, 2, 576), latents(), None, st.Causal(), b)),
        "rows of bytes, chosen": ({name: (one, "page_rows.run") for name, one in LATENT.items()}, lambda: attend(m.normal(3, 20, 2, 576), latents(), None, st.Selection(m.entries(1500, 3, 1, 2, 300)), b)),
        "latents, chosen": (LATENT, lambda: attend(m.normal(1, 128, 9, 576), m.normal(1, 1, 400, 576), None, st.Selection(m.entries(400, 1, 1, 9, 200)), b, value_width=512,
                                                   config=dict(path=dict(cupy="hopper", triton="gluon")[b]))),
        "latents, chosen, backward": (dict(cupy="gather_backward_hopper.run", triton="gather_backward_gluon.run"),
                                      lambda: attend(m.normal(1, 128, 200, 576), m.normal(1, 1, 300, 576), None, st.Selection(m.entries(300, 1, 1, 200, 100)), b, True, value_width=512)),
        "few heads": (LATENT | dict(cupy="gather_tokens_hopper.run"), lambda: [attend(m.normal(1, heads, 37, 576), m.normal(1, 1, 400, 576), None, st.Selection(m.entries(400, 1, 1, 37, 200)), b, value_width=512,
                                                                             config=dict(path="tokens")) for heads in (8, 16, 32)]),
        "union": (dict(cupy=("gather_union.run", "gather_union.run_rows")), lambda: attend(*m.attention(2, 4, 2, 1100, 1200, 64), st.Selection(m.entries(38, 2, 2, 1100, 7), 32, causal=True), b, True)),
        "bitmaps of each head": (both("selection_bitmaps.run"), lambda: attend(*m.attention(1, 4, 2, 300, 300, 64), st.Selection(m.distinct(300, 1, 4, 300, 40), causal=True, distinct=True), b, True)),
        "indexer": (dict(cupy="indexer_topk.run_fused", triton="index_keep.launch"), lambda: st.indexer_topk(eight(m.normal(1, 64, 37, 128)), eight(m.normal(1, 4100, 128)), m.normal(1, 64, 37, dtype="float32"), 512,
                                                                                 config=dict(path=dict(cupy="fused", triton="kept")[b]), backend=b)),
        "indexer, bounds that fail": (dict(cupy="indexer_topk.run_fused", triton="index_keep.launch"), lambda: [mislead(m, b, few) for few in (True, False)]),
        "indexer over pages": ({}, lambda: st.indexer_topk(eight(m.normal(2, 64, 3, 128)), keys(), m.normal(2, 64, 3, dtype="float32"), 40, backend=b)),
        "blocks by importance": (dict(cupy="importance_topk.run_fused"), lambda: importance_topk(m.normal(1, 64, 700, 64), m.normal(1, 4, 42, 64), m.normal(1, 64, 700, dtype="float32") + 4, 5, keys=700,
                                                                                                 backend=b, config=dict(path=dict(cupy="fused", triton="row")[b]))),
        "top-k": (dict(triton="topk_gluon.launch"), lambda: st.topk(m.normal(1, 9, 700, dtype="float32"), 513, key_start=m.integers(-9, 700, 1, 9), backend=b, config=None if b == "cupy" else
                                                                    dict(path="gluon", capacity=4096, sample=4096, select_warps=8, programs=2))),
        "decompression": (dict(cupy="latent_decompress.run_hopper", triton="latent_decompress_gluon.launch"), lambda: st.latent_decompress(m.normal(1, 300, 512), m.normal(2, 512, 128), m.normal(2, 512, 128), backend=b)),
        "append keys": (appended, lambda: pages().write(m.normal(3, 2, 5, 128), m.normal(3, 2, 5, 128), backend=b)),
        "append rows of bytes": (appended, lambda: latents().write(m.normal(3, 5, 512), m.normal(3, 5, 64), backend=b)),
        "append indexer keys": (appended, lambda: keys().write(m.normal(2, 5, 128), backend=b)),
        "append to a ring": (appended, lambda: st.RollingKV.empty(m.normal(1), sequences=2, window=20, heads=2, width=72, pinned=3).write(m.normal(2, 2, 31, 72), m.normal(2, 2, 31, 72), backend=b)),
    }


def portable(m, b) -> dict:
    """name -> (nothing, the call): small calls of the kernels that racecheck understands."""
    chosen = lambda g: st.Selection(m.entries(53 // g, 2, 2, 37, 11), g, causal=g > 1)  # noqa: E731
    here = dict(path="portable")
    found = {f"blocks {name}": ({}, lambda rule=rule: attend(*m.attention(2, 6, 2, 37, 53, 64, 40), rule, b, True, config=here | dict(block_q=64, block_k=64)))
             for name, rule in (("window", st.Window(9, 2) | st.Sink(3)), ("random", st.RandomBlocks(1, 16, seed=1)))}
    found |= {f"chosen {g}": ({}, lambda g=g: attend(*m.attention(2, 6, 2, 37, 53, 64, 40), chosen(g), b, True, config=here)) for g in (1, 16)}
    latent = m.normal(2, 53, 100), m.normal(3, 100, 24), m.normal(3, 100, 40)
    return found | {
        "scores": ({}, lambda: st.indexer_scores(m.normal(2, 5, 37, 72), m.normal(2, 53, 72), m.normal(2, 5, 37, dtype="float32"), backend=b)),
        "indexer": ({}, lambda: st.indexer_topk(m.normal(2, 5, 37, 72), m.normal(2, 53, 72), m.normal(2, 5, 37, dtype="float32"), 7, backend=b)),
        "top-k": ({}, lambda: [st.topk(m.normal(2, 3, S, dtype="float32"), k, backend=b) for S, k in ((7, 3), (1001, 64), (5000, 2048), (5000, 5000))]),
        "decompression": ({}, lambda: st.latent_decompress(*latent, k_rope=m.normal(2, 53, 8), backend=b)),
        "latent attention": ({}, lambda: st.latent_attention(m.normal(2, 3, 37, 24), m.normal(2, 3, 37, 8), latent[0], m.normal(2, 53, 8), *latent[1:], st.Causal(), mode="absorbed", backend=b)),
        "merge": ({}, lambda: st.merge_attention([m.normal(2, 3, 37, 40) for _ in range(3)], [m.normal(2, 3, 37, dtype="float32") for _ in range(3)], backend=b)),
        "layouts": ({}, lambda: st.Layout.from_block_mask(m.integers(0, 2, 2, 1, 9, 7) > 0)),
        "append": ({}, lambda: st.RollingKV.empty(m.normal(1), sequences=2, window=20, heads=2, width=72, pinned=3).write(m.normal(2, 2, 31, 72), m.normal(2, 2, 31, 72), backend=b)),
    }


def take(backend: str, name: str, case: tuple, hopper: bool, only_portable: bool = False) -> None:
    """One call; on Hopper it must come to its functions, and a portable one to none of Hopper's."""
    functions, call = case
    wanted = functions.get(backend, ()) if hopper else ()
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    refused = HOPPERS if only_portable and backend == "cupy" else ()
    dispatch.clear_plans()  # a plan repeats launches without them
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, SPARSETILE_BACKEND=backend))  # layouts have no argument for it
        stack.enter_context(mock.patch.object(selected_blocks, "LEAST", 0))
        seen = {one: [] for one in (*wanted, *refused)}
        for one, answers in seen.items():
            module, _, function = f"sparsetile.backends.{backend}.{one}".rpartition(".")
            right = getattr(import_module(module), function)
            stack.enter_context(mock.patch.object(import_module(module), function, lambda *a, right=right, answers=answers, **how: answers.append(right(*a, **how)) or answers[-1]))
        call()
    for one in wanted:
        assert any(not one.endswith("run_parts") or answer is not None for answer in seen[one]), f"{backend}, {name}: {one} was not taken"
    assert not any(seen[one] for one in refused), f"{backend}, {name}: not the portable path"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="sparsetile.ci.sanitize_paths", description=__doc__.splitlines()[0])
    parser.add_argument("backend", nargs="?", default="cupy", choices=("cupy", "triton"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these calls alone")
    parser.add_argument("--portable", action="store_true", help="calls that racecheck can judge")
    given = parser.parse_args(arguments)
    import torch
    cases = (portable if given.portable else paths)(Make(torch), given.backend)
    for name in given.only or cases:
        take(given.backend, name, cases[name], torch.cuda.get_device_capability() == (9, 0), given.portable)
        torch.cuda.synchronize()
        print(f"{given.backend}: {name}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
