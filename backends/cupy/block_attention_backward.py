"""Backward of attention over block lists: q, k, v, dout [B,Hq,T,Dv], lse and delta [B,Hq,T] -> dq [B,Hq,T,D], dk [B,Hk,S,D], dv [B,Hk,S,Dv].

lse is the logsumexp of all that stood in the denominator (sink included), delta what attention_delta gives. P = exp(s - lse), 0 for rows whose lse is
infinite; dS = P * (dout . v - delta) * d(softcap). dQ goes by the lists of queries, dK and dV by the lists of keys, each sum by one CTA in one order:
twice the same call gives the same bits. dK and dV are summed over the group's heads; keys that nobody sees get 0.

Two paths are for sm_90a and blocks of 128. "hopper" (block_attention_backward_hopper.cu): one pass, dQ added in the order in which items are taken. "two_pass"
(block_attention_backward_two_pass.cu, two_pass.py): dS is kept, dQ is its product with K; also for D up to 192, and for layouts of several parts. Calls that they do not know (softcap,
orders that are not residue classes or summaries, of path hopper any, scales that are not positive, outputs of another type, arrays that the copy engine cannot address) take the portable one
with the same blocks.
"""
import struct

from sparsetile.backends.contract import Problem, Resources, Tunable, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import hopper, two_pass, walks
from sparsetile.backends.cupy.hopper_axes import Axes, axes_of, in_classes
from sparsetile.backends.cupy.operands import HALVES, KINDS, LISTS, POSITIONS, ceil_div, column_slices, copy_bytes, lists_values, padded, position_values, problem_copy_bytes, query_tiles, sliced

TUNABLES = (
    Tunable("path", ("portable", "hopper", "two_pass"), "hopper: one pass of warpgroup products, dQ added in order; 16-bit types, blocks of 128, D and Dv up to 128. two_pass: dS is kept for a second one; D up to 192"),
    Tunable("block_q", (64, 32, 128), "rows of a tile: queries of one head"),
    Tunable("block_k", (64, 128, 32), "keys of a block of the lists"),
    Tunable("tile_k", (32, 64, 128), "keys a step of dQ, and keys of a CTA of dK and dV; divides block_k"),
    Tunable("tile_q", (32, 16, 64), "queries a step of dK and dV"),
    Tunable("stages", (1, 2), "2: the next tiles arrive while these are multiplied"),
    Tunable("heads", (1, 2, 4, 8, 16, 32), "key heads worked on at a time; more keep additions to one row apart, fewer keep a head in the L2 cache", ("hopper", "two_pass")),
    Tunable("sums", (1, 2), "float32 sums of dQ; 2: where rows are long, even key blocks do not wait for odd ones", ("hopper",)),
    Tunable("section", (0, 8, 16, 32), "query tiles of an item of a key block that far more rows see than others; 0: such key blocks are items like others", ("hopper",)),
    Tunable("walk", ("descending", "ascending", "freest", "abreast", "turning"), "rows of an item from the last to the first and key blocks ascending, or both the other way, or, in static layouts, rows as a simulation of the queues finds them free (walks.py); abreast: descending, all heads of a group at a row before the next row; turning: so, and every other round of items from the first row to the last", ("hopper",)),
    Tunable("scratch", (2, 1, 4, 8), "GiB of dS, 32 KiB for each block of 128 x 128 of each head, before a second pass takes it", ("two_pass",)),
)
GROUPED = ("abreast", "turning")  # walks of heads that share a key head
LOG2E = 1.4426950408889634
HOPPER_FIELDS = "128s" * 6 + "18Q" + LISTS + POSITIONS + "17i2f"
HOPPER_FIELDS += f"{-struct.calcsize(HOPPER_FIELDS) % 64}x"  # the struct is as long as its alignment asks
FIELDS = "12Q" + LISTS + POSITIONS + "16q6i2f"


