"""Paged keys and values."""
from sparsetile.backends import arrays
from sparsetile.ops import checks
from sparsetile.ops.caches import memory
from sparsetile.ops.caches.paged import PagedCache

FLOATS = ("float32", "float16", "bfloat16", "float64")


class PagedKV(PagedCache):
    """Keys and values in pages: k [N,page,Hk,D], v [N,page,Hk,Dv], page_table [B,pages] int32, lengths [B] int32; N pages of page_size tokens.

    A token's heads stand side by side (FlashInfer's and vLLM's "NHD"), so that rows of all pages lie at one step. Made by `PagedKV.empty`, or over tensors that
    another owner keeps: PagedKV(k, v, page_table, lengths). Bytes a token: Hk * (D + Dv) elements. Source: PagedAttention (arXiv 2309.06180).
    """

    def __init__(self, k, v, page_table, lengths, book=None):
        memory.pool("k", k, 4, "[N,page,Hk,D]", FLOATS), memory.pool("v", v, 4, "[N,page,Hk,Dv]", FLOATS)
        checks.same("v", "shape [N,page,Hk] of k", list(k.shape[:3]), list(v.shape[:3]), "keys and values share their pages")
        checks.same("v", "element type of k", arrays.dtype_name(k), arrays.dtype_name(v), "keep both in one type")
        super().__init__((k, v), int(k.shape[1]), page_table, lengths, book)

    @classmethod
    def empty(cls, like, *, sequences, pages, heads, width, value_width=None, page_size=64, max_pages=None, dtype=None) -> "PagedKV":
        """Room for `pages` pages, beside the array `like` (its framework, its device and, unless `dtype` names another, its element type).

        heads Hk, width D, value_width Dv (D by default); max_pages is the length of the page table: pages of one sequence at most (all by default).
        """
        table, lengths, book = cls.book_of(memory.writable("like", like), sequences, pages, page_size, max_pages)
        kind = checks.choice("dtype", dtype or arrays.dtype_name(like), FLOATS)
        shape = pages, page_size, checks.integer("heads", heads, 1)
        widths = checks.integer("width", width, 1, 576), checks.integer("value_width", width if value_width is None else value_width, 1, 576)
        return cls(*(memory.zeros(like, (*shape, n), kind) for n in widths), table, lengths, book)

    def write(self, k, v, counts=None, *, backend=None) -> None:
        """k [B,Hk,n,D], v [B,Hk,n,Dv] at the ends of their sequences, then lengths += n (counts [B] int32 on the device, where not all n rows are real). Device work only."""
        self._write(self._rows(k, v), counts, backend)

    def append(self, k, v, counts=None, *, backend=None) -> None:
        """reserve, write and advance: k [B,Hk,n,D], v [B,Hk,n,Dv]; counts: a list of how many of the n rows are real for each sequence."""
        self._append(self._rows(k, v), counts, backend)

    def _rows(self, k, v):
        return "copy", rows_of(self.pools, int(self.lengths.shape[0]), k, v), {}

    def keys(self, T, rule, kv_length, q_start, backend=None):
        return self._keys(*self.pools, T, rule, kv_length, q_start, backend)

    def gather(self):
        """(k [B,Hk,S,D], v [B,Hk,S,Dv]) in one piece, S the longest sequence; 0 past each sequence's tokens."""
        return tuple(self._gather(pool).swapaxes(1, 2) for pool in self.pools)


def rows_of(pools, B, k, v):
    """New keys and values [B,Hk,n,width] for pools [N,page,Hk,width], checked -> [B,n,Hk,width]."""
    for name, x, pool in (("k", k, pools[0]), ("v", v, pools[1])):
        checks.array(name, x, 4, "[B,Hk,n,D]", (arrays.dtype_name(pool),))
        checks.same(name, "shape", [B, pool.shape[2], k.shape[2], pool.shape[3]], list(x.shape), "one row of each sequence and head for each new token")
    return k.swapaxes(1, 2), v.swapaxes(1, 2)
