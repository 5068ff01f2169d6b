"""A workload on a device: its inputs, and how to call one backend with one config. What the tuner times and what the benchmarks time is the same call.

A `Workload` is a named real problem: a kernel's name, sizes, an element type and options. `Task(workload, device)` makes its inputs (seeded) where the
device is: torch on a GPU, NumPy on the CPU.
"""
import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sparsetile.backends import arrays
from sparsetile.backends.contract import TUNED
from sparsetile.ops import attention, dispatch, float8, importance, indexer, latent, merge, patterns, presets, selected_blocks
from sparsetile.ops.selection import Selection


@dataclass(frozen=True)
class Workload:
    """One named problem. sizes: axis -> size; options: what else the call says (pattern, causal, pool, ...)."""
    name: str
    kernel: str
    sizes: tuple
    dtype: str = "float32"
    options: tuple = ()

    @classmethod
    def of(cls, name, kernel, dtype="float32", options=None, **sizes):
        return cls(name, kernel, tuple(sizes.items()), dtype, tuple((options or {}).items()))

    def __getitem__(self, axis):
        return dict(self.sizes)[axis]

    def option(self, name, default=None):
        return dict(self.options).get(name, default)

    def small(self) -> "Workload":
        """The same features at sizes that the float64 reference can check in a moment; odd on purpose."""
        least = {"B": 2, "T": 77, "S": 203, "N": 3, "K": 37, "H": 64 if "float8" in self.dtype else 4}  # kernels of their own for 64 heads of float8
        sizes = {axis: min(size, least.get(axis, size)) for axis, size in self.sizes}
        options = dict(self.options)
        if self.kernel == "importance_topk":  # more blocks than are taken
            sizes |= {"S": min(1203, self["S"]), "K": min(6, self["K"])}
        if "Hk" in sizes:
            lists, heads, keys = options.get("G", 1), sizes["Hq"], sizes["Hk"]
            sizes["Hk"] = min(keys, 2)
            sizes["Hq"] = sizes["Hk"] * min(heads // keys, 4)
            if lists > 1:  # one list for each head, or for each key head
                options["G"] = sizes["Hq"] if lists == heads else sizes["Hk"]
        return replace(self, name=self.name + "/small", sizes=tuple(sizes.items()), options=tuple(options.items()))


class Task:
    """A workload with its inputs on a device."""

    def __init__(self, workload: Workload, device: int | None, seed: int = 0, hollow: bool = False, forward: str | None = None):
        """hollow: inputs of the right shapes that hold one element each: enough for `problem`, at no cost. forward: the backend that makes the answer whose gradient is asked for (None: a call's own)."""
        self.workload, self.device, self.hollow, self.forward = workload, device, hollow, forward
        self.rng = np.random.default_rng(seed + zlib.crc32(workload.name.encode()))
        self.seed = int(self.rng.integers(2 ** 31))
        self.inputs = getattr(self, "_" + workload.kernel)()

    # ------------------------------------------------------------------------------------------------------------- inputs
    def normal(self, shape, dtype=None, scale=1.0):
        dtype = dtype or self.workload.dtype
        if self.hollow:
            return self.filled(shape, dtype)
        if self.device is None:
            return (self.rng.standard_normal(shape, dtype=np.float32) * scale).astype(arrays.numpy_dtype(dtype))
        import torch
        generator = torch.Generator(f"cuda:{self.device}").manual_seed(int(self.rng.integers(2 ** 31)))
        x = torch.randn(shape, generator=generator, device=f"cuda:{self.device}", dtype=torch.float32 if "float8" in dtype else arrays.torch_dtype(dtype))
        return (x * scale if scale != 1 else x).to(arrays.torch_dtype(dtype))

    def filled(self, shape, dtype):
        """Zeros that are one element in memory."""
        if self.device is None:
            return np.broadcast_to(np.zeros((), arrays.numpy_dtype(dtype)), shape)
        import torch
        return torch.zeros((), device=f"cuda:{self.device}", dtype=arrays.torch_dtype(dtype)).expand(shape)

    def integers(self, x, shape):
        """A host int32 array on the device, repeated to the shape."""
        if self.hollow:
            return self.filled(shape, "int32")
        if self.device is None:
            return np.ascontiguousarray(np.broadcast_to(x, shape), np.int32)
        import torch
        return torch.from_numpy(np.ascontiguousarray(x, np.int32)).to(f"cuda:{self.device}").expand(shape).contiguous()

    def _attention(self):
        w = self.workload
        B, Hq, Hk, T, S, D, Dv = (w[a] for a in ("B", "Hq", "Hk", "T", "S", "D", "Dv"))
        keys = w.option("keys")
        q, k = self.normal((B, Hq, T, D)), self.normal((B, Hk, S, D), keys)
        v = None if w.option("shared_kv") else self.normal((B, Hk, S, Dv), keys)
        return q, k, v

    def _block_attention(self):
        return *self._attention(), self.workload.option("pattern", patterns.Causal()), *self._scales()

    def _scales(self):
        """Of float8 q, k and v, about 1: () where none is, None for one that is not."""
        w = self.workload
        if w.option("keys") != float8.FLOAT8:
            return ()
        shapes = float8.shapes_of(*(w[a] for a in ("B", "Hq", "Hk", "T", "S")))
        return tuple(None if name == "q_scale" and w.dtype != float8.FLOAT8 else self.normal(shape, "float32", 0.1) + np.float32(1) for name, (shape, _) in shapes.items())

    def _gather_attention(self):
        return *self._attention(), self._selection(self.workload.option("causal", False))

    def _selection(self, before: bool):
        """Entries drawn from all keys, or (before) from those at or before the query; every list is the same."""
        w = self.workload
        B, G, T, K, S, g = w["B"], w.option("G", 1), w["T"], w["K"], w["S"], w.option("granularity", 1)
        blocks = -(-S // g)
        rows = np.full((1, 1), -1, np.int32) if self.hollow else _drawn(self.rng, T, K, np.clip((S - T + np.arange(T)) // g + 1, 1, blocks) if before else np.full(T, blocks))
        return Selection(self.integers(rows, (B, G, T, K)), g, None, w.option("causal", False))

    def _selection_bitmaps(self):
        return (self._selection(True),)

    def _gradient(self, name):
        q, k, v, rule = getattr(self, "_" + name)()
        w = self.workload
        shape = w["B"], w["Hq"], w["T"], w["Dv"]
        out, lse = (self.filled(shape, w.dtype), self.filled(shape[:3], "float32")) if self.hollow else attention.forward(self._call(q, k, v, rule, backend=self.forward), True)
        return q, k, v, rule, out, lse, self.normal(tuple(out.shape))

    def _block_attention_backward(self):
        return self._gradient("block_attention")

    def _gather_attention_backward(self):
        return self._gradient("gather_attention")

    def _indexer_scores(self):
        w = self.workload
        B, H, T, S, D = (w[a] for a in ("B", "H", "T", "S", "D"))
        k_scale = None if "float8" not in w.dtype else abs(self.normal((B, S), "float32")) * 0.1 + 0.01
        return self.normal((B, H, T, D)), self.normal((B, S, D)), self.normal((B, H, T), "float32"), k_scale

    _indexer_topk = _indexer_scores

    def _indexer_scores_backward(self):
        w = self.workload
        return *self._indexer_scores(), self.normal((w["B"], w["T"], w["S"]), "float32")

    def _importance_topk(self):
        """q, compressed keys (32 at stride 16), and an lse such as that many random scores have."""
        w = self.workload
        B, Hq, Hk, T, S, D = (w[a] for a in ("B", "Hq", "Hk", "T", "S", "D"))
        C = (S - 32) // 16 + 1
        lse = self.normal((B, Hq, T), "float32", 0.1)
        return self.normal((B, Hq, T, D)), self.normal((B, Hk, C, D)), lse if self.hollow else lse + np.float32(np.log(C) + 0.5)

    def _topk(self):
        w = self.workload
        return (self.normal((w["B"], w["T"], w["S"]), "float32"),)

    def _latent_decompress(self):
        w = self.workload
        B, S, H, R, Dn, Dv, P = (w[a] for a in ("B", "S", "H", "R", "Dn", "Dv", "P"))
        return self.normal((B, S, R)), self.normal((H, R, Dn), scale=R ** -0.5), self.normal((H, R, Dv), scale=R ** -0.5), self.normal((B, S, P)) if P else None

    def _grouped_matmul(self):
        w = self.workload
        B, H, T, N, M, P = (w[a] for a in ("B", "H", "T", "N", "M", "P"))
        return self.normal((B, H, T, N)), self.normal((H, M, N), scale=N ** -0.5), self.normal((B, H, T, P)) if P else None

    def _merge_attention(self):
        w = self.workload
        B, Hq, T, Dv, N = (w[a] for a in ("B", "Hq", "T", "Dv", "N"))
        return [self.normal((B, Hq, T, Dv)) for _ in range(N)], [self.normal((B, Hq, T), "float32") for _ in range(N)]

    # -------------------------------------------------------------------------------------------------------------- calls
    def _call(self, q, k, v, rule, *scales, backend=None, config=None):
        w = self.workload
        return attention.check(q, k, v, rule, w.option("scale"), None, w.option("softcap"), None, None, w["Dv"] if v is None else None, True, backend, config, *scales)

    def run(self, backend=None, config=None):
        """One call; the result is in the caller's array type."""
        w, kernel, x = self.workload, self.workload.kernel, self.inputs
        if kernel in ("block_attention", "gather_attention"):
            return attention.forward(self._call(*x, backend=backend, config=config), False)[0]
        if kernel == "indexer_scores_backward":
            q, k, weights, k_scale, dscores = x
            call = indexer.check("indexer_scores", q, k, weights, k_scale, w.option("causal", True), None, None, None, "relu", backend, None)
            return indexer.scores_backward(call, dscores, config)
        if kernel.endswith("_backward"):
            q, k, v, rule, out, lse, dout = x
            return attention.backward(self._call(q, k, v, rule, backend=backend), out, lse, dout, config=config)[:3]
        options = dict(backend=backend, config=config)
        if kernel == "indexer_scores":
            return indexer.indexer_scores(*x[:3], k_scale=x[3], causal=w.option("causal", True), **options)
        if kernel == "indexer_topk":
            got = indexer.indexer_topk(*x[:3], w["K"], k_scale=x[3], causal=w.option("causal", True), pool=w.option("pool", 1), **options)
            return got.indices
        if kernel == "importance_topk":
            return importance.importance_topk(*x, w["K"], keys=w["S"], **options).indices
        if kernel == "topk":
            return indexer.topk(*x, w["K"], **options).indices
        if kernel == "latent_decompress":
            return latent.latent_decompress(*x[:3], k_rope=x[3], **options)
        if kernel == "grouped_matmul":
            caller = "numpy" if self.device is None else "torch"
            return latent.matmul(*x, backend, caller, self.device, config)
        if kernel == "selection_bitmaps":
            caller = "numpy" if self.device is None else "torch"
            choice = dispatch.choose(selected_blocks.OP, selected_blocks.problem_of_bits(*x, w["Hq"], w["Hk"], w["S"], self.device), self.device, backend, config)
            return selected_blocks.bits(choice, *x, w["S"], caller, self.device)
        return merge.merge_attention(*x, **options)[0]

    def bound(self, backend=None, config=None):
        """A closure for the stopwatch, without gradients."""
        if self.device is None:
            return lambda: self.run(backend, config)
        import torch

        def call():
            with torch.no_grad():
                return self.run(backend, config)
        return call

    def explain(self, backend=None):
        """What would run, and why: the call ends at the choice of its kernel."""
        try:
            with dispatch.explaining(), _grad_off(self.device):
                self.run(backend)
        except dispatch._Explained as stop:
            return stop.explanation
        raise AssertionError(f"{self.workload.name}: the call chose no kernel")

    @cached_property
    def problem(self):
        """The problem as dispatch sees it for this call: what the profile's key is made of."""
        return self.explain().problem


def _grad_off(device):
    import contextlib
    if device is None:
        return contextlib.nullcontext()
    import torch
    return torch.no_grad()


def _drawn(rng, T: int, K: int, seen: np.ndarray) -> np.ndarray:
    """Entries [T,K], -1 past the end: of seen[t] blocks one out of each of K even parts, so distinct and ascending without a sort (32M entries in a second)."""
    rows, e = np.empty((T, K), np.int32), np.arange(K)
    for t in range(0, T, 1024):
        blocks = seen[t:t + 1024, None]
        n = np.minimum(K, blocks)
        low, high = np.minimum(e, n) * blocks // n, np.minimum(e + 1, n) * blocks // n
        part = np.maximum(high - low, 1)
        rows[t:t + 1024] = np.where(e < n, low + np.minimum(rng.random(part.shape) * part, part - 1).astype(np.int64), -1)
    return rows


def outputs(result) -> list:
    """A result as a flat list of arrays."""
    return [x for x in (result if isinstance(result, (tuple, list)) else (result,)) if x is not None]


P = patterns
BIGBIRD = presets.bigbird(128)
LONGFORMER = P.Window(256, 256) | P.Global(range(64))
DOCUMENTS = P.Documents((12001, 2638, 5998, 12131)) & P.Causal()  # drawn once from 1024..16383
LONG = {"documents": DOCUMENTS, "random-10pct": P.RandomBlocks(25, 128), "strided-128": presets.sparse_transformer_strided(128), "fixed-128": presets.sparse_transformer_fixed(128, 8)}
_DSA = dict(Hq=128, Hk=1, D=576, Dv=512, S=32768, K=2048)


def workloads() -> list[Workload]:
    """Every named workload. "gpu" and "cpu" ones differ in size; `for_device` says which suit a device."""
    W, found = Workload.of, []
    shapes = dict(B=1, Hq=32, Hk=32, D=128, Dv=128)
    named = {"causal": P.Causal(), "window-4096": P.Window(4095), "window-1024": P.Window(1023), "longformer-512": LONGFORMER, "bigbird-128": BIGBIRD}
    for kernel, suffix in (("block_attention", ""), ("block_attention_backward", "/backward")):
        for n in (8192, 32768):
            for name, pattern in (named if n == 8192 else named | LONG).items():
                found.append(W(f"gpu/{name}/{n}{suffix}", kernel, "bfloat16", dict(pattern=pattern), T=n, S=n, **shapes))
        found.append(W(f"gpu/causal-d64/16384{suffix}", kernel, "bfloat16", dict(pattern=P.Causal()), B=1, Hq=16, Hk=16, T=16384, S=16384, D=64, Dv=64))
        found.append(W(f"gpu/causal-d192/16384{suffix}", kernel, "bfloat16", dict(pattern=P.Causal()), T=16384, S=16384, **{**shapes, "D": 192}))
        for name, pattern in {"causal": P.Causal(), "window-256": P.Window(256, 256), "longformer-512": LONGFORMER}.items():
            found.append(W(f"cpu/{name}/4096{suffix}", kernel, "float32", dict(pattern=pattern), B=1, Hq=8, Hk=8, T=4096, S=4096, D=64, Dv=64))
    found.append(W("gpu/decode-window/32768", "block_attention", "bfloat16", dict(pattern=P.Window(4095) | P.Sink(4)), B=64, Hq=32, Hk=8, T=1, S=32768, D=128, Dv=128))
    for B in (64, 8):
        found.append(W(f"gpu/decode-b{B}/32768", "block_attention", "bfloat16", dict(pattern=P.Full()), B=B, Hq=32, Hk=8, T=1, S=32768, D=128, Dv=128))
    quantised, eight = dict(B=1, Hq=32, Hk=8, D=128, Dv=128), dict(keys=float8.FLOAT8)
    for name, kind in (("float8-keys", "bfloat16"), ("float8", float8.FLOAT8)):
        for n in (8192, 32768):
            found.append(W(f"gpu/{name}-causal/{n}", "block_attention", kind, dict(pattern=P.Causal(), **eight), T=n, S=n, **quantised))
        for word, pattern in (("decode", P.Full()), ("decode-causal", P.Causal())):  # one query sees the same keys by both, and a key tells them apart
            found.append(W(f"gpu/{name}-{word}-b64/32768", "block_attention", kind, dict(pattern=pattern, **eight), T=1, S=32768, **{**quantised, "B": 64}))
    for name, heads in (("h64", dict(Hq=64)), ("hk32", dict(Hk=32))):
        found.append(W(f"gpu/float8-keys-causal-{name}/8192", "block_attention", "bfloat16", dict(pattern=P.Causal(), **eight), T=8192, S=8192, **{**quantised, **heads}))
    for heads, B, S in [(128, 128, 32768), (16, 128, 32768)] + [(h, B, S) for h in (128, 16) for B in (1, 8, 128) for S in (4096, 32768, 131072) if (B, S) != (128, 32768)]:
        name = f"gpu/latent-decode-h{heads}" + (f"-b{B}/{S}" if (B, S) != (128, 32768) else "")  # the attention of latent_attention's absorbed mode over every key
        found.append(W(name, "block_attention", "bfloat16", dict(pattern=P.Full(), shared_kv=True), B=B, Hq=heads, Hk=1, T=1, S=S, D=576, Dv=512))
    for heads in (128, 64, 32, 16, 8):
        found.append(W(f"gpu/dsa-prefill-h{heads}", "gather_attention", "bfloat16", dict(shared_kv=True), B=1, T=4096, **{**_DSA, "Hq": heads}))
    for heads in (128, 64):
        found.append(W(f"gpu/dsa-prefill-h{heads}/131072", "gather_attention", "bfloat16", dict(shared_kv=True), B=1, T=4096, **{**_DSA, "Hq": heads, "S": 131072}))
        found.append(W(f"gpu/dsa-decode-h{heads}", "gather_attention", "bfloat16", dict(shared_kv=True), B=128, T=1, **{**_DSA, "Hq": heads}))
    found.append(W("gpu/dsa-backward", "gather_attention_backward", "bfloat16", dict(shared_kv=True, causal=True), B=1, T=2048, **{**_DSA, "S": 8192, "K": 1024}))
    found.append(W("gpu/dsa-backward-h16", "gather_attention_backward", "bfloat16", dict(shared_kv=True, causal=True), B=1, T=2048, **{**_DSA, "Hq": 16, "S": 8192, "K": 1024}))
    found.append(W("gpu/dsa-backward-16384", "gather_attention_backward", "bfloat16", dict(shared_kv=True, causal=True), B=1, T=16384, **{**_DSA, "S": 16384}))
    found.append(W("gpu/blocks-64-backward", "gather_attention_backward", "bfloat16", dict(granularity=64, causal=True, G=4), B=1, Hq=64, Hk=4, T=4096, S=4096, D=128, Dv=128, K=16))
    found.append(W("gpu/blocks-64", "gather_attention", "bfloat16", dict(granularity=64, causal=True, G=4), B=1, Hq=64, Hk=4, T=8192, S=8192, D=128, Dv=128, K=16))
    for T, S in ((2048, 32768), (4096, 131072), (1, 32768)):
        found.append(W(f"gpu/indexer-{T}x{S}", "indexer_scores", "float8_e4m3fn", dict(causal=False), B=1 if T > 1 else 128, H=64, T=T, S=S, D=128))
        found.append(W(f"gpu/indexer-topk-{T}x{S}", "indexer_topk", "float8_e4m3fn", dict(causal=False), B=1 if T > 1 else 128, H=64, T=T, S=S, D=128, K=2048))
    for S in (8192, 32768, 65536):
        found.append(W(f"gpu/importance-{S}", "importance_topk", "bfloat16", B=1, Hq=64, Hk=4, T=S, S=S, D=128, K=16))
    for T, S in ((4096, 131072), (4096, 32768), (128, 131072)):
        found.append(W(f"gpu/topk-{T}x{S}", "topk", "float32", B=1, T=T, S=S, K=2048))
    for n in (4096, 8192, 16384):  # of exact top-k: a list for each head, none past the query
        found.append(W(f"gpu/bitmaps-{n}", "selection_bitmaps", "int32", dict(G=32), B=1, Hq=32, Hk=8, T=n, S=n, K=2048))
    for S in (4096, 32768, 131072):
        found.append(W(f"gpu/latent-{S}", "latent_decompress", "bfloat16", B=1, S=S, H=128, R=512, Dn=128, Dv=128, P=64))
        found.append(W(f"gpu/absorb-{S // 32}", "grouped_matmul", "bfloat16", B=1, H=128, T=S // 32, N=128, M=512, P=64))
        found.append(W(f"gpu/merge-{S // 4}", "merge_attention", "bfloat16", B=1, Hq=32, T=S // 4, Dv=128, N=2))
    found.append(W("cpu/decode/65536", "block_attention", "float32", dict(pattern=P.Causal()), B=1, Hq=32, Hk=8, T=1, S=65536, D=128, Dv=128))
    for S in (1024, 4096, 16384):
        found.append(W(f"cpu/importance-{S}", "importance_topk", "float32", B=1, Hq=16, Hk=2, T=256, S=S, D=64, K=8))
    cpu = dict(B=1, T=512, S=4096)
    for K in (32, 128, 512):
        found.append(W(f"cpu/topk-{K}", "topk", "float32", K=K, **cpu))
        found.append(W(f"cpu/indexer-topk-{K}", "indexer_topk", "float32", H=16, D=128, K=K, **cpu))
        found.append(W(f"cpu/gather-{K}", "gather_attention", "float32", Hq=8, Hk=8, D=64, Dv=64, K=K, **cpu))
        found.append(W(f"cpu/gather-{K}/backward", "gather_attention_backward", "float32", Hq=8, Hk=8, D=64, Dv=64, K=K, **cpu))
    for S in (512, 1024, 4096):
        found.append(W(f"cpu/indexer-{S}", "indexer_scores", "float32", B=1, H=16, T=256, S=S, D=128))
        found.append(W(f"cpu/indexer-{S}/backward", "indexer_scores_backward", "float32", B=1, H=16, T=256, S=S, D=128))
        found.append(W(f"cpu/latent-{S}", "latent_decompress", "float32", B=1, S=S, H=16, R=512, Dn=128, Dv=128, P=64))
        found.append(W(f"cpu/absorb-{S}", "grouped_matmul", "float32", B=1, H=16, T=S // 4, N=128, M=512, P=64))
        found.append(W(f"cpu/merge-{S}", "merge_attention", "float32", B=1, Hq=8, T=S, Dv=64, N=2))
    return found


def for_device(device: int | None) -> list[Workload]:
    prefix = "cpu/" if device is None else "gpu/"
    return [w for w in workloads() if w.name.startswith(prefix)]


def find(name: str) -> Workload:
    for w in workloads():
        if w.name == name:
            return w
    from difflib import get_close_matches
    near = get_close_matches(str(name), [w.name for w in workloads()], 3, 0) or ["cpu/window-256/4096"]
    raise ValueError(f"workload: expected the name of a workload such as {', '.join(near)}, got {name!r}; see sparsetile tune --list")


def of_problem(problem, pattern=None) -> Workload | None:
    """A workload that stands for a problem met in a running program: the same sizes and types on seeded inputs, and its pattern, if that is known, else one of its
    kind and density. None where nothing stands for its features."""
    plain = {"static", "dense", "causal", "lse", "scale", "tail", "shared_kv", "gradient"}
    options, sizes = {}, dict(problem.dims)
    if "static" in problem.features:
        kinds = _of_kind(sizes["S"], problem.density)
        kind = next((word for word in problem.features if word in kinds), None)
        if pattern is None and kind is None:
            return None
        options["pattern"] = kinds[kind] if pattern is None else pattern
        plain |= {options["pattern"].kind}
    if problem.op == "importance_topk":  # what is forced changes nothing of its cost
        plain |= {"force_first", "force_last"}
    if set(problem.features) - plain or problem.op not in TUNED:
        return None
    if problem.op == "importance_topk" and (problem.granularity != 64 or sizes.pop("C") != (sizes["S"] - 32) // 16 + 1):
        return None
    if "dense" in problem.features:
        options["pattern"] = P.Full()
    if "shared_kv" in problem.features:
        options["shared_kv"] = True
    if problem.op.startswith(("indexer", "gather", "selection")):
        options["causal"] = "causal" in problem.features
    if problem.granularity > 1:
        options["pool" if problem.op == "indexer_topk" else "granularity"] = problem.granularity
    if problem.op == "selection_bitmaps":
        options["G"] = sizes["Hq"]
    if problem.op == "block_attention" and problem.dtype("k") == float8.FLOAT8:
        options["keys"] = float8.FLOAT8
    return Workload.of(f"recorded/{problem.op}/" + "-".join(f"{a}{n}" for a, n in problem.dims), problem.op, problem.dtype("q", problem.dtypes[0][1]), options, **sizes)


def _of_kind(S: int, density: float) -> dict:
    """One pattern of each kind that a density alone describes (a bucket's: the pattern's own lies above its half)."""
    reach = max(1, int(S * density))
    side = max(0, reach * 3 // 8 - 64)
    return {"causal": P.Causal(), "window": P.Window(reach - 1), "global+window": P.Window(side, side) | P.Global(range(64)),
            "sinks+window": P.Window(reach - 1) | P.Sink(4), "random": P.RandomBlocks(max(1, reach // 128), 128)}