def supports(problem: Problem) -> str | None:
    kinds = {problem.dtype(name) for name in "qkv"}
    if len(kinds) > 1 or not kinds <= {"float32", *HALVES}:
        return f"CuPy's block attention backward takes q, k, v of one type, float32, float16 or bfloat16, not {'/'.join(str(problem.dtype(n)) for n in 'qkv')}; cast them to bfloat16"
    if max(problem["D"], problem["Dv"]) > 576:
        return f"CuPy's block attention backward takes D and Dv up to 576, not {problem['D']} and {problem['Dv']}"
    refusal = resources(problem, default_config(problem))
    return f"CuPy's block attention backward of D {problem['D']}, Dv {problem['Dv']}: {refusal}; a narrower head or an 80 GB-class chip (163 KiB) would do" if isinstance(refusal, str) else None


def shared_bytes(D: int, Dv: int, config: dict, float32: bool) -> tuple[int, int]:
    """Of `rows` and of `columns`."""
    bq, tk, tq, stages = config["block_q"], config["tile_k"], config["tile_q"], config["stages"]
    if float32:
        rows = bq * (padded(D) + padded(Dv) + 2) + 32 * 65 + bq * 33 + 3 * bq + 8
        columns = 32 * (padded(D) + padded(Dv) + 2) + 32 * 65 + 2 * 32 * 33 + 4 * 32 + 8
        return 4 * rows, 4 * columns
    width, words = padded(D) + padded(Dv) + 16, tk // 32
    return (bq + stages * tk) * width * 2 + (stages + 1) * (bq + 1) * words * 4 + bq * 4, (tk + stages * tq) * width * 2 + stages * tq * (2 + words) * 4


def no_hopper(problem: Problem, path: str) -> str | None:
    """Why the path "hopper" or "two_pass" is not for this problem."""
    D, Dv = problem["D"], problem["Dv"]
    widest = 192 if path == "two_pass" else 128
    if problem.arch != "sm_90a":
        return f"path {path}: {problem.arch} lacks its instructions; take portable"
    if problem.dtype("q") not in HALVES or D > widest or Dv > 128 or D % 8 or Dv % 8:
        return f"path {path} takes float16 and bfloat16 with D up to {widest} and Dv up to 128, multiples of 8, not {problem.dtype('q')}, {D}, {Dv}; take portable"
    if "softcap" in problem.features:
        return f"path {path} has no softcap; take portable"
    return None


def hopper_defines(kind: str, D: int, Dv: int, parted: bool = False) -> dict:
    return dict(KIND=KINDS[kind], WIDTH=ceil_div(D, 64) * 64, VALUES=64 if Dv <= 64 else 128, PARTED=int(parted))


def hopper_bytes(D: int, Dv: int, path: str) -> int:
    """Keys and values; two stages of queries and dout, of dS, of dQ in float32 where it is added, of rows; plans and barriers."""
    width, values = ceil_div(D, 64) * 64, ceil_div(Dv, 64) * 64
    return 1024 + 256 * (width + values) * 2 + 2 * 64 * 256 + (2 * 64 * width * 4 if path == "hopper" else 0) + 2 * 784 + 128 + 168 + 56


