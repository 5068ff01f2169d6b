"""Exact selection of the k largest floats of a row, shared by `topk` and `indexer_topk`.

A float becomes a uint32 key that orders alike (-0.0 as 0.0; 0 for NaN and -inf, which are never chosen), so that counting, comparing and searching are exact
integers. Equal keys are settled by the smaller position. Rows are read once: a sample gives a bound (key, position) that few more than k entries pass, those
are kept in order of position, and the k-th of them is found by bisection. A bound that fails is noticed by the count, and a radix select over the row follows.
"""
import triton
import triton.language as tl

LINE = tl.constexpr(512)  # scores that a warp looks at together


@triton.jit
def order_keys(bits):
    """int32 bits of float32 values -> uint32 keys."""
    size = bits & 0x7FFFFFFF
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    keys = tl.where(size == 0, 0x80000000, keys)
    return tl.where((size > 0x7F800000) | (bits == -8388608), 0, keys)


@triton.jit
def load_keys(row, at, lo, hi, first, last, FORCED: tl.constexpr):
    """Keys of positions `at`; 0 outside [lo, hi). With FORCED positions before `first` and from `last` on pass every score."""
    inside = (at >= lo) & (at < hi)
    keys = order_keys(tl.load(row + at, mask=inside, other=float("-inf")).to(tl.int32, bitcast=True))
    if FORCED:
        keys = tl.where(inside & ((at < first) | (at >= last)), 0xFFFFFFFF, keys)
    return keys


@triton.jit
def load_block(row, block, width, lo, hi, first, last, BLOCK: tl.constexpr, FORCED: tl.constexpr):
    """Positions block .. block + BLOCK - 1 and their keys, as `load_keys`. Only the row's last block has a mask, which would forbid loads of 16 bytes."""
    at = block + tl.arange(0, BLOCK)
    if block + BLOCK <= width:
        raw = tl.load(row + at)
    else:
        raw = tl.load(row + at, mask=at < width, other=float("-inf"))
    inside = (at >= lo) & (at < hi)
    keys = order_keys(raw.to(tl.int32, bitcast=True))
    keys = tl.where(inside, keys, tl.zeros_like(keys))
    if FORCED:
        keys = tl.where(inside & ((at < first) | (at >= last)), 0xFFFFFFFF, keys)
    return at, keys


@triton.jit
def probes(lo, hi, above, below, k, step):
    """Two keys in lo + 1 .. hi, of whose keys `above` are >= lo and `below` > hi, near the k-th largest: where it were if scores lay as an exponential's do, less and plus three
    eighths of the root of their number, with which five passes find the 2048th of normal scores (with the root itself ten). After many steps, and where that is no number, thirds."""
    x = value_of(lo)
    width = value_of(hi) - x
    most = tl.log2(above.to(tl.float32))
    share = (most - tl.log2(k.to(tl.float32))) / (most - tl.log2(tl.maximum(below, 1).to(tl.float32)))
    spread = 0.375 / tl.sqrt((above - below).to(tl.float32))
    third = (hi - lo) // 3
    near = (step < 8) & (width < float("inf"))  # false for NaN
    p = tl.where(near, order_keys((x + width * (share - spread)).to(tl.int32, bitcast=True)), lo + third)
    q = tl.where(near, order_keys((x + width * (share + spread)).to(tl.int32, bitcast=True)), hi - third)
    p = tl.minimum(tl.maximum(p, lo + 1), hi)
    return p, tl.minimum(tl.maximum(q, p), hi)


@triton.jit
def kth_key(keys, have, k, slack):
    """(bound, how many keys are >= it): k to k + slack of them, or at least k with fewer than k > it. `have` >= k >= 1 keys are not 0; at most 32767 keys."""
    lo = tl.min(tl.where(keys == 0, 0xFFFFFFFF, keys), axis=0)
    hi = tl.max(keys, axis=0)
    k += have * 0  # Triton makes a constant of an argument that is 1
    above = have
    below = have * 0
    step = have * 0
    while lo < hi:
        p, q = probes(lo, hi, above, below, k, step)
        both = tl.sum((keys >= p).to(tl.int32) + ((keys >= q).to(tl.int32) << 16), axis=0)
        at_p = both & 0xFFFF
        at_q = both >> 16
        hi = tl.where(at_q >= k, tl.where(at_q <= k + slack, q, hi), tl.where(at_p >= k, tl.where(at_p <= k + slack, p, q - 1), p - 1))
        below = tl.where(at_q >= k, below, tl.where(at_p >= k, at_q, at_p))
        lo = tl.where(at_q >= k, q, tl.where(at_p >= k, p, lo))
        above = tl.where(at_q >= k, at_q, tl.where(at_p >= k, at_p, above))
        step += 1
    return lo, above


