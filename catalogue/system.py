"""One system of the catalogue, the sizes it is compared at, and the arrays it is called with."""
import zlib
from dataclasses import dataclass
from typing import Callable

import numpy as np

from sparsetile.backends import arrays
from sparsetile.ops.pattern import Pattern

FAMILIES = ("dense", "fixed pattern", "latent", "chosen by content", "linear relative", "out of scope")
# What a system can find, from most to least; "gist" stands apart.
FINDS = {"all": "every key, exactly", "chosen": "whichever keys the content picks", "landmarks": "near keys, and far ones at places fixed beforehand", "nearby": "near keys",
         "gist": "a summary of all keys whose size does not grow with them"}


@dataclass(frozen=True)
class Shape:
    """Sizes that systems are compared at, by the axis names of the contract.

    Hi, Di   heads and width of an indexer: half as many heads as queries have, as in DeepSeek-V3.2
    top_k    keys that a selector chooses; M: features of a linear relative, mixtures of Linformer
    """
    Hq: int = 32
    Hk: int = 8
    D: int = 128
    R: int = 512
    P: int = 64
    Hi: int = 16
    Di: int = 128
    top_k: int = 2048
    M: int = 256
    B: int = 1
    dtype: str = "bfloat16"

    @property
    def itemsize(self) -> int:
        return arrays.ITEMSIZE[self.dtype]


GPU = Shape()
CPU = Shape(Hq=8, Hk=2, D=64, R=128, P=32, Hi=4, Di=64, top_k=512, dtype="float32")
SMALL = Shape(Hq=2, Hk=1, D=16, R=64, P=8, Hi=2, Di=8, top_k=6, M=16, dtype="float32")  # of pictures and checks


@dataclass(frozen=True)
class System:
    """One entry.

    name        what the user types; family: one of FAMILIES; title, paper (arXiv number and place); call: how it is called
    complexity  of one head, in the field's letters; sees: what one query sees; reach: layers until a position has heard of every earlier one (of every other, both ways)
    finds       one of FINDS; trained: what a model must have been trained with
    run         (Inputs, rule) -> out; rule: `real` or `small`, a Pattern, where the system is one
    chosen      (Inputs) -> booleans [T,S], what a system that chooses by content saw; for its picture
    kernels, backward   kernels that a call takes; none: the caller's own framework computes
    token       (Shape) -> bytes a layer keeps for each key kept; kept: (N) -> keys kept of N; state: (Shape) -> bytes whatever N
    counted     (Shape, N) -> floating-point operations of a forward over N tokens, all heads; None: those of the pairs of `real`
    causal      False: compared both ways, as its paper has it; works: (device) -> None, or why it cannot run there; refusal: why it is out of scope
    """
    name: str
    family: str
    title: str
    paper: str
    call: str = ""
    complexity: str = ""
    sees: str = ""
    reach: str = ""
    finds: str = "all"
    trained: str = ""
    run: Callable | None = None
    real: Pattern | None = None
    small: Pattern | None = None
    chosen: Callable | None = None
    kernels: tuple = ()
    backward: tuple = ()
    token: Callable = lambda shape: 2 * shape.Hk * shape.D * shape.itemsize
    kept: Callable = lambda N: N
    state: Callable = lambda shape: 0
    counted: Callable | None = None
    causal: bool = True
    works: Callable = lambda device: None
    refusal: str = ""

    def cache(self, shape: Shape, N: int) -> int:
        """Bytes that one layer keeps for a sequence of N tokens."""
        return self.token(shape) * self.kept(N) + self.state(shape)

    def operations(self, shape: Shape, N: int) -> int:
        """Floating-point operations of a forward over N tokens, all heads."""
        return self.real.flops(N, N, shape.Hq, shape.D) if self.counted is None else self.counted(shape, N)


class Inputs:
    """The arrays that systems are called with, each made when first asked for: torch where a device or gradients are asked for, else NumPy. Seeded by their names, and drawn
    where they lie.

    q [B,Hq,N,D]; k, v [B,Hk,N,D]; k_all, v_all [B,Hq,N,D]; q_nope, q_rope, latent, k_rope, w_uk, w_uv as latent_attention takes them; index_q, index_k, index_w as the indexer;
    centroids [Hk,C,D], as many as give clusters of top_k; gates [B,Hq,N,3]; mix [M,N], Linformer's projection; decay, beta [B,Hq,N] and decays [B,Hq,N,D] of the recurrent
    relatives; upstream [B,Hq,N,D], the gradient that comes in, a constant.
    """
    AXES = {"q": "B Hq N D", "k": "B Hk N D", "v": "B Hk N D", "k_all": "B Hq N D", "v_all": "B Hq N D",
            "q_nope": "B Hq N D", "q_rope": "B Hq N P", "latent": "B N R", "k_rope": "B N P", "w_uk": "Hq R D", "w_uv": "Hq R D",
            "index_q": "B Hi N Di", "index_k": "B N Di", "index_w": "B Hi N", "centroids": "Hk C D", "gates": "B Hq N 3",
            "mix": "M N", "decay": "B Hq N", "beta": "B Hq N", "decays": "B Hq N D", "upstream": "B Hq N D"}
    FAN_IN = {"w_uk": "R", "w_uv": "R", "mix": "N"}

    def __init__(self, shape: Shape, tokens: int, device: int | None = None, gradient: bool = False):
        self.shape, self.tokens, self.device, self.gradient, self.made = shape, tokens, device, gradient, {}

    def __getattr__(self, name):
        if name not in self.AXES:
            raise AttributeError(name)
        if name not in self.made:
            self.made[name] = self._make(name)
        return self.made[name]

    def _make(self, name):
        sizes = {"N": self.tokens, "C": -(-self.tokens // self.shape.top_k)}
        size = lambda axis: int(axis) if axis.isdigit() else sizes.get(axis) or getattr(self.shape, axis)  # noqa: E731
        x, lib = self._drawn([size(axis) for axis in self.AXES[name].split()], zlib.crc32(name.encode()))
        x = 1 / (1 + lib.exp(-x)) if name in ("beta", "gates") else -abs(x) if name.startswith("decay") else x * size(self.FAN_IN[name]) ** -0.5 if name in self.FAN_IN else x
        kind = "float32" if name == "index_w" else self.shape.dtype
        if lib is np:
            return x.astype(arrays.numpy_dtype(kind))
        return x.to(arrays.torch_dtype(kind)).requires_grad_(self.gradient and name != "upstream")

    def _drawn(self, shape, seed):
        """Standard normal float32, and the framework it is of."""
        if self.device is None and not self.gradient:
            return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32), np
        import torch
        place = "cpu" if self.device is None else f"cuda:{self.device}"
        return torch.randn(shape, generator=torch.Generator(place).manual_seed(seed), device=place), torch
