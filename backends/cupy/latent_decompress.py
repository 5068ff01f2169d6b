"""Keys and values out of the shared latent of MLA, by one kernel, each written once in the layout that attention reads.

    latent [B,S,R]  w_uk [H,R,Dn]  w_uv [H,R,Dv]  k_rope [B,S,P]  latent_scale [B,S,ceil(R/128)] float32  ->  k [B,H,S,Dn+P], v [B,H,S,Dv]

k[h] = [latent w_uk[h] | k_rope], v[h] = latent w_uv[h], in w_uk's type; k_rope is copied bit for bit where its type is the same. Weights are read in place:
either of their last two axes may be the contiguous one. latent_scale multiplies 128 latent values each; float8 latents are exact in the weights' type, every
128 products are summed alone in float32 and then scaled, so only the output is rounded. Types: float16 or bfloat16 weights with latents of the same type or
float8_e4m3fn run on tensor cores, every other mix by fused multiply-adds in float32. The path "hopper" (latent_decompress_hopper.cu) is for sm_90a and DeepSeek's
sizes; arrays that its copy engine cannot address (odd strides, w_uk and w_uv standing differently) take the portable one.
"""
from dataclasses import replace

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import gemm, hopper
from sparsetile.backends.cupy.operands import HALVES, KINDS, ceil_div, copy_bytes

TUNABLES = (
    Tunable("path", ("portable", "hopper"), "hopper: latents in registers, weights shared by clusters; 16-bit types, R 512, Dn = Dv = 128, P up to 64"),
    *(replace(knob, paths=("portable",)) for knob in gemm.TUNABLES),
    Tunable("cluster", (2, 1), "blocks that share weight tiles", ("hopper",)),
    Tunable("windows", (4, 8, 2, 1), "parts that the heads are taken in, so that a part's weights stay in L2", ("hopper",)),
)
FIELDS = "7Q" + "8q" + "12i"
ROW_BYTES = 4 * 8 + 4  # struct Rows
HOPPER_FIELDS = "128s" * 6 + "6i40x"  # the struct is as long as its alignment, 64, asks
HOPPER_STAGES = 11
HOPPER_SHARED = 1024 + HOPPER_STAGES * (16384 + 16) + 3 * 16384 + 16


def supports(problem):
    kinds = {problem.dtype("latent"), problem.dtype("w_uk"), problem.dtype("w_uv", problem.dtype("w_uk"))}
    if not kinds <= KINDS.keys() or "float8_e4m3fn" in kinds - {problem.dtype("latent")}:
        return f"CuPy decompresses float32, float16, bfloat16 (latents also float8_e4m3fn), not {'/'.join(sorted(map(str, kinds)))}; cast to bfloat16"
    if problem.dtype("w_uv", problem.dtype("w_uk")) != problem.dtype("w_uk"):
        return "CuPy decompresses with w_uk and w_uv of one type; cast one of them"
    return None


def no_hopper(problem) -> str | None:
    """Why the path "hopper" is not for this problem."""
    kinds = {problem.dtype("latent"), problem.dtype("w_uk")}
    if problem.arch != "sm_90a":
        return f"path hopper: {problem.arch} lacks its instructions; take portable"
    if len(kinds) > 1 or not kinds <= set(HALVES) or "scale" in problem.features:
        return f"path hopper takes float16 or bfloat16 latents without scales, and weights of the same type, not {'/'.join(sorted(map(str, kinds)))}; take portable"
    if (problem["R"], problem["Dn"], problem["Dv"]) != (512, 128, 128) or problem["P"] > 64 or problem["P"] % 8:
        return f"path hopper takes R 512, Dn = Dv = 128, P a multiple of 8 up to 64, not {problem['R']}, {problem['Dn']}, {problem['Dv']}, {problem['P']}; take portable"
    return None


def resources(problem, config):
    if config["path"] == "hopper":
        return no_hopper(problem) or Resources(384, HOPPER_SHARED, 168)
    return gemm.resources(problem.arch, problem.dtype("latent"), problem.dtype("w_uk"), problem.dtype("w_uk"), "scale" in problem.features, config, ROW_BYTES)


def default_config(problem):
    portable = dict(path="portable", cluster=2, windows=4)
    tiles = gemm.default_config(problem["B"] * problem["S"], max(problem["Dn"], problem["Dv"]), lambda config: resources(problem, {**portable, **config}))
    return {**portable, **tiles, "path": "portable" if no_hopper(problem) or problem["S"] < 256 else "hopper"}


