"""Gradients of attention over lists of blocks, without atomics: dQ by the lists of queries, dK and dV by the lists of keys.

q [B,Hq,T,D]  k [B,Hk,S,D]  v [B,Hk,S,Dv]  dout [B,Hq,T,Dv]  lse, delta [B,Hq,T]  ->  dq [B,Hq,T,D], dk [B,Hk,S,D], dv [B,Hk,S,Dv]
lse is the logsumexp of all that stood in the denominator (sink included), delta what attention_delta gives; a row whose lse is infinite has no gradient.
P = exp(s - lse), dS = P (dO . v - delta) d(softcap), dQ = scale dS k, dK = scale dS^T q, dV = P^T dO. Each sum is one program's, in one order: head after
head of the group, partial blocks before full ones; twice the same call gives the same bits. Keys that nobody sees get 0; if they hold NaN it goes nowhere.

Two paths are for sm_90a (block_attention_backward_gluon.py; layouts of several parts, or in an order, block_backward_parts.py). Calls that they do not know (other orders, softcaps, scales that are not positive, outputs of another type,
arrays that the copy engine cannot address) take the portable one with the same blocks; where lists differ within a group of heads gluon_ordered is gluon.
"""
from functools import lru_cache

from sparsetile.backends.contract import Problem, Resources, Tunable
from sparsetile.backends.triton import block_backward_maps, relaunch
from sparsetile.backends.triton.block_backward_portable import columns, rows, rows_again
from sparsetile.backends.triton.gluon_paths import lacking
from sparsetile.backends.triton.launch import (BYTES, FAR, POINTER, beside, covered, known_start, list_steps, options, parts, parts_alone, power, refusal, schedule,
                                               shared_limit)

TUNABLES = (
    Tunable("block_q", (64, 16, 32, 128), "query rows of a tile"),
    Tunable("block_k", (64, 32, 128), "keys of a tile"),
    Tunable("num_warps", (4, 8), "warps of a program", ("portable",)),
    Tunable("num_stages", (1, 2, 3), "blocks in flight", ("portable",)),
    Tunable("chunk", (0, 32, 64, 128), "columns of a product at a time, read again for every block; 0: all, a program's own tiles are kept", ("portable",)),
    Tunable("columns", (0, 64, 128, 256), "with chunk: columns of the gradients that a program makes; 0: all", ("portable",)),
    Tunable("path", ("portable", "gluon", "gluon_ordered"), "of Hopper's own instructions, 16-bit types, blocks of 128, D and Dv up to 128: gluon: dQ in a kernel of its own, as for layouts of several parts always; gluon_ordered: one pass, dQ added in order; D 65 to 128"),
    Tunable("heads", (8, 1, 2, 4, 16, 32), "key heads worked on at a time; more keep additions to one row apart, fewer keep a head in the L2 cache", ("gluon_ordered",)),
    Tunable("walk", ("descending", "ascending", "abreast"), "rows of an item from the last to the first and key blocks ascending, or both the other way; abreast: descending, all heads of a group at a row before the next row", ("gluon_ordered",)),
)


def supports(problem: Problem) -> str | None:
    return refusal(problem)


