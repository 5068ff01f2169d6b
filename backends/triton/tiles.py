"""Device helpers of the attention kernels: tiles of any width, what a row of a partial block sees, one step of the softmax.

A width is held as a power of two W0 and a padded rest W1 (0: none); see launch.parts. All arithmetic on elements is in float32, and products are
not fused with sums (launch.options): a score, q.k times the scale in natural units, is rounded in the backward as the largest of a row is in the forward's lse, so that
score - lse is right however large both are. A row of one key has P = 1 exactly.
"""
import triton
import triton.language as tl

from sparsetile.backends.triton.float8 import exact


@triton.jit
def load(p, rows, ok, COL: tl.constexpr, W: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):
    """[rows, W] from column COL of a matrix of N columns; `rows` are offsets in elements. Columns past N, and rows not ok if ROWS, are 0."""
    c = COL + tl.arange(0, W)
    at = p + rows[:, None] + c[None, :]
    if ROWS:
        if COL + W > N:
            return tl.load(at, mask=ok[:, None] & (c < N)[None, :], other=0.0)
        else:
            return tl.load(at, mask=ok[:, None], other=0.0)
    else:
        if COL + W > N:
            return tl.load(at, mask=(c < N)[None, :], other=0.0)
        else:
            return tl.load(at)


@triton.jit
def load_at(p, rows, ok, col, W: tl.constexpr, N):
    """[rows, W] from a column known at run time only; columns past N and rows not ok are 0."""
    c = col + tl.arange(0, W)
    return tl.load(p + rows[:, None] + c[None, :], mask=ok[:, None] & (c < N)[None, :], other=0.0)


@triton.jit
def store(p, rows, ok, x, col, W: tl.constexpr, N: tl.constexpr):
    c = col + tl.arange(0, W)
    tl.store(p + rows[:, None] + c[None, :], x.to(p.dtype.element_ty), mask=ok[:, None] & (c < N)[None, :])


@triton.jit
def product(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def chunked(a, a_rows, a_ok, b, b_rows, b_ok, R: tl.constexpr, C: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, NEGATE: tl.constexpr):
    """a . b^T over N columns, CHUNK at a time, both read again from memory: for widths that registers or shared memory cannot hold."""
    s = tl.zeros([R, C], tl.float32)
    for d in tl.range(0, N, CHUNK, num_stages=1):
        x = exact(load_at(a, a_rows, a_ok, d, CHUNK, N))
        y = exact(load_at(b, b_rows, b_ok, d, CHUNK, N)).to(x.dtype)
        s = product(x, tl.trans(y), s)
    return -s if NEGATE else s


@triton.jit
def negated(x):
    return (-x.to(tl.float32)).to(x.dtype)


@triton.jit
def opened(q, rows, ok, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NEGATE: tl.constexpr):
    """Both parts of a tile of queries, float8 as float16, turned over where the scale is negative."""
    q0 = exact(load(q, rows, ok, 0, D0, D, True))
    q1 = 0.0
    if D1:
        q1 = exact(load(q, rows, ok, D0, D1, D, True))
    if NEGATE:
        q0 = negated(q0)
        if D1:
            q1 = negated(q1)
    return q0, q1


@triton.jit
def taken(lengths, line, K):
    """How many of a list's K entries are read."""
    count = K
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + line), 0), K)
    return count


@triton.jit
def first_from(cols, lo, hi, count):
    """The first of the ascending entries lo .. hi whose column is at least `count`. Almost always hi or lo: two looks; else bisection."""
    n = hi
    if lo < hi:
        if tl.load(cols + hi - 1) >= count:
            left = lo
            n = hi - 1
            if tl.load(cols + lo) >= count:
                n = lo
            while left < n:
                middle = left + (n - left) // 2
                if tl.load(cols + middle) < count:
                    left = middle + 1
                else:
                    n = middle
    return n