def artifacts(problem, config):
    a, w = problem.dtype("latent"), problem.dtype("w_uk")
    if config["path"] == "hopper":
        return [dict(source="latent_decompress_hopper", defines=dict(KIND=KINDS[w], CLUSTER=config["cluster"], STAGES=HOPPER_STAGES, W_ROWS=rows), names=["latent_decompress_hopper"]) for rows in (0, 1)]
    return [dict(source="latent_decompress", defines=gemm.defines(a, w, w, w, (16, 16, 16, 16), rows, "scale" in problem.features, config), names=["latent_decompress"]) for rows in (0, 1)]


def run_hopper(latent, w_uk, w_uv, k_rope, k, v, place, config, w_rows):
    (B, S, R), H, P = latent.shape, w_uk.shape[0], 0 if k_rope is None else k_rope.shape[2]
    rows = lambda x: hopper.tensor_map(place, x, (x.shape[2], S, B), (1, *reversed(hopper.steps(x))), (64, 128, 1))  # noqa: E731
    weight = lambda w: hopper.tensor_map(place, w, (R, 128, H) if w_rows else (128, R, H), (1, w.strides[2 if w_rows else 1], w.strides[0]), (64, 64, 1))  # noqa: E731
    out = lambda x: hopper.tensor_map(place, x, (x.shape[3], S, B * H), (1, x.shape[3], S * x.shape[3]), (64, 16, 1))  # noqa: E731
    maps = rows(latent), weight(w_uk), weight(w_uv), rows(k_rope if P else latent), out(k), out(v)
    d = dict(KIND=KINDS[w_uk.dtype], CLUSTER=config["cluster"], STAGES=HOPPER_STAGES, W_ROWS=w_rows)
    function = nvrtc.function("latent_decompress_hopper", "latent_decompress_hopper", HOPPER_FIELDS, d, place)
    each = ceil_div(S, 128 * config["cluster"])
    windows = next(n for n in (config["windows"], 4, 2, 1) if 2 * H % n == 0)
    function(max(place.sms // config["cluster"], 1) * config["cluster"], 384, HOPPER_SHARED, place.stream, *maps, H, B * each, each, 2 * H, 2 * H // windows, P)
    return k, v


def run(latent, w_uk, w_uv, *, place, config, k_rope=None, latent_scale=None):
    (B, S, R), H, Dn, Dv = latent.shape, w_uk.shape[0], w_uk.shape[2], w_uv.shape[2]
    P = 0 if k_rope is None else k_rope.shape[2]
    k, v = place.empty((B, H, S, Dn + P), w_uk.dtype), place.empty((B, H, S, Dv), w_uk.dtype)
    if B * S * H * R == 0:
        return k, v
    uk, uv = gemm.orientation(w_uk, 1, 2), gemm.orientation(w_uv, 1, 2)
    if config["path"] == "hopper" and uk[0] == uv[0] and hopper.can_map(latent) and (k_rope is None or hopper.can_map(k_rope) and k_rope.dtype == latent.dtype) \
            and hopper.can_map_weight(w_uk, 1, 2) and hopper.can_map_weight(w_uv, 1, 2):
        return run_hopper(latent, w_uk, w_uv, k_rope, k, v, place, config, uk[0])
    whole = ceil_div(max(Dn, 1), config["block_n"]), ceil_div(Dv, config["block_n"])
    parts = [(uk[0], *whole)] if uk[0] == uv[0] else [(uk[0], whole[0], 0), (uv[0], 0, whole[1])]  # weights that stand differently: one launch for each
    for w_rows, k_tiles, v_tiles in parts:
        read = [w for w, tiles in ((w_uk, k_tiles), (w_uv, v_tiles)) if tiles]
        copies = (copy_bytes(latent), min(gemm.weight_copy(w, w_rows, 1, 2) for w in read), min(gemm.out_copy(k, Dn + P), gemm.out_copy(v, Dv)), gemm.tail_copy(k_rope, k, Dn, Dn + P))
        d = gemm.defines(latent.dtype, w_uk.dtype, w_uk.dtype, None if k_rope is None else k_rope.dtype, copies, w_rows, latent_scale is not None, config)
        function = nvrtc.function("latent_decompress", "latent_decompress", FIELDS, d, place)
        m_tiles = ceil_div(B * S, config["block_m"])
        shared = gemm.shared_bytes(latent.dtype, w_uk.dtype, w_uk.dtype, w_rows, config, ROW_BYTES)
        function(m_tiles * H * (k_tiles + v_tiles), gemm.threads(config), shared, place.stream,
                 latent.ptr, w_uk.ptr, w_uv.ptr, nvrtc.ptr(k_rope), nvrtc.ptr(latent_scale), k.ptr, v.ptr,
                 *latent.strides[:2], w_uk.strides[0], uk[1], w_uv.strides[0], uv[1], *(k_rope.strides[:2] if P else (0, 0)),
                 B, S, H, R, Dn, Dv, P, ceil_div(R, 128), m_tiles, k_tiles, v_tiles, 0)
    return k, v
