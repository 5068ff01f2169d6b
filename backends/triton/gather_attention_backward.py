"""Gradients of attention over selected keys, in a fixed order and without atomics.

q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  indices [B,G,T,K]  lse, delta [B,Hq,T] (sink included)  dout [B,Hq,T,Dv]  ->  dq, dk, dv

`queries` runs like the forward and sums dq. dk and dv are sums over the entries that name a key, which only a sort brings together: for a few queries at a
time `shares` writes each entry's own dk and dv ([entries, D + Dv] float32 in a scratch of at most SCRATCH bytes) and the number of its key, a stable sort
orders the entries by key, and `gathered` adds each key's shares in that order. An entry given twice is two entries.
The path "gluon" (gather_backward_gluon.py) is for sm_90a and DeepSeek's latent: its dk is the sum of both gradients of the latent, its dv None, its dq in the type of q whatever
out_dtype. Calls that it cannot serve (`takes`) run on the portable path.
"""
import math

import triton
import triton.language as tl

from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.triton import gather_blocks, gather_blocks_backward
from sparsetile.backends.triton.gather_attention import keys_of, no_gluon, shared_rows
from sparsetile.backends.triton.launch import BYTES, POINTER, known_start, options, parts, power, refusal, shared_limit
from sparsetile.backends.triton.tiles import load, place_of, product, rebuilt, rows_known, store, taken

TUNABLES = (
    Tunable("path", ("portable", "gluon", "blocks"), "gluon: Hopper's own instructions, contributions to keys added as integers; 16-bit latents of width 576 whose first 512 columns are the values. "
            "blocks: queries that chose the same block of keys are brought together, as in the forward"),
    Tunable("heads", (16, 32, 64), "rows of a tile: heads that share entries and keys, padded", ("portable",)),
    Tunable("block_k", (16, 32, 64), "keys gathered at a time", ("portable",)),
    Tunable("num_warps", (4, 8), "warps of a program", ("portable",)),
    Tunable("num_stages", (1, 2), "blocks in flight", ("portable",)),
)
SCRATCH = 256 << 20  # bytes of shares at a time


@triton.jit
def rows_of_set(b, which, tile, t, lse, delta, T, Hq, ROWS: tl.constexpr, BH: tl.constexpr):
    """Heads of a tile of a set, whether they exist, their LSE and delta."""
    member = tile * BH + tl.arange(0, BH)
    h = (which * ROWS + tl.where(member < ROWS, member, 0)).to(tl.int64)
    logs, shift = rows_known(lse, delta, t, (b * Hq + h) * T, member < ROWS, True)
    return h, member < ROWS, logs, shift


