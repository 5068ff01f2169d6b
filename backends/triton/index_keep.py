"""indexer_topk without scores in memory: of a row only those are stored that may be among its k largest.

The keys that a tile of queries sees are dealt out to tiles of 128 as cards are, one of each of 128 equal stretches to every tile, at hashed places, so that a few tiles are a sample of all.

    score_tiles   the sample's scores, all of them
    bound_rows    of each row's sample a bound that few more than k scores pass (select.py), and what of the sample passes it
    score_tiles   all other tiles; what passes its row's bound goes behind the row's candidates, in any order
    rescue_rows   rows whose bound failed: candidates from all scores of a row by one program, which thins them as they come
    pick_rows     the k best of a row's candidates, by ascending position

What is chosen depends on the scores alone, not on the order in which candidates come. The sums are those of index_score.score_by_heads, bit for bit.
"""
from functools import lru_cache

import triton
import triton.language as tl

from sparsetile.backends.triton import index_score, relaunch
from sparsetile.backends.triton.float8 import passed, pointer, widen
from sparsetile.backends.triton.index_pick import STATE, entry_of, first_of, pick_rows, rescue_rows
from sparsetile.backends.triton.select import bound_rank, kth_key, order_keys, value_of
from sparsetile.backends.triton.select_rows import candidates


@triton.jit
def tile_window(starts, ends, q_starts, b, T_all, t0, T, S, position, short, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """(first key that a tile of queries sees, keys of each of the BLOCK_S stretches: as many tiles there are); (S, 0) where it sees none."""
    rows = t0 + tl.arange(0, BLOCK_T)
    lo, hi = index_score.key_window(starts, ends, q_starts, b, T_all, rows, S, position, short, CAUSAL, rows < T)
    first = tl.min(lo, axis=0)
    return first, (tl.maximum(tl.max(hi, axis=0) - first, 0) + BLOCK_S - 1) // BLOCK_S


@triton.jit
def step_of(length):
    """From one tile to the next in each stretch of `length` keys: near the golden part, so that tiles in a row lie evenly there, and without a factor in common, so that all tiles take every key once."""
    step = (length.to(tl.float32) * 0.61803399).to(tl.int32) | 1
    common = length * 0 + 2
    while common > 1:
        common = step
        rest = length
        while rest > 0:
            last = rest
            rest = common % rest
            common = last
        step = tl.where(common > 1, step + 1, step)
    return step


@triton.jit
def turn(tile, step, length):
    """How far tile number `tile` (or some of them) of `length` has gone in each stretch."""
    return (tile.to(tl.int64) * step % length).to(tl.int32)


@triton.jit
def dealt(turned, i, first, length):
    """The key of stretch i that a tile so `turned` takes. Where each stretch begins is hashed well: with less, periodic rows were in step with the sample."""
    x = (i + 1).to(tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 15)) * 0x85EBCA77
    x = (x ^ (x >> 13)) * 0xC2B2AE3D
    begin = tl.umulhi(x ^ (x >> 16), (length + i * 0).to(tl.uint32)).to(tl.int32)
    at = turned + begin
    return first + i * length + tl.where(at >= length, at - length, at)


@triton.jit
def sample_keys(begin, first, step, length, BLOCK_S: tl.constexpr, TILES: tl.constexpr):
    """The keys of the TILES tiles from number `begin` on, tile by tile."""
    tile, i = begin + tl.arange(0, TILES)[:, None], tl.arange(0, BLOCK_S)[None, :]
    turned = tile * step % length  # as `turn`: 32 bits hold these few tiles
    return tl.reshape(dealt(turned, i, first, length), (TILES * BLOCK_S,))


