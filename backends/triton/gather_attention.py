"""Attention over selected keys, forward: the heads that share a list of entries and a key head are the rows of a tile, their keys are gathered.

q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv] (may lie inside k)  indices [B,G,T,K] int32, G in {1, Hk, Hq}  ->  out [B,Hq,T,Dv], lse [B,Hq,T]
Entry e >= 0 stands for keys e * granularity ... + granularity - 1. What is no key of the call (below 0, at or past the end, at or past `lengths`, past the
query with causal) is a hole: it is read as zeros and never reaches a sum. An entry given twice counts twice. Empty row: out 0, lse -inf.
The paths "gluon" (gather_attention_gluon.py) and "tokens" (gather_tokens_gluon.py, few heads) are for sm_90a and DeepSeek's latent, 576 wide, of which 512 are the values; calls that their copies
cannot serve (`takes`) run on the portable one.
Rows in the fp8 layout of a latent cache have a kernel of their own there (gather_bytes_gluon.py).
"""
from functools import lru_cache

import triton
import triton.language as tl

from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.triton import gather_blocks, relaunch
from sparsetile.backends.triton.gluon_paths import lacking
from sparsetile.backends.triton.latents import latent_of, latent_tile, mode, parts_of, rotary_tile
from sparsetile.backends.triton.latents import refusal as no_latents
from sparsetile.backends.triton.launch import BYTES, POINTER, known_start, options, power, refusal, scales, shared_limit
from sparsetile.backends.triton.tiles import capped, finish, load, load_at, opened, place_of, product, soften, taken

TUNABLES = (
    Tunable("path", ("portable", "gluon", "blocks", "tokens"), "gluon, tokens: Hopper's own instructions with 64 heads of one query as rows, with up to 32 as columns; 16-bit latents of width 576 whose "
            "first 512 columns are the values. blocks: queries that chose the same block of keys are brought together; 16 bits, widths up to 128, blocks of 64 and more. The rest is for portable"),
    Tunable("heads", (16, 32, 64, 128), "rows of a tile: heads that share entries and keys, padded", ("portable",)),
    Tunable("block_k", (32, 16, 64, 128), "keys gathered at a time", ("portable",)),
    Tunable("num_warps", (4, 8), "warps of a program", ("portable",)),
    Tunable("num_stages", (1, 2, 3), "blocks of keys in flight", ("portable",)),
    Tunable("value_block", (0, 64, 128, 256), "value columns of a program; 0: all", ("portable",), "Dv"),
)
FEW = 32  # heads that path tokens multiplies without padding, and gathers keys for once