@triton.jit(do_not_specialize=["T", "S", "K", "q_start", "Hq", "Hk", "G"])
def queries(q, k, v, dout, lse, delta, dq, indices, lengths, kv_length, q_starts, sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, Hq, Hk, G, T, S, K,
            q_start, scale, inner, outer, ROWS: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
            V0: tl.constexpr, V1: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr, CAP: tl.constexpr,
            FROM_LENGTH: tl.constexpr):
    x = tl.program_id(0)
    tile = x % TILES
    x = x // TILES
    sets = Hq // ROWS
    which = x // T % sets
    t = (x % T).to(tl.int64)
    b = (x // T // sets).to(tl.int64)
    hk = (which * ROWS // (Hq // Hk)).to(tl.int64)
    g = (which * ROWS // (Hq // G)).to(tl.int64)
    h, row_ok, logs, shift = rows_of_set(b, which, tile, t, lse, delta, T, Hq, ROWS, BH)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    line = (b * G + g) * T + t
    count = taken(lengths, line, K)
    q += b * sqb + t * sqt
    dout += b * sgb + t * sgt
    k += b * skb + hk * skh
    v += b * svb + hk * svh
    q0 = load(q, h * sqh, row_ok, 0, D0, D, True)
    g0 = load(dout, h * sgh, row_ok, 0, V0, DV, True)
    if D1:
        q1 = load(q, h * sqh, row_ok, D0, D1, D, True)
    if V1:
        g1 = load(dout, h * sgh, row_ok, V0, V1, DV, True)
    acc0 = tl.zeros([BH, D0], tl.float32)
    acc1 = 0.0
    if D1:
        acc1 = tl.zeros([BH, D1], tl.float32)
    for at in tl.range(0, count * GRANULARITY, BK):
        key, ok = keys_of(indices + line * K, at, count, limit, start + t, GRANULARITY, CAUSAL, BK)
        k0 = load(k, key * sks, ok, 0, D0, D, True)
        raw = product(q0, tl.trans(k0), tl.zeros([BH, BK], tl.float32))
        if D1:
            k1 = load(k, key * sks, ok, D0, D1, D, True)
            raw = product(q1, tl.trans(k1), raw)
        grad = product(g0, tl.trans(load(v, key * svs, ok, 0, V0, DV, True)), tl.zeros([BH, BK], tl.float32))
        if V1:
            grad = product(g1, tl.trans(load(v, key * svs, ok, V0, V1, DV, True)), grad)
        p, ds = rebuilt(raw, grad, logs[:, None], shift[:, None], scale, inner, outer, CAP)
        ds = tl.where(ok[None, :], ds, 0.0).to(k.dtype.element_ty)
        acc0 = product(ds, k0, acc0)
        if D1:
            acc1 = product(ds, k1, acc1)
    rows = ((b * Hq + h) * T + t) * D
    store(dq, rows, row_ok, acc0 * scale, 0, D0, D)
    if D1:
        store(dq, rows, row_ok, acc1 * scale, D0, D1, D)


@triton.jit(do_not_specialize=["T", "S", "K", "q_start", "Hq", "Hk", "G", "begin", "some", "blocks"])
def shares(q, k, v, dout, lse, delta, numbers, dks, dvs, indices, lengths, kv_length, q_starts, sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, sgb, sgh, sgt, Hq, Hk, G, T, S,
           K, q_start, begin, some, blocks, none, scale, inner, outer, ROWS: tl.constexpr, TILES: tl.constexpr, D: tl.constexpr, D0: tl.constexpr,
           D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr,
           CAP: tl.constexpr, FROM_LENGTH: tl.constexpr):
    # programs: block of places, set of heads, query begin + i, batch; places of a list lie together, [B, sets, some, blocks * BK]
    x = tl.program_id(0)
    block = x % blocks
    x = x // blocks
    sets = Hq // ROWS
    i = x % some
    which = x // some % sets
    b = (x // some // sets).to(tl.int64)
    t = (begin + i).to(tl.int64)
    at = x.to(tl.int64) * blocks * BK + block * BK + tl.arange(0, BK)
    if t < T:
        hk = (which * ROWS // (Hq // Hk)).to(tl.int64)
        g = (which * ROWS // (Hq // G)).to(tl.int64)
        limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
        line = (b * G + g) * T + t
        count = taken(lengths, line, K)
        key, ok = keys_of(indices + line * K, block * BK, count, limit, start + t, GRANULARITY, CAUSAL, BK)
        tl.store(numbers + at, tl.where(ok, (b * Hk + hk) * S + key, none))
        if tl.max(ok.to(tl.int32), 0) > 0:
            k += b * skb + hk * skh
            v += b * svb + hk * svh
            q += b * sqb + t * sqt
            dout += b * sgb + t * sgt
            k0 = load(k, key * sks, ok, 0, D0, D, True)
            v0 = load(v, key * svs, ok, 0, V0, DV, True)
            dk0 = tl.zeros([BK, D0], tl.float32)
            dv0 = tl.zeros([BK, V0], tl.float32)
            dk1 = 0.0
            dv1 = 0.0
            if D1:
                k1 = load(k, key * sks, ok, D0, D1, D, True)
                dk1 = tl.zeros([BK, D1], tl.float32)
            if V1:
                v1 = load(v, key * svs, ok, V0, V1, DV, True)
                dv1 = tl.zeros([BK, V1], tl.float32)
            for tile in tl.range(0, TILES, num_stages=1):
                h, row_ok, logs, shift = rows_of_set(b, which, tile, t, lse, delta, T, Hq, ROWS, BH)
                q0 = load(q, h * sqh, row_ok, 0, D0, D, True)
                g0 = load(dout, h * sgh, row_ok, 0, V0, DV, True)
                raw = product(k0, tl.trans(q0), tl.zeros([BK, BH], tl.float32))
                grad = product(v0, tl.trans(g0), tl.zeros([BK, BH], tl.float32))
                if D1:
                    q1 = load(q, h * sqh, row_ok, D0, D1, D, True)
                    raw = product(k1, tl.trans(q1), raw)
                if V1:
                    g1 = load(dout, h * sgh, row_ok, V0, V1, DV, True)
                    grad = product(v1, tl.trans(g1), grad)
                p, ds = rebuilt(raw, grad, logs[None, :], shift[None, :], scale, inner, outer, CAP)
                p = tl.where(ok[:, None], p, 0.0).to(v.dtype.element_ty)
                ds = tl.where(ok[:, None], ds, 0.0).to(k.dtype.element_ty)
                dv0 = product(p, g0, dv0)
                dk0 = product(ds, q0, dk0)
                if D1:
                    dk1 = product(ds, q1, dk1)
                if V1:
                    dv1 = product(p, g1, dv1)
            store(dks, at * D, ok, dk0 * scale, 0, D0, D)
            store(dvs, at * DV, ok, dv0, 0, V0, DV)
            if D1:
                store(dks, at * D, ok, dk1 * scale, D0, D1, D)
            if V1:
                store(dvs, at * DV, ok, dv1, V0, V1, DV)
    else:
        tl.store(numbers + at, tl.full([BK], 0, tl.int64) + none)


@triton.jit
def gathered(order, ends, dks, dvs, dk, dv, D: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """dk and dv of one key += its shares, from the first to the last."""
    number = tl.program_id(0).to(tl.int64) // BLOCKS
    c = tl.program_id(0) % BLOCKS * WIDTH + tl.arange(0, WIDTH)
    a = tl.load(ends + number)
    z = tl.load(ends + number + 1)
    if a < z:
        sum_k = tl.load(dk + number * D + c, c < D, 0.0)
        sum_v = tl.load(dv + number * DV + c, c < DV, 0.0)
        for n in range(a, z):
            at = tl.load(order + n)
            sum_k += tl.load(dks + at * D + c, c < D, 0.0)
            sum_v += tl.load(dvs + at * DV + c, c < DV, 0.0)
        tl.store(dk + number * D + c, sum_k, c < D)
        tl.store(dv + number * DV + c, sum_v, c < DV)


# ---------------------------------------------------------------------------------------------------------------- the host
def supports(problem: Problem) -> str | None:
    if problem.arch == "gfx942" and max(problem["D"], problem["Dv"]) > 256:
        return f"gradients of D {problem['D']} and Dv {problem['Dv']} do not fit gfx942's registers without spills; it takes widths up to 256"
    return refusal(problem)


def default_config(problem: Problem) -> dict:
    if gather_blocks.pays(problem):
        return portable_config(problem) | dict(path="blocks")
    return portable_config(problem) | (dict(path="gluon") if no_gluon(problem) is None else {})


def portable_config(problem: Problem) -> dict:
    group, single = problem["Hq"] // problem["Hk"], problem.dtype("q") == "float32"
    wide = power(max(problem["D"], problem["Dv"]))
    config = dict(path="portable", heads=min(64 if wide <= 256 else 16, power(group)), block_k=64 if wide <= 128 else 32 if wide <= 256 else 16, num_warps=8 if wide > 128 else 4,
                  num_stages=1)
    if wide == 256:
        config.update(heads=min(config["heads"], 16), block_k=16)
    if problem.arch != "sm_90a":
        config.update(heads=min(config["heads"], 32), block_k=32 if wide <= 128 else 16)
    if single:
        config.update(heads=16, block_k=16, num_warps=8)
    for step in (dict(heads=16), dict(block_k=16), dict(num_warps=8)):
        if isinstance(resources(problem, config), Resources):
            break
        config |= step
    return config


def resources(problem: Problem, config) -> Resources | str:
    if config["path"] == "gluon":
        portable = no_gluon(problem) or resources(problem, {**config, "path": "portable"})  # where a call needs it
        if isinstance(portable, str):
            return portable
        from sparsetile.backends.triton import gather_backward_gluon
        return gather_backward_gluon.resources(problem)
    if config["path"] == "blocks":
        portable = gather_blocks.refusal(problem) or resources(problem, {**config, "path": "portable"})  # where a call needs it
        return portable if isinstance(portable, str) else gather_blocks_backward.resources()
    (D0, D1), (V0, V1) = parts(problem["D"]), parts(problem["Dv"])
    size, rows, keys = BYTES[problem.dtype("q", "float32")], config["heads"], config["block_k"]
    sums = max(rows * (D0 + D1), keys * (D0 + D1 + V0 + V1)) + 2 * rows * keys
    if sums > config["num_warps"] * 32 * 232:
        return f"{rows} heads and {keys} keys of {D0 + D1} + {V0 + V1} columns do not fit the registers of {config['num_warps']} warps; use smaller tiles or more warps"
    shared = size * ((rows + config["num_stages"] * keys) * (D0 + D1 + V0 + V1) + 2 * rows * keys)
    if shared > shared_limit(problem.arch):
        return f"about {shared // 1024} KiB of shared memory asked for, {problem.arch} has {shared_limit(problem.arch) // 1024}; use smaller tiles"
    return Resources(threads=config["num_warps"] * (64 if problem.arch == "gfx942" else 32), shared=shared)


def constants(D, DV, config, *, rows, granularity=1, causal=False, cap=False, from_length=False) -> dict:
    (D0, D1), (V0, V1) = parts(D), parts(DV)
    return dict(ROWS=rows, TILES=-(-rows // config["heads"]), D=D, D0=D0, D1=D1, DV=DV, V0=V0, V1=V1, BH=config["heads"], BK=config["block_k"], GRANULARITY=granularity, CAUSAL=causal,
                CAP=cap, FROM_LENGTH=from_length)


def run(q, k, v, indices, lse, delta, dout, *, place, config, lengths=None, granularity=1, causal=False, scale, softcap=None, kv_length=None, q_start=None, deterministic=True,
        out_dtype=None):
    B, Hq, T, D = q.shape
    Hk, S, DV, G, K = k.shape[1], k.shape[2], v.shape[3], indices.shape[1], indices.shape[3]
    kind = out_dtype or str(q.dtype)[6:]
    if config["path"] == "blocks" and B * Hq * T and S and K and gather_blocks.takes(q, k, v, indices, None, granularity):
        return gather_blocks_backward.run(q, k, v, indices, lse, delta, place.cast(dout, str(q.dtype)[6:]), kind, place, lengths=lengths, granularity=granularity, causal=bool(causal),
                                          scale=scale, softcap=softcap, kv_length=kv_length, q_start=q_start)
    dk, dv = place.zeros((B, Hk, S, D), "float32"), place.zeros((B, Hk, S, DV), "float32")
    if not B * Hq * T or not S or not K:
        return place.zeros((B, Hq, T, D), kind), place.cast(dk, kind), place.cast(dv, kind)
    if config["path"] == "gluon":
        from sparsetile.backends.triton import gather_backward_gluon
        dout = place.cast(dout, str(q.dtype)[6:])
        if gather_backward_gluon.takes(q, k, v, dout, indices, granularity, scale, softcap):
            return gather_backward_gluon.run(q, k, indices, lse, delta, dout, place=place, lengths=lengths, causal=causal, scale=scale, kv_length=kv_length,
                                             q_start=q_start, out_dtype=kind)
    dq, rows = place.empty((B, Hq, T, D), kind), shared_rows(Hq, Hk, G)
    host, starts = known_start(q_start)
    made = constants(D, DV, config, rows=rows, granularity=granularity, causal=bool(causal), cap=softcap is not None, from_length=q_start is None)
    compiled = options(config)
    inner, outer = (0.0, 0.0) if softcap is None else (scale / softcap, softcap)
    arrays = (indices, lengths, kv_length, starts)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    sets = Hq // rows
    queries[(made["TILES"] * sets * T * B,)](q, k, v, dout, lse, delta, dq, *arrays, *strides, Hq, Hk, G, T, S, K, host or 0, scale, inner, outer, **made, **compiled)
    blocks = triton.cdiv(K * granularity, config["block_k"])
    per = B * sets * blocks * config["block_k"]                                # places of one query
    some = max(1, min(T, SCRATCH // (per * (D + DV) * 4)))
    none, width = B * Hk * S, min(256, power(max(D, DV)))
    numbers = place.empty((some * per,), "int64")
    dks, dvs = place.empty((some * per, D), "float32"), place.empty((some * per, DV), "float32")
    keys = place.torch.arange(none + 1, device=q.device)
    columns = math.ceil(max(D, DV) / width)
    for begin in range(0, T, some):
        shares[(B * sets * some * blocks,)](q, k, v, dout, lse, delta, numbers, dks, dvs, *arrays, *strides, Hq, Hk, G, T, S, K, host or 0, begin, some, blocks, none,
                                            scale, inner, outer, **made, **compiled)
        ordered, order = place.torch.sort(numbers, stable=True)
        ends = place.torch.searchsorted(ordered, keys)
        gathered[(none * columns,)](order, ends, dks, dvs, dk, dv, D=D, DV=DV, WIDTH=width, BLOCKS=columns, num_warps=1 if width <= 128 else 2)
    return dq, place.cast(dk, kind), place.cast(dv, kind)


def artifacts(problem: Problem, config) -> list[dict]:
    if config["path"] == "blocks":
        return gather_blocks_backward.artifacts(problem) + artifacts(problem, {**config, "path": "portable"})
    if config["path"] == "gluon":
        from sparsetile.backends.triton import gather_backward_gluon
        return gather_backward_gluon.artifacts(problem) + artifacts(problem, {**config, "path": "portable"})
    has = problem.features.__contains__
    pointer = POINTER[problem.dtype("q", "float32")]
    made = constants(problem["D"], problem["Dv"], config, rows=problem["Hq"] // problem["Hk"], granularity=problem.granularity, causal=has("causal"), cap=has("softcap"),
                     from_length=has("kv_length") and not has("q_start"))
    common = {name: pointer for name in ("q", "k", "v", "dout")} | {"lse": "*fp32", "delta": "*fp32", "indices": "*i32", "lengths": "*i32"}
    common |= {name: "*i32" for name, on in (("kv_length", has("kv_length")), ("q_starts", has("q_start"))) if on}
    strides = ("sqb", "sqh", "sqt", "skb", "skh", "sks", "svb", "svh", "svs", "sgb", "sgh", "sgt")
    numbers = {name: "i32" for name in strides + ("Hq", "Hk", "G", "T", "S", "K", "q_start")} | {name: "fp32" for name in ("scale", "inner", "outer")}
    aligned = strides if problem["D"] % 16 == 0 and problem["Dv"] % 16 == 0 else ()
    compiled = options(config)
    found = [dict(fn=queries, signature=common | {"dq": pointer} | numbers, constexprs=made, options=compiled, div16=(*common, "dq", *aligned)),
             dict(fn=shares, signature=common | {"numbers": "*i64", "dks": "*fp32", "dvs": "*fp32"} | numbers | {"begin": "i32", "some": "i32", "blocks": "i32", "none": "i32"},
                  constexprs=made, options=compiled, div16=(*common, "numbers", "dks", "dvs", *aligned))]
    width = min(256, power(max(problem["D"], problem["Dv"])))
    found.append(dict(fn=gathered, signature={"order": "*i64", "ends": "*i64", "dks": "*fp32", "dvs": "*fp32", "dk": "*fp32", "dv": "*fp32"},
                      constexprs=dict(D=problem["D"], DV=problem["Dv"], WIDTH=width, BLOCKS=math.ceil(max(problem["D"], problem["Dv"]) / width)),
                      options=dict(num_warps=1 if width <= 128 else 2), div16=("order", "ends", "dks", "dvs", "dk", "dv")))
    return found
