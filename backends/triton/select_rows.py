"""Rows of scores -> the positions of their k largest: the kernels of `topk` and the second half of `indexer_topk`.

    scores [B,T,S] float32 -> out [B,T,K] int32 ascending, then -1; lengths [B,T] int32; values [B,T,K] float32 (what was chosen, then -inf) or None

A row is looked at from `start` to `end` and, if causal, up to its own position; with `pool` g the columns are blocks of g keys while starts, ends and positions
count keys. One kernel reads the rows and keeps candidates, `splits` programs a row (more than one for few long rows); a second one chooses among them. They are
two because one that does both for row after row holds the constants of both in registers. Rows go through in chunks, so that the candidates' buffer is bounded.
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Tunable
from sparsetile.backends.triton.select import choose, choose_by_radix, keep_candidates, load_candidates, pad, sample_bound

TUNABLES = (
    Tunable("capacity", (4096, 8192, 16384, 2048, 1024, 512), "candidates of a row that are sorted out in registers; rows with more take four passes"),
    Tunable("sample", (4096, 2048, 1024, 512, 8192), "scores looked at for the bound that candidates must pass"),
    Tunable("block", (2048, 4096, 8192, 1024), "scores read at a time"),
    Tunable("select_warps", (8, 4, 16), "warps of a program"),
    Tunable("splits", (1, 2, 4, 8, 16), "programs that read one row (few long rows)"),
)
SCRATCH = 32 << 20  # bytes of candidates held at a time


@triton.jit
def row_window(starts, ends, q_starts, b, t, item, S, position, pool, force_first, force_last, CAUSAL: tl.constexpr):
    """Columns lo <= c < hi a row may choose from, and the forced ones: c < first or c >= last. All clamped to the row."""
    lo = t * 0
    hi = lo + S
    if starts is not None:
        lo = tl.minimum(tl.maximum(tl.load(starts + item), 0), S)
    if ends is not None:
        hi = tl.minimum(tl.maximum(tl.load(ends + item), 0), S)
    if CAUSAL:
        p = position + t
        if q_starts is not None:
            p += tl.load(q_starts + b)
        hi = tl.minimum(hi, tl.maximum(p + 1, 0))
    hi = tl.maximum(hi, lo)
    block_lo = lo // pool
    block_hi = tl.where(hi > lo, (hi + pool - 1) // pool, block_lo)
    first = tl.minimum(force_first, block_hi - block_lo) + block_lo
    last = block_hi - tl.minimum(force_last, block_hi - block_lo)
    return block_lo, block_hi, first, last


@triton.jit
def fits(n, k, CAPACITY: tl.constexpr, SAMPLE: tl.constexpr):
    """Whether few enough candidates are to be expected: all of a short row, or k and the sample's margin twice over."""
    mean = k * (SAMPLE / tl.maximum(n, 1).to(tl.float32))
    expected = (mean + 6.5 * tl.sqrt(mean) + 5.0) * tl.maximum(n, 1).to(tl.float32) / SAMPLE
    return (n <= CAPACITY) | ((n >= SAMPLE) & (expected <= CAPACITY))


@triton.jit
def take_all(lo, hi, out, BLOCK: tl.constexpr):
    for block in range(lo, hi, BLOCK):
        at = block + tl.arange(0, BLOCK)
        tl.store(out + at - lo, at, mask=at < hi)
    return hi - lo


