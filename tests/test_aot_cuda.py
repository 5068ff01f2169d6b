"""Every .cu of the CuPy backend compiled for GPUs that are not here, with budgets of registers, spills and shared memory from ptxas's own report.

The default config of each problem is what runs untuned, so it may not spill at all; what does is named in SPILLS with its bytes. Cubins are kept by
digest in the backend's own disk cache: a second run compiles nothing.
"""
import importlib
import re

import pytest

from sparsetile.backends.contract import Problem
from sparsetile.backends.cupy import compile as nvrtc

pytestmark = pytest.mark.aot
ARCHES = ("sm_80", "sm_90a")
HALF, SINGLE = "bfloat16", "float32"
ATTENTION = ("block_attention", "block_attention_backward", "gather_attention", "gather_attention_backward")
SPILLS = {  # source -> bytes that a thread may store and load: registers that ptxas caps for occupancy, loop counters and addresses
    "block_attention": 256, "block_attention_float32": 64, "block_attention_backward": 64, "gather_attention_backward": 128, "topk": 160, "indexer_scores": 64, "layout": 32, "indexer_topk_hopper": 96,
    "block_attention_backward_hopper": 248,  # the planning warp has 24 registers
    "block_attention_backward_two_pass": 272,  # the same warp; D 192: where an item's keys leave
    "selection_bitmaps": 8,  # a call of 64-bit division
    "importance_topk_hopper": 80,  # wide heads in one group: some of a lane's 32 lse, once an item
    "gather_attention_union": 192, "gather_backward_union": 160,  # addresses of the item, once a block
    "gather_backward_queries_hopper": 64, "gather_backward_keys_hopper": 112,  # beside 160 and 192 sums a thread: which item it is, once an item; four sums on their way
}


def attention(D, Dv, kind=HALF, Hq=8, Hk=2, features=(), T=4096):
    return dict(B=1, Hq=Hq, Hk=Hk, T=T, S=4096, D=D, Dv=Dv, K=512), dict(q=kind, k=kind, v=kind), features


