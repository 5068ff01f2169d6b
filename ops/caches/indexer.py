"""Paged keys of a lightning indexer, 132 bytes a token."""
from sparsetile.backends import arrays
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.ops.caches import memory
from sparsetile.ops.caches.paged import PagedCache


class IndexerKeys(PagedCache):
    """Indexer keys in pages: pool [N,page * (D + 4)] uint8, planar within a page: the D bytes of every key (float8_e4m3fn), then the float32 scale of every key.

    With D 128 a token takes 132 bytes. scale = max |x| of the key / 448, or with power_of_two=True the next power of two that is not smaller; it multiplies.
    D is a multiple of 4. Little endian. NumPy and PyTorch: CuPy has no float8. Source: DeepSeek-V3.2 (arXiv 2512.02556); DeepGEMM's paged MQA logits.
    """

    def __init__(self, pool, page_table, lengths, book=None, *, width=128, power_of_two=False):
        self.width = checks.integer("width", width, 4, 576)
        memory.pool("pool", memory.float8("pool", pool), 2, "[N,page*(D+4)]", ("uint8",))
        if width % 4 or pool.shape[1] % (width + 4):
            raise ValueError(f"pool: expected pages of page_size * (D + 4) bytes, D a multiple of 4, got {pool.shape[1]} bytes and D {width}; a key has one float32 scale")
        self.power_of_two = checks.flag("power_of_two", power_of_two)
        super().__init__((pool,), int(pool.shape[1]) // (width + 4), page_table, lengths, book)

    @classmethod
    def empty(cls, like, *, sequences, pages, width=128, page_size=64, max_pages=None, power_of_two=False) -> "IndexerKeys":
        """Room for `pages` pages beside the array `like`."""
        table, lengths, book = cls.book_of(memory.float8("like", like), sequences, pages, page_size, max_pages)
        pool = memory.zeros(like, (pages, page_size * (checks.integer("width", width, 4, 576) + 4)), "uint8")
        return cls(pool, table, lengths, book, width=width, power_of_two=power_of_two)

    def planes(self):
        """(keys [N,page,D] uint8, scales [N,page] float32): the same memory."""
        pool, size = self.pools[0], self.page_size
        return pool[:, :size * self.width].reshape(-1, size, self.width), arrays.typed(pool[:, size * self.width:], "float32")

    def write(self, k, counts=None, *, backend=None) -> None:
        """k [B,n,D] at the ends of their sequences, quantised, then lengths += n (or counts [B] int32 on the device). Device work only."""
        self._write(self._rows(k), counts, backend)

    def append(self, k, counts=None, *, backend=None) -> None:
        """reserve, write and advance: k [B,n,D]; counts: a list of how many of the n rows are real for each sequence."""
        self._append(self._rows(k), counts, backend)

    def _rows(self, k):
        checks.array("k", k, 3, "[B,n,D]", ("float32", "float16", "bfloat16"))
        checks.same("k", "shape", [int(self.lengths.shape[0]), k.shape[1], self.width], list(k.shape), "one key of each sequence for each new token")
        return "indexer_fp8", (k,), dict(power_of_two=self.power_of_two)

    def scored(self, T, q_start, key_end):
        keys, scales = self.planes()
        lib = xp.module(self.lengths)
        length = lib.clip(self.lengths, 0, self.capacity)
        end = length[:, None] if key_end is None else lib.minimum(key_end, length[:, None])
        end = xp.astype(end + xp.arange(length, T) * 0, "int32")                     # [B, T]
        return arrays.typed(keys, "float8_e4m3fn"), scales, self.page_table, length - T if q_start is None else q_start, end

    def gather(self):
        """(k [B,S,D] float8_e4m3fn, k_scale [B,S] float32) in one piece, as indexer_scores takes them; 0 past each sequence's tokens."""
        keys, scales = self.planes()
        return arrays.typed(self._gather(keys), "float8_e4m3fn"), self._gather(scales)
