"""Exact counts without a mask: pairs by refinement of rectangles, layers to full reach on a graph of bits."""
import numpy as np

from sparsetile.ops import packed, regions

_LEAF = (64, 64)  # rectangles of these sides are looked at pair by pair
_FAN = 4
_TOP = 1024   # rectangles of the first step
_SHORT = 2 ** 20  # positions that are asked one by one


def pairs(rule, first_pos: int, last_pos: int, S: int) -> int:
    """Pairs (p, s) with first_pos <= p < last_pos, 0 <= s < S that the rule (without heads) shows.

    Rectangles are halved twice until they are full, empty or of 64 x 64; equal ones (same signature) are followed once and multiplied, so regular
    patterns cost next to nothing at any length. Packed sequences are new with every batch and seldom regular: their positions are asked for their intervals.
    """
    rule, total = regions.plain(rule), 0
    if packed.applies(rule) and max(last_pos - first_pos, packed.extent(rule)) <= _SHORT:
        lo, hi = packed.intervals(rule, np.arange(first_pos, last_pos))
        return int(np.maximum(np.minimum(hi, S) - lo, 0).sum())
    for tiles, times, states in _refined(rule, first_pos, last_pos, S, _LEAF):
        area = (tiles.p_hi - tiles.p_lo + 1) * (tiles.s_hi - tiles.s_lo + 1) * times
        total += int(area[states == 2].sum())
        if tiles.size == _LEAF:
            part = states == 1
            total += _looked_at(rule, tiles.p0[part], tiles.s0[part], times[part], first_pos, last_pos, S)
    return total


