"""The tables of distinct partial blocks, and the lists by query block and by key block, from a plain enumeration of the blocks kept."""
import numpy as np

from sparsetile.backends.contract import Lists


class Table:
    """Pictures of partial blocks [block_q, block_k]: one interval of keys per row where that suffices, a bitmap otherwise. Equal ones are kept once."""

    def __init__(self, block_q: int, block_k: int):
        self.block_q, self.block_k = block_q, block_k
        self.intervals, self.bitmaps, self.known = [], [], {}

    def add(self, seen: np.ndarray) -> np.ndarray:
        """Kinds of the pictures `seen` bool [n, block_q, block_k]: 2m row m of the intervals, 2m + 1 row m of the bitmaps."""
        kinds = np.empty(len(seen), np.int64)
        count = seen.sum(2, dtype=np.int32)
        lo = seen.argmax(2).astype(np.int32)
        hi = np.where(count > 0, self.block_k - seen[:, :, ::-1].argmax(2), 0).astype(np.int32)
        lo[count == 0] = 0
        one = (hi - lo == count).all(1)
        for n in range(len(seen)):
            picture = np.stack([lo[n], hi[n]], 1) if one[n] else bits(seen[n])
            kinds[n] = self._number(picture, 0 if one[n] else 1)
        return kinds

    def _number(self, picture, odd):
        key = (odd, picture.tobytes())
        if key not in self.known:
            store = self.bitmaps if odd else self.intervals
            self.known[key] = 2 * len(store) + odd
            store.append(picture)
        return self.known[key]

    def add_intervals(self, intervals: np.ndarray) -> np.ndarray:
        """Kinds of pictures given as intervals int32 [n, block_q, 2]."""
        return np.fromiter((self._number(picture, 0) for picture in intervals), np.int64, len(intervals))

    def arrays(self):
        """intervals [n, block_q, 2] and bitmaps [m, block_q, block_k / 32]; at least one row each, so that a kernel may always read one."""
        intervals = np.stack(self.intervals) if self.intervals else np.zeros((1, self.block_q, 2), np.int32)
        bitmaps = np.stack(self.bitmaps) if self.bitmaps else np.zeros((1, self.block_q, self.block_k // 32), np.int32)
        return intervals.astype(np.int32, copy=False), bitmaps


def bits(seen: np.ndarray) -> np.ndarray:
    """bool [..., n * 32] as int32 words: bit c % 32 of word c // 32."""
    return np.packbits(seen, axis=-1, bitorder="little").view("<i4").astype(np.int32, copy=False)


def assemble(found, rows, keys, table: Table, list_of) -> Lists:
    """Lists from one (row block, key block, kind) enumeration per list, in any order."""
    number = np.concatenate([np.full(len(qi), n, np.int64) for n, (qi, _, _) in enumerate(found)])
    qi, kj, kinds = (np.concatenate([entry[n] for entry in found]).astype(np.int64) for n in range(3))
    offsets, cols, by_row = _sorted(number * rows.n + qi, kj, kinds, len(found) * rows.n)
    by_key_offsets, by_key_rows, by_key = _sorted(number * keys.n + kj, qi, kinds, len(found) * keys.n)
    intervals, bitmaps = table.arrays()
    q_order = None if rows.order is None else rows.order.astype(np.int32)
    k_order = None if keys.order is None else keys.order.astype(np.int32)
    nq = rows.n
    if rows.tail is not None:  # one list: row blocks without entries are appended
        nq += -(-len(rows.tail) // rows.block)
        q_order = np.full(nq * rows.block, -1, np.int32)
        q_order[:len(rows.order)], q_order[len(rows.order):len(rows.order) + len(rows.tail)] = rows.order, rows.tail
        offsets = np.concatenate((offsets, np.full(2 * (nq - rows.n), offsets[-1], np.int32)))
    longest = max(int((o[2::2] - o[:-2:2]).max(initial=0)) for o in (offsets, by_key_offsets))
    return Lists(
        block_q=rows.block, block_k=keys.block, first=0 if q_order is not None else rows.first, nq=nq, nk=keys.n, offsets=offsets, cols=cols, kinds=by_row,
        by_key_offsets=by_key_offsets, by_key_rows=by_key_rows, by_key_kinds=by_key, intervals=intervals, bitmaps=bitmaps,
        list_of=np.ascontiguousarray(list_of, np.int32), q_order=q_order, k_order=k_order,
        has_intervals=bool(table.intervals), has_bitmaps=bool(table.bitmaps), longest=longest)


def _sorted(major, minor, kinds, n):
    """Entries by (major, partial, minor): offsets [2n + 1], minor, kinds, each of the last two with one readable element more."""
    width = int(minor.max(initial=0)) + 1
    bucket = major * 2 + (kinds >= 0)
    order = np.argsort(bucket * width + minor, kind="stable")
    offsets = np.zeros(2 * n + 1, np.int32)
    np.cumsum(np.bincount(bucket, minlength=2 * n), out=offsets[1:])
    return offsets, _with_end(minor[order]), _with_end(kinds[order])


def _with_end(values):
    out = np.zeros(len(values) + 1, np.int32)
    out[:-1] = values
    return out
