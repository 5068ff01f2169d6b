"""From a pattern to the lists that kernels read, analytically: cost follows the blocks kept, never T x S.

Rectangles are refined from coarse to fine; what a rule leaves empty is dropped at the coarsest size that shows it (ops/regions.py). The blocks that
stay partial are grouped by signature, one example of each group is looked at pair by pair, and its picture becomes a row of the table.
"""
import numpy as np

from sparsetile.backends.contract import Lists
from sparsetile.ops import packed, regions
from sparsetile.ops.axes import Ordered, Plain
from sparsetile.ops.parts import parts
from sparsetile.ops.patterns import Pattern
from sparsetile.ops.tables import Table, assemble

_FAN = 8          # blocks along each side of the next coarser rectangle
_TOP = 4096       # rectangles looked at in the first step
_STRIPE = 2 ** 17  # finest rectangles looked at at once: bounds the temporaries to a few MB


def lower(pattern: Pattern, first_pos: int, last_pos: int, S: int, block_q: int = 128, block_k: int = 128, Hq: int | None = None) -> tuple[Lists, ...]:
    """The parts of a layout: disjoint sets of pairs, whose union is what the pattern shows for first_pos <= p < last_pos and 0 <= s < S.

    pattern    a Pattern; with heads, Hq says for how many query heads (a multiple of the pattern's heads; the pattern's own number if None)
    first_pos, last_pos   any integers, negative ones too (p < 0 exists when T > S)
    block_q, block_k      block_k a multiple of 32

    Usually one part. Patterns finer than a block give several, each with a permutation, where that keeps fewer blocks. Every part's q_order
    holds every position first_pos <= p < last_pos once. Arrays are NumPy int32. Rows outside the range and keys past S stand for nothing.
    """
    if block_k % 32 or block_k <= 0 or block_q <= 0:
        raise ValueError(f"lower: block_q must be positive and block_k a positive multiple of 32, got {block_q} and {block_k}; use e.g. 128 and 128")
    if last_pos < first_pos or S < 0:
        raise ValueError(f"lower: expected first_pos <= last_pos and S >= 0, got {first_pos}, {last_pos} and S {S}")
    if pattern.heads is not None:
        heads = pattern.heads if Hq is None else Hq
        if heads % pattern.heads:
            raise ValueError(f"pattern: it has {pattern.heads} heads, which must divide the {heads} query heads; give one pattern per query head or per key head")
        list_of = np.asarray([[pattern.head_map()[h * pattern.heads // heads] for h in range(heads)]], np.int32)
        return (_plain(pattern.rules(), first_pos, last_pos, S, block_q, block_k, list_of),)
    one = np.zeros((1, 1), np.int32)
    split = parts(regions.plain(pattern), first_pos, last_pos, S, block_q, block_k, lambda rule, rows, keys, given: build((rule,), rows, keys, S, one, given))
    return split or (_plain((pattern,), first_pos, last_pos, S, block_q, block_k, one),)


def _plain(rules, first_pos, last_pos, S, block_q, block_k, list_of) -> Lists:
    rows, keys = Plain(first_pos, last_pos, block_q), Plain(0, S, block_k)
    if len(rules) == 1 and rows.n and keys.n and packed.applies(rules[0]):
        return packed.build(rules[0], rows, keys, S, list_of)
    return build(rules, rows, keys, S, list_of)


def build(rules, rows, keys, S: int, list_of, given=None) -> Lists:
    """Lists of one part: a list per rule over the same two axes."""
    table = Table(rows.block, keys.block)
    found = []
    for rule in rules:
        rule = regions.plain(rule)
        qi, kj, full, columns = kept(rule, rows, keys, S, given or {})
        kinds = np.full(len(qi), -1, np.int64)
        partial = np.flatnonzero(~full)
        example, group = regions.group(columns, len(partial))
        kinds[partial] = look(rule, rows, keys, S, qi[partial[example]], kj[partial[example]], table)[group]
        stays = kinds >= -1
        found.append((qi[stays], kj[stays], kinds[stays]))
    return assemble(found, rows, keys, table, list_of)


# ------------------------------------------------------------------------------------------------ which blocks stay
def kept(rule, rows, keys, S, given):
    """Blocks that are not seen to be empty: (row block, key block, full?, signature columns of the partial ones)."""
    level = 0
    while -(-rows.n // _FAN ** level) * -(-keys.n // _FAN ** level) > _TOP:
        level += 1
    fan = _FAN ** level
    n_q, n_k = -(-rows.n // fan), -(-keys.n // fan)
    qi, kj = np.repeat(np.arange(n_q), n_k), np.tile(np.arange(n_k), n_q)
    while fan > 1:
        spans = rows.spans(fan), keys.spans(fan)
        stay = np.concatenate([_states(rule, spans, qi[a:a + _STRIPE], kj[a:a + _STRIPE], rows, keys, S, fan, given)[0] > 0
                               for a in range(0, len(qi), _STRIPE)] or [np.zeros(0, bool)])
        qi, kj = qi[stay], kj[stay]
        fan //= _FAN
        if fan == 1:
            break
        qi, kj = _children(qi, kj, -(-rows.n // fan), -(-keys.n // fan))
    found = []
    spans, shapes = (rows.spans(1), keys.spans(1)), (rows.shapes(), keys.shapes())
    stripe = max(1, _STRIPE // _FAN ** 2) if level else len(qi) or 1
    for a in range(0, len(qi), stripe):
        i, j = qi[a:a + stripe], kj[a:a + stripe]
        if level:
            i, j = _children(i, j, rows.n, keys.n)
        states, tiles = _states(rule, spans, i, j, rows, keys, S, 1, given)
        stay = np.flatnonzero(states)
        partial = np.flatnonzero(states == 1)
        columns = [shape[at] for shape, at in zip(shapes, (i[partial], j[partial]))] + regions.signature(rule, tiles.take(partial))
        found.append((i[stay].astype(np.int32), j[stay].astype(np.int32), states[stay] == 2, columns))
    if not found:
        none = np.zeros(0, np.int32)
        return none, none, np.zeros(0, bool), []
    qi, kj, full = (np.concatenate([part[n] for part in found]) for n in range(3))
    return qi, kj, full, _stacked([part[3] for part in found])


def _children(qi, kj, n_q, n_k):
    step = np.arange(_FAN)
    qi = np.broadcast_to((qi[:, None] * _FAN + step)[:, :, None], (len(qi), _FAN, _FAN)).reshape(-1)
    kj = np.broadcast_to((kj[:, None] * _FAN + step)[:, None, :], (len(kj), _FAN, _FAN)).reshape(-1)
    inside = (qi < n_q) & (kj < n_k)
    return qi[inside], kj[inside]


def _states(rule, spans, i, j, rows, keys, S, fan, given):
    (p0, p_lo, p_hi, pr_lo, pr_hi), (s0, s_lo, s_hi, sr_lo, sr_hi) = spans
    residues = (pr_lo[i], pr_hi[i], sr_lo[j], sr_hi[j]) if pr_lo is not None and sr_lo is not None else ()
    size = rows.block * fan, keys.block * fan
    tiles = regions.Tiles(p0[i], s0[j], p_lo[i], p_hi[i], s_lo[j], s_hi[j], S, size, rows.modulus, residues, dict(given),
                          ordered=isinstance(rows, Ordered) or isinstance(keys, Ordered), span=rows.span)
    there = (tiles.p_lo <= tiles.p_hi) & (tiles.s_lo <= tiles.s_hi)
    states = regions.state(rule, tiles)
    return (states if there.all() else states * there), tiles


def _stacked(chunks):
    """Signature columns of several stripes as one: equal rows stay equal, different rows stay different."""
    if len(chunks) == 1:
        return chunks[0]
    width = max(len(chunk) for chunk in chunks)
    sizes = [len(chunk[0]) for chunk in chunks]
    return [np.concatenate([chunk[n] if n < len(chunk) else np.zeros(size, np.int64) for chunk, size in zip(chunks, sizes)]) for n in range(width)]



# ------------------------------------------------------------------------------------------------ what the partial ones hold
def look(rule, rows, keys, S, i, j, table: Table | None) -> np.ndarray:
    """Kinds of blocks (i, j) after looking at every pair of them: -1 full, -2 empty, else a row of the table (0 without a table)."""
    kinds = np.empty(len(i), np.int64)
    step = max(1, 2 ** 20 // (rows.block * keys.block))
    for a in range(0, len(i), step):
        b = slice(a, a + step)
        p, s = rows.positions(i[b]).astype(np.int32)[:, :, None], keys.positions(j[b]).astype(np.int32)[:, None, :]
        there = rows.exists(i[b])[:, :, None] & keys.exists(j[b])[:, None, :]
        seen = rule._see(p, s, S) & there
        kinds[b] = np.where((seen == there).all((1, 2)), -1, np.where(seen.any((1, 2)), 0, -2))
        if table is None:
            continue
        mixed = np.flatnonzero(kinds[b] == 0)
        kinds[a + mixed] = table.add(seen[mixed])
    return kinds


def kept_exactly(pattern, rows, keys, S):
    """(row block, key block) of the blocks every pair of which is seen."""
    rule = regions.plain(pattern)
    qi, kj, full, columns = kept(rule, rows, keys, S, {})
    partial = np.flatnonzero(~full)
    example, group = regions.group(columns, len(partial))
    full[partial] = (look(rule, rows, keys, S, qi[partial[example]], kj[partial[example]], None) == -1)[group]
    return qi[full], kj[full]