@triton.jit
def place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH: tl.constexpr):
    """(keys that exist, position of query 0 as int64) of batch b."""
    limit = S
    if kv_length is not None:
        limit = tl.minimum(tl.maximum(tl.load(kv_length + b), 0), S)
    start = tl.full([], 0, tl.int64) + q_start
    if q_starts is not None:
        start = tl.load(q_starts + b).to(tl.int64)
    elif FROM_LENGTH:
        start += limit - T
    return limit, start


@triton.jit
def drawn(number, order):
    """(head, place among its tiles) of item `number`: the first `ahead` tiles of every head, then heads in sections, tile after tile."""
    heads, tiles, ahead, section = order
    m = number - ahead * heads
    each = tiles - ahead
    begin = tl.where(m < 0, 0, m // tl.maximum(section * each, 1) * section)
    width = tl.where(m < 0, heads, tl.minimum(section, heads - begin))
    m = tl.where(m < 0, number, m - begin * each)
    rank = m // width
    return begin + m - rank * width, rank + tl.where(number < ahead * heads, 0, ahead)


@triton.jit
def rows_of(i, which, schedule, q_order, start, T, first, nq, tiles, BQ: tl.constexpr, FAR: tl.constexpr):
    """Program i's query tile: (number in the layout, or outside 0 .. nq - 1 if it has none; base, row: query base + row[r]; row_ok).

    Tiles are aligned to absolute positions, of which `start` may be negative: masks and shifts of two's complement, not C's division, find the tile below it.
    """
    r = tl.arange(0, BQ)
    if q_order is not None:
        if schedule is not None:
            i = tl.load(schedule + which * nq + i)
        tile = i.to(tl.int64)
        p = tl.load(q_order + i * BQ + r)
        t = p.to(tl.int64) - start
        row_ok = (p >= 0) & (t >= 0) & (t < T)
        t = tl.where(row_ok, t, 0)
        row = t if FAR else t.to(tl.int32)
        base = tl.full([], 0, tl.int64)
    else:
        rest = start & (BQ - 1)
        if schedule is not None:  # the call covers exactly the layout's tiles
            tile = tl.load(schedule + which * nq + i).to(tl.int64)
            base = (first + tile) * BQ - start
        else:  # later tiles first: under causal patterns they are the longer ones
            turned = tiles - 1 - i
            tile = (start - rest) // BQ + turned - first
            base = turned * BQ - rest
        tile = tl.where(base < T, tile, -1)
        t = (base + r).to(tl.int32)
        row_ok = (t >= 0) & (t < T)
        row = r.to(tl.int64) if FAR else r
    return tile, base, row, row_ok


@triton.jit
def entries_of(tile, which, offsets, cols, limit, nq, BK: tl.constexpr, EDGE: tl.constexpr):
    """List of a tile: full blocks a .. n, partial ones e .. c; edge 1 if entry n is a full block that the limit cuts, to be done with the partial ones."""
    a = 0
    n = 0
    e = 0
    c = 0
    edge = 0
    if (tile >= 0) & (tile < nq):
        at = offsets + 2 * (which.to(tl.int64) * nq + tile)
        a = tl.load(at)
        e = tl.load(at + 1)
        c = tl.load(at + 2)
        n = e
        if EDGE:
            n = first_from(cols, a, e, limit // BK)
            c = first_from(cols, e, c, (limit + BK - 1) // BK)
            if n < e:
                if (tl.load(cols + n) == limit // BK) & (limit % BK != 0):
                    edge = 1
    return a, n, e, c, edge


@triton.jit
def queries_of(j, which, offsets, entries, start, T, first, nq, nk, BQ: tl.constexpr, EDGE: tl.constexpr):
    """List of key tile j: full blocks a .. e, partial ones m .. c. EDGE: of the query tiles that hold queries of the call only."""
    a = 0
    e = 0
    m = 0
    c = 0
    if j < nk:
        at = offsets + 2 * (which.to(tl.int64) * nk + j)
        a = tl.load(at)
        m = tl.load(at + 1)
        c = tl.load(at + 2)
        e = m
        if EDGE:
            last = start + T - 1
            low = tl.minimum(tl.maximum((start - (start & (BQ - 1))) // BQ - first, 0), nq).to(tl.int32)
            high = tl.minimum(tl.maximum((last - (last & (BQ - 1))) // BQ - first + 1, 0), nq).to(tl.int32)
            e = first_from(entries, a, m, high)
            a = first_from(entries, a, e, low)
            c = first_from(entries, m, c, high)
            m = first_from(entries, m, c, low)
    return a, e, m, c


@triton.jit
def interval_of(kind, row, intervals, M: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, INTERVALS: tl.constexpr):
    """First key of the block that each row[M] of a partial block's picture sees, and the one past its last. All of them by other kinds."""
    lo = tl.zeros([M], tl.int32)
    hi = tl.full([M], BK, tl.int32)
    if INTERVALS:
        at = intervals + (kind >> 1).to(tl.int64) * (2 * BQ) + 2 * row
        rule = (kind >= 0) & ((kind & 1) == 0) & (row >= 0)
        lo = tl.load(at, mask=rule, other=0)
        hi = tl.load(at + 1, mask=rule, other=BK)
    return lo, hi


@triton.jit
def seen(kind, intervals, bitmaps, BQ: tl.constexpr, BK: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr, ANY: tl.constexpr = True):
    """[BQ, BK]: which key of the block each row sees, by the table of partial blocks. kind -1: all. Not ANY, nor BITMAPS: it is one of `intervals`, both ends of which one load brings."""
    r = tl.arange(0, BQ)
    c = tl.arange(0, BK)
    if ANY or BITMAPS:
        lo, hi = interval_of(kind, r, intervals, BQ, BQ, BK, INTERVALS)
    else:
        lo, hi = tl.split(tl.load(intervals + (kind >> 1).to(tl.int64) * (2 * BQ) + 2 * r[:, None] + tl.arange(0, 2)[None, :]))
    ok = (c[None, :] >= lo[:, None]) & (c[None, :] < hi[:, None])
    if BITMAPS:
        if kind >= 0:
            if (kind & 1) == 1:
                w = tl.arange(0, BK // 32)
                words = tl.load(bitmaps + (kind >> 1).to(tl.int64) * (BQ * (BK // 32)) + r[:, None] * (BK // 32) + w[None, :])
                bits = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
                ok = tl.reshape(bits, [BQ, BK]) != 0
    return ok


@triton.jit
def seen_by_key(kind, intervals, bitmaps, BQ: tl.constexpr, BK: tl.constexpr, INTERVALS: tl.constexpr, BITMAPS: tl.constexpr):
    """`seen`, transposed: [BK, BQ]."""
    r = tl.arange(0, BQ)
    c = tl.arange(0, BK)
    lo, hi = interval_of(kind, r, intervals, BQ, BQ, BK, INTERVALS)
    ok = (c[:, None] >= lo[None, :]) & (c[:, None] < hi[None, :])
    if BITMAPS:
        if kind >= 0:
            if (kind & 1) == 1:
                w = tl.arange(0, BK // 32)
                words = tl.load(bitmaps + (kind >> 1).to(tl.int64) * (BQ * (BK // 32)) + r[None, :] * (BK // 32) + w[:, None])
                bits = (words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1
                ok = tl.reshape(bits, [BK, BQ]) != 0
    return ok


@triton.jit
def tanh(x):
    """To about 2 ulp: a series near 0, where 1 - 2 / (1 + e^2x) cancels."""
    y = x * x
    near = x * (1.0 + y * (-0.33333333333 + y * (0.13333333333 + y * (-0.053968253968 + y * (0.021869488536 + y * -0.0088632355299)))))
    far = 1.0 - 2.0 / (1.0 + tl.math.exp2(2.8853900817779268 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0, -far, far))


@triton.jit
def capped(s, inner, outer):
    """Logits after the cap: outer * tanh(inner * s), inner = scale / cap, outer = cap."""
    return outer * tanh(inner * s)


@triton.jit
def soften(s, m, l, scale, GUARD: tl.constexpr, FUSED: tl.constexpr = False):
    """One step of the softmax: probabilities, the factor of what was summed before, new maximum of the products, new sum. `scale` > 0 takes products to base 2.
    The maximum is subtracted before that: however large it is, the largest has P = 1, which no rounding changes. GUARD: a row may have seen nothing yet.
    FUSED: one instruction less for each score; the largest is 2^what rounding m * scale lost (`unfused`)."""
    new = tl.maximum(m, tl.max(s, 1))
    ref = new
    if GUARD:
        ref = tl.where(new == float("-inf"), 0.0, new)
    if FUSED:
        p = tl.math.exp2(tl.fma(s, scale, -(ref * scale)[:, None]))
    else:
        p = tl.math.exp2((s - ref[:, None]) * scale)
    a = tl.math.exp2((m - ref) * scale)
    return p, a, new, l * a + tl.sum(p, 1)


@triton.jit
def unfused(m, l, scale, KIND: tl.constexpr):
    """After `soften` with FUSED: (the sum as without, what sums of values are multiplied by to belong to it). Where one key decides, they hold its probability as KIND rounded it."""
    most = tl.where(l == 0, 1.0, tl.math.exp2(tl.fma(m, scale, -(m * scale))))
    held = l + (most.to(KIND).to(tl.float32) - most)
    return l / most, tl.where(l == 0, 1.0, l / held) / most


@triton.jit
def finish(m, l, scale, scale2, sinks, h, HAS_SINK: tl.constexpr):
    """(factor of the sums, natural logsumexp of the keys) from maximum and sum of `soften`, which ran with scale2 = scale * log2(e); a sink enlarges the
    denominator only. A NaN sum stays NaN."""
    none = l == 0
    lse = tl.where(none, float("-inf"), m * scale + tl.math.log2(tl.where(none, 1.0, l)) * 0.6931471805599453)
    if HAS_SINK:
        z = m * scale2
        sink = tl.load(sinks + h) * 1.4426950408889634
        top = tl.maximum(z, sink)
        most = tl.where(tl.abs(top) == float("inf"), 0.0, top)
        a = tl.where(none, 0.0, tl.math.exp2(z - most))
        total = l * a + tl.math.exp2(sink - most)
        factor = tl.where(sink == float("inf"), 0.0, tl.where(none, 0.0, a / total))
    else:
        factor = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, l))
    return factor, lse


@triton.jit
def rows_known(lse, delta, line, rows, ok, ROWS: tl.constexpr):
    """(lse, delta) of rows line + rows; lse +inf, hence P = 0, where a row sees no key, where its sink holds all and, if ROWS, where it is not ok."""
    at = tl.where(tl.arange(0, 2)[None, :] == 0, lse, delta) + line + rows[:, None]  # one load of both: one alone would be few enough for every thread to load all it uses
    if ROWS:
        logs, shift = tl.split(tl.load(at, mask=ok[:, None], other=0.0))
        return tl.where(ok & (tl.abs(logs) != float("inf")), logs, float("inf")), shift
    else:
        logs, shift = tl.split(tl.load(at))
        return tl.where(tl.abs(logs) != float("inf"), logs, float("inf")), shift


@triton.jit
def rebuilt(raw, grad, lse, delta, scale, inner, outer, CAP: tl.constexpr):
    """(P, dS less the scale) from the products raw = q.k and grad = dO.v; lse and delta broadcast against them."""
    if CAP:
        y = tanh(inner * raw)
        p = tl.math.exp2((outer * y - lse) * 1.4426950408889634)
        ds = p * (grad - delta) * (1.0 - y * y)
    else:
        p = tl.math.exp2((raw * scale - lse) * 1.4426950408889634)
        ds = p * (grad - delta)
    return p, ds
