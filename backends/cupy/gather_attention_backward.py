"""Backward of attention over selected keys: q, k, v, indices, lse and delta [B,Hq,T], dout [B,Hq,T,Dv] -> dq, dk, dv in the shapes of q, k, v.

lse is the logsumexp of all that stood in the denominator (sink included), delta what attention_delta gives. Holes, lengths, granularity, causality and
duplicates (counted) as in gather_attention. dQ goes query by query. For dK and dV the entries are sorted into bins of (key tile, chunk of queries) by
counting, on the device and without a host round trip; a CTA then takes one key tile and its queries in ascending order, so that every sum has one order:
twice the same call gives the same bits. A key tile that far more queries chose than others (Native Sparse Attention gives every query the first block) is cut into parts, summed in
order by `join`: in one CTA it would take longer than all others. Scratch: 4 bytes an entry (more where an entry straddles key tiles), 8 a bin, and up to one float32 dk and dv for parts.
Keys that nobody chose get 0.
The path "hopper" (gather_backward_hopper.py) is for sm_90a and DeepSeek's latent, 576 wide, of which 512 are the values: its dk is the sum of both gradients of the latent, its dv None,
its dq in the type of q whatever out_dtype. The path "union" (gather_union.py) makes dQ of blocks of keys, as Native Sparse Attention selects them; dK and dV are the portable path's.
Calls that their copies cannot serve (`hopper.takes`, `gather_union.takes`) run on the portable path, whose description the rest is.
"""
from sparsetile.backends.contract import Problem, Resources, Tunable, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy import gather_backward_hopper as hopper
from sparsetile.backends.cupy import gather_union
from sparsetile.backends.cupy.operands import (HALVES, KINDS, POSITIONS, SELECTED, ceil_div, column_slices, copy_bytes, first_fitting, head_groups, padded, position_values, problem_copy_bytes,
                                               same_memory, selected_values, sliced)

TUNABLES = (
    Tunable("path", ("portable", "hopper", "union"), "hopper: warpgroup products, contributions to keys added as integers; 16-bit latents of width 576 whose first 512 columns are the values. "
            "union: dQ where neighbouring queries read the blocks of keys that they share once; 16-bit, D and Dv up to 128. The rest is for portable, and for dK and dV"),
    Tunable("heads", (16, 32, 64), "rows of a tile of dQ: heads that share list and keys", ("portable",)),
    Tunable("tile_k", (32, 64), "keys a step of dQ, and keys of a CTA of dK and dV", ("portable", "union")),
    Tunable("key_warps", (1, 2, 4), "warps of dQ that share 16 heads and divide a step's keys", ("portable",)),
    Tunable("tile_q", (16, 32, 64), "rows (query and head) a step of dK and dV", ("portable", "union")),
    Tunable("chunk", (256, 128, 512, 1024), "queries of a bin", ("portable", "union")),
)
FIELDS = "14Q" + SELECTED + POSITIONS + "16q10i2f"
BIN_FIELDS = SELECTED + POSITIONS + "4Q2q4i"


def supports(problem: Problem) -> str | None:
    kinds = {problem.dtype(name) for name in "qkv"}
    if len(kinds) > 1 or not kinds <= {"float32", *HALVES}:
        return f"CuPy's gather attention backward takes q, k, v of one type, float32, float16 or bfloat16, not {'/'.join(str(problem.dtype(n)) for n in 'qkv')}; cast them to bfloat16"
    if max(problem["D"], problem["Dv"]) > 576:
        return f"CuPy's gather attention backward takes D and Dv up to 576, not {problem['D']} and {problem['Dv']}"
    refusal = resources(problem, default_config(problem))
    return f"CuPy's gather attention backward of D {problem['D']}, Dv {problem['Dv']}: {refusal}; a narrower head or an 80 GB-class chip (163 KiB) would do" if isinstance(refusal, str) else None


