"""What forward and backward do around their products: rows into panels, keys into scratch, masks into words, and where the seen keys begin and end.

A tile is one block of queries, cut into `panels` of PANEL rows; a chunk is CHUNK keys of a block. Words are int32 [panels, WORDS, PANEL]; `spans` holds
for each panel, then for all together, WORDS unions and WORDS intersections of its lanes' words, int64 each.
"""
from sparsetile.backends.numba.convert import F32_CODE, fill_zero
from sparsetile.backends.numba.far import far
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.job import job_at, key_of, row_word
from sparsetile.backends.numba.rows import load_row, load_rows, store_rows
from sparsetile.backends.numba.simd import LANES, get_f32, get_i64, highest_bit, lowest_bit, put_f32, put_i32, put_i64, transpose_tile
from sparsetile.backends.numba.tiles import PANEL, STEP, interleave, interval_words, times, word_common, word_union

CHUNK = 64  # keys at a time: their rows of K and V stay in the nearest cache
WORDS = CHUNK // 32 + 1  # one more, always 0: register tiles may reach three keys past the chunk
EVERY = 0xFFFFFFFF


def up(x: int, step: int) -> int:
    return -(-x // step) * step


@kernel
def run_of(rows, r, T):
    """How many rows of a panel from row r on follow each other in one head, or are all -1."""
    t, n = get_i64(rows, r), 1
    most = PANEL - r if t < 0 else min(PANEL - r, T - t % T)
    while n < most and get_i64(rows, r + n) == (t + n if t >= 0 else -1):
        n += 1
    return n


@far("iiiiiiiidiiii")
def load_panel(base, head_step, step, T, code, width, padded, rows, sign, flat, flat_step, panel, both):
    """PANEL rows of a tensor, times sign -> float32 flat [PANEL, padded], and transposed: panel [padded, PANEL]. both = 0: flat is scratch.
    rows: their numbers t, or T more for each head after the first; -1: zeros."""
    r, t = 0, get_i64(rows, 0)
    if both == 0 and code == F32_CODE and width == padded and sign == 1 and t >= 0 and run_of(rows, 0, T) == PANEL:  # read in place
        r, flat, flat_step = PANEL, base + t // T * head_step + t % T * step, step
    while r < PANEL:
        t, count = get_i64(rows, r), run_of(rows, r, T)
        if t >= 0:
            load_rows(code, base + t // T * head_step + t % T * step, step, count, width, padded, flat + r * flat_step, flat_step)
        for n in range(r, r + count):
            if t < 0:
                fill_zero(flat + n * flat_step, padded)
            elif sign != 1:
                times(flat + n * flat_step, padded, sign)
        r += count
    for r in range(0, PANEL, LANES):
        for d in range(0, padded, LANES):
            transpose_tile(flat + r * flat_step + 4 * d, flat_step, panel + 4 * (d * PANEL + r), STEP)


@far("iiiiiiiiii")
def store_panel(panel, padded, flat, rows, base, head_step, step, T, code, width):
    """panel [padded, PANEL] -> the rows of a tensor that `rows` names as in load_panel. flat: scratch, [PANEL, padded]."""
    t, to, to_step = get_i64(rows, 0), flat, 4 * padded
    direct = code == F32_CODE and width == padded and t >= 0 and run_of(rows, 0, T) == PANEL
    if direct:
        to, to_step = base + t // T * head_step + t % T * step, step
    for r in range(0, PANEL, LANES):
        for d in range(0, padded, LANES):
            transpose_tile(panel + STEP * d + 4 * r, STEP, to + to_step * r + 4 * d, to_step)
    r = PANEL if direct else 0
    while r < PANEL:
        t, count = get_i64(rows, r), run_of(rows, r, T)
        if t >= 0:
            store_rows(code, flat + 4 * padded * r, 4 * padded, count, width, base + t // T * head_step + t % T * step, step)
        r += count


@far("iiiii", "i")
def number_rows(rows, panels, T, heads, packed):
    """Queries of a tile for one head at `rows` -> for `heads` heads that see the same keys, T added for each head; packed (which several heads must be): first, -1 after them. Behind the rows:
    how many there are in each panel, a 0 for each panel, and which row of the block each is. Returns how many there are."""
    slots, real = panels * PANEL, 0
    block_rows = rows + 8 * panels * (PANEL + 2)
    for r in range(slots):
        t = get_i64(rows, r)
        at = real if packed != 0 else r
        put_i64(block_rows, r, r)
        if t >= 0:
            put_i64(rows, at, t)
            put_i64(block_rows, at, r)
            real += 1
    if packed != 0:
        for n in range(real, slots):
            g = n // real if real > 0 else heads
            put_i64(rows, n, g * T + get_i64(rows, n % real) if g < heads else -1)
            if g < heads:
                put_i64(block_rows, n, get_i64(block_rows, n % real))
    for p in range(panels):
        there = 0
        for n in range(PANEL):
            if get_i64(rows, p * PANEL + n) >= 0:
                there += 1
        put_i64(rows, slots + p, there)
        put_i64(rows, slots + panels + p, 0)
    return real * heads


@far("iiiiiiiiiiiii")
def load_keys(jobs, base, step, code, width, padded, slot, count, limit, union, scratch, row, table):
    """Keys slot .. slot + count - 1 -> float32 rows of scratch [.., padded]; zeros for those that do not exist or are not in `union`. row: where the first stands if all follow it, else -1."""
    job = job_at(jobs)
    low, high, dense = span_of(union)
    if dense and job.k_order == 0 and row >= 0:
        fill_zero(scratch, low * padded)
        load_rows(code, base + (row + low) * step, step, high - low, width, padded, scratch + 4 * low * padded, 4 * padded)
        fill_zero(scratch + 4 * high * padded, (count - high) * padded)
        return
    for c in range(count):
        s = key_of(job, slot + c, limit, table) if (get_i64(union, c >> 5) >> (c & 31)) & 1 else -1
        if s < 0:
            fill_zero(scratch + 4 * c * padded, padded)
        else:
            load_row(code, base + s * step, width, scratch + 4 * c * padded, padded)


@far("iiiiiiii")
def scale_keys(jobs, scales, slot, count, limit, union, scratch, padded):
    """Rows that `load_keys` left, times the scale of their 128 keys."""
    job = job_at(jobs)
    for c in range(count):
        s = key_of(job, slot + c, limit, 0) if (get_i64(union, c >> 5) >> (c & 31)) & 1 else -1
        if s >= 0:
            factor, row = get_f32(scales, s >> 7), scratch + 4 * c * padded
            times(row, padded & -LANES, factor)
            for d in range(padded & -LANES, padded):
                put_f32(row, d, get_f32(row, d) * factor)


@far("iiiiii")
def scale_queries(scales, rows, panel, padded, flat, flat_step):
    """A panel as `load_panel` left it, transposed and (flat_step not 0) as rows, times the scales of its queries."""
    for n in range(PANEL):
        t = get_i64(rows, n)
        if t >= 0:
            for d in range(padded):
                put_f32(panel, d * PANEL + n, get_f32(panel, d * PANEL + n) * get_f32(scales, t))
            if flat_step != 0:
                times(flat + n * flat_step, padded, get_f32(scales, t))


@far("iiiiiii")
def load_pairs(jobs, base, slot, limit, union, scratch, room):
    """Values of a chunk as pairs of keys 2 j, 2 j + 1 of bfloat16 -> scratch [.., width] words; zeros for those that do not exist or are not in `union`. room: a chunk's raw rows."""
    job = job_at(jobs)
    low, high, dense = span_of(union)
    source, step, count = base + slot * job.v_t, job.v_t, (high + 1) & ~1
    if not dense or low > 0 or count > high:
        load_keys(jobs, base, step, 0, job.Dv >> 1, job.width >> 1, slot, count, limit, union, room, slot, 0)
        source, step = room, 2 * job.width
    interleave(source, step, count >> 1, job.Dv, scratch, job.width)


@far("iiiiiiiiiii")
def chunk_words(jobs, kind, slot, first, count, limit, rows, panels, words, spans, table):
    """Masks of a chunk, keys slot .. slot + count - 1, which are first .. of their block. rows: as `number_rows` leaves them. table: pages that may have holes, or 0."""
    job = job_at(jobs)
    block_rows = rows + 8 * panels * (PANEL + 2)
    total = spans + 16 * WORDS * panels
    for w in range(WORDS):
        there = 0
        if 32 * w < count:
            there = (1 << min(max(limit - slot - 32 * w, 0), 32)) - 1
            if job.k_order != 0 or (table != 0 and there != 0):
                there = 0
                for c in range(32):
                    if 32 * w + c < count and key_of(job, slot + 32 * w + c, limit, table) >= 0:
                        there |= 1 << c
        union = 0
        for p in range(panels):
            lanes, span, last = words + 4 * PANEL * (p * WORDS + w), spans + 16 * WORDS * p, (p + 1) * PANEL - 1
            # Intervals, and rows of the first head with none left out: as they lie in the table.
            if kind >= 0 and kind & 1 == 0 and 0 <= get_i64(rows, last) < job.T and get_i64(block_rows, last) == last:
                interval_words(job.intervals + 8 * ((kind >> 1) * job.block_q + p * PANEL), 32 * ((first >> 5) + w), there, rows + 8 * p * PANEL, lanes)
            else:
                for n in range(PANEL):
                    word = 0
                    if there != 0 and get_i64(rows, p * PANEL + n) >= 0:
                        word = there if kind < 0 else there & row_word(job, kind, get_i64(block_rows, p * PANEL + n), (first >> 5) + w)
                    put_i32(lanes, n, word)
            put_i64(span, w, word_union(lanes))
            put_i64(span, WORDS + w, word_common(lanes))
            union |= get_i64(span, w)
        put_i64(total, w, union)
        put_i64(total, WORDS + w, union)


@kernel
def whole(spans, panels, count):
    """Spans of a chunk that all rows see."""
    for p in range(panels + 1):
        for w in range(2 * WORDS):
            put_i64(spans + 16 * WORDS * p, w, EVERY if 32 * (w % WORDS) < count else 0)


@kernel
def span_of(span):
    """First and last + 1 of the keys in a union (0, 0: none), and whether all lanes see all between."""
    low, high, dense = 0, 0, True
    for w in range(WORDS):
        union = get_i64(span, w)
        if union != 0:
            first, last = lowest_bit(union), highest_bit(union)
            dense = dense and get_i64(span, WORDS + w) == union and union >> first == (1 << (last + 1 - first)) - 1 and (high == 0 or high == 32 * w + first)
            if high == 0:
                low = 32 * w + first
            high = 32 * w + last + 1
    return low, high, dense
