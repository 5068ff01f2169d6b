"""The rows of the GPU table: a named workload, what others reach on it, and where our floor lies.

Stored figures were measured on one H200 whose bfloat16 product ran at 790 TFLOP/s (torch 2.11, CUDA events, cold L2, median). A peer that is not installed where
the table is made stands there with its stored figure times (this run's product / 790), marked with a star.
"""
from dataclasses import dataclass, replace

import numpy as np

from sparsetile.autotune import tasks
from sparsetile.bench import layouts
from sparsetile.ops import patterns as P

STORED_AT = 790.0  # TFLOP/s of the bfloat16 product beside which the stored figures were measured


@dataclass(frozen=True)
class Row:
    """unit: "TFLOP/s" (more is better), "ms" or "GB/s"; stored: ((peer, figure in that unit), ...); floor and goal in that unit, None where none is set.

    A row at another length, or with fewer key heads, names the row of the table whose pattern it has (`like`): its floor is that row's, times what a peer reaches here / reached there.
    """
    name: str
    workload: str
    unit: str
    stored: tuple = ()
    floor: float | None = None
    goal: float | None = None
    like: str | None = None
    sizes: tuple = ()  # those in which it is not the workload
    pattern: P.Pattern | None = None  # if not the workload's

    @property
    def backward(self) -> bool:
        return self.workload.endswith("/backward")

    def make(self) -> tasks.Workload:
        w = tasks.find(NAMED[self.like or self.name].workload)
        if self.like is None:
            return w
        options = dict(w.options) | ({} if self.pattern is None else {"pattern": self.pattern})
        return replace(w, name=self.workload, sizes=tuple((dict(w.sizes) | dict(self.sizes)).items()), options=tuple(options.items()))


# name, workload: (peer: forward, backward) ..., floors and goals of forward and backward. FA3 is FlashAttention-3, Flex the compiled FlexAttention.
_BLOCK = (
    ("causal 32k", "causal/32768", dict(FA3=(673, 612), cuDNN=(604, 539), Flex=(429, 393)), (650, 560), (720, 640)),
    ("causal 8k", "causal/8192", dict(FA3=(732, 602), cuDNN=(617, 504)), (640, 570), (740, 640)),
    ("window 4096", "window-4096/32768", dict(FA3=(631, 554), Flex=(410, 374)), (640, 540), (700, 600)),
    ("window 1024", "window-1024/32768", dict(FA3=(556, 447)), (540, 440), (610, 510)),
    ("documents", "documents/32768", dict(FA3=(628, 568), Flex=(395, 367)), (600, 530), (680, 600)),
    ("Longformer 512+64", "longformer-512/32768", dict(Flex=(150, 166)), (340, 300), (450, 400)),
    ("BigBird 128", "bigbird-128/32768", dict(FlashInfer=(421, None), Flex=(289, 310)), (600, 450), (700, 550)),
    ("random 10 %", "random-10pct/32768", dict(FlashInfer=(535, None), Flex=(335, 340)), (660, 510), (720, 600)),
    ("causal 16k D 64", "causal-d64/16384", dict(cuDNN=(450, 450), Flex=(357, 294)), (420, 400), (500, 470)),
    ("causal 16k D 192", "causal-d192/16384", dict(cuDNN=(607, 496), Flex=(329, 148)), (560, 430), (650, 520)),
    ("strided 128", "strided-128/32768", {}, (250, 200), (450, 350)),
    ("fixed 128 + 8", "fixed-128/32768", {}, (250, 200), (450, 350)),
)
LENGTHS, KEY_HEADS = (8192, 32768, 131072), (32, 8)


def _block():
    for turn, (word, suffix) in enumerate((("fwd", ""), ("bwd", "/backward"))):
        for name, workload, stored, floors, goals in _BLOCK:
            figures = tuple((peer, both[turn]) for peer, both in stored.items() if both[turn])
            yield Row(f"{word} {name}", f"gpu/{workload}{suffix}", "TFLOP/s", figures, floors[turn], goals[turn])


def _other_lengths(table: tuple):
    """Every pattern at every length, with 32 and 8 key heads to 32 query heads, but what stands in the table. causal 8k is its own row's kind."""
    by_workload = {row.workload: row for row in table}
    for base in (row for row in table if "/32768" in row.workload):
        for n in LENGTHS:
            same = by_workload.get(base.workload.replace("/32768", f"/{n}"))
            for heads in KEY_HEADS:
                if same is None or heads != 32:
                    kind = base.name.removesuffix(" 32k")
                    name = base.workload.replace("/32768", f"-hk{heads}/{n}")
                    yield Row(f"{kind} {n // 1024}k Hk {heads}", name, "TFLOP/s", like=(same or base).name, sizes=(("Hk", heads), ("T", n), ("S", n)), pattern=_at(kind[4:], n))


