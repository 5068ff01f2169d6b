"""topk's rows in one kernel, in Gluon, Triton's language of explicit layouts: bound from a sample, one read, choice among what passed, by one program a row.

What select_rows.py does in three kernels. A program's warps read equal pieces of the row without waiting for each other, and while some programs of a multiprocessor
search, others read. A row whose bound fails (adversarial scores) gets the length -1, and `search_rows` reads it again, four times.
"""
from functools import lru_cache

import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon

from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.select import bound_rank, choose_by_radix, kth_key, order_keys, pad, value_of
from sparsetile.backends.triton.select_rows import fits, row_window

LINE = gl.constexpr(512)  # scores that a warp looks at together


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def sample_bound(row, lo, hi, k, SAMPLE: gl.constexpr, WARPS: gl.constexpr):
    """select.sample_bound, by whole sectors of memory: (key, position) that at least k entries pass with high probability."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [16, 2], [WARPS, 1], [1, 0])
    FLAT: gl.constexpr = gl.BlockedLayout([SAMPLE // (32 * WARPS)], [32], [WARPS], [0])
    head = (lo + 7) // 8
    groups = hi // 8 - head
    runs = gl.minimum(SAMPLE // 8, groups // 2)
    run = gl.arange(0, SAMPLE // 8, gl.SliceLayout(1, L))
    begin = run * (groups // runs) + run * (groups % runs) // runs
    noise = gl.umulhi(run.to(gl.uint32) * 0x9E3779B1, (groups // runs + run * 0).to(gl.uint32)).to(gl.int32)
    there = run < runs
    group = gl.where(there, head + begin + noise, head) * 8
    at = gl.expand_dims(group, 1) + gl.expand_dims(gl.arange(0, 8, gl.SliceLayout(0, L)), 0)
    keys = order_keys(gl.load(row + at).to(gl.int32, bitcast=True))
    keys = gl.reshape(gl.where(gl.expand_dims(there, 1), keys, 0), [SAMPLE])
    rank = bound_rank(k * (8 * runs / (hi - lo).to(gl.float32))).to(gl.int32)
    key = (lo * 0).to(gl.uint32)
    position = lo * 0 - 1
    have = gl.sum((keys > 0).to(gl.int32), 0)
    if have >= rank:  # else every entry passes
        slack = rank // 32
        key, passed = kth_key(keys, have, rank, slack)
        position = hi
        if passed > rank + slack:  # equal scores at the bound, as far as they are needed
            places = gl.convert_layout(gl.reshape(at, [SAMPLE]), FLAT)
            ties = gl.convert_layout((keys == key).to(gl.int32), FLAT)
            left = rank - gl.sum((keys > key).to(gl.int32), 0)
            position = gl.max(gl.where((ties > 0) & (gl.associative_scan(ties, 0, _add) <= left), places, -1), 0)
    return key, position


@gluon.jit
def _line(none, row, start, offset, n, whole, lines, hi):
    """Where there is a line n its scores at start [warp, 1, lane, 1] + offset [1, 4, 1, 4]; only where not all are inside NaN from hi on: a mask forbids loads of 16 bytes."""
    x = none
    if n < whole:
        x = gl.load((row + start) + offset)
    elif n < lines:
        x = gl.load((row + start) + offset, mask=start + offset < hi, other=float("nan"))
    return x


@gluon.jit
def _wide(x):
    """[warp] -> [warp, 1, 1]"""
    return gl.expand_dims(gl.expand_dims(x, 1), 1)


@gluon.jit
def keep_line(x, at, plain, first, position, low, high, lo, hi, count, room, byte, CAPACITY: gl.constexpr):
    """What passes of a line of each warp to `room`, behind the `count` [warp] before; how many there are then. What a warp keeps of each quarter, at most 128, is counted
    in the bytes of one number. plain: the lines lie inside the row, each on one side of the bound's position, so that one comparison a score is enough."""
    L: gl.constexpr = x.type.layout
    LANES: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    if not plain:
        x = gl.where((x >= gl.where(at <= position, low, high)) & (at >= lo) & (at < hi), x, float("nan"))
    kept = (x >= gl.expand_dims(_wide(gl.where(first > position, high, low)), 3)).to(gl.uint32)  # false for NaN; no limit is below the least finite float
    mine = gl.sum(gl.sum(kept, 3) << byte, 1)  # [warp, lane]
    before = gl.convert_layout(gl.associative_scan(gl.convert_layout(mine, LANES), 1, _add), mine.type.layout) - mine
    all_ = gl.sum(mine, 1)
    second = all_ & 255
    third = second + ((all_ >> 8) & 255)
    fourth = third + ((all_ >> 16) & 255)
    behind = gl.where(byte == 0, 0, gl.where(byte == 8, _wide(second), gl.where(byte == 16, _wide(third), _wide(fourth))))
    slot = gl.expand_dims(((gl.expand_dims(before, 1) >> byte) & 255) + behind, 3) + gl.associative_scan(kept, 3, _add) - kept
    into = gl.expand_dims(_wide(room + gl.minimum(count, CAPACITY)), 3)
    entry = (x.to(gl.uint32, bitcast=True).to(gl.uint64) << 32) | at.to(gl.uint32).to(gl.uint64)
    gl.store(into + slot.to(gl.int32), entry.to(gl.int64, bitcast=True), mask=kept > 0)
    return count + (fourth + (all_ >> 24)).to(gl.int32)


