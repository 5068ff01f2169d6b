"""Attention over lists of blocks, forward: each query tile runs through the key blocks of its list, an online softmax in base 2.

q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv] (may lie inside k)  ->  out [B,Hq,T,Dv], lse [B,Hq,T]
Partial blocks come first, then the full ones, whose loop holds no mask: measured equal or faster than the other orders, and a row that a
partial block left empty costs no guard later. Key blocks that end past the call's last key are cut in the first loop, later ones skipped.
A key of a partial block that no row of the tile sees is never read into a product (0 * NaN), or, by tensor maps, that product is done again without it. Empty row: out 0, lse -inf.
With table [B,pages] int32 keys and values are [N,Hk,page,D] and [N,Hk,page,Dv], rows of all pages one step apart (pages.py); keys in a page that is not one of 0 .. N - 1
do not exist, so that every block has a mask. latent (R, P): rows of k are bytes, the fp8 layout of a latent cache (latents.py), whose first R columns are the values. The paths portable and decode read them where they lie.

The path "gluon" is for sm_90a. Calls that it does not know (scales that are not positive, outputs of another type, arrays and orders that the copy engine cannot
address) take the portable one with the same blocks. Parts whose orders it can address run together (block_attention_parts_gluon.py).
The path "decode" is for few queries; calls with orders take the portable one. The path "latent" is for them on sm_90a with DeepSeek's latent, 576 wide, of which 512 are the
values; calls that its copies cannot serve (`takes`) run on "decode".
"""
from functools import lru_cache

from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.triton.block_attention_portable import forward
from sparsetile.backends.triton.float8 import more_pointers, of_keys, passed, pointer
from sparsetile.backends.triton.float8 import refusal as no_float8
from sparsetile.backends.triton.gluon_paths import lacking
from sparsetile.backends.triton.launch import BYTES, FAR, covered, known_start, list_steps, options, parts_alone, power, refusal, scales, shared_limit, turns
from sparsetile.backends.triton.latents import latent_of, mode, parts_of
from sparsetile.backends.triton.latents import refusal as no_latents
from sparsetile.backends.triton.maps import can_map
from sparsetile.backends.triton.pages import DEFAULT, one_tensor
from sparsetile.backends.triton.relaunch import Constants, launch

TUNABLES = (
    Tunable("path", ("portable", "gluon", "decode", "latent"),
            "gluon: Hopper's own instructions, 16-bit types, blocks of 128, D up to 192, Dv up to 128 (block_attention_gluon.py); "
            "decode: up to 32 queries a tile, with the heads of a group as its rows, and keys split over the chip (block_attention_decode.py); "
            "latent: the same by Hopper's own instructions, one query and up to 64 heads a tile, 16-bit latents of width 576 whose first 512 columns are the values (block_attention_latent.py)"),
    Tunable("block_q", (64, 16, 32, 128), "query rows of a tile"),
    Tunable("block_k", (32, 64, 128), "keys of a block"),
    Tunable("num_warps", (4, 8), "warps of a program", ("portable", "decode", "latent")),
    Tunable("num_stages", (1, 2, 3), "blocks of K and V in flight", ("portable", "decode", "latent")),
    Tunable("chunk", (0, 64, 128), "columns of Q and K at a time, read again for every block; 0: all, Q is kept", ("portable", "decode", "latent")),
    Tunable("value_block", (0, 64, 128, 256), "value columns of a program; 0: all", ("portable", "decode", "latent"), "Dv"),
    Tunable("maps", (False, True), "keys and values by tensor maps through the copy engine: no registers for addresses", ("portable", "decode", "latent")),
)
MAPPED = ("sm_90a", "sm_100", "cpu")  # where tensor maps are known; the interpreter reads them too


def supports(problem: Problem) -> str | None:
    return no_latents(problem) or (no_float8(problem) or refusal(problem, ()) if of_keys(problem) else refusal(problem))


def no_gluon(problem: Problem) -> str | None:
    """Why the path "gluon" is not for this problem."""
    if "paged" in problem.features:
        return "path gluon reads keys in one piece, not through a page table; take portable"
    if refused := lacking(problem):
        return refused
    if of_keys(problem):
        return "path gluon takes keys and values of 16 bits, not float8; take portable"
    if problem.dtype("q") not in ("float16", "bfloat16") or problem["D"] > 192 or problem["Dv"] > 128 or problem["D"] % 8 or problem["Dv"] % 8:
        return (f"path gluon takes float16 and bfloat16 with D up to 192 and Dv up to 128, multiples of 8, not {problem.dtype('q')}, {problem['D']}, {problem['Dv']}; "
                "take portable")
    return None