@triton.jit
def keep_rows(scores, starts, ends, q_starts, buffer, counts, first_row, T, T_all, S, k, stride_b, stride_t, position, pool, force_first, force_last,
              CAPACITY: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, ALL: tl.constexpr,
              SPLITS: tl.constexpr):
    """Program (part, row): the row's bound, which every part finds for itself, and the candidates of this part. counts [rows, SPLITS], -1 where not tried."""
    part, r = tl.program_id(0), tl.program_id(1)
    b, t = (first_row + r) // T, (first_row + r) % T
    item = b.to(tl.int64) * T_all + t
    lo, hi, first, last = row_window(starts, ends, q_starts, b, t, item, S, position, pool, force_first, force_last, CAUSAL)
    row = scores + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
    width = (S + pool - 1) // pool
    mine = (r.to(tl.int64) * SPLITS + part) * CAPACITY
    count = t * 0 - 1
    wanted = fits(hi - lo, k, CAPACITY, SAMPLE)
    if ALL:
        wanted = wanted & (hi - lo > k)
    if wanted:
        key = tl.sum(tl.zeros((2,), tl.uint32), axis=0)
        place = lo * 0 - 1
        if hi - lo > CAPACITY:
            key, place = sample_bound(row, lo, hi, k, first, last, SAMPLE, FORCED)
        share = (hi - lo + SPLITS - 1) // SPLITS
        share = (share + 15) // 16 * 16
        part_lo = tl.minimum(lo // 16 * 16 + part * share, hi)
        part_hi = tl.minimum(part_lo + share, hi)
        if part == SPLITS - 1:
            part_hi = hi
        part_lo = tl.maximum(part_lo, lo)
        count = keep_candidates(row, width, part_lo, part_hi, key, place, first, last, buffer + mine, CAPACITY, BLOCK, FORCED)
        if (count < k) & (key > 0):
            count = count | 0x40000000  # a true bound: the parts together must hold k
    tl.store(counts + r * SPLITS + part, count)


@triton.jit
def choose_rows(scores, starts, ends, q_starts, out, lengths, values, buffer, counts, first_row, T, T_all, S, k, stride_b, stride_t, position, pool,
                force_first, force_last, CAPACITY: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, FORCED: tl.constexpr, ALL: tl.constexpr,
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
        source = tl.where((i >= total) & (i < total + count), part * CAPACITY + (i - total), source)
        total = tl.minimum(total + count, 0x3FFFFFFF)
    if sound & (total <= CAPACITY) & ((total >= k) | (bounded == 0)):
        keys, at = load_candidates(buffer + r.to(tl.int64) * (SPLITS * CAPACITY) + source, source >= 0, first, last, FORCED)
        written = choose(keys, at, k, row, answer, chosen, VALUES)
    if written < 0:
        written = choose_by_radix(row, width, lo, hi, k, first, last, answer, chosen, BLOCK, FORCED, VALUES)
    pad(answer, chosen, written, k, 1024, VALUES)
    tl.store(lengths + item, written)


def default_knobs(rows: int, S: int, k: int, sms: int) -> dict:
    """Few long rows are split until every multiprocessor has some; the capacity follows k, or the row if that is short."""
    capacity = 4096 if k <= 2560 else 8192 if k <= 6000 else 16384
    while capacity > 512 and capacity >= 2 * S:
        capacity //= 2
    splits = 1
    while splits < 16 and rows * splits * 2 <= 4 * sms and S // (splits * 2) >= 8192:
        splits *= 2
    return {"capacity": capacity, "sample": min(4096, capacity), "block": 2048 if S > 1024 else 1024, "select_warps": 16 if capacity > 8192 else 8 if capacity > 1024 else 4, "splits": splits}


def refusal(config) -> str | None:
    if config["sample"] > config["capacity"]:
        return f"sample {config['sample']} is larger than capacity {config['capacity']}: rows between the two would have no bound"
    if max(config["capacity"], config["block"]) > 1024 * config["select_warps"]:
        return f"{config['select_warps']} warps hold at most {1024 * config['select_warps']} candidates or scores in registers; take more warps"
    return None


def constants(config, causal, forced, everything, values) -> tuple[dict, dict]:
    """Compile-time constants of the two kernels."""
    both = {"CAPACITY": config["capacity"], "CAUSAL": causal, "FORCED": forced, "ALL": everything, "SPLITS": config["splits"]}
    return {**both, "SAMPLE": config["sample"], "BLOCK": config["block"]}, {**both, "BLOCK": min(config["block"], 2048), "VALUES": values}


def select_rows(scores, top_k, out, lengths, values=None, *, place, config, T_all, starts=None, ends=None, q_starts=None, causal=False, position=0, width=None,
                pool=1, force_first=0, force_last=0, everything=False, scratch=None):
    """Launch. scores [B,T,>= columns]; out, lengths, values, starts and ends begin at the first row's element of arrays [B,T_all,..]; `width` keys (not blocks).

    `scratch` from `buffers` may be shared by launches that follow one another on one stream.
    """
    B, T = scores.shape[0], scores.shape[1]
    S = scores.shape[2] * pool if width is None else width
    kept, counts = scratch if scratch is not None else buffers(B * T, place, config)
    keep, choose_ = constants(config, causal, bool(force_first or force_last), everything, values is not None)
    window = (T, T_all, S, top_k, scores.stride(0), scores.stride(1), position, pool, force_first, force_last)
    for first in range(0, B * T, kept.shape[0]):
        rows = min(kept.shape[0], B * T - first)
        keep_rows[(config["splits"], rows)](scores, starts, ends, q_starts, kept, counts, first, *window, **keep, num_warps=config["select_warps"])
        choose_rows[(rows,)](scores, starts, ends, q_starts, out, lengths, values, kept, counts, first, *window, **choose_, num_warps=config["select_warps"])


def buffers(rows, place, config):
    """Bounded scratch for as many rows as go through at once: the candidates of each part of a row, and their number."""
    splits, capacity = config["splits"], config["capacity"]
    rows = max(1, min(rows, SCRATCH // (8 * capacity * splits), 65535))
    return place.empty((rows, splits, capacity), "int64"), place.empty((rows, splits), "int32")


def row_artifacts(config, *, causal, forced, everything, windows, q_starts, values) -> list[dict]:
    """What `select_rows` launches, to compile ahead."""
    arrays = {"scores": "*fp32", "starts": "*i32", "ends": "*i32", "q_starts": "*i32", "out": "*i32", "lengths": "*i32", "values": "*fp32", "buffer": "*i64", "counts": "*i32"}
    numbers = {name: "i32" for name in ("first_row", "T", "T_all", "S", "k", "stride_b", "stride_t", "position", "force_first", "force_last")}
    absent = {name: None for name, there in (("starts", windows), ("ends", windows), ("q_starts", q_starts), ("values", values)) if not there}
    found = []
    for fn, fixed in zip((keep_rows, choose_rows), constants(config, causal, forced, everything, values)):
        fixed = {**{name: value for name, value in absent.items() if name in fn.arg_names}, "pool": 1, **fixed}
        signature = {name: kind for name, kind in {**arrays, **numbers}.items() if name in fn.arg_names and name not in fixed}
        found.append({"fn": fn, "signature": signature, "constexprs": fixed, "options": {"num_warps": config["select_warps"]},
                      "div16": tuple(name for name in signature if name in arrays) + ("stride_b", "stride_t")})
    return found