@triton.jit
def bound_rank(mean):
    """The rank in a sample that, where the k-th of the row is expected at `mean`, lies below it: four and a half deviations."""
    return mean + 4.5 * tl.sqrt(mean) + 3.0


@triton.jit
def sample_bound(row, lo, hi, k, first, last, SAMPLE: tl.constexpr, FORCED: tl.constexpr):
    """(key, position): entries with a larger key, or this key at or before this position, are with high probability at least k and few more.

    The sample are groups of 8, a sector of memory each, at hashed places of equal strata, so that no period of the row is in step with it; at most half of a row, which
    has more than 32.
    """
    n = hi - lo
    head = (lo + 7) // 8
    groups = hi // 8 - head  # whole ones
    runs = tl.minimum(SAMPLE // 8, groups // 2)
    run = tl.arange(0, SAMPLE // 8)
    begin = run * (groups // runs) + run * (groups % runs) // runs
    noise = tl.umulhi(run.to(tl.uint32) * 0x9E3779B1, (groups // runs).to(tl.uint32) + tl.zeros((SAMPLE // 8,), tl.uint32)).to(tl.int32)
    there = run < runs
    group = tl.where(there, head + begin + noise, head) * 8
    at = group[:, None] + tl.arange(0, 8)[None, :]
    keys = order_keys(tl.load(row + at).to(tl.int32, bitcast=True))
    if FORCED:
        keys = tl.where((at < first) | (at >= last), 0xFFFFFFFF, keys)
    keys = tl.reshape(tl.where(there[:, None], keys, tl.zeros_like(keys)), (SAMPLE,))
    at = tl.reshape(at, (SAMPLE,))
    mean = k * (8 * runs / n.to(tl.float32))
    rank = bound_rank(mean).to(tl.int32)
    key = tl.sum(tl.zeros_like(keys), axis=0)
    position = lo * 0 - 1
    have = tl.sum((keys > 0).to(tl.int32), axis=0)
    if have >= rank:  # else every entry passes
        slack = rank // 32
        key, passed = kth_key(keys, have, rank, slack)
        position = hi
        if passed > rank + slack:  # equal scores at the bound, as far as they are needed
            ties = (keys == key).to(tl.int32)
            left = rank - tl.sum((keys > key).to(tl.int32), axis=0)
            position = tl.max(tl.where((ties > 0) & (tl.cumsum(ties, axis=0) <= left), at, -1), axis=0)
    return key, position


@triton.jit
def value_of(key):
    """The float32 of a key; NaN for the keys that no float has."""
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_lines(row, block, width):
    """Floats of LINE positions as a warp loads them, [32, 4, 4]: of each thread 4 neighbours in each quarter. NaN past the row's end."""
    at = block + tl.arange(0, 32)[:, None, None] * 4 + tl.arange(0, 4)[None, :, None] * 128 + tl.arange(0, 4)[None, None, :]
    if block + LINE <= width:
        x = tl.load(row + at)
    else:
        x = tl.load(row + at, mask=at < width, other=float("nan"))
    return x


@triton.jit
def passes(x, at, lo, n, position, low, high, first, last, FORCED: tl.constexpr):
    kept = x >= tl.where(at <= position, low, high)  # false for NaN; no limit is below the least finite float
    if FORCED:
        kept = kept | (at < first) | (at >= last)
    return (kept & ((at - lo).to(tl.uint32, bitcast=True) < n)).to(tl.uint32)


@triton.jit
def keep_one(buffer, slot, x, at, kept):
    entry = (x.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | at.to(tl.uint32, bitcast=True).to(tl.uint64)
    tl.store(buffer + slot, entry.to(tl.int64, bitcast=True), mask=kept > 0)
    return slot + kept


@triton.jit
def keep_candidates(row, width, lo, hi, key, position, first, last, buffer, CAPACITY: tl.constexpr, FORCED: tl.constexpr):
    """Entries that pass the bound, bits of the float in the high word and position in the low one, by ascending position into the buffer of CAPACITY + LINE.

    Returns how many there are (more than CAPACITY: not all are kept). For one warp, which needs no barrier: a thread loads 16 bytes at a time, and what the warp keeps of its
    four loads, at most 128 each, is counted in the bytes of one number: one sum over the threads gives all of them their places. The loop is bound by its instructions.
    """
    least = value_of(key * 0 + 0x00800000)
    low = tl.where(key == 0, least, value_of(key))
    high = tl.where(key == 0, least, value_of(key + 1))
    n = (hi - lo).to(tl.uint32, bitcast=True)
    count = lo * 0
    quarter = tl.arange(0, 4)[None, :]
    byte = quarter.to(tl.uint32) * 8
    places = tl.arange(0, 32)[:, None] * 4 + quarter * 128
    begin = tl.multiple_of(lo // 16 * 16, 16)
    following = load_lines(row, begin, width)
    ahead = load_lines(row, begin + LINE, width)
    for block in range(begin, hi, LINE):
        even, odd = tl.split(tl.reshape(following, (32, 4, 2, 2)))
        following = ahead
        ahead = load_lines(row, block + 2 * LINE, width)  # two lines are in flight while one is looked at
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        at = block + places
        # Almost every block lies inside the row, on one side of the bound's position and away from forced entries: one comparison an entry
        plain = (block >= lo) & (block + LINE <= hi) & ((block > position) | (block + LINE - 1 <= position))
        if FORCED:
            plain = plain & (block >= first) & (block + LINE <= last)
        if plain:
            limit = tl.where(block > position, high, low)
            k0 = (x0 >= limit).to(tl.uint32)
            k1 = (x1 >= limit).to(tl.uint32)
            k2 = (x2 >= limit).to(tl.uint32)
            k3 = (x3 >= limit).to(tl.uint32)
        else:
            k0 = passes(x0, at, lo, n, position, low, high, first, last, FORCED)
            k1 = passes(x1, at + 1, lo, n, position, low, high, first, last, FORCED)
            k2 = passes(x2, at + 2, lo, n, position, low, high, first, last, FORCED)
            k3 = passes(x3, at + 3, lo, n, position, low, high, first, last, FORCED)
        mine = tl.sum((k0 + k1 + k2 + k3) << byte, axis=1)  # [32]
        before = tl.cumsum(mine, axis=0) - mine
        all_ = tl.sum(mine, axis=0)
        second = all_ & 255
        third = second + ((all_ >> 8) & 255)
        fourth = third + ((all_ >> 16) & 255)
        slot = ((before[:, None] >> byte) & 255) + tl.where(quarter == 0, 0, tl.where(quarter == 1, second, tl.where(quarter == 2, third, fourth)))
        into = buffer + tl.minimum(count, CAPACITY)
        slot = keep_one(into, slot, x0, at, k0)
        slot = keep_one(into, slot, x1, at + 1, k1)
        slot = keep_one(into, slot, x2, at + 2, k2)
        keep_one(into, slot, x3, at + 3, k3)
        count += (fourth + (all_ >> 24)).to(tl.int32)
    return count


@triton.jit
def load_candidates(buffer, there, first, last, FORCED: tl.constexpr):
    """(keys, positions) of a tile of buffer entries; key 0 where not there."""
    entry = tl.load(buffer, mask=there, other=0)
    at = entry.to(tl.int32)
    keys = order_keys((entry >> 32).to(tl.int32))
    if FORCED:
        keys = tl.where((at < first) | (at >= last), 0xFFFFFFFF, keys)
    return tl.where(there, keys, tl.zeros_like(keys)), at


@triton.jit
def choose(keys, at, k, row, out, values, VALUES: tl.constexpr):
    """The k best of a tile of candidates whose positions ascend: positions (and values) in ascending order to `out`; returns how many."""
    have = tl.sum((keys > 0).to(tl.int32), axis=0)
    bound = tl.sum(tl.zeros_like(keys), axis=0)
    passed = have
    if have > k:
        bound, passed = kth_key(keys, have, k, 0)
    chosen = (keys >= bound) & (keys > 0)
    if passed > k:  # more equal scores at the end than are wanted
        ties = (keys == bound).to(tl.int32)
        left = k - tl.sum((keys > bound).to(tl.int32), axis=0)
        chosen = (keys > bound) | ((ties > 0) & (tl.cumsum(ties, axis=0) <= left))
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(out + slot, at, mask=chosen)
    if VALUES:
        tl.store(values + slot, tl.load(row + at, mask=chosen, other=0.0), mask=chosen)
    return tl.minimum(have, k)


@triton.jit
def radix_pass(row, width, lo, hi, prefix, need, first, last, SHIFT: tl.constexpr, BLOCK: tl.constexpr, FORCED: tl.constexpr):
    """One digit of 8 bits: keys whose higher bits are `prefix` counted by digit -> (prefix with its digit, how many are still needed, how many matched)."""
    bins = tl.zeros((256,), tl.int32)
    for block in range(tl.multiple_of(lo // 16 * 16, 16), hi, BLOCK):
        _, keys = load_block(row, block, width, lo, hi, first, last, BLOCK, FORCED)
        match = keys > 0
        if SHIFT < 24:
            match = match & ((keys >> (SHIFT + 8)) == prefix)
        bins += tl.histogram(((keys >> SHIFT) & 255).to(tl.int32), 256, mask=match)
    total = tl.sum(bins, axis=0)
    need = tl.minimum(need, total)
    above = total - tl.cumsum(bins, axis=0)                                    # keys with a larger digit
    digit = tl.sum((above >= need).to(tl.int32), axis=0)                       # the largest digit with fewer than `need` above it
    larger = tl.sum(tl.where(tl.arange(0, 256) > digit, bins, 0), axis=0)
    return (prefix << 8) | digit.to(tl.uint32), need - larger, total


@triton.jit
def choose_by_radix(row, width, lo, hi, k, first, last, out, values, BLOCK: tl.constexpr, FORCED: tl.constexpr, VALUES: tl.constexpr):
    """The k best of a whole row, whatever k and the row's length: four passes that count, one that writes; returns how many."""
    none = tl.sum(tl.zeros((2,), tl.uint32), axis=0)
    bound, left, total = radix_pass(row, width, lo, hi, none, k, first, last, 24, BLOCK, FORCED)
    bound, left, _ = radix_pass(row, width, lo, hi, bound, left, first, last, 16, BLOCK, FORCED)
    bound, left, _ = radix_pass(row, width, lo, hi, bound, left, first, last, 8, BLOCK, FORCED)
    bound, left, _ = radix_pass(row, width, lo, hi, bound, left, first, last, 0, BLOCK, FORCED)
    written = lo * 0
    seen = lo * 0
    for block in range(tl.multiple_of(lo // 16 * 16, 16), hi, BLOCK):
        at, keys = load_block(row, block, width, lo, hi, first, last, BLOCK, FORCED)
        ties = ((keys == bound) & (keys > 0)).to(tl.int32)
        chosen = (keys > bound) | ((ties > 0) & (seen + tl.cumsum(ties, axis=0) <= left))
        slot = written + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(out + slot, at, mask=chosen)
        if VALUES:
            tl.store(values + slot, tl.load(row + at, mask=chosen, other=0.0), mask=chosen)
        seen += tl.sum(ties, axis=0)
        written += tl.sum(chosen.to(tl.int32), axis=0)
    return tl.minimum(total, k)


@triton.jit
def pad(out, values, written, K, BLOCK: tl.constexpr, VALUES: tl.constexpr):
    """-1 (and -inf) from `written` to the end of the row's answer."""
    for block in range(written, K, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        tl.store(out + slot, tl.full((BLOCK,), -1, tl.int32), mask=slot < K)
        if VALUES:
            tl.store(values + slot, tl.full((BLOCK,), float("-inf"), tl.float32), mask=slot < K)
