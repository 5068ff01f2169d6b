"""Lists made where the data lies: NumPy, PyTorch, CuPy and JAX operators, sizes fixed by the shapes, no host round trip, CUDA-graph safe.

A grid `kinds` [L, nq, nk] says of every block -2 absent, -1 full, or a row of a table (contract.Lists); the kernel `layout`, or running sums, turn it into lists. Capacities are
upper bounds, so arrays are longer than what the offsets speak of; nothing past the last offset is read.
"""
import numpy as np

from sparsetile.backends import devices, places
from sparsetile.backends.contract import Lists, Problem
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks, dispatch
from sparsetile.ops.ready import transformed


def lists(kinds, block_q: int, block_k: int, lead: tuple, intervals=None, bitmaps=None, first: int = 0, op: str = "layout", backend: str | None = None) -> Lists:
    """Lists of a grid kinds [L, nq, nk]; `lead` is the shape of list_of, whose entries number the grid's lists in order. `op` asks, for `backend`."""
    L, nq, nk = kinds.shape
    made = _by_kernel(kinds, op, backend)
    if made is None:
        names = "offsets", "cols", "kinds", "by_key_offsets", "by_key_rows", "by_key_kinds"
        made = dict(zip(names, (*_compact(kinds), *_compact(xp.module(kinds).swapaxes(kinds, 1, 2)))))
    no_intervals, no_bitmaps = intervals is None, bitmaps is None
    return Lists(
        block_q=block_q, block_k=block_k, first=first, nq=nq, nk=nk, **made,
        intervals=xp.full(kinds, (1, block_q, 2), 0) if no_intervals else intervals,
        bitmaps=xp.full(kinds, (1, block_q, block_k // 32), 0) if no_bitmaps else bitmaps,
        list_of=xp.arange(kinds, L).reshape(lead), has_intervals=not no_intervals, has_bitmaps=not no_bitmaps, longest=max(nq, nk))


def kernel_of(shape: tuple, device: int | None, op: str, backend: str | None) -> dispatch.Choice | None:
    """Who turns a grid of this shape into lists, which an explanation tells; None: operators do."""
    problem = Problem.of("layout", dict(zip(("B", "T", "S"), shape)), dict(mask="int32"), devices.device_info(device).arch)
    choice = dispatch.find(op, problem, device, backend)
    return choice and dispatch.before(op, problem, device, choice.backend)


def _by_kernel(kinds, op, backend):
    """The arrays of both lists by name, or None where no backend that may run has the kernel, or the grid's values are not there: while a framework traces."""
    if xp.kind(kinds) not in ("torch", "cupy") or not _has_memory(kinds):
        return None
    caller, device = checks.together({"mask": kinds})
    choice = kernel_of(kinds.shape, device, op, backend)
    if choice is None:
        return None
    place = places.place_for(dispatch.package(choice.backend).NATIVE, caller, device)
    with place.guard():
        return {name: place.give(x) for name, x in choice.kernel.run(place.native(kinds), place=place, config=choice.config).items()}


def _has_memory(x) -> bool:
    if xp.kind(x) != "torch":
        return True
    import torch
    return type(x) is torch.Tensor and not (torch.compiler.is_compiling() or transformed(torch) or x.is_meta)


def _compact(kinds):
    """Grid [L, n, m] to offsets [2 L n + 1], entries [L n m + 1], kinds of entries: full ones first, each half ascending."""
    lib = xp.module(kinds)
    L, n, m = kinds.shape
    kinds = kinds.reshape(L * n, m)
    full, part = xp.astype(kinds == -1, "int32"), xp.astype(kinds >= 0, "int32")
    counts = lib.stack([xp.total(full, 1), xp.total(part, 1)], 1).reshape(-1)
    offsets = lib.concatenate([xp.full(kinds, (1,), 0), xp.running(counts, 0)])
    starts = offsets[:-1].reshape(L * n, 2)
    place = lib.where(full > 0, starts[:, :1] + xp.running(full, 1) - 1, lib.where(part > 0, starts[:, 1:] + xp.running(part, 1) - 1, -1))
    size = L * n * m + 1
    return offsets, xp.scatter(size, place, lib.broadcast_to(xp.arange(kinds, m), place.shape)), xp.scatter(size, place, kinds)


# ------------------------------------------------------------------------------------------------ packed sequences
def documents(ends, total: int, block_q: int, block_k: int, causal: bool) -> Lists:
    """Documents(lengths), and & Causal(), over positions 0 .. total - 1; ends int32 [n], ascending. Tables hold intervals only."""
    lib = xp.module(ends)
    n, nq = int(ends.shape[0]), -(-total // block_q)
    p = xp.arange(ends, nq * block_q)
    if n:
        document = xp.astype(lib.searchsorted(ends, p, side="right"), "int32")
        inside = (document < n) & (p < total)
        which = lib.where(inside, document, 0)
        hi = ends[_index(which)]
        lo = lib.where(which > 0, ends[_index(lib.where(which > 0, which - 1, 0))], 0)
        hi = lib.where(hi < total, hi, total)  # a document that runs past the end
    else:
        inside, lo, hi = p < 0, p, p
    if causal:
        hi = lib.where(hi < p + 1, hi, p + 1)
    return _rows_of_intervals(lib.where(inside, lo, 0), lib.where(inside, hi, 0), p < total, total, block_q, block_k, documents=n)


def _index(x):
    return x.long() if xp.kind(x) == "torch" else x


def _rows_of_intervals(lo, hi, exists, S: int, block_q: int, block_k: int, documents: int) -> Lists:
    """Every query sees keys lo <= s < hi (lo = hi: none), and the keys that the rows of a block see are one run."""
    lib = xp.module(lo)
    nq, nk = int(lo.shape[0]) // block_q, -(-S // block_k)
    left = xp.arange(lo, nk) * block_k
    right = lib.where(left + block_k < S, left + block_k, S)
    sees = (hi > lo).reshape(nq, block_q)
    lo_rows, hi_rows = lo.reshape(nq, block_q), hi.reshape(nq, block_q)
    far = S + block_k
    if nq and nk:
        first, last = xp.lowest(lib.where(sees, lo_rows, far), 1), xp.highest(lib.where(sees, hi_rows, -1), 1)
        alive = exists.reshape(nq, block_q)
        low_end, high_start = xp.lowest(lib.where(alive, hi_rows, far), 1), xp.highest(lib.where(alive, lo_rows, -1), 1)
        some = (first[:, None] < right) & (last[:, None] > left)
        full = some & (high_start[:, None] <= left) & (low_end[:, None] >= right)
    else:
        some = full = xp.full(lo, (nq, nk), 0) > 0
    part = some & ~full
    # A picture differs from its left neighbour's only where a row's interval starts or ends in this block or in that one.
    block = xp.arange(lo, nq * block_q) // block_q
    edge = xp.full(lo, (nq * nk,), 0)
    for x in (lo, hi):
        at = x // block_k
        edge = edge | xp.scatter(nq * nk, lib.where((hi > lo) & (at < nk), block * nk + at, -1), xp.full(lo, (), 1))
    edge = edge.reshape(nq, nk) > 0
    before = lambda x, fill: lib.concatenate([xp.full(lo, (nq, 1), fill) > 0, x[:, :-1]], 1) if nk else x  # noqa: E731
    new = part & (edge | before(edge, 1) | ~before(part, 0))
    number = xp.running(xp.astype(new, "int32").reshape(-1), 0).reshape(nq, nk) - 1
    # Each (row block, document) pair has at most two edges, causal rows add those of the diagonal; an edge makes two new pictures, a run one.
    capacity = min(nq * nk, 4 * (nq + documents) + 2 * nq * (block_q // block_k + 2)) or 1
    slot = lib.where(new, number, -1)
    where = xp.scatter(capacity, slot, xp.arange(lo, nq * nk).reshape(nq, nk)) if nq and nk else xp.full(lo, (capacity,), 0)
    if nq and nk:
        i, start = _index(where // nk), (where % nk * block_k)[:, None]
        clip = lambda x: lib.where(x < start, start, lib.where(x > start + block_k, start + block_k, x)) - start  # noqa: E731
        low, high = clip(lo_rows[i]), clip(hi_rows[i])
        intervals = lib.stack([lib.where(high > low, low, 0), lib.where(high > low, high, 0)], 2)
        intervals = xp.astype(intervals, "int32")
    else:
        intervals = xp.full(lo, (1, block_q, 2), 0)
    kinds = lib.where(full, -1, lib.where(part, 2 * number, -2))
    return lists(xp.astype(kinds, "int32")[None], block_q, block_k, (1, 1), intervals=intervals)


# ------------------------------------------------------------------------------------------------ globals of every sample
def global_tokens(tokens, T: int, S: int, block_q: int, block_k: int, window, causal: bool) -> Lists:
    """Window(*window) | Global(tokens[b]), and & Causal(), for tokens [B, n] padded with -1; queries at S - T .. S - 1.

    Pictures: those of the band, shared by all blocks at one distance; one per key block with global keys; one per row block with global
    rows; the blocks where these meet have their own. All are bitmaps, since the host does not know which are runs.
    """
    lib = xp.module(tokens)
    B, n = int(tokens.shape[0]), int(tokens.shape[1])
    start = S - T
    first = start // block_q if T else 0
    nq, nk = (-(-S // block_q) - first if T else 0), -(-S // block_k)
    tokens = xp.astype(tokens, "int32")
    at, rows, keys = xp.arange(tokens, B)[:, None], nq * block_q, nk * block_k
    legal = (tokens >= 0) & (tokens < S)
    is_key = xp.scatter(B * keys, lib.where(legal, at * keys + tokens, -1), xp.full(tokens, (), 1)).reshape(B, nk, block_k)
    row = tokens - first * block_q
    is_row = xp.scatter(B * rows, lib.where(legal & (row >= 0) & (row < rows), at * rows + row, -1), xp.full(tokens, (), 1)).reshape(B, nq, block_q)
    if not (B and nq and nk):
        return lists(xp.full(tokens, (B, nq, nk), -2), block_q, block_k, (B, 1), first=first)
    band, shared, mixed = _band(nq, nk, first, start, S, block_q, block_k, window, causal)
    state, distance, allowed = (xp.constant(x, tokens) for x in band)                        # each [nq, nk]
    row_at, key_at = xp.arange(tokens, rows).reshape(nq, block_q) + first * block_q, xp.arange(tokens, keys).reshape(nk, block_k)
    row_there, key_there = (row_at >= start) & (row_at < S), key_at < S
    some_rows, some_keys = xp.highest(is_row, 2) > 0, xp.highest(is_key, 2) > 0             # [B, nq], [B, nk]
    all_rows = xp.lowest(lib.where(row_there, is_row, 1), 2) > 0
    all_keys = xp.lowest(lib.where(key_there, is_key, 1), 2) > 0
    touched = some_rows[:, :, None] | some_keys[:, None, :]
    whole = (all_rows[:, :, None] | all_keys[:, None, :]) & (allowed == 2)
    full = (state == 2) | whole
    some = (state > 0) | (touched & (allowed > 0))
    part = some & ~full
    # rows of the table: shared band pictures, then per (b, key block), then per (b, row block), then the mixed ones
    plain_band = part & ~touched
    free = (state == 0) & (allowed == 2)
    by_key = part & free & some_keys[:, None, :] & ~some_rows[:, :, None]
    by_row = part & free & some_rows[:, :, None] & ~some_keys[:, None, :]
    own = part & ~plain_band & ~by_key & ~by_row
    base_key, base_row = shared, shared + B * nk
    base_own = base_row + B * nq
    room = B * min(nq * nk, min(n, nq) * min(n, nk) + mixed) or 1
    number = xp.running(xp.astype(own, "int32").reshape(-1), 0).reshape(B, nq, nk) - 1
    b_q, b_k = at[:, :, None] * nq + xp.arange(tokens, nq)[:, None], at[:, :, None] * nk + xp.arange(tokens, nk)
    m = lib.where(plain_band, distance, lib.where(by_key, base_key + b_k, lib.where(by_row, base_row + b_q, base_own + number)))
    where = xp.scatter(room, lib.where(own, number, -1), xp.arange(tokens, B * nq * nk).reshape(B, nq, nk))
    b, i, j = _index(where // (nq * nk)), _index(where // nk % nq), _index(where % nk)
    p, s = row_at[i][:, :, None], key_at[j][:, None, :]
    seen = (is_row[b, i] > 0)[:, :, None] | (is_key[b, j] > 0)[:, None, :]
    if window is not None:
        seen = seen | ((p - s <= window[0]) & (s - p <= window[1]))
    seen = seen & (s <= p) if causal else seen
    one_row = lambda x: lib.broadcast_to(x, (len(x), block_q, block_k))  # noqa: E731
    bitmaps = lib.concatenate([
        xp.constant(_band_pictures(band, shared, first, block_q, block_k, window, causal), tokens),
        _bits(one_row((is_key.reshape(B * nk, 1, block_k) > 0))), _bits(one_row((is_row.reshape(B * nq, block_q, 1) > 0))), _bits(seen)])
    kinds = lib.where(full, -1, lib.where(part, 2 * m + 1, -2))
    return lists(xp.astype(kinds, "int32"), block_q, block_k, (B, 1), bitmaps=bitmaps, first=first)


def _band(nq, nk, first, start, S, block_q, block_k, window, causal):
    """Host: state of the band and of causality per block (0, 1, 2), the number of its shared picture, how many blocks may need pictures of their own."""
    p0 = (first + np.arange(nq))[:, None] * block_q
    s0 = np.arange(nk)[None, :] * block_k
    p_lo, p_hi = np.maximum(p0, start), np.minimum(p0 + block_q, S) - 1
    s_lo, s_hi = s0, np.minimum(s0 + block_k, S) - 1
    far, near = p_hi - s_lo, p_lo - s_hi
    allowed = ((near >= 0) * 2 + ((far >= 0) & (near < 0)) if causal else np.full((nq, nk), 2)).astype(np.int32)
    state = np.zeros((nq, nk), np.int32)
    if window is not None:
        left, right = window[0], 0 if causal else window[1]
        full, some = (far <= left) & (near >= -right), (near <= left) & (far >= -right)
        state = (full.astype(np.int32) + some).astype(np.int32)
    open_ = state == 1
    distances = np.unique((p0 - s0)[open_])
    number = np.searchsorted(distances, p0 - s0).astype(np.int32) * open_
    edge = open_ | (allowed == 1)
    return (state, number, allowed), max(len(distances), 1), int(edge.sum())


def _band_pictures(band, shared, first, block_q, block_k, window, causal):
    """Host: bitmaps [shared, block_q, block_k / 32] of the band's partial blocks, one per distance of origins."""
    state, number, _ = band
    out = np.zeros((shared, block_q, block_k // 32), np.int32)
    i, j = np.nonzero(state == 1)
    for m, example in zip(*np.unique(number[i, j], return_index=True)) if len(i) else ():
        d = (first + i[example]) * block_q - j[example] * block_k + np.arange(block_q)[:, None] - np.arange(block_k)
        seen = (d <= window[0]) & (d >= -window[1]) & ((d >= 0) | (not causal))
        out[m] = np.packbits(seen, axis=1, bitorder="little").view(np.int32)
    return out


def _bits(seen):
    """bool [n, block_q, block_k] to int32 words, bit c % 32 of word c // 32; the sum of distinct powers wraps into the sign bit."""
    n, block_q, block_k = seen.shape
    words = xp.astype(seen, "int32").reshape(n, block_q, block_k // 32, 32) << xp.arange(seen, 32)
    return xp.total(words, 3)
