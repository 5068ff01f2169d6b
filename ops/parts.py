"""Patterns finer than a block, as parts with permuted axes that make them dense blocks.

The rule is written as a union of terms. A term with Strided(m) or Dilated(.., m) sorts queries and keys by residue modulo m: in that order it is a dense
band or triangle per residue. A term with the summary columns of Fixed, or with global keys, keeps those keys alone, side by side; one with global
queries puts them first. What has none of these stays in plain order. Each part leaves out the pairs of the parts before it, so the pairs are disjoint.
Sparse Transformer (arXiv:1904.10509, section 5.5) computes strided attention by the same transposition.
"""
import numpy as np

from sparsetile.ops import patterns as pt
from sparsetile.ops.axes import Ordered, Plain
from sparsetile.ops.counting import blocks
from sparsetile.ops.regions import Columns, Rows

_TERMS = 24   # a rule of more terms stays in plain order
_GAIN = 1.25  # parts are merged afterwards: they have to keep so many times fewer blocks
_SIDE = 2     # classes side by side, which no copy engine addresses, have to keep so many times fewer blocks than classes in blocks of their own


def is_fine(rule) -> bool:
    """Whether a permutation may help: some atom is finer than a block. `rule` is plain (ops/regions.py)."""
    if isinstance(rule, (pt.Strided, Columns)) or isinstance(rule, pt.Dilated) and rule.step > 1 or isinstance(rule, pt.Global) and len(rule.runs) > 1:
        return True
    return any(is_fine(part) for part in (rule.parts if isinstance(rule, (pt.And, pt.Or)) else ()))


def parts(rule, first_pos: int, last_pos: int, S: int, block_q: int, block_k: int, build):
    """The Lists of the best split, made by build(rule, rows, keys, given), or None where plain order keeps about as few blocks."""
    if first_pos < 0 or last_pos <= first_pos or S <= 0 or not is_fine(rule):  # an order cannot hold positions below 0: -1 is a hole
        return None
    terms = _terms(rule)
    if terms is None:
        return None
    most, best = blocks(rule, first_pos, last_pos, S, block_q, block_k) / _GAIN, None
    tried = set()
    for compact_globals in (False, True):
        for padded in (True, False):
            groups = _groups(terms, compact_globals)
            key = (tuple(groups), padded or not any(kind == "residue" for kind, _ in groups))
            if set(groups) == {("plain", None)} or key in tried:
                continue
            tried.add(key)
            made, kept, before, limit = [], 0, [], most if padded or best is None else most / _SIDE
            for (kind, what), group in groups.items():
                mine = pt.union(pt.intersection(term) for term in group)
                axes = _axes(kind, what, first_pos, last_pos, S, block_q, block_k, padded)
                if axes[0].n and axes[1].n:
                    made.append(build(mine & ~pt.union(before) if before else mine, *axes))
                    kept += int(made[-1].offsets[-1])
                before.append(mine)
                if kept >= limit:
                    break
            if kept < limit:
                most, best = kept, tuple(part for part in made if part.offsets[-1]) or tuple(made[:1])
    return best


def _terms(rule):
    """The rule as a list of intersections (tuples of rules without & and |), or None if there are too many."""
    if isinstance(rule, pt.Or):
        found = [_terms(part) for part in rule.parts]
        return None if None in found or sum(map(len, found)) > _TERMS else [term for terms in found for term in terms]
    if isinstance(rule, pt.And):
        out = [()]
        for part in rule.parts:
            terms = _terms(part)
            if terms is None or len(out) * len(terms) > _TERMS:
                return None
            out = [a + b for a in out for b in terms]
        return out
    return [(rule,)]


def _groups(terms, compact_globals: bool) -> dict:
    """(kind, what) -> terms; the plain group first, then in order of appearance."""
    groups = {("plain", None): []}
    for term in terms:
        groups.setdefault(_method(term, compact_globals), []).append(term)
    return {method: group for method, group in groups.items() if group}


def _method(term, compact_globals):
    for atom in term:
        if isinstance(atom, pt.Strided) and atom.stride > 1:
            return "residue", atom.stride
        if isinstance(atom, pt.Dilated) and atom.step > 1:
            return "residue", atom.step
    for atom in term:
        if isinstance(atom, Columns) or compact_globals and isinstance(atom, pt.Global):
            return "keys", atom
        if compact_globals and isinstance(atom, Rows):
            return "rows", atom
    return "plain", None


def _axes(kind, what, first_pos, last_pos, S, block_q, block_k, padded):
    """(rows, keys, states that the order itself decides) of one part."""
    if kind == "residue":
        return (_by_residue(np.arange(first_pos, last_pos), what, block_q, padded), _by_residue(np.arange(S), what, block_k, padded), {})
    rows, keys = Plain(first_pos, last_pos, block_q), Plain(0, S, block_k)
    if kind == "keys":
        s = np.arange(S)
        rows.order = np.where(rows.exists(np.arange(rows.n)), rows.positions(np.arange(rows.n)), -1).reshape(-1)
        return rows, Ordered(s[what._see(np.int64(0), s, S)], block_k), {what: 2}
    if kind == "rows":
        p = np.arange(first_pos, last_pos)
        mine = what._see(p, np.int64(0), S)
        return Ordered(p[mine], block_q, tail=p[~mine]), keys, {what: 2}
    return rows, keys, {}


def _by_residue(positions, modulus, block, padded):
    """Positions sorted by residue; padded: each residue class starts a block of its own, unless classes are shorter than half a block."""
    order = positions[np.argsort(positions % modulus, kind="stable")]
    if padded and len(positions) * 2 >= modulus * block:
        classes = np.split(order, np.flatnonzero(np.diff(order % modulus)) + 1)
        order = np.concatenate([np.concatenate((c, np.full(-len(c) % block, -1))) for c in classes])
    return Ordered(order, block, modulus)
