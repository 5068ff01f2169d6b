"""Layer plans: which pattern, selector or other call each layer of a model uses, as plain data."""
from dataclasses import dataclass, fields
from importlib import import_module

import numpy as np

from sparsetile.ops.patterns import Pattern, integer, shown

_PACKAGE = __name__.rpartition(".ops.")[0]


@dataclass(frozen=True)
class Selector:
    """How a layer chooses its keys by content: the arguments that indexer_topk (or topk, over scores of the model's own) will get.

    kind   "indexer_topk" or "topk"; top_k entries a query; pool keys per entry; the first and last force_* blocks are always taken
    """
    kind: str = "indexer_topk"
    top_k: int = 2048
    pool: int = 1
    force_first: int = 0
    force_last: int = 0
    causal: bool = True

    def __post_init__(self):
        if self.kind not in ("indexer_topk", "topk"):
            raise ValueError(f'Selector: kind must be "indexer_topk" or "topk", got {shown(self.kind)}; choose one of these')
        for name, least in (("top_k", 1), ("pool", 1), ("force_first", 0), ("force_last", 0)):
            object.__setattr__(self, name, integer("Selector", name, getattr(self, name), least))
        if not isinstance(self.causal, bool):
            raise TypeError(f"Selector: causal must be True or False, got {shown(self.causal)}; pass a bool")

    def sure(self, T: int) -> np.ndarray:
        """[T,T] booleans: the keys that it takes whatever the scores are: forced blocks, and all where there are no more than top_k."""
        p, blocks = np.arange(T)[:, None], np.arange(T) // self.pool
        visible = p // self.pool + 1 if self.causal else -(-T // self.pool)  # blocks that a query sees
        return ((visible <= self.top_k) | (blocks < self.force_first) | (blocks >= visible - self.force_last)) & ((np.arange(T) <= p) | (not self.causal))

    def arguments(self) -> dict:
        """Keyword arguments for the op named by `kind`."""
        return {"top_k": self.top_k} | ({} if self.kind == "topk" else {name: getattr(self, name) for name in ("pool", "force_first", "force_last", "causal")})

    def to_data(self):
        """Plain data: the kind and what differs from its defaults."""
        return {"kind": self.kind, "top_k": self.top_k} | {f.name: getattr(self, f.name) for f in fields(self)[2:] if getattr(self, f.name) != f.default}

    @classmethod
    def from_data(cls, data, where="selector") -> "Selector":
        """The selector of plain data, checked."""
        names = [f.name for f in fields(cls)]
        if not isinstance(data, dict) or not set(data) <= set(names):
            raise ValueError(f"{where}: expected fields {names}, got {shown(data)}; see Selector.to_data")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True, init=False)
class Call:
    """A layer that calls a public function of sparsetile as function(q, k, v, **arguments), e.g. Call("performer_attention", features=128, causal=True).

    function   its name; arguments: numbers, words, True, False or None. It is looked up when the plan runs
    """
    function: str
    arguments: tuple

    def __init__(self, function: str, **arguments):
        if not isinstance(function, str) or not function.isidentifier():
            raise ValueError(f'Call: function must be the name of a public function, got {shown(function)}; e.g. "performer_attention"')
        for name, value in arguments.items():
            if not isinstance(value, (bool, int, float, str, type(None))):
                raise TypeError(f"Call: {name} must be a number, a word, True, False or None, got {shown(value)}; arrays are no part of a plan")
        object.__setattr__(self, "function", function), object.__setattr__(self, "arguments", tuple(sorted(arguments.items())))

    @property
    def causal(self) -> bool:
        return bool(dict(self.arguments).get("causal", False))

    def run(self, q, k, v):
        """What the function answers."""
        face = import_module(_PACKAGE)
        if self.function not in face.__all__:
            raise ValueError(f"Call: function must be a public function of sparsetile, got {self.function!r}; see sparsetile.__all__")
        return getattr(face, self.function)(q, k, v, **dict(self.arguments))

    def __repr__(self):
        return f"{self.function}({', '.join(f'{name}={value!r}' for name, value in self.arguments)})"

    def to_data(self):
        """Plain data: the function and its arguments."""
        return {"function": self.function, **dict(self.arguments)}

    @classmethod
    def from_data(cls, data, where="call") -> "Call":
        """The call of plain data, checked."""
        if not isinstance(data, dict) or "function" not in data or any(not isinstance(name, str) for name in data):
            raise ValueError(f"{where}: expected function and its arguments, got {shown(data)}; see Call.to_data")
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


