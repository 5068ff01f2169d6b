"""Selections: the keys of every query chosen by content, as lists of entries on the caller's device."""
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparsetile.backends import arrays
from sparsetile.ops import array_operators as xp
from sparsetile.ops.pattern import flag, shown
from sparsetile.ops.patterns import And, Causal, Pattern, integer


@dataclass(frozen=True, eq=False)
class Selection:
    """Entries [B,G,T,K] of every query, G in {1, Hk, Hq}.

    indices      int32 [B,G,T,K]; entry e >= 0 stands for keys e * granularity ... + granularity - 1. Entries below 0 or past the end mean nothing,
                 wherever they stand. An entry given twice counts twice (a selector of ours never gives one twice).
    granularity  keys per entry, >= 1
    lengths      int32 [B,G,T] or None: entries at or past it are not read (values outside 0..K are clamped)
    causal       keys past the query's position are not seen, inside an entry too
    restriction  a pattern that the call applies to the entries first, once positions are known; made by `selection & pattern`
    distinct     the caller's word that no query has an entry twice (then one may count once, or twice): a call may then run as blocks under a mask, where lists of few heads are long.
                 So says every selector of ours, but for Reformer's
    """
    indices: Any
    granularity: int = 1
    lengths: Any = None
    causal: bool = False
    restriction: Pattern | None = None
    distinct: bool = False

    def __post_init__(self):
        for name in ("indices", "lengths"):
            if isinstance(getattr(self, name), (list, tuple)):
                object.__setattr__(self, name, _from_lists(name, getattr(self, name)))
        object.__setattr__(self, "granularity", integer("Selection", "granularity", self.granularity, 1, most=2 ** 31 - 1))
        for name in ("causal", "distinct"):
            object.__setattr__(self, name, flag("Selection", name, getattr(self, name)))
        shape = _shape("indices", self.indices, 4, "[B,G,T,K]")
        if self.lengths is not None:
            got = _shape("lengths", self.lengths, 3, "[B,G,T]")
            if got != shape[:3]:
                raise ValueError(f"Selection: lengths must be [B,G,T] = {list(shape[:3])} as indices says, got {list(got)}; give one length per row of entries")
        if self.restriction is not None and not isinstance(self.restriction, Pattern):
            raise TypeError(f"Selection: restriction must be a Pattern or None, got {type(self.restriction).__name__}; write selection & pattern")

    def __repr__(self):
        more = "".join(f", {name}" for name, on in (("lengths", self.lengths is not None), ("causal", self.causal)) if on)
        tail = "" if self.restriction is None else f", restriction={self.restriction!r}"
        return f"Selection(indices {list(self.indices.shape)}, granularity={self.granularity}{more}{tail})"

    # ---- algebra
    def __and__(self, other):
        """The selection restricted further: `Causal()` becomes causal=True, anything else is applied to the entries by the call, before the kernel."""
        if not isinstance(other, Pattern):
            return NotImplemented
        parts = other.parts if isinstance(other, And) else (other,)
        causal = self.causal or Causal() in parts
        for part in parts:
            if part != Causal():
                other = part if self.restriction is None else self.restriction & part
                self = replace(self, restriction=other)
        return replace(self, causal=causal)

    __rand__ = __and__

    # ---- checks
    def check(self, B: int, Hq: int, Hk: int, T: int) -> None:
        """ValueError if it does not fit a call of these sizes."""
        got = tuple(int(n) for n in self.indices.shape)
        if got[0] != B or got[1] not in (1, Hk, Hq) or got[2] != T:
            raise ValueError(f"pattern.indices: expected [B,G,T,K] with B = {B}, G in {sorted({1, Hk, Hq})} and T = {T}, got {list(got)}; "
                             "select for the same queries that attend")
        if self.restriction is not None and self.restriction.heads is not None and (self.restriction.heads not in (Hq, Hk) or Hq % max(got[1], 1)):
            raise ValueError(f"pattern.restriction: expected one rule per query head (Hq = {Hq}) or per key head (Hk = {Hk}), got {self.restriction.heads}; list as many patterns")

    # ---- entries
    def to_tokens(self) -> "Selection":
        """The same keys as entries of granularity 1, [B,G,T,K * granularity], holes as -1; on the entries' device."""
        if self.granularity == 1:
            return self
        lib, g = xp.module(self.indices), self.granularity
        e = self._read()[..., None]
        last = (2 ** 31 - 1) // g  # an entry past it stands for keys that no array has
        keys = lib.where((e >= 0) & (e < last), e * g + xp.arange(e, g), -1)
        B, G, T, K = (int(n) for n in self.indices.shape)
        return replace(self, indices=xp.astype(keys.reshape(B, G, T, K * g), "int32"), granularity=1, lengths=None)

    def within(self, S: int) -> "Selection":
        """The same entries over S keys: one that reaches past the last key need reach no further."""
        return self if self.granularity <= max(S, 1) else replace(self, granularity=max(int(S), 1))

    def _read(self):
        """Entries with -1 where lengths end them."""
        if self.lengths is None:
            return self.indices
        lib = xp.module(self.indices)
        return lib.where(xp.arange(self.indices, int(self.indices.shape[3])) < self.lengths[..., None], self.indices, -1)

    def resolve(self, S: int, q_start=None, kv_length=None) -> "Selection":
        """Without `restriction`: granularity 1, entries that the pattern does not show replaced by -1. A pass over the entries on their device.

        q_start, kv_length  as sparse_attention takes them: an integer, or int32 [B] on the device; query t stands at q_start + t, q_start
        defaults to kv_length - T, and to S - T without lengths. A pattern with heads gives G = its heads (or the selection's, if more).
        """
        if self.restriction is None:
            return self
        flat = self.within(S).to_tokens()
        e, lib = flat._read(), xp.module(flat.indices)
        B, G, T, K = (int(n) for n in e.shape)
        start = q_start if q_start is not None else kv_length - T if kv_length is not None else S - T
        start = start.reshape(-1, 1, 1, 1) if getattr(start, "ndim", 0) else start
        p = xp.arange(e, T)[:, None] + start
        legal = (e >= 0) & (e < S)
        rule = self.restriction
        heads = max(G, rule.heads or 1)
        if rule.heads is not None and heads > 1:
            if heads % G or heads % rule.heads:
                raise ValueError(f"Selection: {G} lists of entries and a pattern of {rule.heads} heads do not fit; expected one to divide the other")
            rules, numbers = rule.rules(), rule.head_map()
            group = [numbers[h * rule.heads // heads] for h in range(heads)]
            rows = [h * G // heads for h in range(heads)]
            key = lib.where(legal, e, 0)
            seen = {(n, r): rules[n].visible(p if getattr(start, "ndim", 0) == 0 else p[:, 0], key[:, r], S) for n, r in set(zip(group, rows))}
            out = [lib.where(seen[n, r] & legal[:, r], e[:, r], -1) for n, r in zip(group, rows)]
            return replace(flat, indices=xp.astype(lib.stack(out, 1), "int32"), lengths=None, restriction=None)
        rule = rule.rules()[0]
        seen = rule.visible(p, lib.where(legal, e, 0), S) & legal
        return replace(flat, indices=xp.astype(lib.where(seen, e, -1), "int32"), lengths=None, restriction=None)

    # ---- the oracle
    def mask(self, T: int | None = None, S: int | None = None, q_start: int | None = None) -> np.ndarray:
        """Which keys are seen, NumPy booleans [B,G,T,S]; duplicates show once here though they count twice. T must be that of the indices."""
        return self.counts(T, S, q_start) > 0

    def counts(self, T: int | None = None, S: int | None = None, q_start: int | None = None) -> np.ndarray:
        """How often each key counts, NumPy int64 [B,G,T,S]. q_start defaults to S - T."""
        B, G, rows, K = (int(n) for n in self.indices.shape)
        if S is None or T not in (None, rows):
            raise ValueError(f"Selection: mask needs T = {rows} (the indices') and the number of keys S, got T {T} and S {S}")
        start = S - rows if q_start is None else q_start
        whole = replace(self, indices=xp.to_numpy(self.indices), lengths=None if self.lengths is None else xp.to_numpy(self.lengths)).resolve(S, start)
        entries = whole.within(S).to_tokens()._read()
        out = np.zeros((B, entries.shape[1], rows, S + 1), np.int64)
        legal = (entries >= 0) & (entries < S)
        if self.causal:
            legal &= entries <= start + np.arange(rows)[:, None]
        b, g, t, _ = np.indices(entries.shape)
        np.add.at(out, (b, g, t, np.where(legal, entries, S)), 1)
        return out[..., :S]


def _from_lists(name, values):
    try:
        array = np.asarray(values)
        if array.size and (array.dtype.kind not in "iu" or array.max() > 2 ** 31 - 1 or array.min() < -2 ** 31):
            raise ValueError
        return array.astype(np.int32)
    except ValueError:  # unequal lengths too
        raise ValueError(f"Selection: {name} must be int32 in nested lists of equal lengths, got {shown(values)}; pad with -1") from None


def _shape(name, array, axes, text):
    if arrays.framework(array) is None:
        raise TypeError(f"Selection: {name} must be an int32 array {text}, got {type(array).__name__}; give an array of the caller's framework")
    if len(array.shape) != axes:
        raise ValueError(f"Selection: {name} must be {text}, got shape {list(array.shape)}; add or merge axes")
    if arrays.dtype_name(array) != "int32":
        raise TypeError(f"Selection: {name} must be int32, got {array.dtype}; convert it, e.g. indices.to(torch.int32)")
    return tuple(int(n) for n in array.shape)
