"""What indexer_topk holds beyond its inputs and outputs, by a place that counts bytes and makes none: under 50 MB in every config, where all scores of 4096 queries with 128k keys are 2 GB."""
import itertools
import weakref

import numpy as np
import pytest
import torch

from counting import CountingPlace
from sparsetile.backends.arrays import torch_dtype
from sparsetile.backends.contract import Problem
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import indexer_topk as cupy_kernel
from sparsetile.backends.triton import index_keep, index_score, relaunch, select_rows
from sparsetile.backends.triton import indexer_topk as triton_kernel
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup, schema

MOST = 50e6
SHAPES = {"4096 x 128k": (1, 4096, 131072), "2048 x 32k": (1, 2048, 32768), "decode": (128, 1, 32768), "batches": (3, 700, 50001), "1M": (1, 512, 2 ** 20), "few long": (1, 2, 2 ** 20), "4M": (1, 64, 2 ** 22)}
KERNELS = {"cupy": cupy_kernel, "triton": triton_kernel}


class MetaPlace(CountingPlace):
    """For Triton: tensors without memory."""

    def empty(self, shape, dtype):
        x = torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
        size = x.numel() * x.element_size()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(x.untyped_storage(), self.forget, size)
        return x

    def forget(self, size):
        self.alive -= size


@pytest.fixture
def held(monkeypatch):
    """held(backend, shape, config, pool, scores): the most bytes at once beyond inputs and outputs, and the rows that were scored and chosen from."""
    launched = []
    monkeypatch.setattr(nvrtc, "function", lambda source, name, *rest: lambda grid, *values: launched.append((name, grid)))
    monkeypatch.setattr(index_score, "score", lambda q, k, w, scores, **o: launched.append(("scores", scores.shape[0] * scores.shape[1])))
    monkeypatch.setattr(select_rows, "select_rows", lambda scores, *rest, **o: launched.append(("topk", scores.shape[0] * scores.shape[1])))
    monkeypatch.setattr(triton_kernel, "pool_launch", lambda scores, pooled, *rest: pooled)
    monkeypatch.setattr(relaunch, "launch", lambda fn, grid, *rest: launched.append(("topk" if fn.__name__ == "pick_rows" else "other", grid[0])))

    def run(backend, shape, config, pool=1, scores=False):
        (B, T, S), place = SHAPES[shape], CountingPlace() if backend == "cupy" else MetaPlace()
        arrays = [place.empty((B, 64, T, 128), "float8_e4m3fn"), place.empty((B, S, 128), "float8_e4m3fn"), place.empty((B, 64, T), "float32"), place.empty((B, S), "float32")]
        q, k, w, k_scale = arrays
        given, place.most = place.alive, place.alive
        launched.clear()
        outputs = KERNELS[backend].run(q, k, w, 2048, place=place, config=config, k_scale=k_scale, causal=False, pool=pool, return_scores=scores)
        made = sum(int(np.prod(x.shape)) * 4 for x in outputs if x is not None)
        weights = B * 64 * T * 4 if backend == "triton" else 0  # the copy with heads side by side is torch's own
        chosen = sum(n for name, n in launched if name in ("topk", "topk_fast"))
        return place.most - given - made + weights, chosen
    return run


def problem(shape):
    B, T, S = SHAPES[shape]
    return Problem.of("indexer_topk", dict(B=B, H=64, T=T, S=S, D=128, K=2048), dict(q="float8_e4m3fn", k="float8_e4m3fn"), "sm_90a", ["scale"])


PATHS = [("cupy", "scratch"), ("triton", "stored"), ("triton", "kept")]


@pytest.mark.parametrize("pool, scores", [(1, False), (1, True), (2, False), (64, True)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend, path", PATHS)
def test_the_default_holds_less_than_the_limit(held, backend, path, shape, pool, scores):
    B, T, S = SHAPES[shape]
    config = KERNELS[backend].default_config(problem(shape)) | {"path": path}
    found, chosen = held(backend, shape, config, pool, scores)
    assert chosen == B * T and 0 < found <= MOST


def test_the_fused_kernel_holds_nothing(held):
    config = cupy_kernel.default_config(problem("4096 x 128k"))
    assert config["path"] == "fused" and held("cupy", "4096 x 128k", config) == (0, 0)


@pytest.mark.parametrize("shape", ["4096 x 128k", "2048 x 32k", "decode"])
@pytest.mark.parametrize("backend, path", PATHS)
def test_no_config_of_the_tuner_holds_more(held, backend, path, shape):
    """Every value of what moves memory."""
    kernel, about = KERNELS[backend], problem(shape)
    moving = [t for t in kernel.TUNABLES if t.name in ("scratch_mb", "queries", "capacity", "sample" if path == "kept" else "splits")]
    assert {"scratch_mb", "queries"} <= {t.name for t in moving}
    base = kernel.default_config(about) | {"path": path}
    for values in itertools.product(*(t.values for t in moving)):
        config = base | {t.name: value for t, value in zip(moving, values)}
        assert held(backend, shape, config)[0] <= MOST, config


@pytest.mark.parametrize("backend", KERNELS)
def test_more_is_refused(backend):
    for scratch in (47, 48, 64, 256):
        with pytest.raises(ValueError, match="config: expected scratch_mb in "):
            dispatch.check_config(KERNELS[backend], problem("4096 x 128k"), {"scratch_mb": scratch}, "config")


def test_what_is_shipped_holds_no_more():
    found = [(e, path) for path in sorted(lookup.SHIPPED.glob("*/indexer_topk.yaml")) for e in schema.load(path)["entries"] if e["backend"] in KERNELS]
    assert found
    for e, path in found:
        dispatch.check_config(KERNELS[e["backend"]], problem("4096 x 128k"), dict(e["config"]), str(path))


def test_whole_tiles_of_queries_where_some_fit():
    """Triton's score kernel takes queries by tiles: 68 rows of 128k would be three of 32, one of them nearly empty."""
    config = triton_kernel.default_config(problem("4096 x 128k"))
    assert config["path"] == "kept" and index_keep.rows_at_once(1, 4096, config) == 16 * config["queries"] == 1024
    config |= dict(path="stored", queries=32)
    assert triton_kernel.rows_at_once(131072, 0, config) == 2 * config["queries"] == 64 and config["splits"] == 4
    assert triton_kernel.default_config(problem("2048 x 32k"))["splits"] == 4
