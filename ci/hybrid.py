"""`sparsetile plan --run`: a real model reads a real text, every layer attending as a plan says.

The model is the demo's, all-MiniLM-L6-v2 (6 layers, bidirectional), trained dense: what a plan does to its answer is a property of this model, not of systems trained with
theirs. Indexers are fitted to each layer's dense attention on other windows, as in the demo.
"""
from contextlib import contextmanager

from sparsetile.ci import demo
from sparsetile.ops.pattern import Pattern
from sparsetile.ops.plan import Call, LayerPlan, Selector

FITTED, READ = 8, 4  # windows of 512 tokens


def plans(layers: int = 6) -> dict:
    """Plans for the model: any system per layer, dense last; the first is dense throughout."""
    import sparsetile as st
    near, last = st.longformer(64, globals=range(8)), layers - 1
    return {"dense": LayerPlan.of([(range(layers), st.Full())]),
            "windows": LayerPlan.of([(range(layers), st.Window(32, 32))]),
            "windows, dense last": LayerPlan.of([(range(last), st.Window(32, 32)), (last, st.Full())]),
            "Longformer, selection, Longformer, dense last": LayerPlan.of([(range(0, 2), near), (range(2, last - 1), Selector(top_k=64, causal=False)),
                                                                           (last - 1, near), (last, st.Full())]),
            "exact top-64, dense last": LayerPlan.of([(range(last), Selector("topk", top_k=64, causal=False)), (last, st.Full())]),
            "Performer, dense last": LayerPlan.of([(range(last), Call("performer_attention", features=256)), (last, st.Full())]),
            "linear, dense last": LayerPlan.of([(range(last), Call("linear_attention")), (last, st.Full())])}


def attend(rule, q, k, v, hidden, indexer):
    """One layer's attention [W,H,T,D] under a rule; hidden is the layer's input, indexer its fitted weights."""
    import sparsetile as st
    if isinstance(rule, Pattern):
        return st.sparse_attention(q, k, v, rule)
    if isinstance(rule, Call):
        return rule.run(q, k, v)
    if rule.kind == "topk":
        return st.exact_topk(q, k, v, top_k=rule.top_k, causal=rule.causal)
    return st.sparse_attention(q, k, v, st.indexer_topk(*(x.contiguous() for x in demo.project(hidden, indexer)), **rule.arguments()))


@contextmanager
def planned(model, plan, indexers):
    """The model with the attention of layer n computed by plan[n], inside this context. indexers: weights of each layer's, or None where no selector needs them."""
    import torch
    layers = model.encoder.layer
    if len(plan) != len(layers):
        raise ValueError(f"plan: expected one of the model's {len(layers)} layers, got one of {len(plan)}; give every layer its rule")

    class Planned(torch.nn.Module):
        def __init__(self, own, rule, indexer):
            super().__init__()
            self.own, self.rule, self.indexer = own, rule, indexer

        def forward(self, hidden, *args, **kwargs):
            heads = model.config.num_attention_heads, -1
            q, k, v = (x(hidden).unflatten(-1, heads).transpose(1, 2).contiguous() for x in (self.own.query, self.own.key, self.own.value))
            return attend(self.rule, q, k, v, hidden, self.indexer).transpose(1, 2).flatten(2), None
    own = [layer.attention.self for layer in layers]
    try:
        for n, layer in enumerate(layers):
            layer.attention.self = Planned(own[n], plan[n], indexers[n])
        yield model
    finally:
        for layer, attention in zip(layers, own):
            layer.attention.self = attention


def run(chosen: dict, say=print) -> list[dict]:
    """For each plan: how far the last layer's output, and the text's embedding (its mean), are from the dense model's."""
    import torch
    say(f"reading {FITTED + READ} windows of {demo.WINDOW} tokens of Alice's Adventures in Wonderland with all-MiniLM-L6-v2 ...")
    q, k, _, hidden = demo.read(FITTED + READ)
    needs = {n for plan in chosen.values() for n, rule in enumerate(plan) if isinstance(rule, Selector) and rule.kind == "indexer_topk"}
    indexers = [demo.fit(q[n, :FITTED], k[n, :FITTED], hidden[n, :FITTED]) if n in needs else None for n in range(len(q))]
    model, ids = demo.load(FITTED + READ)
    answers, ids = {}, ids[FITTED:]
    with torch.no_grad():
        for name, plan in {"dense": plans(len(q))["dense"], **chosen}.items():
            with planned(model, plan, indexers):
                answers[name] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state  # [W,512,384]
    dense = answers["dense"]
    cosine = lambda x: torch.nn.functional.cosine_similarity(x.mean(1), dense.mean(1), dim=-1).mean().item()  # noqa: E731
    return [{"plan": name, "error": ((answers[name] - dense).norm() / dense.norm()).item(), "cosine": cosine(answers[name])} for name in chosen]


def main(path, as_json=False, say=print) -> int:
    """Prints, for each plan, cost and reach at the model's own windows, then what it did to the answer."""
    import json
    import sys
    from importlib.util import find_spec

    from sparsetile.catalogue import plans as costs
    from sparsetile.catalogue.system import Shape
    missing = [package for module, package in demo.NEEDS.items() if find_spec(module) is None]
    if missing:
        print(f"sparsetile plan --run needs {', '.join(missing)}: pip install 'sparsetile[demo]'", file=sys.stderr)
        return 1
    chosen = {path: costs.read(path)} if path else plans()
    shape = Shape(Hq=12, Hk=12, D=32, Hi=4, Di=32, dtype="float32")
    before = {name: costs.report(plan, demo.WINDOW, shape) for name, plan in chosen.items()}
    rows = run(chosen, (lambda line: None) if as_json else say)
    if as_json:
        print("\n".join(json.dumps(row | before[row["plan"]]) for row in rows))
        return 0
    dense = costs.report(plans()["dense"], demo.WINDOW, shape)["operations"]
    say(f"{'plan':48}{'operations':>12}{'reach, sure / best':>20}{'error':>9}{'cosine':>9}")
    for row in rows:
        cost = before[row["plan"]]
        reach = f"{cost['reach']['surely'] or '-'} / {cost['reach']['at_best'] or '-'}"
        say(f"{row['plan']:48}{cost['operations'] / dense:12.1%}{reach:>20}{row['error']:9.3f}{row['cosine']:9.3f}")
    say(f"\noperations   of dense attention's, attention only, at {demo.WINDOW} tokens\n"
        "reach        layers until every position has heard of every other: whatever is chosen / at best\n"
        "error        |output - dense output| / |dense output| of the last layer, over held-out windows\ncosine       of the window's embedding with the dense one's")
    return 0