def _at(kind: str, n: int) -> P.Pattern | None:
    """The patterns that are not the same at another length: documents are drawn anew, a tenth of the blocks is another number."""
    if n == 32768 or kind not in ("documents", "random 10 %"):
        return None
    return layouts.documents(n, np.random.default_rng(11)) & P.Causal() if kind == "documents" else P.RandomBlocks(n // 1280, 128)


BLOCK = tuple(_block())
GRID = tuple(_other_lengths(BLOCK))
ROWS = (
    *BLOCK,
    Row("DSA h 128", "gpu/dsa-prefill-h128", "TFLOP/s", (("FlashMLA", 592), ("TileLang", 515)), 580, 680),
    Row("DSA h 64", "gpu/dsa-prefill-h64", "TFLOP/s", (("FlashMLA", 579),), 570, 660),
    Row("DSA h 128 128k", "gpu/dsa-prefill-h128/131072", "TFLOP/s", (("FlashMLA", 543), ("TileLang", 494)), 530, 620),
    Row("DSA h 64 128k", "gpu/dsa-prefill-h64/131072", "TFLOP/s"),
    Row("DSA h 32", "gpu/dsa-prefill-h32", "TFLOP/s", (("FlashMLA", 290),)),
    Row("DSA h 16", "gpu/dsa-prefill-h16", "TFLOP/s", (("FlashMLA", 145),)),
    Row("DSA h 8", "gpu/dsa-prefill-h8", "TFLOP/s", (("FlashMLA", 72),)),
    Row("blocks of 64", "gpu/blocks-64", "TFLOP/s"),
    Row("DSA bwd 16k", "gpu/dsa-backward-16384", "TFLOP/s", (("TileLang", 174),), 147, 350),  # deterministic: at most 1.5 x the time of 220
    Row("blocks of 64 bwd", "gpu/blocks-64-backward", "TFLOP/s"),
    Row("latent decode h 128", "gpu/latent-decode-h128", "TFLOP/s", (("FlashMLA", 665),), 560, 680),
    Row("latent decode h 16", "gpu/latent-decode-h16", "GB/s", (("FlashMLA", 4266),), 3900, 4250),
    *(Row(f"latent decode h {h} B {B} {S // 1024}k", f"gpu/latent-decode-h{h}-b{B}/{S}", "TFLOP/s" if h == 128 else "GB/s")
      for h in (128, 16) for B in (1, 8, 128) for S in (4096, 32768, 131072) if (B, S) != (128, 32768)),
    Row("decode window 4096", "gpu/decode-window/32768", "GB/s", (), 0.85 * 4260),  # of a copy, on the keys that the pattern shows
    Row("decode B 64", "gpu/decode-b64/32768", "GB/s"),
    Row("decode B 8", "gpu/decode-b8/32768", "GB/s"),
    Row("DSA decode h 128", "gpu/dsa-decode-h128", "ms", (("FlashInfer", 0.151),)),
    Row("DSA decode h 64", "gpu/dsa-decode-h64", "ms"),
    Row("scores 2048 x 32k", "gpu/indexer-2048x32768", "TFLOP/s", (("DeepGEMM", 1130), ("TileLang", 408)), 1130, 1250),
    Row("scores 4096 x 128k", "gpu/indexer-4096x131072", "TFLOP/s", (("DeepGEMM", 1014),), 1050, 1200),
    Row("scores decode B 128", "gpu/indexer-1x32768", "ms", (("DeepGEMM", 0.149),), 0.16, 0.142),
    Row("top-k 4096 x 128k", "gpu/topk-4096x131072", "ms", (("FlashInfer", 1.89), ("torch", 5.98)), 0.75, 0.57),
    Row("top-k 4096 x 32k", "gpu/topk-4096x32768", "ms", (("TileLang", 0.56), ("torch", 1.66)), 0.30, 0.20),
    Row("top-k 128 x 128k", "gpu/topk-128x131072", "ms", (("FlashInfer", 0.073),), 0.045, 0.026),
    Row("scores + top-k", "gpu/indexer-topk-4096x131072", "ms", (("DeepGEMM + FlashInfer", 10.4),), 9.2, 7.6),
    Row("NSA importance 64k", "gpu/importance-65536", "ms", (("FLA", 27.9),)),
    Row("NSA importance 8k", "gpu/importance-8192", "ms"),
    Row("decompress 4k", "gpu/latent-4096", "ms", (("cuBLAS", 0.217), ("compiled", 0.368)), 0.217),
    Row("decompress 32k", "gpu/latent-32768", "ms", (("cuBLAS", 1.685), ("compiled", 2.887)), 1.685 / 1.12),
    Row("decompress 128k", "gpu/latent-131072", "ms", (("cuBLAS", 7.65), ("compiled", 11.75)), 7.65 / 1.12),
    Row("bitmaps 16k", "gpu/bitmaps-16384", "ms"),
    Row("absorb 4k", "gpu/absorb-4096", "TFLOP/s"),
    Row("merge 32k", "gpu/merge-32768", "GB/s"),
)


NAMED = {row.name: row for row in (*ROWS, *GRID)}


def selected(words: list[str], rows: tuple = ROWS) -> list[Row]:
    """Rows whose name or workload contains one of the words; all of them without words."""
    return [row for row in rows if not words or any(word.lower() in f"{row.name} {row.workload}".lower() for word in words)]
