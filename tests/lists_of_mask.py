"""Block lists of an arbitrary boolean mask, the slow and obvious way: an independent maker of kernels' inputs for tests."""
import numpy as np
from sparsetile.backends.contract import Lists


def lists_of_mask(mask, block_q, block_k, put, *, first=0, q_order=None, k_order=None, list_of=None, bitmaps="mixed") -> Lists:
    """mask [L, nq * block_q, nk * block_k] over the (ordered) rows from first * block_q and keys. bitmaps: "always", or only where no interval does."""
    L, nq, nk = mask.shape[0], mask.shape[1] // block_q, mask.shape[2] // block_k
    blocks = mask.reshape(L, nq, block_q, nk, block_k).swapaxes(2, 3)
    intervals, words = [np.zeros((block_q, 2), np.int32)], [np.zeros((block_q, block_k // 32), np.uint32)]
    kinds = np.full((L, nq, nk), -2, np.int32)  # -2: not kept
    for l, i, j in np.argwhere(blocks.any((-1, -2))):
        block = blocks[l, i, j]
        if block.all():
            kinds[l, i, j] = -1
            continue
        low, high = block.argmax(1), block_k - block[:, ::-1].argmax(1)
        low, high = np.where(block.any(1), low, 0), np.where(block.any(1), high, 0)
        if bitmaps != "always" and (high - low == block.sum(1)).all():
            kinds[l, i, j] = 2 * len(intervals)
            intervals.append(np.stack((low, high), 1).astype(np.int32))
        else:
            kinds[l, i, j] = 2 * len(words) + 1
            words.append(np.packbits(block, axis=1, bitorder="little").view(np.uint32).reshape(block_q, -1))

    def pack(table):  # [L, n, m] -> offsets, others, kinds
        offsets, other, kind = [], [], []
        for l in range(L):
            for row in table[l]:
                for part in (row == -1, row >= 0):
                    offsets.append(len(other))
                    other += list(np.flatnonzero(part))
                    kind += list(row[part])
        offsets.append(len(other))
        return [put(np.asarray(x, np.int32)) for x in (offsets, other + [0], kind + [-1])]

    order = lambda x: None if x is None else put(np.asarray(x, np.int32))  # noqa: E731
    return Lists(block_q, block_k, first, nq, nk, *pack(kinds), *pack(kinds.swapaxes(1, 2)), put(np.stack(intervals)), put(np.stack(words).view(np.int32)),
                 put(np.zeros((1, 1), np.int32) if list_of is None else np.asarray(list_of, np.int32)), order(q_order), order(k_order),
                 has_intervals=len(intervals) > 1, has_bitmaps=len(words) > 1, longest=nk)
