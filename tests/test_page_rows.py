"""Rows of a cache's pool: a selection's keys found through the page table, on every backend, against the contract's words in a loop."""
import numpy as np
import paged_keys
import pytest
from drivers import EVERY
from numeric import assert_same_bits, to_numpy

import sparsetile as st


def rows_of(entries, table, lengths, page, pool, counts, granularity, causal, starts):
    """starts: position of query 0, one for each sequence, or None: at the end of its keys."""
    B, G, T, K = entries.shape
    rows, pages = np.full((B, G, T, K * granularity), -1, np.int64), table.shape[1]
    for b, g, t, slot in np.ndindex(rows.shape):
        held = min(max(int(lengths[b]), 0), pages * page)
        key, at = int(entries[b, g, t, slot // granularity]) * granularity + slot % granularity, t + (held - T if starts is None else int(starts[b]))
        if slot // granularity < (K if counts is None else counts[b, g, t]) and 0 <= key < held and (key <= at or not causal) and 0 <= table[b, key // page] < pool:
            rows[b, g, t, slot] = table[b, key // page] * page + key % page
    assert (rows >= 0).any() and (rows < 0).any()
    return rows.astype(np.int32)


CASES = [  # granularity, causal, position of query 0, page size, lengths of lists
    (1, False, None, 6, True), (1, True, None, 64, False), (4, True, 17, 5, True), (3, True, "device", 1, True), (2, False, 3, 3, False)]


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_selections(on, backend, case, rng):
    """Garbage among the entries, holes in the table, lengths of sequences and of lists that are out of range; an entry of -1 stands for no key of any granularity."""
    granularity, causal, start, page, counted = case
    B, G, T, K, pages, pool = 3, 1, 2, 13, 8, 29
    table, entries = rng.permutation(B * pages).reshape(B, pages).astype(np.int32), rng.integers(0, pages * page // granularity + 2, (B, G, T, K)).astype(np.int32)
    table[1, 3], table[2, 0], entries[..., ::3] = -5, 2 ** 31 - 1, np.resize(paged_keys.GARBAGE, entries[..., ::3].shape)
    lengths, counts = np.array([pages * page + 9, pages * page - 3, -2], np.int32), rng.integers(-3, K + 3, (B, G, T)).astype(np.int32) if counted else None
    starts = np.array([5, 2 ** 31 - 1, -9], np.int32) if start == "device" else start
    cache = st.PagedKV(*(on.put(np.zeros((pool, page, 1, 2), np.float32)) for _ in range(2)), on.put(table), on.put(lengths))
    selection = st.Selection(on.put(entries), granularity, None if counts is None else on.put(counts), causal)
    got = cache.select(selection, cache.lengths, on.put(starts) if start == "device" else start, T, backend)
    assert (got.granularity, got.lengths, got.causal) == (1, None, False)
    assert_same_bits("rows", to_numpy(got.indices), rows_of(entries, table, lengths, page, pool, counts, granularity, causal, None if start is None else np.resize(starts, B)))