def no_latent(problem: Problem) -> str | None:
    """Why the path "latent" is not for this problem."""
    if refused := lacking(problem, "latent", "decode"):
        return refused
    if latent_of(problem) is not None or of_keys(problem) or problem.dtype("q") not in ("float16", "bfloat16"):
        return f"path latent reads latents of 16 bits, not {problem.dtype('k')}; take decode"
    if (problem["D"], problem["Dv"], problem["Hk"]) != (576, 512, 1) or "shared_kv" not in problem.features or {"softcap", "per_head"} & problem.features:
        return "path latent takes one key head of width 576 whose first 512 columns are the values, one list for all heads, and no softcap; take decode"
    return None


def widths(D: int, DV: int, config, latent=None) -> dict:
    """How the widths lie in a program's tiles. Values in one part of at least 64 columns: narrower ones, whose tile is laid out unlike that of the keys, came out
    wrong (the keys past the first 16) in Triton 3.6 on Hopper."""
    D0, D1 = parts_of(D, latent)
    if config["chunk"]:
        D0, D1 = config["chunk"], 0
    V0 = power(DV, 64)
    if config["value_block"]:
        V0 = min(V0, config["value_block"])
    return dict(D0=D0, D1=D1, V0=V0, SLICES=-(-DV // V0))


def default_config(problem: Problem) -> dict:
    if problem["T"] <= 16 and problem.dtype("q") != "float32" and (problem["S"] > 128 or "paged" in problem.features):  # one block of keys has nothing to split, and is one launch
        from sparsetile.backends.triton import block_attention_decode
        for few in block_attention_decode.candidates(problem):
            if not isinstance(resources(problem, few), str):
                fast = few | dict(path="latent", block_k=32)
                return fast if problem["Hq"] >= 16 and not isinstance(resources(problem, fast), str) else few
    config = portable_config(problem)
    if problem["T"] > 64 and not parts_alone(problem) and no_gluon(problem) is None:
        config.update(path="gluon", block_q=128, block_k=128, num_warps=8, num_stages=2)
    return config


def portable_config(problem: Problem) -> dict:
    D, DV, T = problem["D"], problem["Dv"], problem["T"]
    single = problem.dtype("q") == "float32"
    wide = power(max(D, DV))
    config = dict(path="portable", block_q=128, block_k=64, num_warps=4, num_stages=2, chunk=0, value_block=0)
    config["maps"] = problem.arch == "sm_90a" and not single and max(D, DV) <= 256 and not of_keys(problem) and "paged" not in problem.features and problem["S"] > 128  # each costs the host more than so few keys
    if single:
        config.update(block_q=64, block_k=32, num_warps=8 if wide > 64 else 4, num_stages=1, chunk=64 if wide > 64 else 0, value_block=128 if wide > 128 else 0)
    elif wide > 256:
        config.update(block_q=64 if latent_of(problem) is None else 32, block_k=32, num_warps=8, num_stages=1)
    elif of_keys(problem) and wide <= 128 and problem.arch != "gfx942":
        config.update(block_k=128 if problem.arch in ("sm_90a", "sm_100") else 64, num_warps=8)  # converted tiles take registers: four warps would spill
    elif wide > 128:
        config.update(block_k=64 if problem.arch in ("sm_90a", "sm_100", "cpu") else 32, num_warps=8)
        if config["maps"] and not isinstance(resources(problem, config | dict(num_stages=3)), str):
            config.update(num_stages=3)  # one program a multiprocessor: nobody else multiplies while it waits for keys
    elif wide <= 64 and config["maps"] and T > 64:
        config.update(block_q=64, block_k=128)  # three programs a multiprocessor, and half the reductions of 128 x 64
    if problem.arch == "gfx942":
        config.update(num_stages=1)
        if wide > 128 and not single:
            config.update(block_q=64, block_k=32)
        if wide > 256 and not single:
            config.update(chunk=64, value_block=256)
    if T < config["block_q"]:
        config["block_q"] = power(T)
    if config["num_warps"] == 8 and isinstance(resources(problem, config), str):
        config["num_warps"] = 4
    return config


def resources(problem: Problem, config) -> Resources | str:
    if config["path"] == "gluon":
        return _gluon_resources(problem, config)
    if config["path"] == "latent":
        from sparsetile.backends.triton import block_attention_latent
        refused = no_latent(problem) or block_attention_latent.resources(problem, config)
        decode = refused if isinstance(refused, str) else resources(problem, {**config, "path": "decode"})  # where a call needs it
        return decode if isinstance(decode, str) else refused
    if config["path"] == "decode":
        from sparsetile.backends.triton import block_attention_decode
        portable = resources(problem, {**config, "path": "portable", "num_stages": 1})  # where a call needs it
        return portable if isinstance(portable, str) else block_attention_decode.resources(problem, config)
    size = max(2, BYTES[problem.dtype("q", "float32")])  # float8 becomes 16 bits
    if latent_of(problem) is not None and (config["chunk"] or config["value_block"] or config["maps"]):
        return "tiles of the fp8 layout of a latent cache hold whole rows: chunk and value_block are 0, maps False"
    w = widths(problem["D"], problem["Dv"], config, latent_of(problem))
    BQ, BK, warps, stages = config["block_q"], config["block_k"], config["num_warps"], config["num_stages"]
    sums = BQ * (w["V0"] + BK)
    if sums > warps * 32 * 232:
        return f"the sums of a tile ({BQ} rows x {w['V0']} value columns + {BK} scores) do not fit the registers of {warps} warps; use a smaller block_q, more warps, or value_block"
    if problem.arch == "sm_90a" and size == 2 and warps == 8 and BQ == 64 and sums <= 4 * 32 * 232:  # seen wrong with Triton 3.6, D 160, Dv 128
        return "eight warps would split the columns of 64 rows between two warpgroups; use four, or block_q 128"
    if config["maps"] and of_keys(problem):
        return "tensor maps bring 16-bit tiles, float8 ones are converted on their way; take maps=False"
    if config["maps"] and "paged" in problem.features:
        return "tensor maps read keys in one piece, not through a page table; take maps=False"
    if config["maps"] and (problem.arch not in MAPPED or config["chunk"] or w["SLICES"] > 1 or max(w["D0"], w["V0"]) > 256 or size > 2):
        return (f"maps are for chips with a copy engine ({', '.join(MAPPED)}), 16-bit types up to 256 columns, without chunk and value_block; "
                f"{problem.arch} and this config take maps=False")
    kept = 0 if config["chunk"] else BQ * (w["D0"] + w["D1"])
    key_tiles = w["D0"] + w["D1"] + w["V0"]
    shared = size * (kept + max(1, stages) * BK * key_tiles) if problem.arch != "gfx942" else size * max(kept, stages * BK * key_tiles)
    if shared > shared_limit(problem.arch):
        return f"about {shared // 1024} KiB of shared memory asked for, {problem.arch} has {shared_limit(problem.arch) // 1024}; use smaller blocks, fewer stages, or chunk and value_block"
    return Resources(threads=warps * (64 if problem.arch == "gfx942" else 32), shared=shared)


def _gluon_resources(problem: Problem, config) -> Resources | str:
    if (config["block_q"], config["block_k"]) != (128, 128):
        return f"path gluon takes blocks of 128 x 128, not {config['block_q']} x {config['block_k']}"
    portable = no_gluon(problem) or resources(problem, {**config, "path": "portable"})  # where a call needs it
    if isinstance(portable, str):
        return portable
    from sparsetile.backends.triton import block_attention_gluon
    return block_attention_gluon.resources(problem["D"], problem["Dv"])


def constants(D: int, DV: int, config, *, shared_kv=False, negate=False, cap=False, intervals=False, bitmaps=False, edge=False, from_length=False, far=False,
              page=0, latent=None, arch="", float8=False) -> dict:
    """The compile-time constants of `forward`: what run launches and what artifacts compiles ahead."""
    w = widths(D, DV, config, latent)
    same = shared_kv and not config["chunk"] and w["SLICES"] == 1 and DV == w["V0"] == w["D0"]
    return dict(D=D, DV=DV, **w, BQ=config["block_q"], BK=config["block_k"], CHUNK=config["chunk"], SHARED=same, NEGATE=negate, CAP=cap, INTERVALS=intervals,
                BITMAPS=bitmaps, EDGE=edge, FROM_LENGTH=from_length, FAR=far, PAGE=page, LATENT=mode(latent, arch), FLOAT8=float8)


@lru_cache(4096)
def _plan(shapes, strides, dtype, lists_key, flags, config, scale, softcap):
    (B, Hq, T, D), (_, Hk, S, DV) = shapes
    block_q, block_k, first, nq, nk, has_intervals, has_bitmaps, ordered_q, ordered_k = lists_key
    kv_length, from_length, shared_kv, q_start, page, apart, latent, arch = flags
    config = dict(config)
    sqt, sks, svs = strides
    reach_q, reach_k = T if ordered_q else block_q, S if ordered_k else block_k
    far = max(reach_q * max(abs(sqt), DV), reach_k * max(abs(sks), abs(svs), D, DV)) >= FAR or apart
    size, inner, outer, negate = scales(scale, softcap)
    made = constants(D, DV, config, shared_kv=shared_kv, negate=negate, cap=softcap is not None, intervals=has_intervals, bitmaps=has_bitmaps,
                     edge=not ordered_k and (kv_length or nk * block_k > S), from_length=from_length, far=far, page=page, latent=latent, arch=arch,
                     float8=dtype[1].itemsize == 1 and latent is None)
    n, covers, _ = (nq, True, False) if ordered_q else covered(T, block_q, q_start, first, nq)
    return (made["SLICES"] * n * Hq * B,), n, covers, (size, inner, outer), Constants({**made, **options(config)})


def run_parts(q, k, v, parts, *, place, config, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, return_lse=True, table=None, latent=None):
    """(out, lse) of a layout's parts, each starting from the sums of those before, or None where that is not possible: then they are run apart and merged."""
    if config["path"] != "gluon" or table is not None:
        return None
    from sparsetile.backends.triton import block_attention_parts_gluon
    return block_attention_parts_gluon.run(q, k, v, parts, place=place, scale=scale, sink_logits=sink_logits, softcap=softcap, kv_length=kv_length, q_start=q_start, return_lse=return_lse)


def run(q, k, v, lists, *, place, config, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, out_dtype=None, return_lse=True, table=None, latent=None,
        q_scale=None, k_scale=None, v_scale=None):
    B, Hq, T, D = q.shape
    Hk, S, DV = k.shape[1], k.shape[2] * (1 if table is None else table.shape[1]), v.shape[3]
    kind = out_dtype or str(q.dtype)[6:]
    ordered = lists.q_order is not None
    if not B * Hq * T or not S or not lists.nq or not lists.nk:
        return place.zeros((B, Hq, T, DV), kind), place.full((B, Hq, T), "float32", float("-inf")) if return_lse else None
    if (ordered or lists.k_order is not None) and kind == str(q.dtype)[6:]:
        found = run_parts(q, k, v, (lists,), place=place, config=config, scale=scale, sink_logits=sink_logits, softcap=softcap, kv_length=kv_length, q_start=q_start,
                          return_lse=return_lse, table=table)
        if found is not None:
            return found
    make = place.zeros if ordered else place.empty
    out = make((B, Hq, T, DV), kind)
    lse = None
    if return_lse:
        lse = place.full((B, Hq, T), "float32", float("-inf")) if ordered else place.empty((B, Hq, T), "float32")
    if config["path"] == "gluon" and table is None:
        from sparsetile.backends.triton import block_attention_gluon
        if block_attention_gluon.takes(q, k, v, lists, scale, kind):
            block_attention_gluon.launch(q, k, v, lists, out, lse, place, scale, sink_logits=sink_logits, softcap=softcap, kv_length=kv_length, q_start=q_start)
            return out, lse
    if config["path"] == "latent":
        from sparsetile.backends.triton import block_attention_latent
        if block_attention_latent.takes(q, k, v, lists, scale, softcap, kind, latent):
            block_attention_latent.launch(q, k, v, lists, out, lse, kind, place, scale, sink_logits=sink_logits, kv_length=kv_length, q_start=q_start, table=table)
            return out, lse
        config = {**config, "path": "decode"}
    if config["path"] == "decode":
        from sparsetile.backends.triton import block_attention_decode
        if block_attention_decode.takes(q, lists, config):
            return block_attention_decode.run(q, k, v, lists, out, lse, kind, place=place, config=config, scale=scale, sink_logits=sink_logits, softcap=softcap, kv_length=kv_length, q_start=q_start,
                                              table=table, latent=latent, float8_scales=(q_scale, k_scale, v_scale))
        config = {**config, "num_stages": 1}
    if config["maps"] and table is None and lists.k_order is None and can_map(k) and can_map(v):
        from sparsetile.backends.triton import block_attention_maps
        block_attention_maps.launch(q, k, v, lists, out, lse, place, config, scale, sink_logits=sink_logits, softcap=softcap, kv_length=kv_length, q_start=q_start)
        return out, lse
    _, count, page, apart, k, v = one_tensor(table, k, v)
    host, starts = known_start(q_start)
    shared_kv = k.data_ptr() == v.data_ptr() and k.stride()[:3] == v.stride()[:3]
    grid, n, covers, (size, inner, outer), constant = _plan(
        ((B, Hq, T, D), (B, Hk, S, DV)), (q.stride(2), k.stride(2), v.stride(2)), (q.dtype, k.dtype),
        (lists.block_q, lists.block_k, lists.first, lists.nq, lists.nk, lists.has_intervals, lists.has_bitmaps, ordered, lists.k_order is not None),
        (kv_length is not None, q_start is None, shared_kv, host, page, apart, latent, place.arch), tuple(config.items()), float(scale), None if softcap is None else float(softcap))
    order, ahead, section = turns(lists, covers, B * Hq, Hq // Hk, (D + DV) * S * k.element_size())
    launch(forward, grid, place,
           (passed(q, place.arch), passed(k, place.arch), passed(v, place.arch), out, lse, lists.offsets, lists.cols, lists.kinds, lists.intervals, lists.bitmaps, lists.list_of, order,
            lists.q_order, lists.k_order, kv_length, starts, sink_logits, table, q_scale, k_scale, v_scale),
           (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *list_steps(lists),
            B * Hq, Hq, Hq // Hk, T, S, lists.first, lists.nq, n, ahead, section, host or 0, size, inner, outer,
            None if table is None else table.stride(0), count), constant, (q.dtype, kind))
    return out, lse


def artifacts(problem: Problem, config) -> list[dict]:
    """What run would compile for the problem: with the words of its features."""
    if config["path"] == "gluon":
        from sparsetile.backends.triton import block_attention_gluon
        found = block_attention_gluon.artifacts(problem) + artifacts(problem, {**config, "path": "portable"})
        if {"order", "strided", "fixed"} & problem.words:
            from sparsetile.backends.triton import block_attention_parts_gluon
            found += block_attention_parts_gluon.artifacts(problem)
        return found
    if config["path"] == "latent":
        from sparsetile.backends.triton import block_attention_latent
        return block_attention_latent.artifacts(problem, config) + artifacts(problem, {**config, "path": "decode"})
    if config["path"] == "decode":
        from sparsetile.backends.triton import block_attention_decode
        return block_attention_decode.artifacts(problem, config) + artifacts(problem, {**config, "path": "portable", "num_stages": 1})
    has = problem.features.__contains__
    if config["maps"] and not has("order"):
        from sparsetile.backends.triton import block_attention_maps
        return [block_attention_maps.artifact(problem, config)]
    own = pointer(problem.dtype("q", "float32"), problem.arch)
    made = constants(problem["D"], problem["Dv"], config, shared_kv=has("shared_kv"), cap=has("softcap"), intervals=has("interval"), bitmaps=has("bitmap"),
                     edge=not has("order") and (has("kv_length") or problem["S"] % config["block_k"] != 0), from_length=has("kv_length") and not has("q_start"),
                     page=DEFAULT * has("paged"), latent=latent_of(problem), arch=problem.arch, float8=of_keys(problem))
    names = ["list_of", "offsets", "cols", "kinds", "intervals", "bitmaps", "schedule"]
    names += ["q_order", "k_order"] * has("order") + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start") + ["table"] * has("paged")
    keys = "*u8" if latent_of(problem) else pointer(problem.dtype("k", "float32"), problem.arch)
    signature = {"q": own, "k": keys, "v": keys, "lse": "*fp32"} | more_pointers(problem, problem.arch) | {name: "*i32" for name in names} | ({"sinks": "*fp32"} if has("sink") else {})
    strides = ("sqb", "sqh", "sqt", "skb", "skh", "sks", "svb", "svh", "svs")
    integers = ("slb", "slh", "heads", "Hq", "group", "T", "S", "first", "nq", "tiles", "ahead", "section", "q_start") + ("table_b", "count") * has("paged")
    div16 = tuple(signature) + (strides if problem["D"] % 16 == 0 and problem["Dv"] % 16 == 0 else ())
    signature |= {name: "i32" for name in strides + integers} | {name: "fp32" for name in ("scale", "inner", "outer")}
    return [dict(fn=forward, signature=signature, constexprs=made, options=options(config), div16=div16)]
