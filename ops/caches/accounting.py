"""How many bytes a token takes in a cache, and what that makes of MHA, GQA, MQA and MLA."""
from dataclasses import dataclass

from sparsetile.backends.arrays import ITEMSIZE
from sparsetile.ops import checks
from sparsetile.ops.caches.latent import GROUP, latent_bytes

KINDS = ("kv", "latent", "indexer")


def bytes_per_token(kind: str, *, heads=1, width=128, value_width=None, rank=512, rotary=64, layers=1, dtype="bfloat16") -> int:
    """Bytes that one token takes in all layers.

    kind   "kv": `heads` key heads of `width` and values of `value_width` (width by default); "latent": `rank` + `rotary` values, or with dtype "float8" the
           layout of DeepSeek-V3.2 (656 bytes for 512 and 64); "indexer": a float8 key of `width` and its float32 scale (132 bytes for 128), whatever dtype
    """
    checks.choice("kind", kind, KINDS)
    heads, width, rank, layers = (checks.integer(name, x, 1) for name, x in (("heads", heads), ("width", width), ("rank", rank), ("layers", layers)))
    rotary, value_width = checks.integer("rotary", rotary, 0), checks.integer("value_width", width if value_width is None else value_width, 1)
    checks.choice("dtype", dtype, ("float32", "float16", "bfloat16", "float64", *["float8"] * (kind != "kv")))
    if kind == "indexer":
        if width % 4:
            raise ValueError(f"width: expected a multiple of 4 for indexer keys, got {width}; a key stands beside its float32 scale")
        return layers * (width + 4)
    if kind == "latent" and dtype == "float8":
        if rank % GROUP:
            raise ValueError(f"rank: expected a multiple of {GROUP} for the fp8 layout, got {rank}; such latents are kept in bfloat16")
        return layers * latent_bytes(rank, rotary)
    size = ITEMSIZE[dtype]
    return layers * size * (heads * (width + value_width) if kind == "kv" else rank + rotary)


@dataclass(frozen=True)
class Memory:
    """One row of a comparison: bytes of a token in all layers, and what it saves of the first row's."""
    name: str
    bytes_per_token: int
    saved: float

    def gib(self, tokens: int) -> float:
        """GiB of so many tokens."""
        return self.bytes_per_token * tokens / 2 ** 30


class Comparison(tuple):
    """Rows of Memory; str() is the table."""
    tokens = 131072

    def __str__(self):
        lines = [f"| cache | bytes a token | GiB at {self.tokens} tokens | less than {self[0].name} |", "|---|---|---|---|"]
        return "\n".join(lines + [f"| {row.name} | {row.bytes_per_token} | {row.gib(self.tokens):.2f} | {row.saved:.1%} |" for row in self])


def compare_memory(*, heads=32, width=128, groups=8, rank=512, rotary=64, layers=32, dtype="bfloat16") -> Comparison:
    """MHA (a key head for each of `heads`), GQA (`groups` key heads), MQA (one), MLA (one latent), MLA in the 656-byte layout of DeepSeek-V3.2, and that with its indexer's keys.

    With 32 heads of 128 MLA takes 576 numbers where MHA takes 8192: 93.0 % less. (DeepSeek-V2's 93.3 %, arXiv 2405.04434 section 3.2.3, is another comparison: 60 layers of
    latents at 6 bits against 95 layers of GQA with 8 heads in 16 bits.)
    """
    kv = lambda Hk: bytes_per_token("kv", heads=Hk, width=width, layers=layers, dtype=dtype)  # noqa: E731
    latent = lambda kind: bytes_per_token("latent", rank=rank, rotary=rotary, layers=layers, dtype=kind)  # noqa: E731
    rows = [(f"MHA, {heads} heads", kv(heads)), (f"GQA, {groups} key heads", kv(groups)), ("MQA", kv(1)), ("MLA", latent(dtype)), ("MLA, fp8", latent("float8")),
            ("MLA, fp8, and indexer keys", latent("float8") + bytes_per_token("indexer", layers=layers))]
    return Comparison(Memory(name, size, 1 - size / rows[0][1]) for name, size in rows)
