"""contract.Lists from dense masks, one block at a time: an independent way to them, for tests of kernels and of layouts."""
import numpy as np

from sparsetile.backends.contract import Lists


def pack(rows):
    """[block_q, block_k] booleans -> [block_q, block_k / 32] int32, bit c % 32 of word c / 32."""
    return np.packbits(rows, axis=1, bitorder="little").view(np.int32)


def intervals_of(rows):
    """[block_q, 2] (lo, hi) if every row is one run of keys, else None."""
    pairs = np.zeros((len(rows), 2), np.int32)
    for r, row in enumerate(rows):
        keys = np.flatnonzero(row)
        if len(keys):
            pairs[r] = keys[0], keys[-1] + 1
            if keys[-1] + 1 - keys[0] != len(keys):
                return None
    return pairs


def build(mask, p0, block_q, block_k, *, q_order=None, k_order=None, list_of=None, bitmaps=False, full=True):
    """mask [L,P,S]: row r is the query at position p0 + r. Orders map slots to positions (p0 = 0 then). bitmaps: never intervals; full: full blocks as such."""
    L, P, S = mask.shape
    if q_order is None:
        first, nq = p0 // block_q, -(-(p0 + P) // block_q) - p0 // block_q
        rows = np.arange(first * block_q, (first + nq) * block_q) - p0
        rows = np.where((rows < 0) | (rows >= P), -1, rows)
    else:
        first, nq, rows = 0, len(q_order) // block_q, np.asarray(q_order)
    nk = -(-S // block_k) if k_order is None else len(k_order) // block_k
    keys = np.arange(nk * block_k) if k_order is None else np.asarray(k_order)
    keys = np.where(keys >= S, -1, keys)
    table_i, table_b, known = [], [], {}

    def kind_of(block, real):
        if full and (block | ~real).all():
            return -1
        key = block.tobytes()
        if key not in known:
            pairs = None if bitmaps else intervals_of(block)
            if pairs is not None:
                table_i.append(pairs)
                known[key] = 2 * len(table_i) - 2
            else:
                table_b.append(pack(block))
                known[key] = 2 * len(table_b) - 1
        return known[key]

    kinds = np.full((L, nq, nk), -2, np.int64)  # -2: not kept
    for l in range(L):
        for i in range(nq):
            for j in range(nk):
                r, c = rows[i * block_q:(i + 1) * block_q], keys[j * block_k:(j + 1) * block_k]
                real = (r >= 0)[:, None] & (c >= 0)
                block = mask[l][np.ix_(np.maximum(r, 0), np.maximum(c, 0))] & real
                if block.any():
                    kinds[l, i, j] = kind_of(block, real)

    def listed(kinds):
        offsets, entries, names = [0], [], []
        for row in kinds.reshape(-1, kinds.shape[-1]):
            for chosen in (np.flatnonzero(row == -1), np.flatnonzero(row >= 0)):
                entries.extend(chosen)
                names.extend(row[chosen])
                offsets.append(len(entries))
        longest = max((b - a for a, b in zip(offsets[::2], offsets[2::2])), default=0)
        return np.array(offsets, np.int32), np.array([*entries, 0], np.int32), np.array([*names, -1], np.int32), longest

    offsets, cols, names, longest = listed(kinds)
    by_key_offsets, by_key_rows, by_key_kinds, longest_by_key = listed(kinds.swapaxes(1, 2))
    return Lists(block_q, block_k, first, nq, nk, offsets, cols, names, by_key_offsets, by_key_rows, by_key_kinds,
                 np.array(table_i, np.int32).reshape(-1, block_q, 2), np.array(table_b, np.int32).reshape(-1, block_q, block_k // 32),
                 np.zeros((1, 1), np.int32) if list_of is None else np.asarray(list_of, np.int32),
                 None if q_order is None else np.asarray(q_order, np.int32), None if k_order is None else np.asarray(k_order, np.int32),
                 bool(table_i), bool(table_b), max(longest, longest_by_key))