@gluon.jit
def keep(row, lo, hi, key, position, buffer, counts, CAPACITY: gl.constexpr, WARPS: gl.constexpr):
    """Entries that pass the bound, bits of the float in the high word and position in the low one, by ascending position, each warp's into its own CAPACITY + LINE
    places; how many to `counts` (more than CAPACITY: not all are there). No warp waits for another."""
    L: gl.constexpr = gl.BlockedLayout([1, 4, 1, 4], [1, 1, 32, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])  # [warp, quarter, lane, 4]
    N: gl.constexpr = gl.SliceLayout(3, L)                                                         # [warp, quarter, lane]
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(1, N)))
    quarter = gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, N))), 0), 2)
    lane = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(0, N))), 0), 0)
    four = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(0, gl.SliceLayout(0, L)))), 0), 0), 0)
    byte = (8 * quarter).to(gl.uint32)
    least = value_of((key * 0 + 0x00800000).to(gl.uint32))
    low = gl.where(key == 0, least, value_of(key))
    high = gl.where(key == 0, least, value_of(key + 1))
    begin = gl.multiple_of(lo // 16 * 16, 16)
    lines = (hi - begin + 2 * LINE * WARPS - 1) // (2 * LINE * WARPS) * 2  # of each warp
    share = lines * LINE
    first = begin + warp * share
    start = gl.expand_dims(_wide(first) + lane * 4, 3)
    offset = gl.expand_dims(quarter * 128, 3) + four
    whole = (hi - begin - (WARPS - 1) * share) // LINE         # lines that even the last warp has
    cut = gl.where(position >= begin, (position - begin) % gl.maximum(share, 1) // LINE, -1)  # a line that may hold scores on both sides of the bound's position
    ragged = gl.where(begin == lo, -1, 0)                      # and one that may begin before the window
    count = warp * 0
    room = buffer + warp.to(gl.int64) * (CAPACITY + LINE)
    none = gl.full([WARPS, 4, 32, 4], float("nan"), gl.float32, L)
    x = _line(none, row, start, offset, 0, whole, lines, hi)
    y = _line(none, row, start + LINE, offset, 1, whole, lines, hi)
    for i in range(0, lines, 2):  # one line is in flight while the other is looked at
        here = start + i * LINE
        count = keep_line(x, here + offset, (i < whole) & (i != cut) & (i != ragged), first + i * LINE, position, low, high, lo, hi, count, room, byte, CAPACITY)
        x = _line(none, row, here + 2 * LINE, offset, i + 2, whole, lines, hi)
        here += LINE
        count = keep_line(y, here + offset, (i + 1 < whole) & (i + 1 != cut), first + (i + 1) * LINE, position, low, high, lo, hi, count, room, byte, CAPACITY)
        y = _line(none, row, here + 2 * LINE, offset, i + 3, whole, lines, hi)
    gl.store(counts + warp, count)


@gluon.jit
def choose(buffer, counts, k, bounded, out, CAPACITY: gl.constexpr, WARPS: gl.constexpr):
    """The k best of the candidates, positions ascending, to `out`; returns how many, -1 where they cannot be known: a warp had too many, all together have, or fewer than
    k passed a bound."""
    C: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    FLAT: gl.constexpr = gl.BlockedLayout([CAPACITY // (32 * WARPS)], [32], [WARPS], [0])  # neighbours in one thread, for sums along the positions
    i = gl.arange(0, CAPACITY, C)
    off = i * 0
    total = k * 0
    sound = total == 0
    for w in gl.static_range(WARPS):
        off = gl.where(i >= total, w * (CAPACITY + LINE) - total, off)
        count = gl.load(counts + w)
        sound = sound & (count <= CAPACITY)
        total += gl.minimum(count, CAPACITY)
    written = k * 0 - 1
    if sound & (total <= CAPACITY) & ((total >= k) | (bounded == 0)):
        entry = gl.load(buffer + i + off, mask=i < total, other=0)
        at = entry.to(gl.int32)
        keys = gl.where(i < total, order_keys((entry >> 32).to(gl.int32)), 0)
        chosen = keys > 0
        written = gl.minimum(total, k)
        if total > k:
            bound, passed = kth_key(keys, total, k, 0)
            chosen = keys >= bound
            if passed > k:  # more equal scores at the end than are wanted
                ties = gl.convert_layout((keys == bound).to(gl.int32), FLAT)
                left = k - gl.sum((keys > bound).to(gl.int32), 0)
                taken = gl.where(gl.associative_scan(ties, 0, _add) <= left, ties, 0)
                chosen = (keys > bound) | (gl.convert_layout(taken, C) > 0)
        ones = gl.convert_layout(chosen.to(gl.int32), FLAT)
        slot = gl.convert_layout(gl.associative_scan(ones, 0, _add), C) - 1
        gl.store(out + slot, at, mask=chosen)
    return written


@gluon.jit(do_not_specialize=["rows", "T", "S", "k"])
def topk_gluon(scores, starts, ends, out, lengths, buffer, counts, stride_b, stride_t, rows, T, S, k, CAPACITY: gl.constexpr, SAMPLE: gl.constexpr, WARPS: gl.constexpr):
    """buffer int64 [programs, WARPS, CAPACITY + LINE], counts int32 [programs, WARPS]."""
    S_: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    pid = gl.program_id(0)
    buffer += pid.to(gl.int64) * (WARPS * (CAPACITY + LINE))
    counts += pid * WARPS
    for r in range(pid, rows, gl.num_programs(0)):
        b = r // T
        t = r - b * T
        lo, hi, first, last = row_window(starts, ends, None, b, t, r.to(gl.int64), S, 0, 1, 0, 0, False)
        row = scores + b.to(gl.int64) * stride_b + t.to(gl.int64) * stride_t
        written = t * 0 - 1
        if fits(hi - lo, k, CAPACITY, SAMPLE):
            key = (t * 0).to(gl.uint32)
            position = t * 0 - 1
            if hi - lo > CAPACITY:
                key, position = sample_bound(row, lo, hi, k, SAMPLE, WARPS)
            keep(row, lo, hi, key, position, buffer, counts, CAPACITY, WARPS)
            gl.thread_barrier()
            written = choose(buffer, counts, k, key, out + r.to(gl.int64) * k, CAPACITY, WARPS)
            gl.thread_barrier()  # before another row's candidates
        if written >= 0:
            for at in range(written, k, 32 * WARPS):
                place = at + gl.arange(0, 32 * WARPS, S_)
                gl.store(out + r.to(gl.int64) * k + place, place * 0 - 1, mask=place < k)
        gl.store(lengths + r, written)


@triton.jit
def search_rows(scores, starts, ends, out, lengths, stride_b, stride_t, rows, T, S, k, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of length -1, by radix passes."""
    begin = tl.program_id(0) * EACH
    mine = begin + tl.arange(0, EACH)
    if tl.min(tl.load(lengths + mine, mask=mine < rows, other=0), axis=0) < 0:
        for r in range(begin, tl.minimum(begin + EACH, rows)):
            if tl.load(lengths + r) < 0:
                b, t = r // T, r % T
                lo, hi, first, last = row_window(starts, ends, None, b, t, r.to(tl.int64), S, 0, 1, 0, 0, False)
                answer = out + r.to(tl.int64) * k
                written = choose_by_radix(scores + b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t, S, lo, hi, k, first, last, answer, answer, BLOCK, False, False)
                pad(answer, answer, written, k, 1024, False)
                tl.store(lengths + r, written)


# ---------------------------------------------------------------------------------------------------------------- the host
@lru_cache
def constants(capacity: int, sample: int, warps: int, programs: int) -> relaunch.Constants:
    registers = 65536 // (32 * warps * programs) // 8 * 8
    return relaunch.Constants(CAPACITY=capacity, SAMPLE=sample, WARPS=warps, num_warps=warps, maxnreg=min(registers, 255))


@lru_cache
def search_constants(each: int) -> relaunch.Constants:
    return relaunch.Constants(EACH=each, BLOCK=2048, num_warps=8)


def launch(scores, top_k, indices, lengths, place, config, starts, ends):
    """Fills indices [B,T,top_k] and lengths [B,T]."""
    B, T, S = scores.shape
    warps, programs = config["select_warps"], min(B * T, max(place.sms, 1) * config["programs"])
    room = config["capacity"] + LINE.value
    buffer, counts = place.empty((programs, warps, room), "int64"), place.empty((programs, warps), "int32")
    numbers = (scores.stride(0), scores.stride(1), B * T, T, S, top_k)
    relaunch.launch(topk_gluon, (programs,), place, (scores, starts, ends, indices, lengths, buffer, counts), numbers,
                    constants(config["capacity"], config["sample"], warps, config["programs"]))
    each = 8 if B * T > 1024 else 1
    relaunch.launch(search_rows, (-(-B * T // each),), place, (scores, starts, ends, indices, lengths), numbers, search_constants(each))


def artifacts(config, windows: bool) -> list[dict]:
    arrays = dict(scores="*fp32", out="*i32", lengths="*i32", buffer="*i64", counts="*i32") | (dict(starts="*i32", ends="*i32") if windows else {})
    found = []
    chosen = constants(config["capacity"], config["sample"], config["select_warps"], config["programs"])
    for fn, made in ((topk_gluon, chosen), (search_rows, search_constants(8))):
        taken, strides = {name: kind for name, kind in arrays.items() if name in fn.arg_names}, ("stride_b", "stride_t")
        found.append(relaunch.artifact(fn, made, taken, (*strides, "rows", "T", "S", "k"), aligned=strides))
    return found
