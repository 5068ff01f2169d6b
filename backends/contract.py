"""What the rooms agree on: problems, tunables, kernels, lists of blocks. Standard library only.

A kernel is a module `backends/<backend>/<op>.py` with these names (see CONTRIBUTING.md):

    TUNABLES                        tuple of Tunable; the first value of each is the safe one
    supports(problem)               None, or one sentence that says what is not supported and what would work
    resources(problem, config)      Resources, or one sentence that says why this config cannot run; known before compiling
    default_config(problem)         dict, knob -> value
    run(..., config, place)         the work; `place` (backends/places.py) is where it runs, what allocates, and what a launch goes through: a run may be noted and repeated (backends/tape.py)
    artifacts(problem, config)      what has to be compiled for a GPU (triton and cupy only), so that it can be done ahead of time
    captures(config)                where a CUDA graph holds other work than the call it records: None, or the sentence why

Axis names, used alike in docstrings, errors, tuning keys and YAML:
    B batch, Hq query heads, Hk key heads, T queries, S keys, D query/key width, Dv value width,
    K selected entries, R latent rank, P rotary width, Dn non-rotary width, H heads of the indexer or the latent.
"""
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Mapping

TUNED = (
    "block_attention", "block_attention_backward", "gather_attention", "gather_attention_backward", "merge_attention",
    "indexer_scores", "indexer_scores_backward", "indexer_topk", "importance_topk", "topk", "latent_decompress", "grouped_matmul", "selection_bitmaps",
)
UNTUNED = ("attention_delta", "layout", "append", "page_rows")  # small ones beside them, one pass over their memory: no workload stands for them, and no profile is missed
KERNELS = TUNED + UNTUNED
BACKENDS = ("triton", "cupy", "numba", "reference")  # in order of preference
ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "gfx942")


class Unsupported(RuntimeError):
    """A real limit of a backend: says which, why, and the nearest thing that would work."""


@dataclass(frozen=True)
class Problem:
    """One case as the tuner and the kernels' checks see it. Hashable; equal problems share one config.

    dims      axis name -> size
    dtypes    argument name -> dtype name ("float32", "float16", "bfloat16", "float64", "float8_e4m3fn")
    arch      "cpu", "sm_80", "sm_90a", ..., "gfx942"
    features  words such as "interval", "bitmap", "order", "per_head", "per_batch", "sink", "softcap", "lse", "kv_length", "q_start",
              "gradient", "shared_kv", "causal", "scale", "pool", "return_scores", "tail", "interpret"; of a static pattern its kind ("window", "global+window")
    density   share of the pairs kept, rounded up to a power of two (1.0 = dense)
    granularity   keys per selected entry (selections), else 1
    """
    op: str
    dims: tuple[tuple[str, int], ...]
    dtypes: tuple[tuple[str, str], ...]
    arch: str
    features: frozenset[str] = frozenset()
    density: float = 1.0
    granularity: int = 1

    @classmethod
    def of(cls, op: str, dims: Mapping[str, int], dtypes: Mapping[str, str], arch: str, features=(), density: float = 1.0, granularity: int = 1):
        return cls(op, tuple(sorted(dims.items())), tuple(sorted(dtypes.items())), arch, frozenset(features), density, granularity)

    @cached_property
    def _hash(self):
        return hash((self.op, self.dims, self.dtypes, self.arch, self.features, self.density, self.granularity))

    def __hash__(self):  # asked at every lookup
        return self._hash

    def __reduce__(self):  # without the hash: another process hashes words differently
        return Problem, (self.op, self.dims, self.dtypes, self.arch, self.features, self.density, self.granularity)

    def __getitem__(self, axis: str) -> int:
        for name, size in self.dims:
            if name == axis:
                return size
        raise KeyError(f"{self.op} has no axis {axis!r}; it has {[name for name, _ in self.dims]}")

    @cached_property
    def words(self) -> frozenset[str]:
        """The features one by one: "global+window" is two."""
        return frozenset(word for feature in self.features for word in feature.split("+"))

    def dtype(self, argument: str, default: str | None = None) -> str | None:
        return dict(self.dtypes).get(argument, default)