def cases():
    for op in ATTENTION:
        for D, Dv in ((64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (31, 33)):
            yield op, f"{D}x{Dv}", attention(D, Dv)
        yield op, "128x128-float16", attention(128, 128, "float16")
        yield op, "64x64-order", attention(64, 64, features=("order",))
        yield op, "128x128-order", attention(128, 128, features=("order",))
        yield op, "128x128-float16-softcap-order", attention(128, 128, "float16", features=("softcap", "order"))
        yield op, "576x512-shared", attention(576, 512, Hq=128, Hk=1, features=("shared_kv",))
        yield op, "576x512-shared-float16", attention(576, 512, "float16", Hq=128, Hk=1, features=("shared_kv",))
        yield op, "576x512", attention(576, 512, Hq=128, Hk=1)
        yield op, "128x128-float32", attention(128, 128, SINGLE)
    for D, Dv, Hq, Hk, T, features in ((128, 128, 32, 8, 1, ()), (64, 64, 8, 8, 4, ("softcap",)), (256, 256, 8, 1, 16, ()), (31, 33, 8, 2, 2, ()), (192, 128, 16, 2, 16, ("per_head",)),
                                       (576, 512, 16, 1, 1, ("shared_kv",)), (576, 512, 128, 1, 1, ("shared_kv",)), (576, 512, 16, 1, 1, ())):
        yield "block_attention", f"decode-{D}x{Dv}-h{Hq}:{Hk}-t{T}", attention(D, Dv, Hq=Hq, Hk=Hk, T=T, features=features)
    for D, Dv, kind, group, granularity, features in ((128, 128, HALF, 16, 64, ("causal",)), (64, 64, "float16", 4, 64, ("softcap",)), (128, 128, HALF, 64, 32, ()), (96, 40, HALF, 1, 16, ())):
        for op in ("gather_attention", "gather_attention_backward"):
            yield op, f"blocks-{D}x{Dv}-{kind}-g{granularity}-h{group}", (*attention(D, Dv, kind, 4 * group, 4, features), granularity)
    for kind, D, Dv, Hq, Hk, T in ((HALF, 128, 128, 32, 8, 1), (HALF, 576, 512, 16, 1, 1), (HALF, 128, 128, 8, 2, 4096), (SINGLE, 128, 128, 8, 2, 64)):
        yield "block_attention", f"paged-{D}x{Dv}-{kind}-t{T}", attention(D, Dv, kind, Hq, Hk, ("paged", *["shared_kv"] * (D > 512)), T)
    for op, T, Hq, features in (("block_attention", 1, 128, ("paged",)), ("block_attention", 4096, 16, ("paged",)), ("gather_attention", 1, 128, ()), ("gather_attention", 1, 16, ())):
        dims, kinds, _ = attention(576, 512, Hq=Hq, Hk=1, T=T)
        yield op, f"float8-latent-h{Hq}-t{T}", (dims, kinds | dict(k="latent_fp8", v="latent_fp8"), ("shared_kv", *features))
    yield "block_attention", "float8-128x128-t1", (attention(128, 128, Hq=32, Hk=8, T=1)[0], dict(q=HALF, k="float8_e4m3fn", v="float8_e4m3fn"), ("scale",))
    for kind, D, Dv in ((HALF, 128, 128), ("float16", 64, 64), ("float8_e4m3fn", 128, 128), (HALF, 192, 128)):
        yield "block_attention", f"float8-{D}x{Dv}-{kind}", (attention(D, Dv)[0], dict(q=kind, k="float8_e4m3fn", v="float8_e4m3fn"), ("scale",))
    for kind in (HALF, SINGLE):
        yield "attention_delta", kind, (dict(B=1, Hq=8, T=4096, Dv=128), dict(out=kind), ())
        yield "merge_attention", kind, (dict(B=1, Hq=8, T=4096, Dv=128, N=2), dict(outs=kind), ())
        yield "merge_attention", f"weights-{kind}", (dict(B=1, Hq=64, T=8192, Dv=128, N=3), dict(out=HALF, weights=kind), ("weights",))
    for kind in (HALF, SINGLE, "float8_e4m3fn"):
        yield "indexer_scores", kind, (dict(B=1, H=64, T=2048, S=32768, D=128), dict(q=kind, k=kind), ("causal",))
        yield "indexer_topk", kind, (dict(B=1, H=64, T=2048, S=32768, D=128, K=2048), dict(q=kind, k=kind), ("causal",))
        weights = HALF if kind.startswith("float8") else kind
        yield "latent_decompress", kind, (dict(B=1, H=128, S=4096, R=512, Dn=128, Dv=128, P=64), dict(latent=kind, w_uk=weights, w_uv=weights), ("scale",))
    for op, more in (("indexer_scores", {}), ("indexer_topk", dict(K=2048))):
        yield op, "paged", (dict(B=8, H=64, T=1, S=32768, D=128, **more), dict(q="float8_e4m3fn", k="float8_e4m3fn"), ("causal", "scale", "window", "q_start", "paged"))
    yield "indexer_scores", "decode", (dict(B=128, H=64, T=1, S=32768, D=128), dict(q="float8_e4m3fn", k="float8_e4m3fn"), ("causal", "scale"))
    for kind, Hq, D, S in ((HALF, 64, 128, 8192), (HALF, 64, 192, 65536), (HALF, 64, 192, 131072), ("float16", 28, 72, 8192), ("float16", 128, 192, 8192), (SINGLE, 64, 128, 8192)):
        yield "importance_topk", f"{kind}-h{Hq}:4-d{D}-{S}", (dict(B=1, Hq=Hq, Hk=4, T=8192, S=S, C=S // 16 - 1, D=D, K=16), dict(q=kind, k=kind), ("force_first", "force_last"), 64)
    yield "topk", "float32", (dict(B=1, T=4096, S=131072, K=2048), dict(scores=SINGLE), ())
    yield "grouped_matmul", HALF, (dict(B=1, H=128, T=4096, N=128, M=512, P=64), dict(x=HALF, w=HALF), ("tail",))
    yield "append", "copy", (dict(B=8, T=1, D=128), dict(rows=HALF, pool=HALF), ("copy", "ring"))
    yield "append", "latent", (dict(B=8, T=1, D=512), dict(rows=HALF, pool="uint8"), ("latent_fp8",))
    yield "append", "indexer", (dict(B=8, T=1, D=128), dict(rows=SINGLE, pool="uint8"), ("indexer_fp8",))
    yield "page_rows", "selection", (dict(B=128, Hk=1, T=1, K=2048), dict(indices="int32"), ())
    for granularity in (1, 64):
        yield "selection_bitmaps", f"blocks of {granularity}", (dict(B=1, Hq=32, Hk=8, T=16384, S=16384, K=2048), dict(indices="int32"), ("causal",), granularity)
    yield "layout", "blocks", (dict(B=1, Hq=8, Hk=8, T=4096, S=4096, D=128, Dv=128), dict(mask="uint8"), ())


@pytest.fixture(scope="module", autouse=True)
def compiler():
    try:
        nvrtc.compiler()
    except RuntimeError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("op, name, case", [pytest.param(*c, id=f"{c[0]}-{c[1]}") for c in cases()])
def test_budget(op, name, case, arch):
    kernel = importlib.import_module(f"sparsetile.backends.cupy.{op}")
    dims, dtypes, features, *granularity = case
    problem = Problem.of(op, dims, dtypes, arch, features, 1.0, *granularity)
    assert kernel.supports(problem) is None
    within_budget(kernel, problem, kernel.default_config(problem), arch)


@pytest.mark.parametrize("kind", [HALF, "float16"])
def test_a_sum_over_heads_is_within_budget(kind):
    kernel = importlib.import_module("sparsetile.backends.cupy.grouped_matmul")
    problem = Problem.of("grouped_matmul", dict(B=1, H=128, T=4096, N=128, M=512, P=0), dict(x=kind, w=kind, out=SINGLE), "sm_90a", ["inner_heads"])
    within_budget(kernel, problem, kernel.default_config(problem), "sm_90a")


@pytest.mark.parametrize("kind", [HALF, "float16"])
@pytest.mark.parametrize("D, Dv, features", [(64, 64, ()), (128, 128, ()), (192, 128, ("order",)), (136, 64, ())])
def test_two_passes_are_within_budget(D, Dv, features, kind):
    """The default of the backward from D 129 on and for layouts of several parts, and a value of its path below."""
    kernel = importlib.import_module("sparsetile.backends.cupy.block_attention_backward")
    problem = Problem.of("block_attention_backward", *attention(D, Dv, kind)[:2], "sm_90a", features)
    default = kernel.default_config(problem)
    assert (default["path"] == "two_pass") == (D > 128)
    within_budget(kernel, problem, {**default, "path": "two_pass"}, "sm_90a")


def within_budget(kernel, problem, config, arch):
    asked = kernel.resources(problem, config)
    assert not isinstance(asked, str), asked
    for artifact in kernel.artifacts(problem, config):
        found = nvrtc.report(artifact["source"], artifact["defines"], arch)
        said = set(re.findall(r"\bC7[56]\d\d\b", nvrtc.cubin(artifact["source"], artifact["defines"], arch)[1])) - {"C7519"}
        assert not said, f"{artifact['source']}: ptxas serialised products, ignored a register budget or refused a shape: {sorted(said)}"
        assert set(artifact["names"]) <= set(found), f"{artifact['source']}.cu defines {sorted(found)}, artifacts() names {artifact['names']}"
        for entry in artifact["names"]:
            used = found[entry]
            assert used["registers"] <= 255
            assert used["spills"] <= SPILLS.get(artifact["source"], 0), f"{artifact['source']}.{entry}: {used} under {artifact['defines']}"
            assert asked.shared + used["shared"] <= nvrtc.shared_limit(arch)


@pytest.mark.parametrize("kind", [HALF, "float16"])
@pytest.mark.parametrize("block_q", [128, 192])
def test_narrow_heads_in_classes_spill_nothing(block_q, kind):
    """Strided patterns take 128 rows by default; a layout or a profile may ask for 192."""
    kernel = importlib.import_module("sparsetile.backends.cupy.block_attention")
    problem = Problem.of("block_attention", *attention(64, 64, kind)[:2], "sm_90a", ("static", "causal+strided+window", "order"))
    default = kernel.default_config(problem)
    assert (default["path"], default["block_q"]) == ("hopper", 128)
    (found,) = [nvrtc.report(a["source"], a["defines"], "sm_90a") for a in kernel.artifacts(problem, {**default, "block_q": block_q}) if a["defines"].get("PARTED")]
    assert found["forward"]["spills"] == 0, found


@pytest.mark.parametrize("kind", [HALF, "float16"])
@pytest.mark.parametrize("heads", [8, 16, 32])
def test_few_heads_spill_nothing(heads, kind):
    """Path tokens has a build for 8, 16 and 32 heads."""
    kernel = importlib.import_module("sparsetile.backends.cupy.gather_attention")
    problem = Problem.of("gather_attention", *attention(576, 512, kind, Hq=heads, Hk=1, features=("shared_kv",))[:2], "sm_90a", ("shared_kv",))
    config = kernel.default_config(problem)
    (artifact,) = kernel.artifacts(problem, config)
    found, log = nvrtc.report(artifact["source"], artifact["defines"], "sm_90a"), nvrtc.cubin(artifact["source"], artifact["defines"], "sm_90a")[1]
    asked = kernel.resources(problem, config)
    assert config["path"] == "tokens" and artifact["defines"]["HEADS"] == heads and not re.findall(r"\bC7[56]\d\d\b", log)
    assert found["gather_tokens_hopper"]["spills"] == 0 and found["gather_tokens_hopper"]["registers"] <= asked.registers and asked.shared <= nvrtc.shared_limit("sm_90a")


@pytest.mark.parametrize("op", ATTENTION)
def test_every_config_is_refused_or_complete(op):
    """What resources() lets through has every constant that the source needs: one odd config of each kernel compiles."""
    kernel = importlib.import_module(f"sparsetile.backends.cupy.{op}")
    problem = Problem.of(op, *attention(72, 40)[:2], "sm_80")
    config = {knob.name: knob.values[-1] for knob in kernel.TUNABLES}
    while isinstance(kernel.resources(problem, config), str):  # the largest of everything is refused; step down
        for knob in kernel.TUNABLES:
            at = knob.values.index(config[knob.name])
            if at:
                config[knob.name] = knob.values[at - 1]
                break
    for artifact in kernel.artifacts(problem, config):
        assert nvrtc.report(artifact["source"], artifact["defines"], "sm_80")


def test_small_chips_have_a_default():
    """Chips with 99 KiB a block: a config that fits, or a sentence."""
    for op in ATTENTION:
        kernel = importlib.import_module(f"sparsetile.backends.cupy.{op}")
        for D, Dv in ((64, 64), (128, 128), (192, 128), (256, 256), (320, 320)):
            problem = Problem.of(op, *attention(D, Dv)[:2], "sm_86")
            assert kernel.supports(problem) is None, (op, D, Dv)
    refusal = importlib.import_module("sparsetile.backends.cupy.block_attention_backward").supports(Problem.of("block_attention_backward", *attention(576, 512)[:2], "sm_86"))
    assert "shared memory" in refusal and refusal[-1] != "\n"


def test_cache_survives_damage(tmp_path, monkeypatch):
    """A cubin cut short or overwritten is compiled again; a fresh one is read without compiling."""
    monkeypatch.setenv("SPARSETILE_CACHE_DIR", str(tmp_path))
    first = nvrtc.cubin("merge_attention", dict(KIND=0, OUT_KIND=0, VECTOR=1, LANES=32, PARTS=0, WEIGHTS=-1), "sm_80")[0]
    (file,) = (tmp_path / "cupy").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:100], b"", whole[:50] + b"\0" + whole[51:]):
        file.write_bytes(damaged)
        assert nvrtc.cubin("merge_attention", dict(KIND=0, OUT_KIND=0, VECTOR=1, LANES=32, PARTS=0, WEIGHTS=-1), "sm_80")[0] == first
        assert len(file.read_bytes()) > len(whole) - 64  # the log tells the time it took
    monkeypatch.setattr(nvrtc.compiler().__class__, "compile", lambda *a: pytest.fail("compiled although the cache was whole"))
    assert nvrtc.cubin("merge_attention", dict(KIND=0, OUT_KIND=0, VECTOR=1, LANES=32, PARTS=0, WEIGHTS=-1), "sm_80")[0] == first


def test_digest_knows_its_sources():
    """Headers, defines and architecture are in the key."""
    base = nvrtc.digest("block_attention", dict(A=1), "sm_80")
    assert len({base, nvrtc.digest("block_attention", dict(A=2), "sm_80"), nvrtc.digest("block_attention", dict(A=1), "sm_90a"), nvrtc.digest("merge_attention", dict(A=1), "sm_80")}) == 4
    assert {path.name for path in nvrtc.sources("block_attention")} >= {"block_attention.cu", "tiles.cuh", "mma.cuh", "numbers.cuh", "lists.cuh"}