@triton.jit
def keys_of(row, start, count, limit, p, GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr, BK: tl.constexpr):
    """(keys, which of them exist) at places start .. start + BK of an entry list: holes are not."""
    place = start + tl.arange(0, BK)
    if GRANULARITY == 1:
        entry = tl.load(row + place, mask=place < count, other=-1)
        ok = (entry >= 0) & (entry < limit)
        key = tl.where(ok, entry, 0)
    else:
        entry = tl.load(row + place // GRANULARITY, mask=place // GRANULARITY < count, other=-1)
        ok = (entry >= 0) & (entry < (limit + GRANULARITY - 1) // GRANULARITY)  # before the product: an entry may be anything
        key = tl.where(ok, entry, 0) * GRANULARITY + place % GRANULARITY
        ok = ok & (key < limit)
        key = tl.where(ok, key, 0)
    if CAUSAL:
        ok = ok & (key <= p)
    return key.to(tl.int64), ok


@triton.jit(do_not_specialize=["T", "S", "K", "q_start", "Hq", "Hk", "G"])
def forward(q, k, v, out, lse, indices, lengths, kv_length, q_starts, sinks, sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, Hq, Hk, G, T, S, K, q_start,
            scale, inner, outer, ROWS: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr,
            SLICES: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr, SHARED: tl.constexpr,
            NEGATE: tl.constexpr, CAP: tl.constexpr, FROM_LENGTH: tl.constexpr, LATENT: tl.constexpr):
    # programs: value slice, tile of the heads that share (ROWS of them), query, set of such heads (what runs at a time reads one key head: the cache holds it), batch
    x = tl.program_id(0)
    piece = x % SLICES
    tile = x // SLICES % TILES
    x = x // SLICES // TILES
    sets = Hq // ROWS
    which = x // T % sets
    t = (x % T).to(tl.int64)
    b = (x // T // sets).to(tl.int64)
    first = which * ROWS
    member = tile * BH + tl.arange(0, BH)
    row_ok = member < ROWS
    h = (first + tl.where(row_ok, member, 0)).to(tl.int64)
    hk = (first // (Hq // Hk)).to(tl.int64)
    g = (first // (Hq // G)).to(tl.int64)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    line = (b * G + g) * T + t
    count = taken(lengths, line, K)
    row = indices + line * K
    q += b * sqb + t * sqt
    k += b * skb + hk * skh
    v += b * svb + hk * svh
    q0, q1 = opened(q, h * sqh, row_ok, D, D0, D1, NEGATE)
    m = tl.full([BH], float("-inf"), tl.float32)
    l = tl.zeros([BH], tl.float32)
    acc = tl.zeros([BH, V0], tl.float32)
    col = piece * V0
    scale2 = scale * 1.4426950408889634
    for at in tl.range(0, count * GRANULARITY, BK):
        key, ok = keys_of(row, at, count, limit, start + t, GRANULARITY, CAUSAL, BK)
        if LATENT:
            k0 = latent_tile(k, key * sks, ok, D0, q0.dtype, LATENT)
        else:
            k0 = load(k, key * sks, ok, 0, D0, D, True)
        s = product(q0, tl.trans(k0), tl.zeros([BH, BK], tl.float32))
        if D1:
            if LATENT:
                k1 = rotary_tile(k, key * sks, ok, D0, D - D0, D1, q0.dtype)
            else:
                k1 = load(k, key * sks, ok, D0, D1, D, True)
            s = product(q1, tl.trans(k1), s)
        if CAP:
            s = capped(s, inner, outer)
        s = tl.where(ok[None, :], s, float("-inf"))
        p, a, m, l = soften(s, m, l, scale2, True)
        if SLICES > 1:
            v0 = load_at(v, key * svs, ok, col, V0, DV)
        elif SHARED or LATENT:
            v0 = k0
        else:
            v0 = load(v, key * svs, ok, 0, V0, DV, True)
        acc = product(p.to(v0.dtype), v0, acc * a[:, None])
    factor, logs = finish(m, l, scale, scale2, sinks, h, sinks is not None)
    rows = (b * Hq + h) * T + t
    if lse is not None:
        if piece == 0:
            tl.store(lse + rows, logs, mask=row_ok)
    cv = col + tl.arange(0, V0)
    tl.store(out + (rows * DV)[:, None] + cv[None, :], (acc * factor[:, None]).to(out.dtype.element_ty), mask=row_ok[:, None] & (cv < DV)[None, :])


# ---------------------------------------------------------------------------------------------------------------- the host
def supports(problem: Problem) -> str | None:
    return no_latents(problem) or refusal(problem)


def no_gluon(problem: Problem, path: str = "gluon") -> str | None:
    """Why a path of Hopper's own products is not for this problem."""
    if refused := lacking(problem, path):
        return refused
    if path != "gluon" and latent_of(problem) is not None:
        return f"path {path} reads latents of 16 bits, not the fp8 layout of a latent cache; take gluon or portable"
    kind = problem.dtype("q")
    if kind not in ("float16", "bfloat16") or problem.dtype("out", kind) != kind:
        return f"path {path} takes queries of 16 bits and answers in their type, not {kind} to {problem.dtype('out', kind)}; take portable"
    if (problem["D"], problem["Dv"], problem["Hk"], problem.granularity) != (576, 512, 1, 1) or "shared_kv" not in problem.features or "softcap" in problem.features:
        return f"path {path} takes one key head of width 576 whose first 512 columns are the values, tokens (granularity 1) and no softcap; take portable"
    return None


def default_config(problem: Problem) -> dict:
    if gather_blocks.pays(problem):
        return portable_config(problem) | dict(path="blocks")
    path = "tokens" if problem["Hq"] <= FEW and latent_of(problem) is None else "gluon"
    return portable_config(problem) | (dict(path=path) if no_gluon(problem, path) is None else {})


def portable_config(problem: Problem) -> dict:
    group, single = problem["Hq"] // problem["Hk"], problem.dtype("q") == "float32"
    wide, heads = power(max(problem["D"], problem["Dv"])), min(64, power(group))
    config = dict(path="portable", heads=heads, block_k=64 if wide <= 128 else 32, num_warps=8 if heads * wide > 64 * 128 else 4, num_stages=2, value_block=0)
    if single:
        config.update(heads=16, block_k=32 if wide <= 128 else 16, num_stages=1, value_block=128 if wide > 128 else 0)
    elif heads == 16 and wide > 256 and problem.arch == "sm_90a" and "shared_kv" in problem.features and latent_of(problem) is None:
        config.update(block_k=64, num_warps=4)  # of DeepSeek's latent; with half the keys and twice the warps 1.9 times as long
    if problem.arch in ("gfx942", "sm_86", "sm_89", "sm_80") and wide > 256:
        config.update(heads=min(heads, 32), block_k=16 if problem.arch == "gfx942" else 32, num_stages=1, value_block=256)
    if latent_of(problem) is not None:  # values on their way through registers: larger tiles spill
        old = problem.arch in ("sm_80", "sm_86", "sm_89")
        config.update(heads=16 if old else min(heads, 32), block_k=16 if old else 32, num_stages=2 if heads == 16 and not old else 1, value_block=0)
    for step in (dict(num_stages=1), dict(block_k=16), dict(heads=16), dict(value_block=128)):
        if isinstance(resources(problem, config), Resources):
            break
        config |= step
    return config


def _widths(D, DV, config, latent=None):
    """Values in one part, as in block_attention."""
    V0 = min(power(DV), config["value_block"] or power(DV))
    return *parts_of(D, latent), V0, -(-DV // V0)


def resources(problem: Problem, config) -> Resources | str:
    if config["path"] in ("gluon", "tokens"):
        portable = no_gluon(problem, config["path"]) or resources(problem, {**config, "path": "portable"})  # where a call needs it
        if isinstance(portable, str):
            return portable
        from sparsetile.backends.triton import gather_bytes_gluon, gather_tokens_gluon, latent_gluon
        if config["path"] == "tokens":
            return gather_tokens_gluon.resources(problem["Hq"])
        return latent_gluon.resources() if latent_of(problem) is None else gather_bytes_gluon.resources()
    if config["path"] == "blocks":
        portable = gather_blocks.refusal(problem) or resources(problem, {**config, "path": "portable"})  # where a call needs it
        return portable if isinstance(portable, str) else gather_blocks.resources()
    D0, D1, V0, slices = _widths(problem["D"], problem["Dv"], config, latent_of(problem))
    if latent_of(problem) is not None and slices > 1:
        return "tiles of the fp8 layout of a latent cache hold whole rows: value_block is 0"
    size, rows, keys, stages = BYTES[problem.dtype("q", "float32")], config["heads"], config["block_k"], config["num_stages"]
    if rows * (V0 + keys) > config["num_warps"] * 32 * 232:
        return f"{rows} heads x {V0} value columns do not fit the registers of {config['num_warps']} warps; use fewer heads, more warps, or value_block"
    values = 0 if "shared_kv" in problem.features and slices == 1 and V0 == D0 else V0
    shared = size * (rows * (D0 + D1) + stages * keys * (D0 + D1 + values) + rows * keys)
    if shared > shared_limit(problem.arch):
        return f"about {shared // 1024} KiB of shared memory asked for, {problem.arch} has {shared_limit(problem.arch) // 1024}; use fewer heads, keys or stages"
    return Resources(threads=config["num_warps"] * (64 if problem.arch == "gfx942" else 32), shared=shared)


def constants(D, DV, config, *, rows, granularity=1, causal=False, shared_kv=False, negate=False, cap=False, from_length=False, latent=None, arch="") -> dict:
    D0, D1, V0, slices = _widths(D, DV, config, latent)
    return dict(ROWS=rows, TILES=-(-rows // config["heads"]), D=D, D0=D0, D1=D1, DV=DV, V0=V0, SLICES=slices, BH=config["heads"], BK=config["block_k"], GRANULARITY=granularity,
                CAUSAL=causal, SHARED=shared_kv and slices == 1 and DV == V0 == D0, NEGATE=negate, CAP=cap, FROM_LENGTH=from_length, LATENT=mode(latent, arch))


def shared_rows(Hq: int, Hk: int, G: int) -> int:
    """How many heads share both entries and keys."""
    return Hq // max(G, Hk)


@lru_cache(4096)
def _plan(sizes, config, scale, softcap, granularity, causal, shared_kv, from_length, latent, arch):
    B, Hq, Hk, T, D, DV, G = sizes
    config, rows = dict(config), shared_rows(Hq, Hk, G)
    size, inner, outer, negate = scales(scale, softcap)
    made = constants(D, DV, config, rows=rows, granularity=granularity, causal=causal, shared_kv=shared_kv, negate=negate, cap=softcap is not None, from_length=from_length,
                     latent=latent, arch=arch)
    return (made["SLICES"] * made["TILES"] * (Hq // rows) * T * B,), (size, inner, outer), relaunch.Constants(**made, **options(config))


def run(q, k, v, indices, *, place, config, lengths=None, granularity=1, causal=False, scale, sink_logits=None, softcap=None, kv_length=None, q_start=None, out_dtype=None,
        return_lse=True, latent=None):
    B, Hq, T, D = q.shape
    Hk, S, DV, G, K = k.shape[1], k.shape[2], v.shape[3], indices.shape[1], indices.shape[3]
    kind = out_dtype or str(q.dtype)[6:]
    if not B * Hq * T or not S or not K:
        return place.zeros((B, Hq, T, DV), kind), place.full((B, Hq, T), "float32", float("-inf")) if return_lse else None
    out, lse = place.empty((B, Hq, T, DV), kind), place.empty((B, Hq, T), "float32") if return_lse else None
    if config["path"] in ("gluon", "tokens"):
        from sparsetile.backends.triton import gather_attention_gluon, gather_bytes_gluon
        if latent is None:
            ours = gather_attention_gluon.takes(q, k, v, indices, granularity, scale, softcap, kind)
        else:
            ours = gather_bytes_gluon.takes(q, k, indices, granularity, scale, softcap, kind, latent)
        if ours:
            gather_attention_gluon.launch(*_of_hopper(config["path"], Hq, latent), q, k, indices, out, lse, place, lengths=lengths, causal=causal, scale=scale, sink_logits=sink_logits,
                                          kv_length=kv_length, q_start=q_start)
            return out, lse
    if config["path"] == "blocks" and gather_blocks.takes(q, k, v, indices, latent, granularity):
        return gather_blocks.run(q, k, v, indices, kind, place, lengths=lengths, granularity=granularity, causal=causal, scale=scale, sink_logits=sink_logits, softcap=softcap,
                                 kv_length=kv_length, q_start=q_start)
    host, starts = known_start(q_start)
    shared_kv = k.data_ptr() == v.data_ptr() and k.stride()[:3] == v.stride()[:3]
    grid, (size, inner, outer), constant = _plan((B, Hq, Hk, T, D, DV, G), tuple(config.items()), float(scale), None if softcap is None else float(softcap), granularity, bool(causal),
                                                 shared_kv, q_start is None, latent, place.arch)
    pointers = q, k, v, out, lse, indices, lengths, kv_length, starts, sink_logits
    numbers = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], Hq, Hk, G, T, S, K, host or 0, size, inner, outer
    relaunch.launch(forward, grid, place, pointers, numbers, constant, (q.dtype, k.dtype, out.dtype))
    return out, lse


def _of_hopper(path: str, Hq: int, latent):
    """A kernel of Hopper's own products, and how many heads it takes at a time."""
    from sparsetile.backends.triton import gather_attention_gluon, gather_bytes_gluon, gather_tokens_gluon
    if latent is not None:
        return gather_bytes_gluon.gather_bytes_gluon, gather_bytes_gluon.HEADS.value
    if path == "tokens":
        return gather_tokens_gluon.gather_tokens_gluon, gather_tokens_gluon.heads_of(Hq)
    return gather_attention_gluon.gather_gluon, gather_attention_gluon.HEADS.value


def artifacts(problem: Problem, config) -> list[dict]:
    if config["path"] == "blocks":
        return gather_blocks.artifacts(problem) + artifacts(problem, {**config, "path": "portable"})
    if config["path"] in ("gluon", "tokens"):
        from sparsetile.backends.triton import gather_attention_gluon
        return gather_attention_gluon.artifacts(*_of_hopper(config["path"], problem["Hq"], latent_of(problem)), problem) + artifacts(problem, {**config, "path": "portable"})
    has = problem.features.__contains__
    pointer = POINTER[problem.dtype("q", "float32")]
    made = constants(problem["D"], problem["Dv"], config, rows=problem["Hq"] // problem["Hk"], granularity=problem.granularity, causal=has("causal"), shared_kv=has("shared_kv"),
                     cap=has("softcap"), from_length=has("kv_length") and not has("q_start"), latent=latent_of(problem), arch=problem.arch)
    keys = "*u8" if latent_of(problem) else pointer
    signature = {"q": pointer, "k": keys, "v": keys, "out": pointer} | {"lse": "*fp32", "indices": "*i32", "lengths": "*i32"}
    signature |= {name: "*i32" for name, on in (("kv_length", has("kv_length")), ("q_starts", has("q_start"))) if on} | ({"sinks": "*fp32"} if has("sink") else {})
    strides = ("sqb", "sqh", "sqt", "skb", "skh", "sks", "svb", "svh", "svs")
    div16 = tuple(signature) + (strides if problem["D"] % 16 == 0 and problem["Dv"] % 16 == 0 else ())
    signature |= {name: "i32" for name in strides + ("Hq", "Hk", "G", "T", "S", "K", "q_start")} | {name: "fp32" for name in ("scale", "inner", "outer")}
    return [dict(fn=forward, signature=signature, constexprs=made, options=options(config), div16=div16)]
