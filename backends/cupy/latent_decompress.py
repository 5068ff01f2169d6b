"""Keys and values out of the shared latent of MLA, by one kernel, each written once in the layout that attention reads.

    latent [B,S,R]  w_uk [H,R,Dn]  w_uv [H,R,Dv]  k_rope [B,S,P]  latent_scale [B,S,ceil(R/128)] float32  ->  k [B,H,S,Dn+P], v [B,H,S,Dv]

k[h] = [latent w_uk[h] | k_rope], v[h] = latent w_uv[h], in w_uk's type; k_rope is copied bit for bit where its type is the same. Weights are read in place:
either of their last two axes may be the contiguous one. latent_scale multiplies 128 latent values each; float8 latents are exact in the weights' type, every
128 products are summed alone in float32 and then scaled, so only the output is rounded. Types: float16 or bfloat16 weights with latents of the same type or
float8_e4m3fn run on tensor cores, every other mix by fused multiply-adds in float32.
"""
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import gemm
from sparsetile.backends.cupy.operands import KINDS, ceil_div, copy_bytes

TUNABLES = gemm.TUNABLES
FIELDS = "7Q" + "8q" + "12i"
ROW_BYTES = 4 * 8 + 4  # struct Rows


def supports(problem):
    kinds = {problem.dtype("latent"), problem.dtype("w_uk"), problem.dtype("w_uv", problem.dtype("w_uk"))}
    if not kinds <= KINDS.keys() or "float8_e4m3fn" in kinds - {problem.dtype("latent")}:
        return f"CuPy decompresses float32, float16, bfloat16 (latents also float8_e4m3fn), not {'/'.join(sorted(map(str, kinds)))}; cast to bfloat16"
    if problem.dtype("w_uv", problem.dtype("w_uk")) != problem.dtype("w_uk"):
        return "CuPy decompresses with w_uk and w_uv of one type; cast one of them"
    return None


def resources(problem, config):
    return gemm.resources(problem.arch, problem.dtype("latent"), problem.dtype("w_uk"), problem.dtype("w_uk"), "scale" in problem.features, config, ROW_BYTES)


def default_config(problem):
    return gemm.default_config(problem["B"] * problem["S"], max(problem["Dn"], problem["Dv"]), lambda config: resources(problem, config))


def artifacts(problem, config):
    a, w = problem.dtype("latent"), problem.dtype("w_uk")
    return [dict(source="latent_decompress", defines=gemm.defines(a, w, w, w, (16, 16, 16, 16), rows, "scale" in problem.features, config), names=["latent_decompress"]) for rows in (0, 1)]


def run(latent, w_uk, w_uv, *, place, config, k_rope=None, latent_scale=None):
    (B, S, R), H, Dn, Dv = latent.shape, w_uk.shape[0], w_uk.shape[2], w_uv.shape[2]
    P = 0 if k_rope is None else k_rope.shape[2]
    k, v = place.empty((B, H, S, Dn + P), w_uk.dtype), place.empty((B, H, S, Dv), w_uk.dtype)
    if B * S * H * R == 0:
        return k, v
    uk, uv = gemm.orientation(w_uk, 1, 2), gemm.orientation(w_uv, 1, 2)
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