@triton.jit
def score_tiles(q, k, weights, k_scale, starts, ends, q_starts, sampled, room, state, T, T_all, S, q_b, q_h, q_t, k_b, k_s, w_b, w_h, w_t, scale_b, position, short, zero,
                H: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr, ACT: tl.constexpr,
                CAUSAL: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, SAMPLING: tl.constexpr):
    """Program (batch, tile of queries, tile of keys): the first TILES tiles of keys, SAMPLING, or the others. zero: 0."""
    tiles = (S + BLOCK_S - 1) // BLOCK_S
    if SAMPLING:
        tiles = tl.minimum(tiles, TILES)
    t_blocks = (T + BLOCK_T - 1) // BLOCK_T
    pid = tl.program_id(0)
    tile = pid % tiles
    t0 = (pid // tiles % t_blocks) * BLOCK_T
    b = pid // tiles // t_blocks
    begin, length = tile_window(starts, ends, q_starts, b, T_all, t0, T, S, position, short, CAUSAL, BLOCK_T, BLOCK_S)
    if (tile < length) & ((tile >= TILES) | SAMPLING):
        i, h, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
        if SAMPLING:  # the same for all tiles of keys: the first tells the kernels that follow
            step = step_of(length)
            if tile == 0:
                tl.store(state + (b * T + t0).to(tl.int64) * STATE + 5, step)
        else:
            step = tl.load(state + (b * T + t0).to(tl.int64) * STATE + 5)
        s = dealt(turn(tile, step, length), i, begin, length)
        exists = s < S
        q += b.to(tl.int64) * q_b
        weights += b.to(tl.int64) * w_b
        keys = k + b.to(tl.int64) * k_b + s.to(tl.int64)[:, None] * k_s + d[None, :]
        held = widen(tl.load(keys, mask=exists[:, None] & (d < D)[None, :], other=0.0), DTYPE)
        if k_scale is not None:
            scale = tl.load(k_scale + b.to(tl.int64) * scale_b + s, mask=exists, other=0.0)
        row = (b * T + t0).to(tl.int64)
        sampled += row * (2 * WIDTH) + tile * BLOCK_S
        room += row * WIDTH
        state += row * STATE
        slot = i * 0
        entry = slot.to(tl.int64)
        kept = slot > 0
        for n in range(tl.minimum(BLOCK_T, T - t0)):
            t = t0 + n
            if not SAMPLING:
                low = tl.load(state + n * STATE + 1).to(tl.float32, bitcast=True)
                high = tl.load(state + n * STATE + 2).to(tl.float32, bitcast=True)
                place = tl.load(state + n * STATE + 3)
                full = tl.load(state + n * STATE, cache_modifier=".cg") > WIDTH  # its bound has failed: all its scores adding to one address would take their time
            weight = tl.load(weights + h.to(tl.int64) * w_h + t.to(tl.int64) * w_t, mask=h < H, other=0.0)
            queries = q + h.to(tl.int64)[:, None] * q_h + t.to(tl.int64) * q_t + d[None, :]
            query = widen(tl.load(queries, mask=(h < H)[:, None] & (d < D)[None, :], other=0.0), DTYPE)
            score = index_score.score_of(held, query, weight, None, h, H, BLOCK_H, ACT)
            score = tl.gather(score, i, 0)  # to a thread a score, once: left alone the compiler moves what follows, piece by piece
            if k_scale is not None:
                score = score * scale
            lo, hi = index_score.key_window(starts, ends, q_starts, b, T_all, t, S, position, short, CAUSAL, t < T)
            inside = (s >= lo) & (s < hi)
            if SAMPLING:
                tl.store(sampled + n * (2 * WIDTH) + i, tl.where(inside, score, float("-inf")))
            else:
                tl.store(room + (n - 1) * WIDTH + slot, entry, mask=kept & (slot < WIDTH))  # the last query's, whose places have come meanwhile
                kept = inside & (score >= tl.where(s <= place, low, high)) & (full == 0)  # false for NaN; no limit is below the least finite float
                slot = tl.atomic_add(state + n * STATE + i * zero, i * 0 + 1, mask=kept, sem="relaxed")  # to one address ptxas would make it an addition a warp, and wait for it
                entry = entry_of(score, s)
        if not SAMPLING:
            tl.store(room + (tl.minimum(BLOCK_T, T - t0) - 1) * WIDTH + slot, entry, mask=kept & (slot < WIDTH))


@triton.jit
def keep_sample(scores, tile, begin, step, length, key, place, room, state, BLOCK_S: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr):
    """What passes the bound of the scores of some tiles of the sample."""
    keys = order_keys(scores.to(tl.int32, bitcast=True))
    at = sample_keys(tile, begin, step, length, BLOCK_S, TILES)
    chosen = (keys > key) | ((keys == key) & (keys > 0) & (at <= place))
    slot = tl.atomic_add(state + at * 0, at * 0 + 1, mask=chosen, sem="relaxed")
    tl.store(room + slot, entry_of(scores, at), mask=chosen & (slot < WIDTH))


@triton.jit
def bound_rows(sampled, room, state, starts, ends, q_starts, T, T_all, S, k, position, short, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
               TILES: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr):
    """Program (row): its state. The sample's candidates stand where its scores have stood."""
    r = tl.program_id(0)
    b, t = r // T, r % T
    begin, length = tile_window(starts, ends, q_starts, b, T_all, t // BLOCK_T * BLOCK_T, T, S, position, short, CAUSAL, BLOCK_T, BLOCK_S)
    lo, hi = index_score.key_window(starts, ends, q_starts, b, T_all, t, S, position, short, CAUSAL, t < T)
    step = tl.load(state + (r - t % BLOCK_T).to(tl.int64) * STATE + 5)
    state += r.to(tl.int64) * STATE
    key = (t * 0).to(tl.uint32)
    place = t * 0 - 1
    tl.store(state, 0)
    tl.debug_barrier()
    if lo < hi:
        e = tl.arange(0, TILES * BLOCK_S)
        sampled += r.to(tl.int64) * (2 * WIDTH)
        keys = order_keys(tl.load(sampled + e, mask=e < length * BLOCK_S, other=float("-inf")).to(tl.int32, bitcast=True))
        have = tl.sum((keys > 0).to(tl.int32), axis=0)
        rank = bound_rank(k * (tl.minimum(TILES, length) / length.to(tl.float32))).to(tl.int32)
        if (have >= rank) & (hi - lo > CAPACITY):  # else every entry passes
            slack = rank // 32
            key, passed_ = kth_key(keys, have, rank, slack)
            place = hi
            if passed_ > rank + slack:  # equal scores at the bound, as far as they are needed
                taken = first_of(keys == key, sample_keys(0, begin, step, length, BLOCK_S, TILES), rank - tl.sum((keys > key).to(tl.int32), axis=0))
                place = tl.max(tl.where(taken, sample_keys(0, begin, step, length, BLOCK_S, TILES), -1), axis=0)
        tl.debug_barrier()  # read again below: no registers hold them through the search
        e = tl.arange(0, TILES * BLOCK_S // 4)
        n = length * BLOCK_S
        s0 = tl.load(sampled + e, mask=e < n, other=float("-inf"))
        s1 = tl.load(sampled + (e + TILES * BLOCK_S // 4), mask=e + TILES * BLOCK_S // 4 < n, other=float("-inf"))
        s2 = tl.load(sampled + (e + TILES * BLOCK_S // 2), mask=e + TILES * BLOCK_S // 2 < n, other=float("-inf"))
        s3 = tl.load(sampled + (e + TILES * BLOCK_S // 4 * 3), mask=e + TILES * BLOCK_S // 4 * 3 < n, other=float("-inf"))
        tl.debug_barrier()  # everyone has read its scores
        room += r.to(tl.int64) * WIDTH
        keep_sample(s0, 0, begin, step, length, key, place, room, state, BLOCK_S, TILES // 4, WIDTH)
        keep_sample(s1, TILES // 4, begin, step, length, key, place, room, state, BLOCK_S, TILES // 4, WIDTH)
        keep_sample(s2, TILES // 2, begin, step, length, key, place, room, state, BLOCK_S, TILES // 4, WIDTH)
        keep_sample(s3, TILES // 4 * 3, begin, step, length, key, place, room, state, BLOCK_S, TILES // 4, WIDTH)
    least = value_of(key * 0 + 0x00800000)
    tl.store(state + 1, tl.where(key == 0, least, value_of(key)).to(tl.int32, bitcast=True))
    tl.store(state + 2, tl.where(key == 0, least, value_of(key + 1)).to(tl.int32, bitcast=True))
    tl.store(state + 3, place)
    tl.store(state + 4, key.to(tl.int32, bitcast=True))


# ---------------------------------------------------------------------------------------------------------------- the host
KNOBS = ("capacity", "sample", "queries", "stages", "select_warps")


def refusal(problem, config) -> str | None:
    """Why a problem cannot be answered so, in one sentence."""
    if problem.arch == "gfx942":
        return "path kept does not compile for gfx942 (LLVM gives up on the bounds' kernel); take path stored"
    plan = index_score.plan(problem["H"], problem["D"], problem.dtype("q"), problem.dtype("k"), problem.arch)[1]
    if problem.features & {"pool", "force_first", "force_last", "return_scores", "paged"}:
        return "path kept chooses keys that lie in one piece, without blocks, forced ones or their scores; take path stored"
    if plan.get("BLOCK_H", 0) < problem["H"] or plan["BLOCK_D"] < problem["D"] or problem["T"] <= index_score.ALONE:
        return f"path kept wants 16 to 64 heads and up to 256 columns in one tile, and more than {index_score.ALONE} queries; take path stored"
    if problem["S"] > config["capacity"] < max(candidates(problem["S"], problem["K"], config["sample"]), problem["K"] + 2 * plan["BLOCK_S"]):
        return f"of a sample of {config['sample']} scores more than {config['capacity']} candidates follow; take more of either"
    return None


def default_knobs(S: int, k: int) -> dict:
    """The least room for candidates, and for it the smallest sample, that five deviations of the sample do not overflow: a larger one costs no scores, but a longer search."""
    for capacity in (4096, 8192, 16384):
        for sample in (4096, 8192, 16384):
            if min(S, candidates(S, k, sample)) <= capacity:
                return dict(capacity=capacity, sample=sample, select_warps=8 if capacity <= 4096 else 16)
    return {}


def width(config) -> int:
    """Candidates that a row has room for; those of its sample stand where its scores have stood."""
    return max(config["capacity"], config["sample"] // 2)


def rescue_stages(plan) -> int:
    """Tiles of keys of one row in flight: at most three, and with its queries 96 KB."""
    size = 4 if plan["DTYPE"] == tl.float32 else 1 if plan["DTYPE"] == tl.float8e4nv else 2
    return max(1, min(3, ((96 << 10) // (size * plan["BLOCK_D"]) - plan["BLOCK_H"]) // plan["BLOCK_S"]))


def words(S, config) -> int:
    """Of a row's bitmap; 0 where it does not fit its room."""
    found = max(32, 1 << max(0, -(-S // 32) - 1).bit_length())
    return found if found <= 2 * width(config) else 0


def rows_at_once(B, T, config) -> int:
    """Rows of one piece: whole batches, or equal shares of whole tiles of queries."""
    rows = max(1, (config["scratch_mb"] << 20) // (8 * width(config) + 4 * STATE.value))
    if rows >= T:
        return min(B, rows // T) * T
    tile = config["queries"]
    return min(rows, -(-T // -(-T // (rows // tile * tile)) // tile) * tile) if rows >= tile else rows


def launch(q, k, weights, top_k, indices, lengths, *, place, config, k_scale, key_start, key_end, causal, q_start, activation):
    """Fills indices [B,T,top_k] and lengths [B,T]."""
    (B, H, T, D), S = q.shape, k.shape[1]
    rows = rows_at_once(B, T, config)
    fixed = _fixed(H, D, *(str(x.dtype).removeprefix("torch.") for x in (q, k)), place.arch, activation, causal, top_k, words(S, config), *map(config.get, KNOBS))
    by_batch = not isinstance(q_start, int)
    batches, queries = (rows // T, T) if rows >= T else (1, rows)
    held = place.empty((batches * queries * width(config),), "int64")
    floats = held.view(weights.dtype)
    state = place.empty((batches * queries, STATE.value), "int32")
    tiles = triton.cdiv(S, fixed["bound"]["BLOCK_S"])
    sampled = min(tiles, fixed["bound"]["TILES"])
    for b in range(0, B, batches):
        for t in range(0, T, queries):
            part = slice(b, min(B, b + batches)), slice(t, min(T, t + queries))
            nb, nt = part[0].stop - b, part[1].stop - t
            windows = None if key_start is None else key_start[part], None if key_end is None else key_end[part], q_start[part[0]] if by_batch and causal else None
            where = t if by_batch else t + q_start
            if S > top_k:
                x, y, w, scale = q[part[0], :, part[1]], k[part[0]], weights[part[0], :, part[1]], None if k_scale is None else k_scale[part[0]]
                arrays = passed(x, place.arch), passed(y, place.arch), w, scale, *windows, floats, held, state
                numbers = nt, T, S, *x.stride()[:3], *y.stride()[:2], *w.stride(), 0 if scale is None else scale.stride(0), where, top_k, 0
                kinds, grid = _kinds(arrays), nb * triton.cdiv(nt, config["queries"])
                relaunch.launch(score_tiles, (grid * sampled,), place, arrays, numbers, fixed["sample"], kinds)
                relaunch.launch(bound_rows, (nb * nt,), place, (floats, held, state, *windows), (nt, T, S, top_k, where, top_k), fixed["bound"])
                if tiles > sampled:
                    relaunch.launch(score_tiles, (grid * tiles,), place, arrays, numbers, fixed["keep"], kinds)
                if S > config["capacity"]:
                    arrays = *arrays[:-3], held, state
                    relaunch.launch(rescue_rows, (nb * nt,), place, arrays, (*numbers[:3], top_k, *numbers[3:-3], where), fixed["rescue"], _kinds(arrays))
            relaunch.launch(pick_rows, (nb * nt,), place, (held, state, *windows, indices[part], lengths[part]), (nt, T, S, top_k, where), fixed["pick"])


def _kinds(arrays) -> tuple:
    return tuple(None if x is None else x.dtype for x in arrays)


@lru_cache(256)
def _fixed(H, D, q_dtype, k_dtype, arch, activation, causal, top_k, words, capacity, sample, queries, stages, select_warps) -> dict:
    """Compile-time constants of the kernels, and how they are compiled."""
    _, plan, warps = index_score.plan(H, D, q_dtype, k_dtype, arch)
    block = plan["BLOCK_S"]
    scored = {**plan, "ACT": activation, "CAUSAL": causal, "num_warps": warps}
    row = dict(CAUSAL=causal, CAPACITY=capacity, WIDTH=max(capacity, sample // 2))
    tiled = {**scored, "BLOCK_T": queries, "TILES": sample // block, "WIDTH": row["WIDTH"], "num_stages": stages}
    fewer = lambda n: dict(maxnreg=n) if arch == "sm_90a" else {}  # noqa: E731
    make = relaunch.Constants
    return {"sample": make(tiled, SAMPLING=True), "keep": make(tiled, SAMPLING=False), "rescue": make(scored, CAPACITY=capacity, WIDTH=row["WIDTH"], num_stages=rescue_stages(plan)),
            "bound": make(row, BLOCK_T=queries, BLOCK_S=block, TILES=sample // block, num_warps=max(4, sample // 1024), **fewer(80)),  # three blocks a multiprocessor
            "pick": make(row, ROOM=1 << max(0, top_k - 1).bit_length(), WORDS=words, num_warps=select_warps, **fewer(128))}  # two


def artifacts(problem, config, *, causal: bool, windows: bool) -> list[dict]:
    """What `launch` launches, to compile ahead."""
    kinds, has = (problem.dtype("q"), problem.dtype("k"), problem.arch), problem.features
    fixed = _fixed(problem["H"], problem["D"], *kinds, "relu", causal, problem["K"], words(problem["S"], config), *map(config.get, KNOBS))
    arrays = dict(weights="*fp32", k_scale="*fp32", starts="*i32", ends="*i32", q_starts="*i32", sampled="*fp32", room="*i64", state="*i32", out="*i32", lengths="*i32")
    absent = {name for name, there in (("k_scale", "scale" in has), ("starts", windows), ("ends", windows), ("q_starts", "q_start" in has)) if not there}
    found = []
    for name, fn in dict(sample=score_tiles, bound=bound_rows, keep=score_tiles, rescue=rescue_rows, pick=pick_rows).items():
        own = arrays | (dict(q=pointer(kinds[0], problem.arch), k=pointer(kinds[1], problem.arch)) if "q" in fn.arg_names else {})
        none = {n: None for n in fn.arg_names if n in absent} | ({"w_h": 1} if "w_h" in fn.arg_names else {})
        taken = {n: kind for n, kind in own.items() if n in fn.arg_names and n not in none}
        constants = relaunch.Constants(fixed[name], **none)
        numbers = tuple(n for n in fn.arg_names if n not in taken and n not in constants)
        found.append(relaunch.artifact(fn, constants, taken, numbers, aligned=tuple(n for n in numbers if n in ("q_b", "q_h", "q_t", "k_b", "k_s", "w_t") and problem["D"] % 16 == 0 == problem["H"] % 16)))
    return found