@dataclass(frozen=True)
class LayerPlan:
    """One pattern, selector or call per layer. `plan[layer]` is it; equal plans are equal and hash alike; YAML round trip.

        LayerPlan.of([(range(0, 11), longformer(512)), (range(11, 21), Selector(top_k=2048)), (range(21, 31), longformer(512)), (31, dense())])
    """
    rules: tuple

    @classmethod
    def of(cls, entries) -> "LayerPlan":
        """From (layers, rule) pairs: layers an integer or a collection of them, together 0 .. n - 1, each once; rule a Pattern, a Selector or a Call."""
        found = {}
        if not isinstance(entries, (list, tuple)) or any(not isinstance(entry, (list, tuple)) or len(entry) != 2 for entry in entries):
            raise TypeError(f"LayerPlan: expected a list of pairs (layers, rule), got {shown(entries)}; e.g. [(range(12), Causal())]")
        for layers, rule in entries:
            if not isinstance(rule, (Pattern, Selector, Call)):
                raise TypeError(f"LayerPlan: layers {layers} must have a Pattern, a Selector or a Call, got {type(rule).__name__}; e.g. Causal() or Selector(top_k=2048)")
            for layer in layers if hasattr(layers, "__iter__") else (layers,):
                layer = integer("LayerPlan", "layer", layer)
                if layer in found:
                    raise ValueError(f"LayerPlan: expected every layer once, layer {layer} is given twice; leave one out")
                found[layer] = rule
        missing = sorted(set(range(len(found))) - set(found))
        if missing:
            raise ValueError(f"LayerPlan: layers must be 0 .. n - 1, layer {missing[0]} is missing and layer {max(found)} is given; give every layer once")
        return cls(tuple(found[layer] for layer in range(len(found))))

    def __len__(self):
        return len(self.rules)

    def __iter__(self):
        return iter(self.rules)

    def __getitem__(self, layer: int):
        return self.rules[layer]

    def runs(self):
        """(first, last, rule) of layers in a row that are alike."""
        start = 0
        for layer in range(1, len(self.rules) + 1):
            if layer == len(self.rules) or self.rules[layer] != self.rules[start]:
                yield start, layer - 1, self.rules[start]
                start = layer

    def __str__(self):
        return "\n".join(f"layers {a}-{b}: {rule!r}" if b > a else f"layer {a}: {rule!r}" for a, b, rule in self.runs())

    def hops(self, T: int, chosen: str = "none") -> int | None:
        """Layers of this plan, from the first, until every position has heard of every other, or, where no layer sees later keys, of every earlier one; None if it never has.

        chosen   "none": what content decides shows only what it is sure to (Selector.sure), and a Call nothing: the plan reaches this far for every text.
                 "any": a choice may fall on any key, a Call's summary holds them all: no text reaches farther
        As in Pattern.hops a layer keeps what a position has; here the layers come in their order, each once.
        """
        from sparsetile.ops.counting import hops_in_order
        if chosen not in ("none", "any"):
            raise ValueError(f'chosen: expected "none" or "any", got {shown(chosen)}; choose one of these')
        T = integer("hops", "T", T, 1)
        return hops_in_order((_edges(rule, T, chosen) for rule in self.rules), all(_is_causal(rule, T) for rule in self.rules), T)

    def pairs(self, T: int, S: int) -> int:
        """(query, key) pairs of all layers, one head each; a selector counts top_k * pool keys a query (no more than there are, nor than causality shows), a call none."""
        total = 0
        for a, b, rule in self.runs():
            if isinstance(rule, Pattern):
                total += (b - a + 1) * rule.pairs(T, S) // len(rule.head_map())
            elif isinstance(rule, Selector):
                most = rule.top_k * rule.pool
                total += (b - a + 1) * sum(min(most, max(0, S - T + t + 1) if rule.causal else S) for t in range(T))
        return total

    def to_data(self):
        """A list of {layers: [first, last], pattern: ...}, {layers: ..., selector: ...} or {layers: ..., call: ...}."""
        return [{"layers": [a, b], _word(rule): rule.to_data()} for a, b, rule in self.runs()]

    @classmethod
    def from_data(cls, data) -> "LayerPlan":
        """The plan of plain data, checked entry by entry."""
        from sparsetile.ops.notation import from_data
        if not isinstance(data, list):
            raise ValueError(f"plan: expected a list of {{layers: [first, last], pattern: ...}}, got {type(data).__name__}; see LayerPlan.to_data")
        entries = []
        for n, entry in enumerate(data):
            where = f"plan[{n}]"
            if not isinstance(entry, dict) or set(entry) not in ({"layers", "pattern"}, {"layers", "selector"}, {"layers", "call"}):
                raise ValueError(f"{where}: expected layers and one of pattern, selector and call, got {shown(entry)}; see LayerPlan.to_data")
            layers = entry["layers"]
            layers = [layers, layers] if type(layers) is int else layers
            if not isinstance(layers, list) or len(layers) != 2 or any(type(x) is not int for x in layers) or not 0 <= layers[0] <= layers[1] < 2 ** 20:
                raise ValueError(f"{where}.layers: expected a layer or [first, last], got {shown(entry['layers'])}; count from 0")
            word = next(word for word in entry if word != "layers")
            rule = {"pattern": from_data, "selector": Selector.from_data, "call": Call.from_data}[word](entry[word], f"{where}.{word}")
            entries.append((range(layers[0], layers[1] + 1), rule))
        return cls.of(entries)

    def to_yaml(self) -> str:
        """YAML text that `LayerPlan.from_yaml` turns back into an equal plan."""
        import yaml
        return yaml.safe_dump(self.to_data(), sort_keys=False, default_flow_style=None, width=120)

    @classmethod
    def from_yaml(cls, text: str) -> "LayerPlan":
        """The plan of a YAML text: safe loader, no aliases, size limit, schema checked."""
        from sparsetile.ops.notation import load_yaml
        return cls.from_data(load_yaml(text, "plan"))


def _word(rule) -> str:
    return "pattern" if isinstance(rule, Pattern) else "selector" if isinstance(rule, Selector) else "call"


def _is_causal(rule, T: int) -> bool:
    return not any(np.triu(part.mask(T, T), 1).any() for part in rule.rules()) if isinstance(rule, Pattern) else rule.causal


def _edges(rule, T: int, chosen: str) -> np.ndarray:
    """[T,T] booleans: from which keys a layer of this rule brings something to a position, itself always."""
    if isinstance(rule, Pattern):
        seen = np.logical_or.reduce([part.mask(T, T) for part in rule.rules()])
    elif chosen == "any":
        seen = np.tri(T, dtype=bool) if rule.causal else np.ones((T, T), bool)
    else:
        seen = rule.sure(T) if isinstance(rule, Selector) else np.zeros((T, T), bool)
    return seen | np.eye(T, dtype=bool)
