"""Correct before timed: a backend's config against the float64 formula at a small, odd size with the same features."""
import numpy as np

from sparsetile.autotune import numeric, plain
from sparsetile.autotune.tasks import Task, outputs
from sparsetile.backends import arrays
from sparsetile.ops.float8 import GROUP


class Verifier:
    """The truth for one workload's small twin, made once; `wrong(backend, config)` judges a config by it. `error`: how far off the last right one was, against what the policy
    allows, of the output that used most of it; None for chosen indices, which are right or not."""

    error = None

    def __init__(self, workload, device: int | None, seed: int = 1):
        self.workload = workload.small()
        self.host = Task(self.workload, None, seed, forward="reference")  # another would compile for a quarter of a minute
        self.task = self.host if device is None else _moved(self.host, device)
        self.truth = _answers(self.host, np.float64)
        self.plain = _answers(self.host, None)

    def wrong(self, backend: str, config: dict) -> str | None:
        """None if the config answers within the numeric policy, else what was wrong."""
        got = [numeric.to_numpy(x) for x in outputs(self.task.bound(backend, config)())]
        kernel, x, self.error = self.workload.kernel, self.host.inputs, None
        reports = []
        try:
            if kernel == "topk":
                length = (got[0] >= 0).sum(-1).astype(np.int32)
                numeric.assert_topk(kernel, got[0][:, 0], length[:, 0], x[0], self.workload["K"])
                return None
            if kernel == "importance_topk":
                length = (got[0] >= 0).sum(-1).astype(np.int32)
                forced, seen = plain.forced_blocks(self.workload, np.arange(self.workload["T"]))
                numeric.assert_chosen(kernel, got[0], length, self.truth[0], self.plain[0], self.workload["K"], visible=seen, forced=forced,
                                      reduction=self.workload["D"] * self.workload["Hq"] // self.workload["Hk"])
                return None
            if kernel == "selection_bitmaps":
                return None if np.array_equal(plain.seen_by_bits(*got, self.workload["T"], self.workload["S"]), self.truth[0]) else "bits of other keys than the selection's"
            if kernel == "indexer_topk":
                length = (got[0] >= 0).sum(-1).astype(np.int32)
                numeric.assert_chosen(kernel, got[0][:, 0], length[:, 0], self.truth[0], self.plain[0], self.workload["K"], visible=np.isfinite(self.truth[0]),
                                      reduction=self.workload["D"] * self.workload["H"], accumulator="float8" if "float8" in self.workload.dtype else "float32")
                return None
            for n, (g, t, p) in enumerate(zip(got, self.truth, self.plain)):
                reports.append(numeric.assert_close(f"{kernel}[{n}]", g, t, p, reduction=_reduction(self.workload), accumulator="float8" if "float8" in self.workload.dtype else "float32"))
        except AssertionError as error:
            return str(error)
        worst = max(reports, key=lambda r: r["max"] / max(r["max_allowed"], 1e-300))
        self.error = {"max": float(f"{worst['max']:.3g}"), "allowed": float(f"{worst['max_allowed']:.3g}")}
        return None


def _reduction(workload) -> int:
    return max(size for axis, size in workload.sizes if axis in ("S", "T", "D", "R", "N", "H", "Dv"))


def _moved(task: Task, device: int) -> Task:
    """The same task with its inputs on a GPU, as torch tensors."""
    import torch
    from dataclasses import fields, is_dataclass, replace

    def move(x):
        if isinstance(x, (list, tuple)):
            return type(x)(move(y) for y in x)
        if isinstance(x, np.ndarray):
            return arrays.as_torch(np.ascontiguousarray(x)).to(f"cuda:{device}")
        if is_dataclass(x) and hasattr(x, "indices"):
            return replace(x, **{f.name: move(getattr(x, f.name)) for f in fields(x) if isinstance(getattr(x, f.name), np.ndarray)})
        return x
    moved = object.__new__(Task)
    moved.workload, moved.device, moved.inputs = task.workload, device, move(task.inputs)
    assert torch.cuda.is_available()
    return moved


def _wide(x, dtype):
    return x if x is None or dtype is None else x.astype(dtype)


def _answers(task: Task, dtype) -> list:
    """The textbook formula on the task's host inputs, upcast to `dtype` or as they are."""
    w, x = task.workload, task.inputs
    if w.kernel == "topk":
        return []
    if w.kernel == "selection_bitmaps":
        return [_count(*x, w).reshape(-1, w["T"], w["S"]) > 0]  # a list for each head
    if w.kernel == "importance_topk":
        return [plain.importances(w, *(_wide(a, dtype) for a in x), np.arange(w["T"]))]
    if w.kernel in ("indexer_scores", "indexer_topk"):
        q, k, weights, k_scale = (_wide(a, dtype) for a in x)
        T, S = w["T"], w["S"]
        visible = np.ones((T, S), bool) if not w.option("causal", True) else np.arange(S)[None] <= (S - T + np.arange(T))[:, None]
        scores = plain.indexer_scores(*(a if dtype is None else a.astype(np.float64) for a in (q, k, weights)), k_scale=k_scale, visible=visible) if dtype is None \
            else _scores64(q, k, weights, k_scale, visible)
        if w.option("pool", 1) > 1:
            g = w.option("pool")
            scores = np.pad(scores, ((0, 0), (0, 0), (0, -S % g)), constant_values=-np.inf).reshape(w["B"], T, -1, g).max(-1)
        return [scores]
    if w.kernel == "indexer_scores_backward":
        q, k, weights, k_scale, dscores = x
        visible = None if not w.option("causal", True) else np.arange(w["S"])[None] <= (w["S"] - w["T"] + np.arange(w["T"]))[:, None]
        if dtype is None:
            return list(plain.indexer_gradients(q, k, weights, dscores, k_scale=k_scale, visible=visible))
        q, k, weights, k_scale, g = (_wide(a, dtype) for a in x)
        g = np.where(True if visible is None else visible, g if k_scale is None else g * k_scale[:, None], 0)
        dots = np.einsum("bhtd,bsd->bhts", q, k)
        da = (dots > 0) * g[:, None] * weights[..., None]
        return [np.einsum("bhts,bsd->bhtd", da, k), np.einsum("bhts,bhtd->bsd", da, q), np.einsum("bts,bhts->bht", g, np.maximum(dots, 0))]
    if w.kernel == "latent_decompress":
        latent, w_uk, w_uv, rope = (_wide(a, dtype) for a in x)
        return list(plain.latent_decompress(latent, w_uk, w_uv, k_rope=rope))
    if w.kernel == "grouped_matmul":
        a, b, tail = (_wide(y, dtype) for y in x)
        return [plain.grouped_matmul(a, b, tail=tail)]
    if w.kernel == "merge_attention":
        return [plain.merge_attention([_wide(o, dtype) for o in x[0]], [_wide(e, dtype) for e in x[1]])[0]]
    q, k, v, rule = x[:4]
    q, k, v = _wide(q, dtype), _wide(k, dtype), _wide(k[..., :w["Dv"]] if v is None else v, dtype)
    scale = w["D"] ** -0.5 if w.option("scale") is None else w.option("scale")
    count = _count(rule, w)
    if not w.kernel.endswith("_backward"):
        scales = dict(zip(("q_scale", "k_scale", "v_scale"), x[4:]))
        if scales and dtype:
            q, k, v, scales = *_scaled(q, k, v, **scales), {}
        return [plain.attention(q, k, v, count, scale=scale, softcap=w.option("softcap"), **scales)[0]]
    dq, dk, dv, _ = plain.attention_gradients(q, k, v, count, _wide(x[6], dtype), scale=scale, softcap=w.option("softcap"))
    if x[2] is None:
        dk = dk.astype(np.float64 if dtype else np.float32)
        dk[..., :w["Dv"]] += dv
        return [dq, dk.astype(k.dtype)]
    return [dq, dk, dv]


def _scaled(q, k, v, q_scale, k_scale, v_scale):
    """float8 operands as what they stand for."""
    k, v = (x * np.repeat(scale, GROUP, 2)[:, :, :x.shape[2], None] for x, scale in ((k, k_scale), (v, v_scale)))
    return q if q_scale is None else q * q_scale[..., None], k, v


def _scores64(q, k, weights, k_scale, visible):
    x = np.einsum("bhtd,bsd->bhts", q, k)
    total = (np.maximum(x, 0) * weights[..., None]).sum(1)
    return np.where(visible, total if k_scale is None else total * k_scale[:, None], -np.inf)


def _count(rule, w):
    """How often each query sees each key: [.., T, S]."""
    T, S = w["T"], w["S"]
    if not hasattr(rule, "indices"):
        mask = rule.mask(T, S)
        return mask.astype(int)
    B, G = rule.indices.shape[:2]
    count = np.zeros((B, G, T, S), int)
    g = rule.granularity
    for b, n, t in np.ndindex(B, G, T):
        for e in rule.indices[b, n, t]:
            if e >= 0:
                top = min(S, e * g + g, S - T + t + 1) if rule.causal else min(S, e * g + g)
                count[b, n, t, e * g:top] += 1
    return np.repeat(count, w["Hq"] // G, 1)
