"""In which order the items of an ordered sum walk their rows: the Hopper backward's additions to dQ. NumPy only, on the host, once for a static layout.

    offsets [2 L nk + 1], rows [entries]: lists by key (contract.Lists)   ->   place [entries] int32: where in its key block's walk an entry stands

Any walk is right, and none can deadlock: a sum's order is that of tickets (block_attention_backward_hopper.cu). A walk only decides who waits how long. Rows from the last to the
first, the kernel's own way, suit windows and causal patterns; where key blocks see rows at random, items that are under way meet at rows in the wrong order all the time.
"""
import heapq

import numpy as np

MOST = 2 ** 16  # entries: about ten microseconds each


def freest_first(offsets: np.ndarray, rows: np.ndarray, nk: int, under_way: int) -> np.ndarray:
    """Walks by list scheduling: `under_way` items of a head at a time, a query tile each in one unit of time; an item takes the row that is free soonest, of several the one that
    somebody else wants soonest."""
    place, following, nq = np.zeros(len(rows), np.int32), np.full(len(rows), nk), int(rows.max(initial=0)) + 1
    for first in range(0, (len(offsets) - 1) // 2, nk):
        blocks = [slice(offsets[2 * x], offsets[2 * x + 2]) for x in range(first, first + nk)]
        last = np.full(nq, nk)
        for j in reversed(range(nk)):  # the key block that comes to an entry's row next
            following[blocks[j]], last[rows[blocks[j]]] = last[rows[blocks[j]]], j
        free, ready = [0.0] * under_way, np.zeros(nq)  # when a block of threads, a row is
        for block in blocks:
            now, mine, wanted = heapq.heappop(free) + 0.5, rows[block], following[block]
            soonest = ready[mine]
            for n in range(len(mine)):
                at = np.maximum(soonest, now)
                those = np.flatnonzero(at == at.min())
                e = those[wanted[those].argmin()]
                now = at[e] + 1
                place[block.start + e], ready[mine[e]], soonest[e] = n, now + 0.5, np.inf  # half a tile until the next sees that it is its turn
            heapq.heappush(free, now)
    return place