@dataclass(frozen=True)
class Tunable:
    """One knob: its name, its values (the first is the safe one), what it means; on which paths (values of the kernel's knob "path") it does anything, (): on each; and the axis of whose
    columns it is a part, if one: a part of at least all of them, rounded up to a power of two, is the same as 0."""
    name: str
    values: tuple
    doc: str = ""
    paths: tuple = ()
    part_of: str = ""


@dataclass(frozen=True)
class Resources:
    """What one config asks of the chip, per block of threads; 0 where it is not known before compiling."""
    threads: int = 0
    shared: int = 0     # bytes
    registers: int = 0  # per thread


@dataclass(frozen=True, eq=False)
class Lists:
    """A part of a layout as kernels read it. Arrays are of the backend's native kind, int32, on the call's device.

    Query block i (0 <= i < nq) holds the rows p' = (first + i) * block_q + r; key block j (0 <= j < nk) the keys s' = j * block_k + c.
    Without orders p' is the absolute position p and s' the key s. With `q_order` p = q_order[i * block_q + r] (-1: no such row) and
    with `k_order` s = k_order[j * block_k + c] (-1: no such key); `first` is 0 then. `first` may be negative (p < 0 exists when T > S).

    offsets [L * nq * 2 + 1]   list l, block i, x = l * nq + i: entries offsets[2x] .. offsets[2x+1] are full blocks,
                               offsets[2x+1] .. offsets[2x+2] partial ones; within each, columns ascend
    cols    [entries]          key block of an entry (one readable element more than the last entry)
    kinds   [entries]          (likewise) -1 full; 2n: row n of `intervals`; 2n + 1: row n of `bitmaps`
    by_key_offsets [L * nk * 2 + 1], by_key_rows, by_key_kinds    the same by key block; rows are i (relative to `first`), ascending
    intervals [n, block_q, 2]  keys lo <= c < hi of the block are seen by row r (lo = hi = 0: none)
    bitmaps [n, block_q, block_k / 32]   bit c % 32 of word c / 32
    list_of [1 or B, 1 or Hq]  which list l a batch and head reads
    longest                    at most so many entries in one list (an upper bound for layouts made on the device)
    """
    block_q: int
    block_k: int
    first: int
    nq: int
    nk: int
    offsets: Any
    cols: Any
    kinds: Any
    by_key_offsets: Any
    by_key_rows: Any
    by_key_kinds: Any
    intervals: Any
    bitmaps: Any
    list_of: Any
    q_order: Any = None
    k_order: Any = None
    has_intervals: bool = False
    has_bitmaps: bool = False
    longest: int = 0
    extras: dict = field(default_factory=dict)  # what a backend derives once per layout (schedules, orders), under its own key; "offsets": those of a static layout on the host

    def far_longer(self, offsets: str, taken: int | None = None) -> tuple[int, int]:
        """How many lines of a list have more than four times the entries of the mean, at most, and how many entries the longest has: a piece of work ends no earlier than those do. Lines are by row
        (offsets "offsets") or by key ("by_key_offsets"), the first `taken` of them, or all: a layout may be longer than the keys. (0, 0) where the host does not know the layout; counted once."""
        known, lines, key = self.extras.get(offsets), self.nq if offsets == "offsets" else self.nk, f"far_longer.{offsets}.{taken}"
        if known is None or not lines:
            return 0, 0
        if key not in self.extras:
            length = (known[2::2] - known[:-2:2]).reshape(-1, lines)[:, :taken]
            self.extras[key] = int((length > 4 * length.mean()).sum(axis=1).max()), int(length.max())
        return self.extras[key]


def density_bucket(density: float) -> float:
    """Rounded up to a power of two, at least 2**-12."""
    bucket = 1.0
    while bucket / 2 >= density and bucket > 2 ** -12:
        bucket /= 2
    return bucket
