"""`sparsetile plan`: what a plan of layers reaches and costs, computed before anything runs."""
from dataclasses import replace
from inspect import signature
from pathlib import Path

import sparsetile as st
from sparsetile.catalogue import calls, page
from sparsetile.catalogue.entries import SYSTEMS
from sparsetile.catalogue.system import GPU, Shape
from sparsetile.ops.pattern import Pattern
from sparsetile.ops.patterns import Causal, Window
from sparsetile.ops.plan import Call, LayerPlan, Selector

FARTHEST = 4096  # reach is followed over so many positions at most: it holds sets of all of them


def report(plan: LayerPlan, N: int, shape: Shape = GPU) -> dict:
    """Reach and cost over a sequence of N tokens. layers: one row for each run of equal layers, figures of one layer; operations of the whole forward; reads: bytes that
    one more token reads; of_dense: the share of causal dense attention's operations in every layer."""
    rows, near = [], min(N, FARTHEST)
    for first, last, rule in plan.runs():
        rows.append({"first": first, "last": last, "rule": repr(rule), "operations": operations(rule, N, shape), "reads": reads(rule, N, shape)})
    total = lambda name: sum(row[name] * (row["last"] - row["first"] + 1) for row in rows)  # noqa: E731
    dense = Causal().flops(N, N, shape.Hq, shape.D) * len(plan)
    return {"tokens": N, "layers": rows, "operations": total("operations"), "of_dense": total("operations") / dense, "reads": total("reads"),
            "reach": {"positions": near, "surely": plan.hops(near), "at_best": plan.hops(near, chosen="any")}}


def operations(rule, N: int, shape: Shape) -> int:
    """Floating-point operations of one layer's forward, all heads; a selector's scores are those of an indexer, or of the attention itself (kind topk)."""
    if isinstance(rule, Pattern):
        return rule.flops(N, N, shape.Hq, shape.D)
    if isinstance(rule, Call):
        count = calls.COUNTS.get(rule.function)
        return _system(rule).operations(_sized(rule, shape), N) if count is None else count(shape, N, **_knobs(rule, count))
    scored = N * (N + 1) // 2 if rule.causal else N * N
    heads, width = (shape.Hi, shape.Di) if rule.kind == "indexer_topk" else (shape.Hq, shape.D)
    return 2 * scored * heads * width + 4 * LayerPlan((rule,)).pairs(N, N) * shape.Hq * shape.D


def reads(rule, N: int, shape: Shape) -> int:
    """Bytes of its cache that one layer reads for one more token: the keys and values seen, an indexer's keys (kind topk: all keys), or what a called system keeps."""
    key = 2 * shape.Hk * shape.D * shape.itemsize
    if isinstance(rule, Pattern):
        return rule.pairs(1, N) * key // len(rule.head_map())
    if isinstance(rule, Call):
        return _system(rule).cache(_sized(rule, shape), N)
    scored = N * (shape.Di + 4) if rule.kind == "indexer_topk" else N * key // 2
    return min(rule.top_k * rule.pool, N) * key + scored


def _system(rule: Call):
    """The catalogue's entry of a called function."""
    found = next((system for system in SYSTEMS if f"st.{rule.function}(" in system.call and rule.function != "sparse_attention"), None)
    if found is None:
        raise ValueError(f"call: expected a function that the catalogue has an entry for, got {rule.function!r}; add one to catalogue/entries.py")
    return found


def _knobs(rule: Call, count) -> dict:
    """What the call is counted by: its own arguments, else the function's defaults."""
    known = {name: knob.default for name, knob in signature(getattr(st, rule.function)).parameters.items()} | dict(rule.arguments)
    return {name: known[name] for name, knob in signature(count).parameters.items() if knob.kind is knob.KEYWORD_ONLY}


def _sized(rule: Call, shape: Shape) -> Shape:
    return replace(shape, M=dict(rule.arguments).get("features", shape.M))


def read(path: str) -> LayerPlan:
    return LayerPlan.from_yaml(Path(path).read_text())


def example() -> LayerPlan:
    """The hybrid that the field's surveys draw: near text first, any key in the middle, near text again, dense last."""
    near = Window(511)
    return LayerPlan.of([(range(0, 11), near), (range(11, 21), Selector(top_k=2048)), (range(21, 31), near), (31, Causal())])


def text(r: dict) -> str:
    lines = [f"{'layers':10}{'operations a layer':>20}{'read for one more token':>26}  rule"]
    for row in r["layers"]:
        numbers = f"{row['first']}-{row['last']}" if row["last"] > row["first"] else str(row["first"])
        lines.append(f"{numbers:10}{page.shown(row['operations'], 'FLOP'):>20}{page.shown(row['reads'], 'B'):>26}  {row['rule']}")
    reach = r["reach"]
    far = lambda layers: "never in this plan" if layers is None else f"after {layers} layers"  # noqa: E731
    cost = f"{page.shown(r['operations'], 'FLOP')}, {r['of_dense']:.3g} of dense; one more token reads {page.shown(r['reads'], 'B')}"
    return "\n".join([*lines, "", f"{r['tokens']:,} tokens: {cost}",
                      f"over {reach['positions']:,} positions everything is reached: surely {far(reach['surely'])}, at best {far(reach['at_best'])}"])
