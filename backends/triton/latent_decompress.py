"""Keys and values out of the shared latent, in one pass, each written once in its final layout.

    latent [B,S,R]  w_uk [H,R,Dn]  w_uv [H,R,Dv]  k_rope [B,S,P]  latent_scale [B,S,ceil(R/128)] float32  ->  k [B,H,S,Dn+P], v [B,H,S,Dv] in w_uk's dtype

k[h] = latent w_uk[h], followed by the rotary part, the same for every head and bit-equal if its type is k's; v[h] = latent w_uv[h]. Weights are read in place.
Scales multiply the float32 sums of their group of 128, so that scaled values are never rounded. The path "gluon" (latent_decompress_gluon.py) is for sm_90a and
DeepSeek's sizes; calls that its copy engine cannot serve (`takes`: odd strides, w_uk and w_uv standing differently) run on the portable one.
"""
from dataclasses import replace

import triton
import triton.language as tl

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.triton import head_product as product
from sparsetile.backends.triton.float8 import passed, pointer, product_dtype
from sparsetile.backends.triton.gluon_paths import lacking

TUNABLES = (
    Tunable("path", ("portable", "gluon"), "gluon: Hopper's own instructions, latents in registers; 16-bit types, R 512, Dn = Dv = 128, P up to 64"),
    *(replace(knob, paths=("portable",)) for knob in product.TUNABLES),
    Tunable("windows", (4, 8, 2, 1), "parts that the heads are taken in, so that a part's weights stay in L2", ("gluon",)),
)
FLOATS = ("float32", "float16", "bfloat16")


