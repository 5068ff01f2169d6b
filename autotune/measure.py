"""`sparsetile bench`: workloads timed with the config a call gets, beside the kernel's default and PyTorch's own op, interleaved in one run."""
import numpy as np

from sparsetile.autotune import numeric, tasks, timing
from sparsetile.backends.contract import BACKENDS
from sparsetile.ops import dispatch


def rows(workload, device, seconds: float) -> list[dict]:
    """One row for each backend that runs the workload, each timed in turn with the others and with PyTorch."""
    task = tasks.Task(workload, device)
    problem = task.problem
    watch, calls, labels, refused = timing.Stopwatch(device), [], [], {}
    for name in BACKENDS[:-1]:
        why = dispatch.refusal(name, problem, device)
        if why:
            refused[name] = why
            continue
        calls.append(task.bound(name)), labels.append(name)
        default = _default_besides(task, name)
        if default is not None:
            calls.append(task.bound(name, default)), labels.append(f"{name} (default config)")
    peer = torch_peer(task)
    if peer is not None:
        calls.append(peer), labels.append("torch")
    for call in calls:
        call()
    watch.synchronize()
    found = []
    for name, samples in zip(labels, timing.finals(watch, calls, seconds)):
        time_us = watch.centre(samples)
        row = {"workload": workload.name, "kernel": workload.kernel, "who": name, "time_us": round(time_us, 1), **timing.spread(samples)}
        flops = operations(task)
        if flops:
            row["gflops"] = round(flops / time_us / 1e3, 1)
        found.append(row)
    for name, why in refused.items():
        found.append({"workload": workload.name, "kernel": workload.kernel, "who": name, "refused": why})
    return found


def _default_besides(task, backend) -> dict | None:
    """The kernel's own config where a profile gives the call another."""
    found = task.explain(backend)
    default = dispatch.kernel(backend, found.kernel).default_config(found.problem)
    return None if found.config == default else default


def operations(task) -> float | None:
    """Floating-point operations of the pairs inside the pattern only."""
    w = task.workload
    if w.kernel.startswith("block_attention"):
        pairs = task.inputs[3].pairs(w["T"], w["S"]) * w["B"] * w["Hq"]
        return pairs * (2 * (3 * w["D"] + 2 * w["Dv"]) if w.kernel.endswith("backward") else 2 * (w["D"] + w["Dv"]))
    if w.kernel.startswith("gather_attention"):
        chosen = task.inputs[3]
        pairs = selected_pairs(chosen, w["S"]) * w["Hq"] // chosen.indices.shape[1]
        return pairs * (2 * (3 * w["D"] + 2 * w["Dv"]) if w.kernel.endswith("backward") else 2 * (w["D"] + w["Dv"]))
    if w.kernel in ("indexer_scores", "indexer_topk"):
        return 2.0 * w["B"] * w["H"] * w["T"] * w["S"] * w["D"]
    if w.kernel == "importance_topk":  # of the compressed keys that are seen
        p = w["S"] - w["T"] + np.arange(w["T"])
        return 2.0 * w["B"] * w["Hq"] * w["D"] * int(np.clip((p - 31) // 16 + 1, 0, None).sum())
    if w.kernel == "latent_decompress":
        return 2.0 * w["B"] * w["H"] * w["S"] * w["R"] * (w["Dn"] + w["Dv"])
    if w.kernel == "grouped_matmul":
        return 2.0 * w["B"] * w["H"] * w["T"] * w["N"] * w["M"]
    return None


def traffic(task) -> float | None:
    """Bytes that have to move: each input once, of keys and values at most one for each pair of the pattern, and each output once. None where indices say what is read."""
    w = task.workload
    size = lambda *axes: float(np.prod([w[a] for a in axes]))
    if w.kernel.startswith(("gather", "selection")):
        return None
    read = [x for item in task.inputs for x in (item if isinstance(item, list) else [item]) if hasattr(x, "itemsize")]
    element, total = read[0].itemsize, sum(x.size * x.itemsize for x in read)
    if w.kernel.startswith("block_attention"):
        unseen = 1 - min(w["S"], task.inputs[3].pairs(w["T"], w["S"])) / w["S"]
        total -= unseen * sum(x.size * x.itemsize for x in task.inputs[1:3] if x is not None)
    written = {"block_attention": lambda: size("B", "Hq", "T", "Dv") * max(element, 2), "block_attention_backward": lambda: sum(x.size * element for x in task.inputs[:3] if x is not None),
               "indexer_scores": lambda: size("B", "T", "S") * 4, "latent_decompress": lambda: (size("B", "S", "H") * (w["Dn"] + w["Dv"]) + size("B", "S", "P")) * element,
               "grouped_matmul": lambda: size("B", "H", "T") * (w["M"] + w["P"]) * element, "merge_attention": lambda: size("B", "Hq", "T", "Dv") * element}
    return total + (written[w.kernel]() if w.kernel in written else size("B", "T", "K") * 4)


def selected_pairs(selection, S: int) -> int:
    """Pairs of one list of queries and keys, summed over batch and lists: entries times granularity, cut at S and, if causal, past the query."""
    entries = numeric.to_numpy(selection.indices).astype(np.int64)
    T, g = entries.shape[2], selection.granularity
    last = np.minimum(S, S - T + np.arange(T)[:, None] + 1) if selection.causal else S
    return int(np.where(entries >= 0, np.clip(last - entries * g, 0, g), 0).sum())


def torch_peer(task):
    """The same work in plain PyTorch where it has an op for it, else None."""
    try:
        import torch
    except ImportError:
        return None
    from sparsetile.backends import arrays
    w = task.workload
    if w.kernel == "block_attention" and w["T"] * w["S"] <= 2 ** 28 and w.option("keys") is None:
        q, k, v = (arrays.as_torch(x) for x in task.inputs[:3] if x is not None) if task.inputs[2] is not None else (None,) * 3
        if q is None:
            return None
        rule = task.inputs[3]
        causal = rule == tasks.P.Causal()
        mask = None if causal else torch.from_numpy(rule.mask(w["T"], w["S"])).to(q.device)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: sdpa(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=w["Hq"] != w["Hk"])
    if w.kernel == "topk":
        scores = arrays.as_torch(task.inputs[0])
        return lambda: torch.topk(scores, w["K"], dim=-1)
    if w.kernel == "latent_decompress":
        latent, w_uk, w_uv = (arrays.as_torch(x) for x in task.inputs[:3])
        both = torch.cat((w_uk, w_uv), -1).permute(1, 0, 2).reshape(w["R"], -1).contiguous()
        return lambda: latent @ both
    return None


def table(found: list[dict]) -> str:
    lines = [f"{'workload':42} {'who':24} {'time':>12} {'p20 .. p80':>24} {'GFLOP/s':>10}"]
    for r in found:
        if "refused" not in r:
            spread = f"{r['p20'] / 1e3:.3f} .. {r['p80'] / 1e3:.3f}"
            lines.append(f"{r['workload']:42} {r['who']:24} {r['time_us'] / 1e3:9.3f} ms {spread:>24} {r.get('gflops', ''):>10}")
    refused = {(r["who"], r["refused"]): None for r in found if "refused" in r}
    return "\n".join(lines + [f"not timed: {who}: {why}" for who, why in refused])
