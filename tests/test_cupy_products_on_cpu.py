"""The CuPy backend's latent decompression, matrix per head and block lists, run on the CPU as they are written (cuda_on_cpu.py)."""
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CXX, CpuPlace
from hopper_on_cpu import HopperPlace
from numeric import assert_close, plain

import oracle
import sparsetile as st
from sparsetile.backends.contract import Problem
from sparsetile.backends.cupy import grouped_matmul, latent_decompress, layout

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ compiles the kernels for the CPU, and is not there")
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn}


@pytest.fixture(scope="module")
def place():
    return CpuPlace()


def normal(rng, kind, *shape):
    return rng.standard_normal(shape).astype(TYPES[kind])


def turned(rng, kind, H, M, N):
    """[H, M, N], whose middle axis is the contiguous one."""
    return normal(rng, kind, H, N, M).transpose(0, 2, 1)


LATENTS = [  # latent, weights, B, S, H, R, Dn, Dv, P, scaled, w_uk turned, w_uv turned, config
    ("bfloat16", "bfloat16", 2, 70, 2, 96, 128, 128, 64, False, False, False, {}),
    ("bfloat16", "bfloat16", 1, 70, 3, 100, 31, 72, 7, False, True, True, {}),
    ("float16", "float16", 1, 33, 2, 64, 64, 64, 0, False, True, False, {}),
    ("float8_e4m3fn", "bfloat16", 1, 40, 2, 300, 64, 40, 8, True, False, False, {}),
    ("float8_e4m3fn", "float16", 1, 140, 2, 256, 64, 64, 8, True, False, True, {}),
    ("bfloat16", "bfloat16", 1, 3, 2, 130, 32, 64, 8, True, False, False, {}),
    ("float32", "float32", 2, 40, 2, 100, 33, 65, 5, False, False, False, {}),
    ("float32", "float32", 1, 40, 2, 130, 32, 64, 8, True, True, True, {}),
    ("bfloat16", "bfloat16", 1, 130, 1, 96, 128, 200, 64, False, False, False, dict(block_m=64, block_n=256, depth=64, stages=2)),
    ("bfloat16", "bfloat16", 1, 20, 2, 1, 1, 1, 1, False, False, False, {}),
]


