"""Paged latents of MLA: as they are, or in DeepSeek-V3.2's 656 bytes a token."""
from sparsetile.backends import arrays
from sparsetile.ops import checks
from sparsetile.ops.caches import memory
from sparsetile.ops.caches.kv import FLOATS
from sparsetile.ops.caches.paged import PagedCache
from sparsetile.ops.quantise import dequantise_float8

GROUP = 128  # latent values that share a scale


class PagedLatent(PagedCache):
    """Latents and the rotary part shared by all heads, in pages: pool [N,page,R + P] of floats, or [N,page,bytes] uint8 in the layout of DeepSeek-V3.2.

    Bytes of a token of the fp8 layout, R 512 and P 64: 0 .. 511 the latent as float8_e4m3fn; 512 .. 527 four float32 scales, one for each 128 values, which
    multiply them; 528 .. 655 the rotary part as 64 bfloat16, not quantised. Little endian. Any R that 128 divides, any even P likewise: R + 4 R / 128 + 2 P bytes.
    Attention reads it where it lies: each value times its scale is rounded once, to the queries' type, as gather() of that type would.
    scale = max |x| of the group / 448, or with power_of_two=True the next power of two that is not smaller; a group with NaN or inf is NaN.
    The fp8 layout is for NumPy and PyTorch: CuPy has no float8. Source: DeepSeek-V3.2 (arXiv 2512.02556); FlashMLA's README, "FP8 KV cache".
    """

    def __init__(self, pool, page_table, lengths, book=None, *, rank, rotary, power_of_two=False):
        R, P = checks.integer("rank", rank, 1, 576), checks.integer("rotary", rotary, 0, 576)
        self.quantised = arrays.dtype_name(checks.array("pool", pool)) == "uint8"
        memory.pool("pool", memory.float8("pool", pool) if self.quantised else pool, 3, "[N,page,R+P] or [N,page,bytes]", (*FLOATS, "uint8"))
        if self.quantised and (R % GROUP or P % 2):
            raise ValueError(f"rank: expected multiples of {GROUP} and an even rotary width for the fp8 layout, got {R} and {P}; keep such latents in bfloat16")
        checks.same("pool", "last axis", latent_bytes(R, P) if self.quantised else R + P, pool.shape[2], "it holds one token")
        self.rank, self.rotary, self.power_of_two = R, P, checks.flag("power_of_two", power_of_two)
        if power_of_two and not self.quantised:
            raise ValueError(f"power_of_two: expected False for a pool of {arrays.dtype_name(pool)}, got True; only the fp8 layout has scales")
        super().__init__((pool,), int(pool.shape[1]), page_table, lengths, book)

    @classmethod
    def empty(cls, like, *, sequences, pages, rank=512, rotary=64, page_size=64, max_pages=None, dtype=None, power_of_two=False) -> "PagedLatent":
        """Room for `pages` pages beside the array `like`; dtype "float8" is the layout of DeepSeek-V3.2, else an element type, by default that of `like`."""
        kind = checks.choice("dtype", dtype or arrays.dtype_name(memory.writable("like", like)), (*FLOATS, "float8"))
        table, lengths, book = cls.book_of(memory.float8("like", like) if kind == "float8" else like, sequences, pages, page_size, max_pages)
        R, P = checks.integer("rank", rank, 1, 576), checks.integer("rotary", rotary, 0, 576)
        pool = memory.zeros(like, (pages, page_size, latent_bytes(R, P)), "uint8") if kind == "float8" else memory.zeros(like, (pages, page_size, R + P), kind)
        return cls(pool, table, lengths, book, rank=R, rotary=P, power_of_two=power_of_two)

    def write(self, latent, k_rope=None, counts=None, *, backend=None) -> None:
        """latent [B,n,R], k_rope [B,n,P] (None where P is 0) at the ends of their sequences, then lengths += n (or counts [B] int32 on the device). Device work only."""
        self._write(self._rows(latent, k_rope), counts, backend)

    def append(self, latent, k_rope=None, counts=None, *, backend=None) -> None:
        """reserve, write and advance: latent [B,n,R], k_rope [B,n,P]; counts: a list of how many of the n rows are real for each sequence."""
        self._append(self._rows(latent, k_rope), counts, backend)

    def _rows(self, latent, k_rope):
        kinds = ("float32", "float16", "bfloat16") if self.quantised else (arrays.dtype_name(self.pools[0]),)
        checks.array("latent", latent, 3, "[B,n,R]", kinds)
        B, n, R, P = int(self.lengths.shape[0]), latent.shape[1], self.rank, self.rotary
        checks.same("latent", "shape", [B, n, R], list(latent.shape), "one row of each sequence for each new token")
        if P:
            checks.array("k_rope", k_rope, 3, "[B,n,P]", (arrays.dtype_name(latent),))
            checks.same("k_rope", "shape", [B, n, P], list(k_rope.shape), "one rotary part for each latent")
        elif k_rope is not None:
            raise ValueError("k_rope: expected None, got an array; this cache was made with rotary=0")
        rows, pool = (latent, k_rope) if P else (latent,), self.pools[0]
        if self.quantised:
            return "latent_fp8", rows, dict(power_of_two=self.power_of_two)
        parts_ = (pool[:, :, None, :R], pool[:, :, None, R:])[:len(rows)]             # [N, page, 1, R or P]
        return "copy", tuple(x[:, :, None] for x in rows), dict(pools=parts_)

    def keys(self, T, rule, kv_length, q_start, backend=None):
        """One key head of R + P, of the fp8 layout its bytes; the caller says that the value is its first R columns."""
        return self._keys(self.pools[0][:, :, None], None, T, rule, kv_length, q_start, backend, (self.rank, self.rotary) if self.quantised else None)

    def gather(self, dtype=None, *, quantised=False):
        """(latent [B,S,R], k_rope [B,S,P] or None) in one piece, S the longest sequence; 0 past each sequence's tokens. In `dtype`, by default the pool's own type, of the fp8
        layout bfloat16; with quantised=True (latent float8_e4m3fn, k_rope bfloat16, latent_scale [B,S,R/128]), as latent_decompress takes them."""
        own = arrays.dtype_name(self.pools[0])
        if checks.flag("quantised", quantised) and not self.quantised:
            raise ValueError(f"quantised: expected False for a cache of {own}, got True; only the fp8 layout has scales")
        if quantised and dtype is not None:
            raise ValueError(f"dtype: expected None with quantised=True, got {checks.shown(dtype)}; what is stored comes in its own types")
        dtype = checks.choice("dtype", dtype or ("bfloat16" if self.quantised else own), FLOATS)
        rows, R, P = self._gather(self.pools[0]), self.rank, self.rotary
        if not self.quantised:
            rows = rows if dtype == own else arrays.cast(rows, dtype)
            return rows[..., :R], rows[..., R:] if P else None
        latent, scale, rope = parts(rows, R, P)
        if quantised:
            return arrays.typed(latent, "float8_e4m3fn"), rope, scale
        return dequantise_float8(arrays.typed(latent, "float8_e4m3fn"), scale, dtype=dtype), arrays.cast(rope, dtype) if P else None


def latent_bytes(R: int, P: int) -> int:
    return R + 4 * R // GROUP + 2 * P


def parts(rows, R: int, P: int):
    """Rows [...,bytes] of the fp8 layout -> latent bytes [...,R], scales float32 [...,R/128], rotary part bfloat16 [...,P] or None; the same memory."""
    at = R + 4 * R // GROUP
    return rows[..., :R], arrays.typed(rows[..., R:at], "float32"), arrays.typed(rows[..., at:], "bfloat16") if P else None
