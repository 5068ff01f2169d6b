"""Every Triton kernel compiled for GPUs that are not here, with budgets of registers, spills and shared memory from ptxas's and LLVM's own reports.

The default config of each problem is what runs untuned, so it may not spill at all; what does is named in SPILLS with its bytes. Each kernel's first case is
compiled for every target, the others for Hopper. What was found is kept by digest (aot.py): a second run compiles nothing.
"""
import importlib

import aot
import pytest

from sparsetile.backends.contract import Problem, Resources
from sparsetile.backends.triton import interpreted
from sparsetile.backends.triton.launch import shared_limit

pytest.importorskip("triton")
pytestmark = [pytest.mark.aot, pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1: nothing is compiled")]
HALF, SINGLE, EIGHT = "bfloat16", "float32", "float8_e4m3fn"
WIDEST = {"sm_80": 255, "sm_90a": 255, "sm_100": 255, "gfx942": 512}  # registers of a thread
SPILLS = {  # kernel -> bytes that a thread may store and load: addresses and what loops do not use; the forward's 128 x 64 tiles, and float32 sums of 64 rows
    ("block_attention", "forward"): 896, ("block_attention", "forward_maps"): 160, ("block_attention_backward", "rows"): 32, ("block_attention_backward", "columns"): 448,
    ("block_attention_backward", "columns_maps"): 72, ("block_attention_backward", "rows_maps"): 8, ("block_attention_backward", "rows_again"): 48,
    ("block_attention_backward", "queries_gluon"): 48, ("block_attention_backward", "keys_gluon"): 184, ("block_attention_backward", "ordered_gluon"): 192,
    ("block_attention_backward", "part_keys_gluon"): 136, ("block_attention_backward", "part_queries_gluon"): 24, ("topk", "keep_rows"): 8, ("indexer_topk", "keep_rows"): 8, ("topk", "sample_rows"): 16,
    ("indexer_topk", "sample_rows"): 16, ("indexer_topk", "bound_rows"): 48, ("indexer_topk", "pick_rows"): 8, ("importance_topk", "score_by_queries"): 96,
    ("gather_attention", "gather_gluon"): 40, ("block_attention", "attend_latent"): 88, ("block_attention", "forward_parts_gluon"): 24, ("gather_attention_backward", "queries_gluon"): 32,
    ("gather_attention", "gather_bytes_gluon"): 112, ("gather_attention", "gather_tokens_gluon"): 72, ("topk", "topk_gluon"): 376,
}


def attention(D, Dv, kind=HALF, Hq=8, Hk=2, features=("interval",), T=4096):
    return dict(B=1, Hq=Hq, Hk=Hk, T=T, S=4096, D=D, Dv=Dv, K=512), dict(q=kind, k=kind, v=kind), features


def cases():
    for op in ("block_attention", "block_attention_backward"):
        yield op, "128", attention(128, 128)
        yield op, "64", attention(64, 64)
        yield op, "96x40-bitmap", attention(96, 40, features=("interval", "bitmap", "kv_length", "sink"))
        yield op, "192x128-full", attention(192, 128, features=())
        yield op, "128-float16-softcap-order", attention(128, 128, "float16", features=("softcap", "order", "bitmap"))
        yield op, "128x32", attention(128, 32)
        yield op, "64x16-softcap", attention(64, 16, features=("interval", "bitmap", "softcap"))
        yield op, "576x512", attention(576, 512, Hq=128, Hk=1)
        yield op, "64-float32", attention(64, 64, SINGLE)
    yield "block_attention_backward", "128-global-random", attention(128, 128, features=("interval", "global", "random"))
    yield "block_attention_backward", "64-bitmap-per-head", attention(64, 64, features=("bitmap", "per_head"))
    yield "block_attention_backward", "128-fixed", attention(128, 128, features=("interval", "causal+fixed"))
    yield "block_attention", "256", attention(256, 256)
    yield "block_attention", "192-lengths", attention(192, 192, features=("interval", "bitmap", "kv_length"))
    yield "block_attention", "128-lengths", attention(128, 128, features=("interval", "bitmap", "kv_length"))
    yield "block_attention", "128-order", attention(128, 128, features=("interval", "order"))
    yield "block_attention", "decode-128", attention(128, 128, Hq=32, Hk=8, T=1, features=("interval", "kv_length"))
    yield "block_attention", "decode-64-t16", attention(64, 64, Hq=32, Hk=8, T=16, features=("bitmap", "softcap"))
    yield "block_attention", "decode-576x512", attention(576, 512, Hq=16, Hk=1, T=1, features=("shared_kv", "kv_length"))
    yield "block_attention", "latent-decode", attention(576, 512, Hq=128, Hk=1, T=1, features=("shared_kv",))
    yield "block_attention", "paged-latent-decode", attention(576, 512, "float16", Hq=128, Hk=1, T=2, features=("shared_kv", "interval", "bitmap", "kv_length", "paged", "sink"))
    yield "block_attention", "paged-decode-128", attention(128, 128, Hq=32, Hk=8, T=1, features=("interval", "kv_length", "paged"))
    yield "block_attention", "paged-decode-576x512", attention(576, 512, Hq=16, Hk=1, T=1, features=("shared_kv", "kv_length", "paged"))
    yield "block_attention", "paged-128", attention(128, 128, features=("interval", "kv_length", "paged"))
    for T, name in ((4096, "float8-128"), (1, "float8-decode-128")):
        dims, kinds, _ = attention(128, 128, Hq=32, Hk=8, T=T)
        yield "block_attention", name, (dims, kinds | dict(k=EIGHT, v=EIGHT), ("interval", "kv_length", "scale"))
    for op in ("gather_attention", "gather_attention_backward"):
        yield op, "128", attention(128, 128, features=())
        yield op, "576x512", attention(576, 512, Hq=128, Hk=1, features=("shared_kv", "causal"))
    for kind, Hq, T in ((HALF, 16, 1), ("float16", 128, 1), (HALF, 16, 4096)):
        dims, kinds, _ = attention(576, 512, kind, Hq, 1, T=T)
        eight = kinds | dict(k="latent_fp8", v="latent_fp8")
        yield "block_attention", f"float8-latent-{kind}-h{Hq}-t{T}", (dims, eight, ("shared_kv", "kv_length", "paged", "interval"))
        yield "gather_attention", f"float8-latent-{kind}-h{Hq}-t{T}", (dims, eight, ("shared_kv",))
    yield "attention_delta", HALF, (dict(B=1, Hq=8, T=4096, Dv=128), dict(out=HALF), ("sink",))
    yield "merge_attention", HALF, (dict(B=1, Hq=8, T=4096, Dv=128, N=2), dict(outs=HALF), ())
    for kind in (HALF, SINGLE):
        yield "merge_attention", f"weights-{kind}", (dict(B=1, Hq=64, T=8192, Dv=128, N=3), dict(out=HALF, weights=kind), ("weights",))
    yield "indexer_scores", EIGHT, (dict(B=1, H=64, T=2048, S=32768, D=128), dict(q=EIGHT, k=EIGHT), ("causal",))
    yield "indexer_topk", EIGHT, (dict(B=1, H=64, T=2048, S=32768, D=128, K=2048), dict(q=EIGHT, k=EIGHT), ("causal",))
    yield "indexer_topk", "128k", (dict(B=1, H=64, T=4096, S=131072, D=128, K=2048), dict(q=EIGHT, k=EIGHT), ("scale", "window"))
    paged = ("causal", "scale", "window", "q_start", "paged")
    yield "indexer_scores", "paged", (dict(B=8, H=64, T=1, S=32768, D=128), dict(q=EIGHT, k=EIGHT), paged)
    yield "indexer_scores", "paged-h4", (dict(B=8, H=4, T=1, S=32768, D=128), dict(q=EIGHT, k=EIGHT), paged)
    yield "indexer_topk", "paged", (dict(B=8, H=64, T=1, S=32768, D=128, K=2048), dict(q=EIGHT, k=EIGHT), paged)
    yield "importance_topk", HALF, (dict(B=1, Hq=64, Hk=4, T=8192, S=8192, C=511, D=128, K=16), dict(q=HALF, k=HALF), ("force_first", "force_last"), 64)
    yield "importance_topk", "decode-float16", (dict(B=8, Hq=64, Hk=4, T=1, S=8192, C=511, D=128, K=16), dict(q="float16", k="float16"), ("force_first", "force_last"), 64)
    yield "importance_topk", SINGLE, (dict(B=1, Hq=14, Hk=2, T=100, S=8192, C=511, D=72, K=16), dict(q=SINGLE, k=SINGLE), ("return_scores",), 64)
    yield "topk", SINGLE, (dict(B=1, T=4096, S=131072, K=2048), dict(scores=SINGLE), ())
    yield "latent_decompress", HALF, (dict(B=1, H=128, S=4096, R=512, Dn=128, Dv=128, P=64), dict(latent=HALF, w_uk=HALF, w_uv=HALF), ())
    yield "latent_decompress", "float16-no-rotary", (dict(B=2, H=16, S=300, R=512, Dn=128, Dv=128, P=0), dict(latent="float16", w_uk="float16", w_uv="float16"), ())
    yield "grouped_matmul", HALF, (dict(B=1, H=128, T=4096, N=128, M=512, P=64), dict(x=HALF, w=HALF), ("tail",))
    yield "append", "copy", (dict(B=8, T=1, D=128), dict(rows=HALF, pool=HALF), ("copy", "ring"))
    yield "append", "latent", (dict(B=8, T=1, D=512), dict(rows=HALF, pool="uint8"), ("latent_fp8",))
    yield "append", "indexer", (dict(B=8, T=1, D=128), dict(rows=HALF, pool="uint8"), ("indexer_fp8",))
    yield "page_rows", "selection", (dict(B=128, Hk=1, T=1, K=2048), dict(indices="int32"), ())
    for Hq, kind, features in ((8, "float16", ("shared_kv", "causal", "kv_length", "sink")), (16, HALF, ("shared_kv",)), (32, HALF, ("shared_kv", "causal", "q_start"))):
        yield "gather_attention", f"few-heads-{Hq}", attention(576, 512, kind, Hq, 1, features)
    yield "gather_attention", "long blocks of each head", (dict(B=1, Hq=32, Hk=8, T=16384, S=16384, D=128, Dv=128, K=4), dict(q=HALF, k=HALF, v=HALF), ("causal", "per_head", "lse"), 512)
    yield "gather_attention_backward", "long blocks of each head", (dict(B=1, Hq=32, Hk=8, T=16384, S=16384, D=128, Dv=128, K=4), dict(q=HALF, k=HALF, v=HALF), ("causal", "per_head", "gradient"), 512)
    for granularity in (1, 64):
        yield "selection_bitmaps", f"blocks of {granularity}", (dict(B=1, Hq=32, Hk=8, T=16384, S=16384, K=2048), dict(indices="int32"), ("causal",), granularity)
    yield "layout", "blocks", (dict(B=1, Hq=8, Hk=8, T=4096, S=4096, D=128, Dv=128), dict(mask="uint8"), ())


def everywhere():
    first = set()
    for op, name, case in cases():
        for arch in aot.TARGETS if op not in first else ("sm_90a", "sm_80", "gfx942") if name == "float8-decode-128" else ("sm_90a",):  # two of which cannot convert it
            yield pytest.param(op, case, arch, id=f"{op}-{name}-{arch}")
        first.add(op)


@pytest.mark.parametrize("op, case, arch", list(everywhere()))
def test_budget(op, case, arch):
    kernel = importlib.import_module(f"sparsetile.backends.triton.{op}")
    dims, dtypes, features, *granularity = case
    problem = Problem.of(op, dims, dtypes, arch, features, 1.0, *granularity)
    refusal = kernel.supports(problem)
    if refusal:
        pytest.skip(refusal)
    default = kernel.default_config(problem)
    portable, stored = lambda: [kernel.portable_config(problem)], lambda: [default | {"path": "stored"}]
    configs = [default, *dict(gluon=portable, tokens=portable, kept=stored).get(default.get("path"), list)()]
    for config in configs:
        asked = kernel.resources(problem, config)
        assert isinstance(asked, Resources), asked
    artifacts = [artifact for config in configs for artifact in kernel.artifacts(problem, config)]
    assert artifacts
    for artifact in artifacts:
        name, used = artifact["fn"].__name__, aot.resources(artifact, arch)
        assert used["registers"] <= WIDEST[arch]
        assert used["spills"] <= SPILLS.get((op, name), 0), f"{op}.{name}: {used} with {artifact['constexprs']}"
        assert used["shared"] <= shared_limit(arch), f"{op}.{name}: {used} with {artifact['constexprs']}"
        if name.endswith("_gluon") or name == "attend_latent" or any("tensordesc" in str(kind) for kind in artifact["signature"].values()):
            assert not used["said"], f"{op}.{name}: ptxas serialised products or ignored a register budget: {used['said']}"


@pytest.mark.parametrize("op", ["block_attention", "block_attention_backward", "gather_attention", "gather_attention_backward"])
def test_what_resources_lets_through_fits(op):
    """The largest config of odd widths that is not refused compiles, and within the chip's shared memory."""
    kernel = importlib.import_module(f"sparsetile.backends.triton.{op}")
    problem = Problem.of(op, *attention(72, 40)[:2], "sm_80")
    config = {knob.name: max(knob.values) for knob in kernel.TUNABLES}
    while isinstance(kernel.resources(problem, config), str):
        knob = next(knob for knob in kernel.TUNABLES if config[knob.name] != min(knob.values))
        config[knob.name] = max(value for value in knob.values if value < config[knob.name])
    for artifact in kernel.artifacts(problem, config):
        used = aot.resources(artifact, "sm_80")
        assert used["shared"] <= shared_limit("sm_80"), f"{artifact['fn'].__name__}: {used} with {config}"


@pytest.mark.parametrize("D, programs", [(64, 3), (128, 2)])
def test_the_portable_forward_shares_a_multiprocessor(D, programs):
    """One program multiplies while others take exponentials: so many have to fit a Hopper's registers and shared memory. By default narrow heads run Gluon all the same."""
    kernel = importlib.import_module("sparsetile.backends.triton.block_attention")
    problem = Problem.of("block_attention", *attention(D, D)[:2], "sm_90a", ("interval",), 1.0)
    (artifact,) = kernel.artifacts(problem, kernel.portable_config(problem))
    used = aot.resources(artifact, "sm_90a")
    assert programs * (used["shared"] + 1024) <= 228 * 1024 and programs * used["threads"] * -(-used["registers"] // 8) * 8 <= 65536, used
    default = kernel.default_config(problem)
    assert (default["path"], default["block_q"], default["block_k"]) == ("gluon", 128, 128)


@pytest.mark.parametrize("op, kind, T", [("gather_attention", HALF, 64), ("gather_attention", "latent_fp8", 64), ("block_attention", HALF, 1)])
def test_resources_of_the_latent_are_what_is_taken(op, kind, T):
    """Its ring fills shared memory: a tile more in it, or a conversion of layouts through it, has to be counted."""
    kernel = importlib.import_module(f"sparsetile.backends.triton.{op}")
    problem = Problem.of(op, dict(B=128, Hq=128, Hk=1, T=T, S=32768, D=576, Dv=512, K=2048), dict(q=HALF, k=kind, v=kind), "sm_90a", ("shared_kv",), 1.0)
    config = kernel.default_config(problem)
    asked, used = kernel.resources(problem, config), aot.resources(kernel.artifacts(problem, config)[0], "sm_90a")
    assert config["path"] in ("gluon", "latent") and asked.shared - 64 <= used["shared"] <= asked.shared, (asked, used)


def test_the_best_one_of_a_row_compiles():
    """Triton makes a constant of an argument that is 1, which has not what a tensor has."""
    kernel, problem = importlib.import_module("sparsetile.backends.triton.topk"), Problem.of("topk", dict(B=1, T=64, S=32768, K=1), dict(scores=SINGLE), "sm_90a")
    for artifact in kernel.artifacts(problem, kernel.default_config(problem)):
        if "k" in artifact["signature"]:
            kinds = {name: kind for name, kind in artifact["signature"].items() if name != "k"}
            assert aot.resources({**artifact, "signature": kinds, "constexprs": {**artifact["constexprs"], "k": 1}}, "sm_90a")["registers"]


def test_one_key_chosen():
    """Triton makes a constant of an integer that is 1, which no loop may then change."""
    from sparsetile.backends.triton import index_keep, indexer_topk
    problem = Problem.of("indexer_topk", dict(B=1, H=64, T=2048, S=32768, D=128, K=1), dict(q=EIGHT, k=EIGHT), "sm_90a", ("causal",), 1.0)
    config = indexer_topk.default_config(problem) | {"path": "kept", "capacity": 8192, "sample": 1024}
    for artifact in index_keep.artifacts(problem, config, causal=True, windows=False):
        if "top_k" in artifact["signature"]:
            fixed = artifact | dict(signature={name: kind for name, kind in artifact["signature"].items() if name != "top_k"}, constexprs=artifact["constexprs"] | dict(top_k=1))
            assert aot.resources(fixed, "sm_90a")["registers"] > 0