def shared_bytes(D: int, Dv: int, config: dict, float32: bool, shared_kv: bool) -> tuple[int, int]:
    """Of `rows` and of `columns`."""
    bh, tk, tq, kw, tc = config["heads"], config["tile_k"], config["tile_q"], config["key_warps"], config["chunk"]
    bins = 4 * (tc // 32 + tc + 4 + tq * tk + 5 * tq)
    if float32:
        return 4 * (32 * (padded(D) + padded(Dv) + 2) + 32 * 65 + 32 * 33 + 33), 4 * (32 * (padded(D) + padded(Dv) + 2) + 32 * 65 + 2 * 32 * 33) + bins
    keys = padded(D) + 8 + (0 if shared_kv else padded(Dv) + 8)
    both = padded(D) + padded(Dv) + 16
    return max((bh * both + tk * keys) * 2 + 8 * (tk + tk // 32), bh * sliced(D)[1] * 4 if kw > 1 else 0), (tk * keys + tq * both) * 2 + bins


def resources(problem: Problem, config: dict):
    if config["path"] == "hopper":
        return hopper.no_hopper(problem) or Resources(hopper.QUERY_THREADS, max(hopper.QUERY_SHARED, hopper.key_shared(hopper.blocks_of(problem["Hq"]))), 128)
    if config["path"] == "union":
        own, rest = gather_union.resources(problem, True), resources(problem, {**config, "path": "portable"})
        if isinstance(own, str) or isinstance(rest, str):
            return own if isinstance(own, str) else rest
        return Resources(max(own.threads, rest.threads), max(own.shared, rest.shared), max(own.registers, rest.registers))
    tk, kw, tq, float32 = config["tile_k"], config["key_warps"], config["tile_q"], problem.dtype("q") == "float32"
    if float32 and (config["heads"], tk, kw, tq) != (32, 32, 1, 32):
        return "float32 takes heads 32, tile_k 32, key_warps 1 and tile_q 32"
    if tk % (16 * kw):
        return f"key_warps {kw} leave less than 16 of {tk} keys each"
    registers = max(sliced(problem["D"])[1] // 2 + tk // kw, sum(column_slices(problem["D"], problem["Dv"])[1:]) // 2 + tq) + 64
    if not float32 and registers > 255:
        return f"tile_k {tk} over {kw} key_warps and tile_q {tq} need about {registers} registers a thread, 255 are there"
    shared = max(shared_bytes(problem["D"], problem["Dv"], config, float32, "shared_kv" in problem.features))
    if shared > nvrtc.shared_limit(problem.arch):
        return f"{shared} bytes of shared memory, {problem.arch} has {nvrtc.shared_limit(problem.arch)}"
    return Resources(threads=max(_threads(config, float32)), shared=shared, registers=registers)


def _threads(config: dict, float32: bool) -> tuple[int, int]:
    return (128, 128) if float32 else (config["heads"] * 2 * config["key_warps"], 2 * config["tile_k"])


def default_config(problem: Problem) -> dict:
    if problem.dtype("q") == "float32":
        return dict(path="portable", heads=32, tile_k=32, key_warps=1, tile_q=32, chunk=256)
    group = problem["Hq"] // problem["Hk"]
    rows = 16 if group <= 16 else 32 if group <= 32 else 64
    tries = [(rows, 64, {16: 4, 32: 2, 64: 1}[rows], 32), (rows, 64, 4 if rows == 16 else 2, 16), (rows, 32, 2, 16), (min(rows, 32), 32, 2, 16), (16, 32, 2, 16)]
    if problem["D"] + problem["Dv"] > 256:  # 32 rows a step spill there; so do 64 keys of wide heads
        tries = [(h, 32 if problem["D"] > 256 else tk, 2 if problem["D"] > 256 else kw, 16) for h, tk, kw, _ in tries]
    tiles = first_fitting(problem, resources, [dict(path="portable", heads=h, tile_k=tk, key_warps=kw, tile_q=tq, chunk=256) for h, tk, kw, tq in tries])
    if gather_union.pays(problem) and not isinstance(resources(problem, {**tiles, "path": "union"}), str):
        return {**tiles, "path": "union"}
    return tiles if hopper.no_hopper(problem) else {**tiles, "path": "hopper"}


def defines(kind: str, out_kind: str, D: int, Dv: int, config: dict, copy: int, softcap: bool, shared_kv: bool) -> dict:
    _, dks, dvs = column_slices(D, Dv)
    common = dict(KIND=KINDS[kind], OUT_KIND=KINDS[out_kind], BH=config["heads"], TK=config["tile_k"], TQ=config["tile_q"], TC=config["chunk"], DP=padded(D), DVP=padded(Dv), DQS=sliced(D)[1],
                  DKS=dks, DVS=dvs, SOFTCAP=int(softcap))
    return common if kind == "float32" else dict(common, KW=config["key_warps"], SHARED_KV=int(shared_kv), COPY=copy)


def artifacts(problem: Problem, config: dict) -> list[dict]:
    kind = problem.dtype("q")
    if config["path"] == "hopper":
        return hopper.artifacts(problem)
    d = defines(kind, problem.dtype("out", kind), problem["D"], problem["Dv"], config, problem_copy_bytes(problem, "D", "Dv"), "softcap" in problem.features, "shared_kv" in problem.features)
    own = gather_union.artifacts(problem, True) if config["path"] == "union" else []
    return [*own, dict(source=_source(kind), defines=d, names=["rows", "columns", *(["join"] if kind != "float32" else [])]), dict(source="gather_bins", defines=_bin_defines(config), names=["count", "scan", "scatter"])]


def _source(kind: str) -> str:
    return "gather_attention_backward_float32" if kind == "float32" else "gather_attention_backward"


def _bin_defines(config: dict) -> dict:
    return dict(TK=config["tile_k"], TC=config["chunk"])


def share_of(items: int, tiles: int) -> int:
    """Items that one CTA adds up: more than twice as many as the mean are cut into parts of so many. There are at most 2 * items / share parts, tiles of them."""
    return max(512, 2 * ceil_div(items, tiles))


def _bins(indices, selected: tuple, positions: tuple, granularity: int, tiles: int, place, config: dict, parted: bool):
    """The entries sorted by (list, key tile, chunk of queries): starts [bins + 1], items; parts of long tiles [n, 4] and from how many items on a tile is long."""
    B, G, T, K = indices.shape
    tk, chunks, entries = config["tile_k"], ceil_div(T, config["chunk"]), B * G * T * K
    straddles = 1 if tk % granularity == 0 else granularity // tk if granularity % tk == 0 else (granularity + tk - 2) // tk + 1
    bins, items = B * G * tiles * chunks, entries * straddles
    if max(bins, items) >= 2 ** 31:
        raise Unsupported(f"CuPy's gather attention backward sorts at most 2^31 - 1 entries, not {max(bins, items)}; split the batch")
    counts, starts, sorted_ = place.zeros((bins,), "int32"), place.empty((bins + 1,), "int32"), place.empty((max(items, 1),), "int32")
    share = share_of(items, B * G * tiles)
    most = 2 * items // share if parted else 0
    parts = place.zeros((max(most, 1) * 4,), "int32")
    values = (*selected, *positions, counts.ptr, starts.ptr, sorted_.ptr, parts.ptr, entries, bins, tiles, chunks, share, most)
    for name, grid, threads, shared in (("count", ceil_div(entries, 256), 256, 0), ("scan", 1, 1024, 128), ("scatter", ceil_div(entries, 256), 256, 0)):
        nvrtc.function("gather_bins", name, BIN_FIELDS, _bin_defines(config), place)(grid, threads, shared, place.stream, *values)
    return starts, sorted_, parts, chunks, share, most


def run(q, k, v, indices, lse, delta, dout, *, place, config, lengths=None, granularity=1, causal=False, scale, softcap=None, kv_length=None, q_start=None, deterministic=True, out_dtype=None):
    (B, Hq, T, D), (Hk, S), Dv = q.shape, k.shape[1:3], v.shape[3]
    kind, out_kind, G, K = q.dtype, out_dtype or q.dtype, indices.shape[1], indices.shape[3]
    if dout.dtype != kind:
        dout = place.cast(dout, kind)
    empty = B * Hq * T * S * K == 0
    if config["path"] == "hopper" and not empty and hopper.takes(q, k, v, dout, indices, granularity, scale, softcap):
        return hopper.run(q, k, indices, lse, delta, dout, place=place, lengths=lengths, causal=causal, scale=scale, kv_length=kv_length, q_start=q_start, out_dtype=out_kind)
    make = place.zeros if empty else place.empty
    dq, dk, dv = make((B, Hq, T, D), out_kind), make((B, Hk, S, D), out_kind), make((B, Hk, S, Dv), out_kind)
    if empty:
        return dq, dk, dv
    float32, shared_kv = kind == "float32", same_memory(k, v)
    tiles, row_slices, key_slices = ceil_div(S, config["tile_k"]), sliced(D)[0], column_slices(D, Dv)[0]
    grids = B * T * head_groups(G, Hq, Hk, config["heads"]) * row_slices, B * Hk * tiles * key_slices
    if max(grids) >= 2 ** 31:
        raise Unsupported(f"CuPy's gather attention backward launches at most 2^31 - 1 tiles, not {max(grids)}; split the batch")
    selected, positions = selected_values(indices, lengths, granularity, causal), position_values(T, S, kv_length, q_start)
    parted = not float32 and (G != Hq or G == Hk)  # heads of their own lists add up list by list
    starts, items, parts, chunks, share, extra = _bins(indices, selected, positions, granularity, tiles, place, config, parted)
    extra *= Hk if G == 1 else 1
    if B * Hk * tiles * key_slices + extra * key_slices >= 2 ** 31:
        raise Unsupported(f"CuPy's gather attention backward launches at most 2^31 - 1 tiles, not {(B * Hk * tiles + extra) * key_slices}; split the batch")
    sums = [place.empty((extra * config["tile_k"] * width,), "float32") for width in (D, Dv)]
    d = defines(kind, out_kind, D, Dv, config, copy_bytes(q, k, v, dout), softcap is not None, shared_kv)
    shared, threads = shared_bytes(D, Dv, config, float32, shared_kv), _threads(config, float32)
    head = (q.ptr, k.ptr, v.ptr, dout.ptr, lse.ptr, delta.ptr, dq.ptr, dk.ptr, dv.ptr, starts.ptr, items.ptr, parts.ptr, *(x.ptr for x in sums), *selected, *positions,
            *q.strides, *k.strides, *v.strides, *dout.strides, Hq, Hq // Hk, D, Dv, tiles)
    launches = [("rows", grids[0], threads[0], row_slices, shared[0]), ("columns", grids[1] + extra * key_slices, threads[1], key_slices, shared[1])] + [("join", extra, threads[1], 1, 0)] * (extra > 0)
    if config["path"] == "union" and gather_union.takes(q, k, v, indices, out_kind) and copy_bytes(dout) == 16:
        gather_union.run_rows(q, k, v, indices, lse, delta, dout, dq, place=place, lengths=lengths, granularity=granularity, causal=causal, scale=scale, softcap=softcap, kv_length=kv_length,
                              q_start=q_start)
        del launches[0]
    for name, grid, n, slices, bytes_ in launches:
        nvrtc.function(_source(kind), name, FIELDS, d, place)(grid, n, bytes_, place.stream, *head, slices, chunks, share, extra, 0, scale, softcap or 0.0)
    return dq, dk, dv
