"""Lists of blocks from a block mask, NumPy.

    mask [L,nq,nk] bool  ->  dict of the arrays of contract.Lists: offsets, cols, kinds, by_key_offsets, by_key_rows, by_key_kinds

Every kept block is full (kind -1). The arrays have the capacity of L * nq * nk entries and one more, as those made on a device do;
what stands past the last entry is 0 (-1 for kinds) and never read.
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


def compact(mask):
    """mask [L, n, m] -> offsets [L*n*2+1], entries and kinds [L*n*m+1]: the kept columns of every row, ascending."""
    L, n, m = mask.shape
    counts = mask.reshape(L * n, m).sum(axis=1)
    offsets = np.zeros(2 * L * n + 1, np.int32)
    offsets[1::2] = offsets[2::2] = np.cumsum(counts)                                 # full blocks, then no partial one
    entries = np.zeros(L * n * m + 1, np.int32)
    columns = np.nonzero(mask.reshape(L * n, m))[1]
    entries[:len(columns)] = columns
    return offsets, entries, np.full(L * n * m + 1, -1, np.int32)


def run(mask, *, place=None, config=None, block_q=None, block_k=None):
    mask = np.asarray(mask) != 0
    offsets, cols, kinds = compact(mask)
    by_key_offsets, by_key_rows, by_key_kinds = compact(mask.transpose(0, 2, 1))
    return {"offsets": offsets, "cols": cols, "kinds": kinds,
            "by_key_offsets": by_key_offsets, "by_key_rows": by_key_rows, "by_key_kinds": by_key_kinds}
