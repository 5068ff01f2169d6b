"""Rows of scores -> the positions of their k largest: the kernels of `topk` and the second half of `indexer_topk`.

    scores [B,T,S] float32 -> out [B,T,K] int32 ascending, then -1; lengths [B,T] int32; values [B,T,K] float32 (what was chosen, then -inf) or None

A row is looked at from `start` to `end` and, if causal, up to its own position; with `pool` g the columns are blocks of g keys while starts, ends and positions
count keys. One kernel finds a bound from a sample of each row, one reads the rows and keeps what passes it, `splits` programs a row (more than one for few long
rows), one chooses among the candidates. One kernel for all three holds too many registers. Rows go through in chunks, so that the candidates' buffer is bounded.
Rows of few columns take one launch of another kernel (select_few.py).
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Tunable
from sparsetile.backends.triton import select_few
from sparsetile.backends.triton.select import LINE, bound_rank, choose, choose_by_radix, keep_candidates, load_candidates, pad, sample_bound
from sparsetile.backends.triton.select_few import row_window

TUNABLES = (
    Tunable("capacity", (4096, 8192, 16384, 2048, 1024, 512), "candidates of a row that are sorted out in registers; rows with more take five passes"),
    Tunable("sample", (4096, 8192, 2048, 1024, 512, 16384), "scores looked at for the bound that candidates must pass"),
    Tunable("select_warps", (8, 4, 16), "warps of a program that chooses"),
    Tunable("splits", (1, 2, 4, 8, 16), "programs that read one row (few long rows)"),
)
SCRATCH = 256 << 20  # bytes of candidates held at a time


@triton.jit
def fits(n, k, CAPACITY: tl.constexpr, SAMPLE: tl.constexpr):
    """Whether the candidates are likely to fit: all of a short row, or those that pass the bound of a sample, one deviation more."""
    share = 8 * tl.minimum(SAMPLE // 8, n // 16) / tl.maximum(n, 1).to(tl.float32)
    rank = bound_rank(k * share)
    return (n <= CAPACITY) | (rank + tl.sqrt(rank) <= CAPACITY * share)


@triton.jit
def take_all(lo, hi, out, BLOCK: tl.constexpr):
    for block in range(lo, hi, BLOCK):
        at = block + tl.arange(0, BLOCK)
        tl.store(out + at - lo, at, mask=at < hi)
    return hi - lo


@triton.jit
def wanted(lo, hi, k, CAPACITY: tl.constexpr, SAMPLE: tl.constexpr, ALL: tl.constexpr):
    """Whether candidates of a row are kept at all."""
    keep = fits(hi - lo, k, CAPACITY, SAMPLE)
    if ALL:
        keep = keep & (hi - lo > k)
    return keep


@triton.jit
def sample_rows(scores, starts, ends, q_starts, bounds, first_row, T, T_all, S, k, stride_b, stride_t, position, pool, force_first, force_last,
                CAPACITY: tl.constexpr, SAMPLE: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, ALL: tl.constexpr):
    """Program r: bounds[first_row + r] = key and position that candidates must pass; key 0 where all may."""
    r = tl.program_id(0)
    b, t = (first_row + r) // T, (first_row + r) % T
    item = b.to(tl.int64) * T_all + t
    lo, hi, first, last = row_window(starts, ends, q_starts, b, t, item, S, position, pool, force_first, force_last, CAUSAL)
    key = tl.sum(tl.zeros((2,), tl.uint32), axis=0)
    place = lo * 0 - 1
    if (hi - lo > CAPACITY) & wanted(lo, hi, k, CAPACITY, SAMPLE, ALL):
        key, place = sample_bound(scores + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t, lo, hi, k, first, last, SAMPLE, FORCED)
    tl.store(bounds + 2 * (first_row + r), key.to(tl.int32, bitcast=True))
    tl.store(bounds + 2 * (first_row + r) + 1, place)


@triton.jit
def keep_rows(scores, starts, ends, q_starts, bounds, buffer, counts, first_row, T, T_all, S, k, stride_b, stride_t, position, pool, force_first, force_last,
              CAPACITY: tl.constexpr, SAMPLE: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, ALL: tl.constexpr, SPLITS: tl.constexpr):
    """Program (part, row): the candidates of this part of the row. counts [rows, SPLITS], -1 where not tried."""
    part, r = tl.program_id(0), tl.program_id(1)
    b, t = (first_row + r) // T, (first_row + r) % T
    item = b.to(tl.int64) * T_all + t
    lo, hi, first, last = row_window(starts, ends, q_starts, b, t, item, S, position, pool, force_first, force_last, CAUSAL)
    row = scores + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
    mine = (r.to(tl.int64) * SPLITS + part) * (CAPACITY + LINE)
    count = t * 0 - 1
    if wanted(lo, hi, k, CAPACITY, SAMPLE, ALL):
        share = ((hi - lo) // SPLITS + 16) // 16 * 16
        part_lo = tl.minimum(lo // 16 * 16 + part * share, hi)
        part_hi = tl.minimum(part_lo + share, hi)
        if part == SPLITS - 1:
            part_hi = hi
        key = tl.load(bounds + 2 * (first_row + r)).to(tl.uint32, bitcast=True)
        place = tl.load(bounds + 2 * (first_row + r) + 1)
        count = keep_candidates(row, (S + pool - 1) // pool, tl.maximum(part_lo, lo), part_hi, key, place, first, last, buffer + mine, CAPACITY, FORCED)
        if (count < k) & (key > 0):
            count = count | 0x40000000  # a true bound: the parts together must hold k
    tl.store(counts + r * SPLITS + part, count)


@triton.jit
def choose_rows(scores, starts, ends, q_starts, out, lengths, values, buffer, counts, first_row, T, T_all, S, k, stride_b, stride_t, position, pool,
                force_first, force_last, CAPACITY: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, ALL: tl.constexpr,
                VALUES: tl.constexpr, SPLITS: tl.constexpr):
    r = tl.program_id(0)
    b, t = (first_row + r) // T, (first_row + r) % T
    item = b.to(tl.int64) * T_all + t
    lo, hi, first, last = row_window(starts, ends, q_starts, b, t, item, S, position, pool, force_first, force_last, CAUSAL)
    row = scores + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
    width = (S + pool - 1) // pool
    answer = out + item * k
    chosen = answer if values is None else values + item * k
    written = t * 0 - 1
    if ALL:
        if hi - lo <= k:
            written = take_all(lo, hi, answer, BLOCK)
    i = tl.arange(0, CAPACITY)
    source = i * 0 - 1
    total = t * 0
    sound = (written < 0)
    bounded = sound & (t < 0)
    for part in tl.static_range(SPLITS):
        count = tl.load(counts + r * SPLITS + part)
        sound = sound & (count >= 0)
        bounded = bounded | ((count >> 30) > 0)
        count = count & 0x3FFFFFFF
        sound = sound & (count <= CAPACITY)
        source = tl.where((i >= total) & (i < total + count), part * ROOM + (i - total), source)
        total = tl.minimum(total + count, 0x3FFFFFFF)
    if sound & (total <= CAPACITY) & ((total >= k) | (bounded == 0)):
        keys, at = load_candidates(buffer + r.to(tl.int64) * (SPLITS * ROOM) + source, source >= 0, first, last, FORCED)
        written = choose(keys, at, k, row, answer, chosen, VALUES)
    if written < 0:
        written = choose_by_radix(row, width, lo, hi, k, first, last, answer, chosen, BLOCK, FORCED, VALUES)
    pad(answer, chosen, written, k, 1024, VALUES)
    tl.store(lengths + item, written)


def default_knobs(rows: int, S: int, k: int, sms: int) -> dict:
    """Few long rows are split until every multiprocessor has some. Capacity and sample: the first pair that five deviations of the sample do not overflow."""
    warps = lambda capacity: 16 if capacity > 8192 else 8 if capacity > 1024 else 4  # noqa: E731
    capacity = 512
    while capacity < 16384 and capacity < S and (capacity < 4096 or candidates(S, k, 8192) > capacity):
        capacity *= 2
    sample = min(capacity, 1024)
    while sample < min(8192, 2 * capacity) and sample < S and candidates(S, k, sample) > capacity:
        sample *= 2
    splits = 1
    while splits < 16 and rows * splits <= 32 * sms and S // (splits * 2) >= 8192:  # warps, of which a multiprocessor holds about 28
        splits *= 2
    return {"capacity": capacity, "sample": sample, "select_warps": warps(capacity), "splits": splits}


def candidates(S: int, k: int, sample: int) -> float:
    """How many of S scores pass the bound of a sample, at the upper end of five deviations."""
    mean = k * sample / max(S, 1)
    rank = mean + 4.5 * mean ** 0.5 + 3
    return (rank + 5 * rank ** 0.5) * S / sample


def refusal(config) -> str | None:
    if config["capacity"] > 1024 * config["select_warps"]:
        return f"{config['select_warps']} warps hold at most {1024 * config['select_warps']} candidates in registers; take more warps"
    return None


def constants(config, causal, forced, everything, values) -> tuple[dict, dict, dict]:
    """Compile-time constants of the three kernels."""
    all_ = {"CAPACITY": config["capacity"], "CAUSAL": causal, "FORCED": forced, "ALL": everything}
    sample, splits = {"SAMPLE": config["sample"]}, {"SPLITS": config["splits"]}
    return {**all_, **sample}, {**all_, **sample, **splits}, {**all_, **splits, "ROOM": config["capacity"] + LINE.value, "BLOCK": 2048, "VALUES": values}


def options(config, arch) -> tuple[dict, dict, dict]:
    """How the three kernels are compiled. A warp samples 1024 scores. Of Hopper's registers a thread gets 80, not 120, where that spills next to nothing: three blocks of eight
    warps share a multiprocessor then, not two, and most of their time is waiting for one another."""
    fewer = dict(maxnreg=80) if arch == "sm_90a" else {}
    few = config["capacity"] <= 512 * config["select_warps"]
    return dict(num_warps=max(4, config["sample"] // 1024), **fewer), dict(num_warps=1), dict(num_warps=config["select_warps"], **fewer if few else {})


def select_rows(scores, top_k, out, lengths, values=None, *, place, config, T_all, starts=None, ends=None, q_starts=None, causal=False, position=0, width=None,
                pool=1, force_first=0, force_last=0, everything=False, scratch=None):
    """Launch. scores [B,T,>= columns]; out, lengths, values, starts and ends begin at the first row's element of arrays [B,T_all,..]; `width` keys (not blocks).

    `scratch` from `buffers` may be shared by launches that follow one another on one stream.
    """
    B, T = scores.shape[0], scores.shape[1]
    S = scores.shape[2] * pool if width is None else width
    window, columns = (T, T_all, S, top_k, scores.stride(0), scores.stride(1), position, pool, force_first, force_last), -(-S // pool)
    if values is None and select_few.serves(columns, top_k):
        how = select_few.how(columns, top_k, causal, bool(force_first or force_last), everything)
        select_few.few_columns[(triton.cdiv(B * T, how["ROWS"]),)](scores, starts, ends, q_starts, out, lengths, B * T, *window, **how)
        return
    bounds, kept, counts = scratch if scratch is not None else buffers(B * T, place, config)
    sample, keep, choose_ = constants(config, causal, bool(force_first or force_last), everything, values is not None)
    sampling, keeping, choosing = options(config, place.arch)
    sample_rows[(B * T,)](scores, starts, ends, q_starts, bounds, 0, *window, **sample, **sampling)
    for first in range(0, B * T, kept.shape[0]):
        rows = min(kept.shape[0], B * T - first)
        keep_rows[(config["splits"], rows)](scores, starts, ends, q_starts, bounds, kept, counts, first, *window, **keep, **keeping)
        choose_rows[(rows,)](scores, starts, ends, q_starts, out, lengths, values, kept, counts, first, *window, **choose_, **choosing)


def row_bytes(config) -> int:
    """What `buffers` takes for one row, all at once."""
    return 8 + config["splits"] * (8 * (config["capacity"] + LINE.value) + 4)


def buffers(rows, place, config):
    """A bound for each row, and bounded scratch for as many as go through at once: the candidates of each part of a row, and their number."""
    splits, room, every = config["splits"], config["capacity"] + LINE.value, rows
    rows = -(-rows // -(-rows // max(1, min(SCRATCH // (8 * room * splits), 65535))))  # equal shares
    return place.empty((every, 2), "int32"), place.empty((rows, splits, room), "int64"), place.empty((rows, splits), "int32")


def row_artifacts(config, arch, *, causal, forced, everything, windows, q_starts, values, ends=False) -> list[dict]:
    """What `select_rows` launches, to compile ahead. windows: starts and ends; ends: they alone."""
    arrays = {"scores": "*fp32", "starts": "*i32", "ends": "*i32", "q_starts": "*i32", "out": "*i32", "lengths": "*i32", "values": "*fp32", "bounds": "*i32", "buffer": "*i64", "counts": "*i32"}
    numbers = {name: "i32" for name in ("first_row", "T", "T_all", "S", "k", "stride_b", "stride_t", "position", "force_first", "force_last")}
    absent = {name: None for name, there in (("starts", windows), ("ends", windows or ends), ("q_starts", q_starts), ("values", values)) if not there}
    found, kernels = [], list(zip((sample_rows, keep_rows, choose_rows), constants(config, causal, forced, everything, values), options(config, arch)))
    if not values:
        few = select_few.how(128, 4, causal, forced, everything)
        numbers["rows"] = "i32"
        kernels.append((select_few.few_columns, {name: few[name] for name in few if name != "num_warps"}, dict(num_warps=few["num_warps"])))
    for fn, fixed, how in kernels:
        fixed = {**{name: value for name, value in absent.items() if name in fn.arg_names}, "pool": 1, **fixed}
        signature = {name: kind for name, kind in {**arrays, **numbers}.items() if name in fn.arg_names and name not in fixed}
        found.append({"fn": fn, "signature": signature, "constexprs": fixed, "options": how,
                      "div16": tuple(name for name in signature if name in arrays) + ("stride_b", "stride_t")})
    return found
