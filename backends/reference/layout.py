"""Lists of blocks from a block mask, NumPy.

    mask [L,nq,nk] bool or uint8 (kept blocks are full), or int32 kinds (-2 absent, -1 full, else a row of a table)  ->  dict of the arrays of contract.Lists:
    offsets, cols, kinds, by_key_offsets, by_key_rows, by_key_kinds

Full blocks first, each half ascending. The arrays have the capacity of L * nq * nk entries and one more, as those made on a device do; what stands past the last entry is 0 (-1 for
kinds) and never read.
"""
import numpy as np

from sparsetile.backends.contract import Resources

TUNABLES = ()


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def compact(grid):
    """Kinds [L, n, m] -> offsets [L*n*2+1], entries and kinds [L*n*m+1]: the kept columns of every row."""
    L, n, m = grid.shape
    offsets, entries, kinds = np.zeros(2 * L * n + 1, np.int32), np.zeros(L * n * m + 1, np.int32), np.full(L * n * m + 1, -1, np.int32)
    at = 0
    for x, row in enumerate(grid.reshape(L * n, m)):
        for half, columns in enumerate((np.flatnonzero(row == -1), np.flatnonzero(row >= 0))):
            entries[at:at + len(columns)], kinds[at:at + len(columns)] = columns, row[columns]
            at += len(columns)
            offsets[2 * x + half + 1] = at
    return offsets, entries, kinds


def run(mask, *, place=None, config=None):
    grid = mask if mask.dtype == np.int32 else np.where(mask != 0, -1, -2)
    offsets, cols, kinds = compact(grid)
    by_key_offsets, by_key_rows, by_key_kinds = compact(grid.transpose(0, 2, 1))
    return {"offsets": offsets, "cols": cols, "kinds": kinds,
            "by_key_offsets": by_key_offsets, "by_key_rows": by_key_rows, "by_key_kinds": by_key_kinds}
