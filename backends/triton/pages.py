"""Keys behind a page table: key s of a sequence is row table[s // page] * page + s % page of a pool whose rows stand at one step.

An entry of the table that names none of the pool's `count` pages is a hole: its keys do not exist. PAGE is 0 where keys stand in order.
"""
import triton
import triton.language as tl

from sparsetile.backends.triton.launch import FAR

DEFAULT = 64  # the page size that caches have unless told otherwise: what is compiled ahead


@triton.jit
def pages_of(table, s, limit, PAGE: tl.constexpr, BK: tl.constexpr):
    """Pages of keys s .. s + BK - 1: one number where one page holds them all, else one each. -1 for keys past the limit; s may be anything."""
    if PAGE % BK == 0:
        return tl.load(table + s // PAGE, mask=(s >= 0) & (s < limit), other=-1)
    else:
        key = s + tl.arange(0, BK)
        return tl.load(table + key // PAGE, mask=(key >= 0) & (key < limit), other=-1)


@triton.jit
def page_of(table, key, limit, count, PAGE: tl.constexpr):
    """(page of each key, 0 where it has none; whether it has one)."""
    page = tl.load(table + key // PAGE, mask=(key >= 0) & (key < limit), other=-1)
    ok = (page >= 0) & (page < count)
    return tl.where(ok, page, 0).to(tl.int64), ok


@triton.jit
def rows_in(pages, key, limit, count, PAGE: tl.constexpr, FAR: tl.constexpr):
    """(rows of the pool, which exist) of keys, by the page of each."""
    ok = (pages >= 0) & (pages < count) & (key < limit)
    page = tl.where(ok, pages, 0)
    if FAR:
        page = page.to(tl.int64)
    return page * PAGE + key % PAGE, ok


def sizes(table, keys) -> tuple:
    """(keys of a sequence, pages of the pool, page size) of keys [N,...,page,W] behind a table [B,pages]; of keys in one piece (S, None, 0)."""
    page = keys.shape[-2]
    return (page, None, 0) if table is None else (page * table.shape[1], keys.shape[0], page)


def one_tensor(table, *keys) -> tuple:
    """(keys of a sequence, pages of the pool, page size, whether its elements are far apart, each of `keys`). Keys [N,H,page,W] behind a table [B,pages] become
    one tensor of rows that batches share, [1,H,N * page,W] with a batch step of 0."""
    S, N, page = sizes(table, keys[0])
    if table is None:
        return S, N, page, False, *keys
    H = keys[0].shape[1]
    steps = [x.stride(2) if page > 1 else x.stride(0) for x in keys]
    rows = (x.as_strided((1, H, N * page, x.shape[3]), (0, x.stride(1), step, 1)) for x, step in zip(keys, steps))
    return S, N, page, N * page * max(*steps, 1) >= FAR, *rows