def resources(problem: Problem, config: dict):
    path = config["path"]
    if path != "portable":
        if (config["block_q"], config["block_k"]) != (128, 128):
            return f"path {path} takes blocks of 128 x 128, not {config['block_q']} x {config['block_k']}"
        if (config["tile_k"], config["tile_q"], config["stages"]) != (64, 32, 1):
            return f"path {path} has tiles of its own; leave tile_k, tile_q and stages at 64, 32 and 1, which are for calls that need the portable path"
        if path == "two_pass" and (config["sums"], config["section"], config["walk"]) != (1, 0, "descending"):
            return "path two_pass adds nothing in device memory; leave sums, section and walk at 1, 0 and descending"
        if config["walk"] in GROUPED and (problem["Hq"] == problem["Hk"] or "per_head" in problem.features):
            return f"walk {config['walk']} is for groups of query heads that share a key head and a list; take descending"
        portable = resources(problem, {**config, "path": "portable"})  # where a call needs it
        shared = hopper_bytes(problem["D"], problem["Dv"], path)
        return no_hopper(problem, path) or (portable if isinstance(portable, str) else Resources(384, shared if path == "hopper" else max(shared, two_pass.query_bytes(ceil_div(problem["D"], 64) * 64)), 168))
    bq, bk, tk, tq = config["block_q"], config["block_k"], config["tile_k"], config["tile_q"]
    float32 = problem.dtype("q") == "float32"
    if bq % 32 or bk % tk or bq % tq:
        return f"block_q is a multiple of 32 and of tile_q {tq}, block_k of tile_k {tk}, not {bq} and {bk}"
    if float32 and (tk, tq, config["stages"]) != (32, 32, 1):
        return "float32 takes tile_k 32, tile_q 32 and stages 1"
    registers = max(sliced(problem["D"])[1] // 2 + tk, sum(column_slices(problem["D"], problem["Dv"])[1:]) // 2 + tq) + 56
    if not float32 and registers > 255:
        return f"tile_k {tk} and tile_q {tq} need about {registers} registers a thread, 255 are there"
    shared = max(shared_bytes(problem["D"], problem["Dv"], config, float32))
    if shared > nvrtc.shared_limit(problem.arch):
        return f"{shared} bytes of shared memory, {problem.arch} has {nvrtc.shared_limit(problem.arch)}"
    return Resources(threads=_threads(config, float32)[0], shared=shared, registers=registers)


def _threads(config: dict, float32: bool) -> tuple[int, int]:
    return (4 * config["block_q"], 128) if float32 else (2 * config["block_q"], 2 * config["tile_k"])


def waits(problem: Problem) -> bool:
    """Whether ordered additions wait for each other most of the time: some rows or key blocks meet nearly all others, or key blocks meet rows at random (unless crowded)."""
    return bool({"global", "sinks", "random"} & problem.words) and not crowded(problem)


def crowded(problem: Problem) -> bool:
    """Random blocks so many that dS of one key head does not fit two_pass's room: in pieces of few key blocks that path fills no chip, and where most blocks are there nobody waits long."""
    blocks = problem.density * ceil_div(problem["T"], 128) * ceil_div(problem["S"], 128) * (problem["Hq"] // problem["Hk"])
    known = not {"kv_length", "q_start"} & problem.features  # else the density is 1, whatever the blocks
    return "random" in problem.features and known and blocks * two_pass.SLOPES > two_pass.room(problem["B"], problem["Hq"], problem["T"], problem["D"])


def hopper_default(problem: Problem) -> dict | None:
    """TFLOP/s of hopper / two_pass in one run: random 10 % 302 / 488, BigBird 333 / 426, Longformer 203 / 296 on an H200; window 1024 433 / 375, window 4096 557 / 461 on an H100; sinks as globals, not measured.
    Of hopper on H100s, 8 heads / 8 and two sums / 2 and ascending: window 1024 419 / 429 (4 heads) / 432, documents 498 / 536 / 596, causal 8k 564 / 570 / 564, causal 32k 588 / 582 / 571 (1 head), causal 16k of D 64
    424 / 434 (16 heads 429); of groups of four heads to a key head window 1024 445 / - / 452, window 4096 566 / - / 524, documents 536 / - / 364, causal 8k 529 / 531 / -, causal 32k 538 / 584 / -. Of two_pass on an H100, 1 / 2 heads: BigBird 430 / 416, of groups of four heads 462 / 452, Longformer 323 / 323, random 10 % 484 / 466. What a simulation says of `section` and `walk` "freest" is for the tuner to try. Causal on an H100, of 8 heads / and two sums: groups of four at 8k 527 / 474, at 32k 538 / 584, at 128k
    589 / 390, one head to a key head at 128k 591 / 590. Random blocks on an H100, two_pass of 1 head / hopper of 2 heads / of 1 and freest: a third of them
    539 / 477 / 409, three quarters 379 / 517 / 554, all 386 / 587 / 596 (dense 617); groups of four heads: a third 147 / 354 / 417, three quarters 166 / 443 / 517, all 171 / 594 / 595. Layouts of several parts have two_pass only (strided 128 at heads
    2 / 8 / 32: 84 / 83 / 82)."""
    if problem["T"] > 64 and no_hopper(problem, "hopper") is None and not waits(problem) and not in_classes(problem):
        kinds = problem.words
        alone = problem["Hq"] == problem["Hk"]
        if crowded(problem):
            return dict(path="hopper", heads=1, walk="freest", scratch=2)
        if not alone and (own := grouped_default(problem)):
            return own
        if kinds & {"window", "documents"} and alone and "kv_length" not in kinds:  # where keys end early, key blocks past them would come first, with every key masked
            return dict(path="hopper", heads=2, walk="ascending", scratch=2)
        two = "causal" in kinds and "documents" not in kinds and (problem["T"] <= 16384 if alone else 16384 < problem["T"] <= 65536)
        return dict(path="hopper", heads=16 if problem["D"] <= 64 and not two else 8, sums=2 if two else 1, scratch=2)
    if problem["T"] > 64 and no_hopper(problem, "two_pass") is None:
        return dict(path="two_pass", heads=1 if waits(problem) else 2 if in_classes(problem) else 32, scratch=two_pass.default_scratch(problem))
    return None


def grouped_default(problem: Problem) -> dict | None:
    """Causal, heads in groups. TFLOP/s of descending / abreast / turning on an H200, one run, 32 query heads to 8, one sum: 8k 467 / 556 / 554 (two sums 496 / 502 / 567), in batches of 4 480 / 553 / 559, 16k 527 / 569 / 563
    (another run 553 / - / 599), 32k - / 581 / 592 (two sums 576 / 552 / -), 128k 581 / 562 / 582; 4k in batches of 16 419 / 529 / 482, 2k of 32 329 / 478 / 411: rounds stay in step while all key heads are worked on at a
    time. The last 2k of 8k 500 / 524 / 485, 8k of 32k 572 / 592 / 581; documents 492 / 526 / 460. To 4 key heads 8k 428 / - / 563 (two sums 583), to 16 521 / - / 566. Windows keep theirs: 4096 523 / 400 / 425, 1024 427 / 320 / 266."""
    causal, T, key_heads = "causal" in problem.features, problem["T"], problem["B"] * problem["Hk"]
    if not (causal or "causal+documents" in problem.features) or "per_head" in problem.features:
        return None
    if causal and T == problem["S"] and key_heads <= 32:
        return dict(path="hopper", walk="turning", heads=next(n for n in (8, 16, 32) if n >= key_heads), sums=2 if key_heads <= 8 and T <= (8192 if problem["D"] > 64 else 16384) else 1, scratch=2)
    return dict(path="hopper", walk="abreast", heads=8, sums=1, scratch=2) if T <= 32768 else None


def default_config(problem: Problem) -> dict:
    wide, portable = problem["D"] + problem["Dv"], dict(path="portable", heads=8, sums=1, section=0, walk="descending", scratch=2)
    if problem.dtype("q") == "float32":
        return dict(portable, block_q=32, block_k=64, tile_k=32, tile_q=32, stages=1)
    if own := hopper_default(problem):
        return {**portable, **own, **dict(block_q=128, block_k=128, tile_k=64, tile_q=32, stages=1)}
    if wide <= 256:
        return dict(portable, block_q=64, block_k=128, tile_k=64, tile_q=32, stages=1)
    return dict(portable, block_q=64 if wide <= 384 and nvrtc.shared_limit(problem.arch) > 128 * 1024 else 32, block_k=64, tile_k=32, tile_q=16, stages=1)


def defines(kind: str, out_kind: str, D: int, Dv: int, config: dict, copy: int, softcap: bool, q_order: bool, k_order: bool) -> dict:
    float32 = kind == "float32"
    _, dks, dvs = column_slices(D, Dv)
    return dict(KIND=KINDS[kind], OUT_KIND=KINDS[out_kind], BQ=config["block_q"], BK=config["block_k"], TK=config["tile_k"], TQ=config["tile_q"], DP=padded(D), DVP=padded(Dv), DQS=sliced(D)[1],
                DKS=dks, DVS=dvs, STAGES=config["stages"], COPY=4 if float32 else copy, SOFTCAP=int(softcap), Q_ORDER=int(q_order), K_ORDER=int(k_order))


def artifacts(problem: Problem, config: dict) -> list[dict]:
    kind, order = problem.dtype("q"), "order" in problem.features
    d = defines(kind, problem.dtype("out", kind), problem["D"], problem["Dv"], config, problem_copy_bytes(problem, "D", "Dv"), "softcap" in problem.features, order, order)
    portable = [dict(source=_source(kind), defines=d, names=["rows", "columns"])]
    source, names = ("block_attention_backward_hopper", ["prepare", "classify", "order", "backward", "join", "finish"]) if config["path"] == "hopper" else ("block_attention_backward_two_pass", ["prepare", "arrange", "backward", "queries", "join"])
    builds = (False, True) if order and config["path"] == "two_pass" else (False,)
    return portable if config["path"] == "portable" else [*(dict(source=source, defines=hopper_defines(kind, problem["D"], problem["Dv"], parted), names=names) for parted in builds), *portable]


def _source(kind: str) -> str:
    return "block_attention_backward_float32" if kind == "float32" else "block_attention_backward"


def takes_hopper(q, k, v, dout, config, scale, softcap, out_kind) -> bool:
    return config["path"] != "portable" and softcap is None and 1e-30 < scale < 1e38 and out_kind == q.dtype and v.shape[3] % 8 == 0 and all(map(hopper.can_map, (q, k, v, dout)))


def sections(lists, section: int, key_tiles: int, group: int, sums: int) -> tuple[int, int, int]:
    """(query tiles of a section, sections of a split key block, key blocks of a list that may be split): 0 of them where none is, or where lists of one group of heads differ.
    Their parts take at most as much scratch as dQ's sum, beside two of them a tenth: all is to stay under 2.2 times dQ; sections are longer where a static layout splits so many key blocks that they would not fit."""
    if not section or not lists.nq or (group > 1 and lists.list_of.shape[1] > 1):
        return 1, 0, 0
    known, room = lists.extras.get("by_key_offsets"), key_tiles // (2 if sums == 1 else 20)
    if known is None:
        splits = lists.nk
    elif (splits := lists.extras.get("cupy.splits")) is None:  # as is_long of the kernel, of any number of keys
        count = (known[2::2] - known[:-2:2]).astype("int64").reshape(-1, lists.nk)
        splits = lists.extras["cupy.splits"] = int(((count > 16) & (count * lists.nk > 4 * count.sum(axis=1, keepdims=True))).sum(axis=1).max(initial=0))
    while known is not None and splits * ceil_div(lists.nq, section) > room and section < lists.nq:
        section *= 2
    each = ceil_div(lists.nq, section)
    splits = min(splits, room // each)
    return (section, each, splits) if splits else (1, 0, 0)


def chosen_walk(lists, walk: str, under_way: int, place):
    """Where each entry of the lists by key stands in its walk, or None: descending. Made once for a static layout that is not too large."""
    offsets, rows = lists.extras.get("by_key_offsets"), lists.extras.get("by_key_rows")
    if walk != "freest" or offsets is None or len(rows) > walks.MOST:
        return None
    key = ("cupy.walk", under_way)
    if key not in lists.extras:
        lists.extras[key] = place.upload(walks.freest_first(offsets, rows, lists.nk, under_way))
    return lists.extras[key]


def views_of(q, k, v, dout, place, axes=Axes(), views=(False,)) -> tuple:
    """How the copy engine reads queries 64 rows at a time and keys 128, 64 columns each; views: of short classes or not (hopper_axes.py)."""
    rows, keys = (lambda x: [axes.rows(place, x, 64, short) for short in views]), (lambda x: [axes.keys(place, x, short) for short in views])  # noqa: E731
    return *rows(q), *keys(k), *keys(v), *rows(dout)


def maps_of(q, k, v, dout, dk, dv, place) -> tuple:
    """And how it writes 64 rows of dK and dV."""
    write = lambda x: hopper.tensor_map(place, x, (x.shape[3], x.shape[2], x.shape[0] * x.shape[1]), (1, x.shape[3], x.shape[2] * x.shape[3]), (64, 64, 1))  # noqa: E731
    return *views_of(q, k, v, dout, place), write(dk), write(dv)


def run_hopper(q, k, v, lists, lse, delta, dout, tiles, place, config, scale, kv_length, q_start):
    (B, Hq, T, D), (Hk, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    dq, dk, dv = place.empty((B, Hq, T, D), q.dtype), place.empty((B, Hk, S, D), q.dtype), place.empty((B, Hk, S, Dv), q.dtype)
    d = hopper_defines(q.dtype, D, Dv)
    halves, key_tiles, n = 2 * B * Hq * tiles, ceil_div(S, 128), config["sums"]
    rows, sums, turns = place.empty((halves, 196), "float32"), place.empty((n * halves, 64, d["WIDTH"]), "float32"), place.empty((n * halves + 1,), "int32")
    columns = lists.by_key_offsets.shape[0] // 2  # key blocks of all lists
    section, each, splits = sections(lists, config["section"], key_tiles, Hq // Hk, n)
    count, places = columns // max(lists.nk, 1), key_tiles + each * splits
    walk, sequence, parts = place.empty((lists.by_key_rows.shape[0], 4), "int32"), place.empty((count, places, 2), "int32"), place.empty((B * Hk * splits * each, 128 * (d["WIDTH"] + d["VALUES"])), "float32")
    before, blocks = place.empty((count, lists.nk + 1), "int32"), place.empty((count, splits), "int32")
    items, together = B * Hk * places, min(config["heads"], B * Hk)
    chosen = chosen_walk(lists, config["walk"], max(place.sms // together, 1), place)
    values = (*maps_of(q, k, v, dout, dk, dv, place), dq.ptr, dk.ptr, dv.ptr, lse.ptr, delta.ptr, rows.ptr, sums.ptr, parts.ptr, turns.ptr, turns.ptr + 4 * n * halves, before.ptr, blocks.ptr, sequence.ptr, walk.ptr,
              lists.by_key_offsets.ptr, lists.by_key_rows.ptr, lists.by_key_kinds.ptr, nvrtc.ptr(chosen), *lists_values(lists), *position_values(T, S, kv_length, q_start),
              B * Hk, Hq, Hq // Hk, D, Dv, tiles, key_tiles, together, items, n, section, each, splits, places, int(config["walk"] == "ascending"), int(config["walk"] in GROUPED), int(config["walk"] == "turning"), scale, scale * LOG2E)
    for name, grid, threads, shared in (("prepare", halves, 64, 0), ("classify", count, 32, 0), ("order", columns, 128, 0), ("backward", min(items, max(place.sms, 1)), 384, hopper_bytes(D, Dv, "hopper")),
                                       ("join", 2 * B * Hk * splits * (d["WIDTH"] + d["VALUES"]) // 64, 128, 0), ("finish", halves, 256, 64 * (d["WIDTH"] // 2 + 4) * 4)):
        nvrtc.function("block_attention_backward_hopper", name, HOPPER_FIELDS, d, place)(grid, threads, shared, place.stream, *values)
    return dq, dk, dv


def run_parts(q, k, v, parts, lse, delta, dout, *, place, config, scale, softcap=None, kv_length=None, q_start=None, deterministic=True):
    """(dq, dk, dv) of a layout's parts, their sums made in float32 and rounded once, or None where that is not possible: then they are run apart and added."""
    (B, Hq, T, D), (Hk, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    kind, start = q.dtype, S - T if q_start is None and kv_length is None else q_start
    if dout.dtype != kind:
        dout = place.cast(dout, kind)
    if config["path"] != "two_pass" or not B * Hq * T or not takes_hopper(q, k, v, dout, config, scale, softcap, kind):
        return None
    axes = [axes_of(part, start, T, S) for part in parts]
    if None in axes or not axes[0].every or any(2 * B * Hq * part.nq >= 2 ** 31 - place.sms for part in parts):
        return None
    dq, dk, dv = place.empty((B, Hq, T, D), kind), place.empty((B, Hk, S, D), kind), place.empty((B, Hk, S, Dv), kind)
    made = [two_pass.Part(at.applied(part), views_of(q, k, v, dout, place, at, (True, False)), part.nq, at) for part, at in zip(parts, axes)]
    return two_pass.run(made[::-1], dq, dk, dv, lse, delta, hopper_defines(kind, D, Dv, True), place=place, config=config, first_bytes=hopper_bytes(D, Dv, "two_pass"),
                        shape=(B, Hq, Hk, T, S, D, Dv), scale=scale, kv_length=kv_length, q_start=start)


def run(q, k, v, lists, lse, delta, dout, *, place, config, scale, softcap=None, kv_length=None, q_start=None, deterministic=True, out_dtype=None):
    (B, Hq, T, D), (Hk, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    kind, out_kind = q.dtype, out_dtype or q.dtype
    if dout.dtype != kind:
        dout = place.cast(dout, kind)
    tiles = query_tiles(lists, T, q_start, S, kv_length)
    if lists.q_order is not None or lists.k_order is not None:
        found = run_parts(q, k, v, (lists,), lse, delta, dout, place=place, config=config, scale=scale, softcap=softcap, kv_length=kv_length, q_start=q_start) if out_kind == kind else None
        if found is not None:
            return found
    elif B * Hq * T and takes_hopper(q, k, v, dout, config, scale, softcap, out_kind) and max(2 * B * Hq * tiles, B * Hk * ceil_div(S, 128)) < 2 ** 31 - place.sms:
        if config["path"] == "hopper":
            return run_hopper(q, k, v, lists, lse, delta, dout, tiles, place, config, scale, kv_length, q_start)
        dq, dk, dv = place.empty((B, Hq, T, D), kind), place.empty((B, Hk, S, D), kind), place.empty((B, Hk, S, Dv), kind)
        start = S - T if q_start is None and kv_length is None else q_start
        whole = two_pass.Part(lists, views_of(q, k, v, dout, place), tiles, covered=isinstance(start, int) and start // 128 == lists.first and tiles == lists.nq)
        return two_pass.run([whole], dq, dk, dv, lse, delta, hopper_defines(kind, D, Dv), place=place, config=config, first_bytes=hopper_bytes(D, Dv, "two_pass"),
                            shape=(B, Hq, Hk, T, S, D, Dv), scale=scale, kv_length=kv_length, q_start=q_start)
    make = place.zeros if lists.k_order is not None or B * Hq * T == 0 else place.empty  # an order may lack keys
    dq, dk, dv = place.empty((B, Hq, T, D), out_kind), make((B, Hk, S, D), out_kind), make((B, Hk, S, Dv), out_kind)
    if B * Hq * T == 0:
        return dq, dk, dv
    float32, orders = kind == "float32", (lists.q_order is not None, lists.k_order is not None)
    d = defines(kind, out_kind, D, Dv, config, copy_bytes(q, k, v, dout), softcap is not None, *orders)
    shared, threads = shared_bytes(D, Dv, config, float32), _threads(config, float32)
    row_slices, key_slices = sliced(D)[0], column_slices(D, Dv)[0]
    key_tiles = lists.nk * (config["block_k"] // config["tile_k"]) if orders[1] else ceil_div(S, config["tile_k"])
    grids = B * Hq * tiles * row_slices, B * Hk * key_tiles * key_slices
    if max(grids) >= 2 ** 31:
        raise Unsupported(f"CuPy's block attention backward launches at most 2^31 - 1 tiles, not {max(grids)}; split the batch")
    head = (q.ptr, k.ptr, v.ptr, dout.ptr, lse.ptr, delta.ptr, dq.ptr, dk.ptr, dv.ptr, lists.by_key_offsets.ptr, lists.by_key_rows.ptr, lists.by_key_kinds.ptr,
            *lists_values(lists), *position_values(T, S, kv_length, q_start), *q.strides, *k.strides, *v.strides, *dout.strides, Hq, Hq // Hk, D, Dv)
    for name, grid, n, count, slices, bytes_ in (("rows", grids[0], threads[0], tiles, row_slices, shared[0]), ("columns", grids[1], threads[1], key_tiles, key_slices, shared[1])):
        nvrtc.function(_source(kind), name, FIELDS, d, place)(grid, n, bytes_, place.stream, *head, count, slices, scale, softcap or 0.0)
    return dq, dk, dv