def blocks(rule, first_pos: int, last_pos: int, S: int, block_q: int, block_k: int) -> int:
    """How many blocks of this size (aligned to positions) cannot be seen to be empty: what plain lists would keep, but for blocks found empty pair by pair."""
    rule, total = regions.plain(rule), 0
    for tiles, times, states in _refined(rule, first_pos, last_pos, S, (block_q, block_k)):
        whole = states == 2 if tiles.size != (block_q, block_k) else states > 0
        each = (tiles.p_hi // block_q - tiles.p_lo // block_q + 1) * (tiles.s_hi // block_k - tiles.s_lo // block_k + 1)
        total += int((each * times)[whole].sum())
    return total


def _refined(rule, first_pos, last_pos, S, leaf):
    """(tiles, how often each stands for one, states) from coarse to fine: full and empty ones are settled, equal ones are followed once."""
    if last_pos <= first_pos or S <= 0:
        return
    rows, cols = leaf
    while -(-(last_pos - first_pos) // rows) * -(-S // cols) > _TOP:
        rows, cols = rows * _FAN, cols * _FAN
    p0 = np.arange(first_pos // rows, -(-last_pos // rows), dtype=np.int64) * rows
    s0 = np.arange(0, -(-S // cols), dtype=np.int64) * cols
    p0, s0 = np.repeat(p0, len(s0)), np.tile(s0, len(p0))
    times = np.ones(len(p0), np.int64)
    while len(p0):
        tiles = regions.Tiles(p0, s0, np.maximum(p0, first_pos), np.minimum(p0 + rows, last_pos) - 1, s0, np.minimum(s0 + cols, S) - 1, S, (rows, cols), span=(first_pos, last_pos))
        states = regions.state(rule, tiles)
        last = (rows, cols) == leaf
        part = np.flatnonzero(states == 1)
        example, group = regions.group(regions.signature(rule, tiles.take(part)), len(part))
        if last:
            settled = np.flatnonzero(states == 2)
            pick = np.concatenate((settled, part[example]))
            yield tiles.take(pick), np.concatenate((times[settled], _sums(group, times[part], len(example)))), states[pick]
            return
        yield tiles, times, states
        p0, s0, times = p0[part[example]], s0[part[example]], _sums(group, times[part], len(example))
        rows, cols = rows // _FAN, cols // _FAN
        p0 = np.broadcast_to((p0[:, None] + np.arange(_FAN) * rows)[:, :, None], (len(p0), _FAN, _FAN)).reshape(-1)
        s0 = np.broadcast_to((s0[:, None] + np.arange(_FAN) * cols)[:, None, :], (len(s0), _FAN, _FAN)).reshape(-1)
        times = np.repeat(times, _FAN * _FAN)
        inside = (p0 < last_pos) & (p0 + rows > first_pos) & (s0 < S)
        p0, s0, times = p0[inside], s0[inside], times[inside]


def _sums(group, times, n):
    out = np.zeros(n, np.int64)
    np.add.at(out, group, times)  # exact, where bincount with weights would go through float64
    return out


def _looked_at(rule, p0, s0, times, first_pos, last_pos, S):
    total, side = 0, np.arange(_LEAF[0])
    for a in range(0, len(p0), 256):
        p, s = (p0[a:a + 256, None] + side)[:, :, None], (s0[a:a + 256, None] + side)[:, None, :]
        seen = rule._see(p, s, S) & (p >= first_pos) & (p < last_pos) & (s < S)
        total += int((seen.sum((1, 2)) * times[a:a + 256]).sum())
    return total


# ------------------------------------------------------------------------------------------------ reach
def hops(pattern, T: int) -> int | None:
    """See Pattern.hops. Reach after 2^k layers by squaring, then the least number by bisection; sets of positions are bits in 64-bit words."""
    if T == 1:
        return 0
    edges = np.eye(T, dtype=bool)
    for rule in pattern.rules():
        edges |= rule.mask(T, T)
    goal = np.ones((T, T), bool)
    if not np.triu(edges, 1).any():
        goal = np.tril(goal)
    goal = _words(goal)
    powers = [_words(edges)]
    while not np.array_equal(powers[-1], goal):
        powers.append(_compose(powers[-1], powers[-1]))
        if np.array_equal(powers[-1], powers[-2]):
            return None
    if len(powers) == 1:
        return 1
    reach, layers = powers[-2], 2 ** (len(powers) - 2)
    for k in range(len(powers) - 3, -1, -1):
        further = _compose(reach, powers[k])
        if not np.array_equal(further, goal):
            reach, layers = further, layers + 2 ** k
    return layers + 1


def hops_in_order(layers, causal: bool, T: int) -> int | None:
    """How many of these layers, [T,T] booleans in their order, until every position has heard of every other (causal: of every earlier one); None if they do not suffice."""
    goal = _words(np.tri(T, dtype=bool) if causal else np.ones((T, T), bool))
    reach = _words(np.eye(T, dtype=bool))
    if np.array_equal(reach, goal):
        return 0
    for n, edges in enumerate(layers, 1):
        reach = _compose(_words(edges), reach)
        if np.array_equal(reach, goal):
            return n
    return None


def _words(mask):
    padded = np.zeros((mask.shape[0], -(-mask.shape[1] // 64) * 64), bool)
    padded[:, :mask.shape[1]] = mask
    return np.packbits(padded, axis=1, bitorder="little").view("<u8")


def _compose(left, right):
    """Boolean product of bit matrices, eight columns of `left` at a time through a table of the 256 unions of eight rows of `right`."""
    out = np.zeros_like(left)
    columns = np.ascontiguousarray(left.view(np.uint8).T)  # [T / 8, T]
    table = np.zeros((256, right.shape[1]), np.uint64)
    for n in range(-(-right.shape[0] // 8)):
        users = np.flatnonzero(columns[n])
        if not len(users):
            continue
        for bit, row in enumerate(right[8 * n:8 * n + 8]):
            np.bitwise_or(table[:1 << bit], row, out=table[1 << bit:2 << bit])
        for bit in range(len(right[8 * n:8 * n + 8]), 8):
            table[1 << bit:2 << bit] = table[:1 << bit]
        out[users] |= table[columns[n][users]]
    return out