@pytest.mark.parametrize("a, w, B, S, H, R, Dn, Dv, P, scaled, uk_turned, uv_turned, config", LATENTS, ids=lambda x: str(x) if isinstance(x, (str, int)) and not isinstance(x, bool) else "")
def test_latent_decompress(a, w, B, S, H, R, Dn, Dv, P, scaled, uk_turned, uv_turned, config, rng, place):
    latent, rope = normal(rng, a, B, S, R), normal(rng, w, B, S, P) if P else None
    uk, uv = (turned if t else normal for t in (uk_turned, uv_turned))
    w_uk, w_uv = uk(rng, w, H, R, Dn), uv(rng, w, H, R, Dv)
    given = dict(k_rope=rope, latent_scale=(rng.random((B, S, -(-R // 128))) + 0.3).astype(np.float32) if scaled else None)
    problem = Problem.of("latent_decompress", dict(B=B, H=H, S=S, R=R, Dn=Dn, Dv=Dv, P=P), dict(latent=a, w_uk=w, w_uv=w), "sm_80", ("scale",) if scaled else ())
    assert latent_decompress.supports(problem) is None
    config = {**latent_decompress.default_config(problem), **config}
    got = latent_decompress.run(*map(place.put, (latent, w_uk, w_uv)), place=place, config=config, **{name: place.put(x) for name, x in given.items()})
    truth, formula = oracle.latent_decompress(latent, w_uk, w_uv, **given), plain.latent_decompress(latent, w_uk, w_uv, **given)
    for name, found, true, one in zip("kv", map(place.get, got), truth, formula):
        assert_close(name, found, true, one, reduction=R)
    if P:
        assert np.array_equal(place.get(got[0])[..., Dn:], np.broadcast_to(rope[:, None], (B, H, S, P)))


PRODUCTS = [  # x, w, B, H, T, N, M, P, turned, out
    ("bfloat16", "bfloat16", 2, 3, 5, 128, 96, 64, False, None), ("bfloat16", "bfloat16", 2, 2, 50, 100, 33, 7, True, None),
    ("float16", "float16", 3, 2, 1, 64, 512, 64, False, "float32"), ("float32", "float32", 1, 2, 20, 33, 70, 3, False, None),
    ("float32", "float32", 1, 2, 20, 33, 70, 3, True, None), ("float32", "float16", 1, 2, 20, 33, 70, 3, False, "float16"),
    ("float8_e4m3fn", "bfloat16", 1, 2, 20, 64, 70, 0, False, "bfloat16"), ("bfloat16", "bfloat16", 1, 1, 150, 40, 130, 0, False, "float32"),
]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("B, H, T, N, M, sms", [(2, 3, 150, 64, 256, 3), (1, 2, 300, 128, 512, 3), (1, 3, 70, 64, 256, 2)])
def test_products_summed_over_heads(kind, B, H, T, N, M, sms, rng):
    """Rows that stand apart, as the non-rotary columns of keys' gradients do; more rows than a block has, and fewer; heads in one part and in two that are not equal."""
    place = HopperPlace()
    place.sms = sms
    x, w = normal(rng, kind, B, H, T, N + 64)[..., :N], normal(rng, kind, H, M, N)
    problem = Problem.of("grouped_matmul", dict(B=B, H=H, T=T, N=N, M=M, P=0), dict(x=kind, w=kind, out="float32"), "sm_90a", ["inner_heads"])
    assert grouped_matmul.supports(problem) is None and "side by side" in grouped_matmul.supports(replace(problem, arch="sm_80"))
    got = place.get(grouped_matmul.run(place.put(x), place.put(w), place=place, config=grouped_matmul.default_config(problem), out_dtype="float32", inner_heads=True))
    formula = plain.grouped_matmul(x, w, out_dtype=np.float32).sum(1, keepdims=True)
    assert_close("product", got, oracle.grouped_matmul(x, w).sum(1, keepdims=True), formula, reduction=H * N)


@pytest.mark.parametrize("a, w, B, H, T, N, M, P, is_turned, out", PRODUCTS)
def test_grouped_matmul(a, w, B, H, T, N, M, P, is_turned, out, rng, place):
    x, weight, tail = normal(rng, a, B, H, T, N), (turned if is_turned else normal)(rng, w, H, M, N), normal(rng, a, B, H, T, P) if P else None
    kind = out or a
    problem = Problem.of("grouped_matmul", dict(B=B, H=H, T=T, N=N, M=M, P=P), dict(x=a, w=w, out=kind), "sm_80")
    assert grouped_matmul.supports(problem) is None
    got = place.get(grouped_matmul.run(place.put(x), place.put(weight), place=place, config=grouped_matmul.default_config(problem), tail=place.put(tail), out_dtype=out))
    formula = plain.grouped_matmul(x, weight, out_dtype=TYPES[kind])
    assert_close("product", np.ascontiguousarray(got[..., :M]), oracle.grouped_matmul(x, weight), formula, reduction=N)
    if P:
        assert np.array_equal(got[..., M:], tail.astype(TYPES[kind]))


FEW = [  # x, B, H, T, N, M, P, turned, sms: more rows than a tile; queries that do not fill one; a span of several column tiles and a last one that is not full
    ("bfloat16", 130, 2, 1, 64, 320, 16, False, 8), ("float16", 3, 1, 50, 128, 136, 0, True, 1), ("bfloat16", 1, 2, 140, 72, 64, 64, True, 8), ("float16", 2, 3, 1, 512, 64, 8, False, 3),
]


@pytest.mark.parametrize("kind, B, H, T, N, M, P, is_turned, sms", FEW)
def test_few_rows_on_hopper(kind, B, H, T, N, M, P, is_turned, sms, rng):
    """Queries and tail stand between others, as halves of one array do; nothing of the copy engine's boxes reaches neighbours."""
    place = HopperPlace()
    place.sms, place.refused = sms, "grouped_matmul"
    x, tail = normal(rng, kind, B, H, T, N + P + 8)[..., :N], normal(rng, kind, B, H, T, P + 8)[..., 8:] if P else None
    weight = (turned if is_turned else normal)(rng, kind, H, M, N)
    problem = Problem.of("grouped_matmul", dict(B=B, H=H, T=T, N=N, M=M, P=P), dict(x=kind, w=kind), "sm_90a", ["tail"] * (P > 0))
    config = grouped_matmul.default_config(problem)
    assert config["path"] == "hopper" and not isinstance(grouped_matmul.resources(problem, config), str)
    got = place.get(grouped_matmul.run(place.put(x), place.put(weight), place=place, config=config, tail=place.put(tail)))
    assert_close("product", np.ascontiguousarray(got[..., :M]), oracle.grouped_matmul(x, weight), plain.grouped_matmul(x, weight, out_dtype=TYPES[kind]), reduction=N)
    if P:
        assert np.array_equal(got[..., M:], tail)


def test_hoppers_path_leaves_odd_widths_to_the_portable_one(rng):
    """A tuned config serves calls of any width."""
    place, dims = HopperPlace(), dict(B=1, H=2, T=5, N=3, M=20, P=0)
    x, weight = normal(rng, "bfloat16", 1, 2, 5, 3), normal(rng, "bfloat16", 2, 20, 3)
    config = grouped_matmul.default_config(Problem.of("grouped_matmul", dict(dims, N=128, M=512), dict(x="bfloat16", w="bfloat16"), "sm_90a"))
    odd = Problem.of("grouped_matmul", dims, dict(x="bfloat16", w="bfloat16"), "sm_90a")
    assert config["path"] == "hopper" and not isinstance(grouped_matmul.resources(odd, config), str) and grouped_matmul.default_config(odd)["path"] != "hopper"
    got = place.get(grouped_matmul.run(place.put(x), place.put(weight), place=place, config=config))
    assert_close("product", got, oracle.grouped_matmul(x, weight), plain.grouped_matmul(x, weight, out_dtype=TYPES["bfloat16"]), reduction=3)


@pytest.mark.parametrize("L, nq, nk, share", [(1, 1, 1, 1), (2, 5, 7, 0.5), (3, 40, 33, 0.3), (1, 70, 100, 0.1), (2, 33, 64, 0), (1, 1, 65, 1), (1, 65, 1, 0.5)])
def test_lists_of_a_grid(L, nq, nk, share, rng, place):
    """Bytes and int32 kinds, both ways through the grid, a transposed grid read in place."""
    kept = rng.random((L, nq, nk)) < share
    kinds = np.where(kept, rng.integers(-1, 5, kept.shape), -2).astype(np.int32)
    for grid, meaning in ((kept.astype(np.uint8), np.where(kept, -1, -2)), (kinds, kinds), (np.ascontiguousarray(kinds.transpose(0, 2, 1)).transpose(0, 2, 1), kinds)):
        made = {name: place.get(x) for name, x in layout.run(place.put(grid), place=place, config={}).items()}
        for offsets, numbers, names, lines in (("offsets", "cols", "kinds", meaning.reshape(L * nq, nk)),
                                               ("by_key_offsets", "by_key_rows", "by_key_kinds", meaning.transpose(0, 2, 1).reshape(L * nk, nq))):
            at = made[offsets]
            for x, line in enumerate(lines):
                halves = np.flatnonzero(line == -1), np.flatnonzero(line >= 0)
                for n, half in enumerate(halves):
                    part = slice(at[2 * x + n], at[2 * x + n + 1])
                    assert np.array_equal(made[numbers][part], half) and np.array_equal(made[names][part], line[half])
            assert at[0] == 0 and at[-1] == (meaning >= -1).sum()
            assert (made[numbers][at[-1]:] == 0).all() and (made[names][at[-1]:] == -1).all() and len(made[numbers]) == L * nq * nk + 1


HOPPER = [("bfloat16", 1, 128, 1, 64, False, 3), ("float16", 2, 300, 3, 16, True, 3), ("bfloat16", 1, 300, 2, 0, False, 5), ("bfloat16", 3, 130, 1, 8, False, 1)]


@pytest.mark.parametrize("kind, B, S, H, P, is_turned, sms", HOPPER)
def test_latent_decompress_on_hopper(kind, B, S, H, P, is_turned, sms, rng):
    """DeepSeek's sizes by warpgroup products: turns, ring, ragged ends, weights either way round (one block to a cluster: clusters are not emulated)."""
    place = HopperPlace()
    place.sms = sms
    latent, rope = normal(rng, kind, B, S, 576)[..., :512], normal(rng, kind, B, S, P) if P else None
    w_uk, w_uv = ((turned if is_turned else normal)(rng, kind, H, 512, 128) for _ in range(2))
    problem = Problem.of("latent_decompress", dict(B=B, H=H, S=S, R=512, Dn=128, Dv=128, P=P), dict(latent=kind, w_uk=kind, w_uv=kind), "sm_90a")
    config = {**latent_decompress.default_config(problem), "path": "hopper", "cluster": 1}
    got = latent_decompress.run(*map(place.put, (latent, w_uk, w_uv)), place=place, config=config, k_rope=place.put(rope))
    for name, found, true, one in zip("kv", map(place.get, got), oracle.latent_decompress(latent, w_uk, w_uv, k_rope=rope), plain.latent_decompress(latent, w_uk, w_uv, k_rope=rope)):
        assert_close(name, found, true, one, reduction=512)
    if P:
        assert np.array_equal(place.get(got[0])[..., 128:], np.broadcast_to(rope[:, None], (B, H, S, P)))


def test_hopper_is_chosen_for_the_problem_that_the_op_names(rng):
    """DeepSeek's sizes on sm_90a, in the words of the public op."""
    latent, w, rope = normal(rng, "bfloat16", 1, 256, 512), normal(rng, "bfloat16", 1, 512, 128), normal(rng, "bfloat16", 1, 256, 64)
    problem = replace(st.explain("latent_decompress", latent, w, w, k_rope=rope).problem, arch="sm_90a")
    config = latent_decompress.default_config(problem)
    assert config["path"] == "hopper" and not isinstance(latent_decompress.resources(problem, config), str)
