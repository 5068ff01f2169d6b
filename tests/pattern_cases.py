"""Patterns for tests, and what they mean, pair by pair, from the definitions alone: no helper is shared with the code under test."""
import numpy as np
from hypothesis import strategies as st

from sparsetile.ops import patterns as pt


def sees(rule, p: int, s: int, S: int) -> bool:
    """Does the query at p see the key at s, from the contract's table."""
    name = type(rule).__name__
    if name == "Window":
        p, s = (p, s) if rule.block == 1 else (p // rule.block, s // rule.block)
        return (rule.left is None or p - rule.left <= s) and (rule.right is None or s <= p + rule.right)
    if name == "Dilated":
        return (rule.left is None or p - rule.left <= s) and (rule.right is None or s <= p + rule.right) and (p - s) % rule.step == 0
    if name == "Strided":
        return (p - s) % rule.stride == 0
    if name == "Compressed":
        return s * rule.stride + rule.block - 1 <= p
    if name == "Fixed":
        return s // rule.stride == p // rule.stride or s % rule.stride >= rule.stride - rule.summary
    if name == "Global":
        return s in rule.tokens or (rule.symmetric and p in rule.tokens)
    if name == "Sink":
        return s < rule.n
    if name == "Blocks":
        i, j = p // rule.block_q, s // rule.block_k
        return 0 <= i < rule.mask_bits.shape[0] and j < rule.mask_bits.shape[1] and bool(rule.mask_bits[i, j])
    if name == "Documents":
        start = 0
        for length in rule.lengths:
            if start <= p < start + length:
                return start <= s < start + length
            start += length
        return False
    if name == "RandomBlocks":
        return s // rule.block in drawn(rule, p // rule.block, S)
    if name == "And":
        return all(sees(part, p, s, S) for part in rule.parts)
    if name == "Or":
        return any(sees(part, p, s, S) for part in rule.parts)
    return not sees(rule.part, p, s, S)


def drawn(rule, i: int, S: int, known={}) -> set:
    """The blocks that RandomBlocks draws for query block i, one integer at a time."""
    if (rule, i, S) not in known:
        known[rule, i, S] = set(_draw(rule, i, S))
    return known[rule, i, S]


def _draw(rule, i, S):
    n = 0 if i < 0 else i + 1 if rule.causal else -(-S // rule.block)
    left = [j for j in range(n) if not _covered(rule, i, j, S)]
    for slot in range(rule.count):
        if not left:
            return
        key, place, following = _hash(rule.seed, i, slot), 0, 0
        while following < len(left):
            place = following
            key = (key * 2862933555777941757 + 1) % 2 ** 64
            following = ((place + 1) << 31) // ((key >> 33) + 1)
        yield left.pop(place)


def _covered(rule, i, j, S):
    b = rule.block
    pairs = [(p, s) for p in range(i * b, i * b + b) for s in range(j * b, j * b + b) if not rule.causal or s <= p]
    return bool(rule.exclude) and all(any(sees(part, p, s, S) for part in rule.exclude) for p, s in pairs)


def _mix(x):
    x = (x + 0x9E3779B97F4A7C15) % 2 ** 64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2 ** 64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2 ** 64
    return x ^ (x >> 31)


def _hash(seed, i, slot):
    return _mix(_mix(_mix(seed) ^ (i % 2 ** 64)) ^ slot)


def brute(rule, T: int, S: int, q_start: int | None = None) -> np.ndarray:
    """bool [T, S], or [heads, T, S]."""
    start = S - T if q_start is None else q_start
    if rule.heads is not None:
        return np.stack([brute(rule.rules()[n], T, S, q_start) for n in rule.head_map()])
    return np.array([[sees(rule, start + t, s, S) for s in range(S)] for t in range(T)], bool).reshape(T, S)


# ------------------------------------------------------------------------------------------------ strategies
_side = st.one_of(st.none(), st.integers(0, 6), st.integers(0, 200))


def _blocks(rows):
    return st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2 ** 25), st.integers(9, 70), st.integers(9, 70)).map(
        lambda x: pt.Blocks(np.unpackbits(np.frombuffer(np.int64(x[2]).tobytes(), np.uint8))[:x[0] * x[1]].reshape(x[0], x[1]).astype(bool), x[3], x[4]))


atoms = st.one_of(
    st.just(pt.Full()), st.just(pt.Causal()),
    st.builds(pt.Window, _side, _side), st.builds(pt.Window, _side, _side, st.integers(1, 70)),
    st.builds(pt.Dilated, _side, _side, st.integers(1, 9)), st.builds(pt.Strided, st.integers(1, 70)),
    st.builds(pt.Compressed, st.integers(1, 40), st.integers(1, 20)),
    st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda x: pt.Fixed(x[0], min(x))),
    st.builds(pt.Global, st.lists(st.integers(0, 260), max_size=12), st.booleans()), st.builds(lambda a, n: pt.Global(range(a, a + n)), st.integers(0, 90), st.integers(0, 90)),
    st.builds(pt.Sink, st.integers(0, 150)), st.builds(pt.Documents, st.lists(st.integers(0, 90), max_size=7)), _blocks(None),
    st.builds(pt.RandomBlocks, st.integers(0, 4), st.integers(8, 70), st.integers(0, 99), st.booleans(), st.sampled_from([(), (pt.Window(1, 1, block=9), pt.Sink(40)), (pt.Global([3]),)])),
)
rules = st.recursive(atoms, lambda inner: st.one_of(st.builds(lambda a, b: a & b, inner, inner), st.builds(lambda a, b: a | b, inner, inner), inner.map(lambda a: ~a)), max_leaves=4)
# What the permuted parts are for: patterns finer than a block, alone and in company.
fine = st.builds(
    lambda a, b, c: (a | b) & c,
    st.one_of(st.builds(pt.Strided, st.integers(2, 40)), st.builds(pt.Dilated, _side, _side, st.integers(2, 9)), st.builds(pt.Fixed, st.integers(8, 40), st.integers(0, 3)),
              st.builds(pt.Global, st.lists(st.integers(0, 260), max_size=12), st.booleans())),
    st.sampled_from([~pt.Full(), pt.Window(20), pt.Window(5, 5), pt.Strided(7), pt.Sink(3), pt.Documents([100, 50, 90])]),
    st.sampled_from([pt.Full(), pt.Causal(), pt.Documents([100, 150]), ~pt.Sink(4), pt.Window(150, 150)]))
sizes = st.tuples(st.sampled_from([0, 1, 7, 33, 64, 130, 200]), st.sampled_from([0, 1, 31, 64, 100, 257]), st.sampled_from([None, None, 0, -50, 60]))