def widths(D: int, DV: int, config, own: int) -> dict:
    """How the widths lie in a program's tiles; `own` is the width whose gradients the program makes."""
    if not config["chunk"]:
        (D0, D1), (V0, V1) = parts(D), parts(DV)
        return dict(D0=D0, D1=D1, V0=V0, V1=V1, SLICES=1)
    wide = min(config["columns"] or power(own), power(own))
    return dict(D0=wide, D1=0, V0=wide, V1=0, SLICES=-(-own // wide))


def no_gluon(problem: Problem, path: str = "gluon") -> str | None:
    """Why the path "gluon" or "gluon_ordered" is not for this problem."""
    D, DV = problem["D"], problem["Dv"]
    if refused := lacking(problem, path):
        return refused
    if problem.dtype("q") not in ("float16", "bfloat16") or D > 192 or DV > 128 or D % 8 or DV % 8:
        return f"path {path} takes float16 and bfloat16 with D up to 192 and Dv up to 128, multiples of 8, not {problem.dtype('q')}, {D}, {DV}; take portable"
    if path == "gluon_ordered" and not 64 < D <= 128:
        return f"path gluon_ordered takes D 65 to 128, not {D}; take gluon"
    return f"path {path} has no softcap; take portable" if "softcap" in problem.features else None


def default_config(problem: Problem) -> dict:
    """TFLOP/s on H100s in several runs, portable / gluon / gluon_ordered (CuPy beside the last): causal 8k 385 / 436 / 495 (586), 32k 369 / 447 / 498 (614), window 4096 366 / 458 / 433 (581),
    window 1024 277 / 394 / 346 (441), documents 361 / 426 / 435 to 478 (535 to 602), random 10 % 317 / 465 / - (492), BigBird 300 / 451 / - (426), Longformer 190 / 316 / - (316),
    Longformer with eight key heads - / 328 / - (353), causal 16k of D 64 - / 370 / - (432), of D 192 222 / 450 / - (535).
    Of gluon_ordered, descending 8 / 16 / 32 heads / ascending 2: causal 8k 495 / - / 493 / 489, 32k 487 / 498 / - / -, window 4096 434 / - / - / 426, window 1024 348 / - / - / 350,
    documents 449 / 460 / - / 478.
    Under groups of heads on an H200, descending / abreast (CuPy), one run: causal 8k of 32 heads on 8 458 / 512 (603), 32k 505 / 527 (622), 64k 497 / 519, documents 430 / 463 (559), 4k 368 / 456, the last 8k of 32k 503 / 511
    (another run 502 / 487), window 4096 464 / 382, window 1024 386 / 318; 128k 483 / 413 (rounds start staggered, and what they read falls out of the cache).
    All keys at 32k - / 487 / 327 (617). Layouts of several parts run as block_backward_parts.py says on either path: strided 128 / fixed 128 + 8 at 32k 98 / 349 (portable 44 / 108, CuPy 90 / 259)."""
    kinds = problem.words
    if problem["T"] <= 64 or {"order", "shared_kv"} & problem.features or parts_alone(problem, widest=128) or no_gluon(problem) is not None:  # gradients of shared keys leave in float32
        return portable_config(problem)
    config = dict(path="gluon", heads=8, walk="descending", block_q=128, block_k=128, num_warps=8, num_stages=1, chunk=64, columns=64)  # from num_warps on: where a call needs the portable path
    if kinds & {"global", "sinks", "random", "window", "dense"} or no_gluon(problem, "gluon_ordered") is not None:  # ordered additions would wait for each other; windows have many partial blocks
        return config
    if "documents" in kinds and problem["Hq"] == problem["Hk"]:
        return config | dict(path="gluon_ordered", heads=2, walk="ascending")
    grouped = "causal" in kinds and problem["Hq"] > problem["Hk"] and "per_head" not in problem.features
    return config | dict(path="gluon_ordered", heads=16 if "causal" in kinds and problem["T"] > 16384 else 8, walk="abreast" if grouped and problem["T"] == problem["S"] <= 65536 else "descending")


def portable_config(problem: Problem) -> dict:
    wide, big = power(max(problem["D"], problem["Dv"])), problem.arch in ("sm_90a", "sm_100", "cpu")
    config = dict(path="portable", heads=8, walk="descending", block_q=64, block_k=64, num_warps=4, num_stages=2, chunk=0, columns=0)
    if problem.dtype("q") == "float32":
        config.update(block_q=32, block_k=32, num_stages=1, chunk=32, columns=128 if wide > 128 else 0)
    elif problem.arch == "gfx942":
        config.update(num_stages=1)
        if wide > 64:
            config.update(block_q=32, block_k=32)
        if wide > 128:
            config.update(chunk=64, columns=128)
    elif wide > 256:
        config.update(block_q=32 if big else 16, block_k=32, num_warps=8, num_stages=1)
    elif wide > 128:
        config.update(num_warps=8, block_q=128 if problem.arch == "sm_90a" else 64)
        if not big:  # no warpgroups that would want 64 rows
            config.update(block_q=32, block_k=32)
    for step in (dict(num_stages=1), dict(block_q=32, block_k=32), dict(chunk=64, columns=128)):
        if isinstance(resources(problem, config), Resources):
            break
        config |= step
    if problem["T"] < config["block_q"]:
        config["block_q"] = power(problem["T"])
    return config


def resources(problem: Problem, config) -> Resources | str:
    if config["path"] != "portable":
        if (config["block_q"], config["block_k"]) != (128, 128):
            return f"path {config['path']} takes blocks of 128 x 128, not {config['block_q']} x {config['block_k']}"
        if config["walk"] == "abreast" and (problem["Hq"] == problem["Hk"] or "per_head" in problem.features):
            return "walk abreast is for groups of query heads that share a key head and a list; take descending"
        portable = no_gluon(problem, config["path"]) or resources(problem, {**config, "path": "portable"})  # where a call needs it
        if isinstance(portable, str):
            return portable
        from sparsetile.backends.triton import block_attention_backward_gluon
        return block_attention_backward_gluon.resources(problem["D"], problem["Dv"], config["path"])
    D, DV, BQ, BK, warps, stages = problem["D"], problem["Dv"], config["block_q"], config["block_k"], config["num_warps"], config["num_stages"]
    size, lanes = BYTES[problem.dtype("q", "float32")], 64 if problem.arch == "gfx942" else 32
    a, b = widths(D, DV, config, D), widths(D, DV, config, max(D, DV))
    sums = max(BQ * (a["D0"] + a["D1"]), BK * (b["D0"] + b["D1"] + b["V0"] + b["V1"])) + 2 * BQ * BK
    if sums > warps * 32 * 232:
        return f"the sums of a tile ({BQ} queries, {BK} keys, {D} + {DV} columns) do not fit the registers of {warps} warps; use smaller blocks, more warps, or chunk and columns"
    if config["chunk"]:
        shared = size * max(BQ, BK) * (2 * config["chunk"] + b["D0"] + b["V0"])
    else:
        wide = a["D0"] + a["D1"] + a["V0"] + a["V1"]
        scratch = BK * wide + 2 * BQ * BK if problem.arch == "sm_100" else BK * max(a["D0"], a["V0"])  # sums on their way out; sm_100 lays P and dS there too
        shared = size * (wide * max(BQ + max(1, stages) * BK, BK + max(1, stages) * BQ) + scratch) + 2048
    if shared > shared_limit(problem.arch):
        return f"about {shared // 1024} KiB of shared memory asked for, {problem.arch} has {shared_limit(problem.arch) // 1024}; use smaller blocks, fewer stages, or chunk and columns"
    return Resources(threads=warps * lanes, shared=shared)


def constants(D: int, DV: int, config, own: int, *, cap=False, intervals=False, bitmaps=False, edge=False, from_length=False, far=False, steps=(0, 0, 0, 0)) -> dict:
    """The compile-time constants of `rows` (own = D) and `columns` (own = max(D, DV)): what run launches and what artifacts compiles ahead.
    steps: the distances of rows in q, k, v, dout where they are the usual ones, else zeros. Known and in 64 bits they cost one address, not one a row."""
    QT, KT, VT, GT = steps
    return dict(D=D, DV=DV, **widths(D, DV, config, own), BQ=config["block_q"], BK=config["block_k"], CHUNK=config["chunk"], CAP=cap, INTERVALS=intervals, BITMAPS=bitmaps,
                EDGE=edge, FROM_LENGTH=from_length, FAR=far or QT > 0, QT=QT, KT=KT, VT=VT, GT=GT)


def masked(made: dict) -> bool:
    """Whether a tile may have blocks with a mask, hence keys that none of its rows sees."""
    return made["EDGE"] or made["INTERVALS"] or made["BITMAPS"]


@lru_cache(4096)
def _plan(shapes, strides, lists_key, flags, config, softcap):
    """Of both kernels: constants, and of `rows` its tiles and whether the call covers exactly those of the lists."""
    (Hq, T, D), (Hk, S, DV) = shapes
    block_q, block_k, first, nq, nk, has_intervals, has_bitmaps, ordered_q, ordered_k = lists_key
    kv_length, from_length, q_start = flags
    config = dict(config)
    sqt, sks, svs, sgt = strides
    reach_q, reach_k = T if ordered_q else block_q, S if ordered_k else block_k
    far = max(reach_q * max(abs(sqt), abs(sgt), D), reach_k * max(abs(sks), abs(svs), D, DV)) >= FAR
    usual = all(step in (width, heads * width) for step, width, heads in ((sqt, D, Hq), (sks, D, Hk), (svs, DV, Hk), (sgt, DV, Hq)))
    n, covers, exact = (nq, True, False) if ordered_q else covered(T, block_q, q_start, first, nq)
    common = dict(cap=softcap, intervals=has_intervals, bitmaps=has_bitmaps, from_length=from_length, far=far, steps=(sqt, sks, svs, sgt) if usual else (0, 0, 0, 0))
    by_rows = constants(D, DV, config, D, edge=not ordered_k and (kv_length or nk * block_k > S), **common)
    by_columns = constants(D, DV, config, max(D, DV), edge=not ordered_q and not exact, **common)
    return relaunch.Constants(by_rows | options(config)), relaunch.Constants(by_columns | options(config)), n, covers


@lru_cache(4096)
def _again(made: relaunch.Constants) -> relaunch.Constants:
    """The constants of `rows_again`, from those of `rows`."""
    return relaunch.Constants({name: value for name, value in made.items() if name != "SLICES"} | dict(MANY=64))


def run_parts(q, k, v, parts, lse, delta, dout, *, place, config, scale, softcap=None, kv_length=None, q_start=None, deterministic=True):
    """(dq, dk, dv) of a layout's parts, their sums made in float32 and rounded once, or None where that is not possible: then they are run apart and added."""
    if config["path"] == "portable" or softcap is not None or max(q.shape[3], v.shape[3]) > 128 or not 1e-30 < scale < 1e38 or not q.numel() or not k.numel():
        return None
    from sparsetile.backends.triton import block_backward_parts
    plan = block_backward_parts.plans(q, k, v, dout, parts, q_start, kv_length, place)
    if plan is None:
        return None
    kind, shape, heads = str(q.dtype)[6:], q.shape, k.shape
    dq, dk, dv = place.empty(tuple(shape), kind), place.empty(tuple(heads), kind), place.empty((*heads[:3], v.shape[3]), kind)
    block_backward_parts.launch(q, k, v, dout, plan, lse, delta, dq, dk, dv, place, scale)
    return dq, dk, dv


def run(q, k, v, lists, lse, delta, dout, *, place, config, scale, softcap=None, kv_length=None, q_start=None, deterministic=True, out_dtype=None):
    B, Hq, T, D = q.shape
    Hk, S, DV = k.shape[1], k.shape[2], v.shape[3]
    kind = out_dtype or str(q.dtype)[6:]
    if (lists.q_order is not None or lists.k_order is not None) and kind == str(q.dtype)[6:]:
        found = run_parts(q, k, v, (lists,), lse, delta, dout, place=place, config=config, scale=scale, softcap=softcap, kv_length=kv_length, q_start=q_start)
        if found is not None:
            return found
    if not B * Hq * T or not S or not lists.nq or not lists.nk:
        return place.zeros((B, Hq, T, D), kind), place.zeros((B, Hk, S, D), kind), place.zeros((B, Hk, S, DV), kind)
    dq = (place.zeros if lists.q_order is not None else place.empty)((B, Hq, T, D), kind)  # an order may lack queries or keys
    make = place.zeros if lists.k_order is not None else place.empty
    dk, dv = make((B, Hk, S, D), kind), make((B, Hk, S, DV), kind)
    if config["path"] != "portable":
        from sparsetile.backends.triton import block_attention_backward_gluon
        if block_attention_backward_gluon.takes(q, k, v, dout, lists, scale, softcap, kind):
            where = dict(kv_length=kv_length, q_start=q_start)
            if config["path"] == "gluon" or not block_attention_backward_gluon.shares_lists(q, k, lists):
                block_attention_backward_gluon.launch(q, k, v, dout, lists, lse, delta, dq, dk, dv, place, scale, **where)
            else:
                block_attention_backward_gluon.launch_ordered(q, k, v, dout, lists, lse, delta, dq, dk, dv, place, scale, **{name: config[name] for name in ("heads", "walk")}, **where)
            return dq, dk, dv
    host, starts = known_start(q_start)
    by_rows, by_columns, n, covers = _plan(
        ((Hq, T, D), (Hk, S, DV)), (q.stride(2), k.stride(2), v.stride(2), dout.stride(2)),
        (lists.block_q, lists.block_k, lists.first, lists.nq, lists.nk, lists.has_intervals, lists.has_bitmaps, lists.q_order is not None, lists.k_order is not None),
        (kv_length is not None, q_start is None, host), tuple(config.items()), softcap is not None)
    inner, outer = (0.0, 0.0) if softcap is None else (scale / softcap, float(softcap))
    scales, kinds = (float(scale), inner, outer), (q.dtype, dq.dtype)
    known = (lists.intervals, lists.bitmaps, lists.list_of)
    where = lists.q_order, lists.k_order, kv_length, starts
    steps = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *list_steps(lists))
    rest = (q, k, v, dout, lse, delta, dq, lists.offsets, lists.cols, lists.kinds, *known, schedule(lists) if covers else None, *where)
    numbers = (*steps, Hq, Hq // Hk, T, S, lists.first, lists.nq, n)
    if block_backward_maps.takes(q, k, v, dout, lists, by_columns, place.arch):
        bad = place.empty((B * Hq, n), "int32") if masked(by_rows) else None
        block_backward_maps.launch(q, k, v, dout, lists, lse, delta, dq, bad, dk, dv, place, by_rows, by_columns, n, covers, kv_length, starts, host, scales)
        if bad is not None:
            made = _again(by_rows)
            relaunch.launch(rows_again, (-(-B * Hq * n // made["MANY"]),), place, (bad, *rest), (*numbers, B * Hq, host or 0, *scales), made, kinds)
        return dq, dk, dv
    relaunch.launch(rows, (by_rows["SLICES"] * n * Hq * B,), place, rest, (*numbers, beside(Hq), host or 0, *scales), by_rows, kinds)
    n = lists.nk if lists.k_order is not None else -(-S // config["block_k"])
    relaunch.launch(columns, (by_columns["SLICES"] * n * Hk * B,), place,
                    (q, k, v, dout, lse, delta, dk, dv, lists.by_key_offsets, lists.by_key_rows, lists.by_key_kinds, *known, *where),
                    (*steps, Hk, Hq // Hk, T, S, lists.first, lists.nq, lists.nk, n, beside(Hk), host or 0, *scales), by_columns, kinds)
    return dq, dk, dv


def artifacts(problem: Problem, config) -> list[dict]:
    """What run would compile for the problem: with the words of its features."""
    if config["path"] != "portable":
        from sparsetile.backends.triton import block_attention_backward_gluon
        found = block_attention_backward_gluon.artifacts(problem, config["path"]) + artifacts(problem, {**config, "path": "portable"})
        if problem.words & {"strided", "fixed"} and max(problem["D"], problem["Dv"]) <= 128:
            from sparsetile.backends.triton import block_backward_parts
            found += block_backward_parts.artifacts(problem, "strided" in problem.words)
        return found
    has, D, DV = problem.features.__contains__, problem["D"], problem["Dv"]
    pointer, gradient = POINTER[problem.dtype("q", "float32")], POINTER[problem.dtype("out", problem.dtype("q", "float32"))]
    common = dict(cap=has("softcap"), intervals=has("interval"), bitmaps=has("bitmap"), from_length=has("kv_length") and not has("q_start"), steps=(D, D, DV, DV))
    by_rows = constants(D, DV, config, D, edge=not has("order") and (has("kv_length") or problem["S"] % config["block_k"] != 0), **common)
    by_columns = constants(D, DV, config, max(D, DV), edge=not has("order") and (has("kv_length") or has("q_start") or problem["T"] % config["block_q"] != 0), **common)
    arrays = {name: pointer for name in ("q", "k", "v", "dout")} | {"lse": "*fp32", "delta": "*fp32"} | {name: "*i32" for name in ("offsets", "kinds", "intervals", "bitmaps", "list_of")}
    arrays |= {name: "*i32" for name, on in (("q_order", has("order")), ("k_order", has("order")), ("kv_length", has("kv_length")), ("q_starts", has("q_start"))) if on}
    strides = ("sqb", "sqh", "sqt", "skb", "skh", "sks", "svb", "svh", "svs", "sgb", "sgh", "sgt")
    integers = (*strides, "slb", "slh", "group", "T", "S", "first", "nq", "tiles", "q_start")
    by_rows, by_columns = (relaunch.Constants(made | options(config)) for made in (by_rows, by_columns))
    mapped = block_backward_maps.takes_problem(problem, by_columns)
    rest = {"dq": gradient, "cols": "*i32", "schedule": "*i32"}
    if mapped:
        found = block_backward_maps.artifacts(problem, by_rows, by_columns, masked(by_rows), pointer, gradient)
        todo = [(rows_again, rest | {"bad": "*i32"}, ("Hq", "heads"), _again(by_rows))] if masked(by_rows) else []
    else:
        found, todo = [], [(rows, rest, ("Hq", "together"), by_rows), (columns, {"dk": gradient, "dv": gradient, "entries": "*i32"}, ("Hk", "nk", "together"), by_columns)]
    for fn, own, more, made in todo:
        found.append(relaunch.artifact(fn, made, arrays | own, (*integers, *more), ("scale", "inner", "outer"), aligned=strides if D % 16 == 0 and DV % 16 == 0 else ()))
    return found