@triton.jit
def decompress(latent, scale, w_uk, w_uv, rope, k, v, B, H, S, x_b, x_t, scale_b, scale_t, uk_h, uk_n, uk_m, uv_h, uv_n, uv_m, rope_b, rope_t, R: tl.constexpr,
               DN: tl.constexpr, DV: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
               DTYPE: tl.constexpr, GROUP: tl.constexpr):
    K_TILES: tl.constexpr = (DN + BLOCK_M - 1) // BLOCK_M
    V_TILES: tl.constexpr = (DV + BLOCK_M - 1) // BLOCK_M
    tiles = (S + BLOCK_T - 1) // BLOCK_T
    tile, column = product.place_of(tl.program_id(0), B * tiles, H * (K_TILES + V_TILES), GROUP)
    b, h, part = (tile // tiles).to(tl.int64), (column // (K_TILES + V_TILES)).to(tl.int64), column % (K_TILES + V_TILES)
    rows = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tl.arange(0, BLOCK_M)
    latent += b * x_b
    if scale is not None:
        scale += b * scale_b
    if part < K_TILES:
        k += (b * H + h) * S * (DN + P)
        product.head_tile(latent, x_t, scale, scale_t, w_uk + h * uk_h, uk_n, uk_m, k, DN + P, rows, part * BLOCK_M + inside, S, R, DN, BLOCK_T, BLOCK_M, BLOCK_N, DTYPE)
        if P > 0:
            if part == K_TILES - 1:
                product.copy_tail(rope + b * rope_b, rope_t, k + DN, DN + P, rows, S, P, BLOCK_T, BLOCK_P)
    else:
        v += (b * H + h) * S * DV
        product.head_tile(latent, x_t, scale, scale_t, w_uv + h * uv_h, uv_n, uv_m, v, DV, rows, (part - K_TILES) * BLOCK_M + inside, S, R, DV, BLOCK_T, BLOCK_M, BLOCK_N, DTYPE)


def supports(problem):
    kind, latent = problem.dtype("w_uk"), problem.dtype("latent")
    if kind not in FLOATS:
        return f"weights are float32, float16 or bfloat16 here, not {kind}; cast w_uk and w_uv"
    if latent not in (*FLOATS, "float8_e4m3fn"):
        return f"the latent is float32, float16, bfloat16 or float8_e4m3fn here, not {latent}; cast it"
    return None


def no_gluon(problem) -> str | None:
    """Why the path "gluon" is not for this problem."""
    if refused := lacking(problem):
        return refused
    kinds = {problem.dtype("latent"), problem.dtype("w_uk")}
    if len(kinds) > 1 or not kinds <= {"float16", "bfloat16"} or "scale" in problem.features:
        return f"path gluon takes float16 or bfloat16 latents without scales, and weights of the same type, not {'/'.join(sorted(map(str, kinds)))}; take portable"
    if (problem["R"], problem["Dn"], problem["Dv"]) != (512, 128, 128) or problem["P"] > 64 or problem["P"] % 8:
        return f"path gluon takes R 512, Dn = Dv = 128, P a multiple of 8 up to 64, not {problem['R']}, {problem['Dn']}, {problem['Dv']}, {problem['P']}; take portable"
    return None


def resources(problem, config):
    if config["path"] == "gluon":
        portable = no_gluon(problem) or resources(problem, {**config, "path": "portable"})  # where a call needs it
        if isinstance(portable, str):
            return portable
        from sparsetile.backends.triton import latent_decompress_gluon
        return latent_decompress_gluon.resources()
    asked = product.refusal(problem, config, "latent", "w_uk")
    return asked if isinstance(asked, str) else Resources(threads=32 * config["warps"], shared=asked)


def default_config(problem):
    return portable_config(problem) | (dict(path="gluon") if problem["S"] >= 256 and no_gluon(problem) is None else {})


def portable_config(problem):
    tiles = product.default_config(problem.arch, product_dtype(problem.dtype("latent"), problem.dtype("w_uk"), problem.arch), problem["S"])
    return dict(path="portable", **tiles, windows=4)


def fixed_for(config, dtype, S, R, Dn, Dv, P) -> dict:
    return {"R": R, "DN": Dn, "DV": Dv, "P": P, **product.constants(config, dtype, S, R, max(Dn, Dv), P)}


def artifacts(problem, config):
    if config["path"] == "gluon":
        from sparsetile.backends.triton import latent_decompress_gluon
        return latent_decompress_gluon.artifacts(problem) + artifacts(problem, {**config, "path": "portable"})
    arch, kind = problem.arch, problem.dtype("w_uk")
    S, R, Dn, Dv, P = (problem[axis] for axis in ("S", "R", "Dn", "Dv", "P"))
    arrays = {"latent": pointer(problem.dtype("latent"), arch), "w_uk": pointer(kind, arch), "w_uv": pointer(kind, arch), "k": pointer(kind, arch), "v": pointer(kind, arch)}
    absent = {}
    for name, there, pointed in (("scale", bool(problem.features & {"scale", "latent_scale"}), "*fp32"), ("rope", P > 0, pointer(problem.dtype("k_rope", kind), arch))):
        (arrays if there else absent)[name] = pointed if there else None
    numbers = ("B", "H", "S", "x_b", "x_t", "scale_b", "scale_t", "uk_h", "uk_n", "uv_h", "uv_n", "rope_b", "rope_t")
    signature = {**arrays, **{name: "i32" for name in numbers}}
    aligned = tuple(arrays) if R % 16 or Dn % 16 or Dv % 16 or P % 16 else (*arrays, "x_b", "x_t", "uk_h", "uk_n", "uv_h", "uv_n", "rope_b", "rope_t")
    dtype = product_dtype(problem.dtype("latent"), kind, arch)
    return [{"fn": decompress, "signature": signature, "constexprs": {**absent, "uk_m": 1, "uv_m": 1, **fixed_for(config, dtype, S, R, Dn, Dv, P)}, "div16": aligned,
             "options": {"num_warps": config["warps"], "num_stages": config["stages"]}}]


def run(latent, w_uk, w_uv, *, place, config, k_rope=None, latent_scale=None):
    (B, S, R), (H, _, Dn), Dv = latent.shape, w_uk.shape, w_uv.shape[2]
    P = 0 if k_rope is None else k_rope.shape[2]
    k_rope = k_rope if P else None  # no tensor map has a width of 0
    names = [str(array.dtype).removeprefix("torch.") for array in (latent, w_uk)]
    k, v = place.empty((B, H, S, Dn + P), names[1]), place.empty((B, H, S, Dv), names[1])
    if not B * H * S:
        return k, v
    if config["path"] == "gluon" and latent_scale is None:
        from sparsetile.backends.triton import latent_decompress_gluon
        if latent_decompress_gluon.takes(latent, w_uk, w_uv, k_rope):
            latent_decompress_gluon.launch(latent, w_uk, w_uv, k_rope, k, v, place, config)
            return k, v
    fixed = fixed_for(config, product_dtype(*names, place.arch), S, R, Dn, Dv, P)
    tiles = triton.cdiv(Dn, fixed["BLOCK_M"]) + triton.cdiv(Dv, fixed["BLOCK_M"])
    decompress[(B * triton.cdiv(S, fixed["BLOCK_T"]) * H * tiles,)](
        passed(latent, place.arch), latent_scale, w_uk, w_uv, None if k_rope is None else passed(k_rope, place.arch), k, v, B, H, S, *latent.stride()[:2],
        *((0, 0) if latent_scale is None else latent_scale.stride()[:2]), *w_uk.stride(), *w_uv.stride(), *((0, 0) if k_rope is None else k_rope.stride()[:2]),
        **fixed, num_warps=config["warps"], num_stages=config["stages"])
    return k, v
