"""Keys in pages, scattered at random: pools and a table for kernels that read through it, with garbage wherever nobody may look."""
import numpy as np

GARBAGE = np.array([-1, -2 ** 31, 2 ** 31 - 1, 99999], np.int32)


def scatter(arrays, lengths, page, rng, holes=()):
    """arrays [B,H,S,W] -> (pools [N,H,page,W] whose rows lie at one step, table [B,pages]). What lies past lengths [B], or in a page of `holes` (b, number), is in no pool;
    rows of the pools that hold no key are NaN, and table entries that name no page are garbage."""
    B, _, S, _ = arrays[0].shape
    pages = -(-S // page)
    table = np.resize(GARBAGE, (B, pages))
    wanted = [(b, n) for b in range(B) for n in range(pages) if n * page < lengths[b] and (b, n) not in holes]
    table[tuple(np.array(wanted, int).reshape(-1, 2).T)] = rng.permutation(len(wanted) + 2)[:len(wanted)]
    pools = []
    for x in arrays:
        pool = np.full((len(wanted) + 2, page, x.shape[1], x.shape[3]), np.nan).astype(x.dtype)
        for b, n in wanted:
            rows = x[b, :, n * page:min((n + 1) * page, lengths[b])]
            pool[table[b, n], :rows.shape[1]] = rows.swapaxes(0, 1)
        pools.append(pool.swapaxes(1, 2))
    return pools, table


def there(lengths, S, page, holes=()):
    """[B,S]: which keys exist."""
    found = np.arange(S) < np.asarray(lengths)[:, None]
    for b, n in holes:
        found[b, n * page:(n + 1) * page] = False
    return found
