"""Patterns as text and as plain data: one canonical line (also a Python expression), and dicts and lists for YAML.

Nothing is executed when reading: the text is parsed by `ast` and only pattern names, numbers, None, booleans, lists, tuples, ranges and the
operators `&`, `|`, `~` are understood; data is checked entry by entry.
"""
import ast
import base64
import operator
import zlib

import numpy as np

from sparsetile.ops import patterns as pt

_LIMIT = 16 * 2 ** 20  # characters of one pattern's text: a block mask of 8192 x 8192 fits


# ------------------------------------------------------------------------------------------------ writing
def write(pattern: pt.Pattern) -> str:
    """The canonical line."""
    return _WRITERS[type(pattern)](pattern)


def _inner(pattern) -> str:
    return f"({pattern._text})" if isinstance(pattern, (pt.And, pt.Or)) else pattern._text


def _window(w):
    if w == (None, None, 1):
        return "Full()"
    return "Causal()" if w == (None, 0, 1) else f"Window({w[0]}, {w[1]}" + (f", block={w[2]})" if w[2] != 1 else ")")


def _tokens(g):
    runs = [f"range({lo}, {hi})" if hi - lo > 1 else str(lo) for lo, hi in g.runs]
    if len(runs) == 1 and "range" in runs[0]:
        return runs[0]
    return "[" + ", ".join("*" + run if run.startswith("range") else run for run in runs) + "]"


def pack(mask: np.ndarray) -> str:
    """A boolean array as text: shape, then its bits, compressed, in base 64."""
    return "x".join(map(str, mask.shape)) + ":" + base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    """The boolean array of `pack`; ValueError where the text is not one."""
    try:
        head, _, body = text.partition(":")
        shape = tuple(int(n) for n in head.split("x"))
        size = int(np.prod(shape, dtype=object))
        if min(shape) < 0 or size > 8 * _LIMIT:
            raise ValueError("too large")
        decoder = zlib.decompressobj()
        bits = np.frombuffer(decoder.decompress(base64.b64decode(body, validate=True), (size + 7) // 8 + 1), np.uint8)
        if len(bits) != (size + 7) // 8:
            raise ValueError("wrong length")
        return np.unpackbits(bits, count=size).astype(bool).reshape(shape)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"Blocks: the packed mask {text[:40]!r} cannot be read ({error}); write it with canonical() or to_yaml()") from None


_WRITERS = {
    pt.Window: lambda p: _window((p.left, p.right, p.block)),
    pt.Dilated: lambda p: f"Dilated({p.left}, {p.right}, {p.step})",
    pt.Strided: lambda p: f"Strided({p.stride})",
    pt.Compressed: lambda p: f"Compressed({p.block}, {p.stride})",
    pt.Fixed: lambda p: f"Fixed({p.stride}, {p.summary})",
    pt.Global: lambda p: f"Global({_tokens(p)}" + (")" if p.symmetric else ", symmetric=False)"),
    pt.Sink: lambda p: f"Sink({p.n})",
    pt.RandomBlocks: lambda p: f"RandomBlocks({p.count}, {p.block}, seed={p.seed}" + (", causal=True" if p.causal else "")
    + (f", exclude=[{', '.join(part._text for part in p.exclude)}])" if p.exclude else ")"),
    pt.Blocks: lambda p: f"Blocks({pack(p.mask_bits)!r}, {p.block_q}, {p.block_k})",
    pt.Documents: lambda p: f"Documents({list(p.lengths)})",
    pt.PerHead: lambda p: f"PerHead([{', '.join(part._text for part in p.patterns)}])",
    pt.And: lambda p: " & ".join(map(_inner, p.parts)),
    pt.Or: lambda p: " | ".join(map(_inner, p.parts)),
    pt.Not: lambda p: "~" + _inner(p.part),
}

# ------------------------------------------------------------------------------------------------ reading
_NAMES = {name: getattr(pt, name) for name in (
    "Full", "Causal", "Window", "Dilated", "Strided", "Compressed", "Fixed", "Global", "Sink", "RandomBlocks", "Documents", "PerHead")}
_NAMES["Blocks"] = lambda mask, *args, **kwargs: pt.Blocks(unpack(mask) if isinstance(mask, str) else np.asarray(mask), *args, **kwargs)
_OPERATORS = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}


def read(text: str) -> pt.Pattern:
    """The pattern of one line of text; ValueError with the offending piece."""
    if not isinstance(text, str):
        raise TypeError(f"pattern: expected text such as 'Causal() & Window(127)', got {type(text).__name__}; give canonical()")
    if len(text) > _LIMIT:
        raise ValueError(f"pattern: text of {len(text)} characters, expected at most {_LIMIT}; pass the pattern's layout instead")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        pattern = _value(tree)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"pattern: cannot read {text[:80]!r} ({type(error).__name__}); expected text such as 'Causal() & (Window(127) | Strided(128))'") from None
    if not isinstance(pattern, pt.Pattern):
        raise ValueError(f"pattern: expected a pattern, got {text[:80]!r}; write for example 'Causal()'")
    return pattern


def _value(node):
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (bool, int, str))):
        return node.value
    if isinstance(node, (ast.List, ast.Tuple)):
        items = []
        for item in node.elts:
            if isinstance(item, ast.Starred):
                items.extend(_value(item.value))
            else:
                items.append(_value(item))
        return items
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left), _value(node.right)
        if isinstance(left, pt.Pattern) and isinstance(right, pt.Pattern):
            return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        inner = _value(node.operand)
        if isinstance(inner, pt.Pattern):
            return ~inner
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
        args = [_value(a) for a in node.args]
        kwargs = {k.arg: _value(k.value) for k in node.keywords}
        if node.func.id == "range" and not kwargs and 1 <= len(args) <= 3 and all(type(a) is int for a in args):
            span = range(*args)
            if len(span) > 2 ** 27:
                raise ValueError(f"pattern: {ast.unparse(node)} is too long; expected at most 2**27 tokens")
            return span
        if node.func.id in _NAMES:
            try:
                return _NAMES[node.func.id](*args, **kwargs)
            except TypeError as error:
                raise ValueError(f"pattern: expected a pattern with its own fields, got {ast.unparse(node)[:80]!r}; {error}") from None
    raise ValueError(f"pattern: cannot read {ast.unparse(node)[:80]!r}; expected the patterns {sorted(_NAMES)}, numbers, lists, range(a, b), None, True, False, &, | and ~")


# ------------------------------------------------------------------------------------------------ plain data
_FIELDS = {  # YAML name -> class name, fields with their defaults (... is required)
    "full": ("Full", {}), "causal": ("Causal", {}),
    "window": ("Window", {"left": None, "right": 0, "block": 1}),
    "dilated": ("Dilated", {"left": ..., "right": ..., "step": ...}),
    "strided": ("Strided", {"stride": ...}),
    "compressed": ("Compressed", {"block": ..., "stride": ...}),
    "fixed": ("Fixed", {"stride": ..., "summary": ...}),
    "global": ("Global", {"tokens": ..., "symmetric": True}),
    "sink": ("Sink", {"n": ...}),
    "random_blocks": ("RandomBlocks", {"count": ..., "block": ..., "seed": 0, "causal": False, "exclude": []}),
    "blocks": ("Blocks", {"mask": ..., "block_q": 64, "block_k": 64}),
    "documents": ("Documents", {"lengths": ...}),
}
_KEY = {cls: key for key, (cls, _) in _FIELDS.items()}


def to_data(pattern: pt.Pattern):
    """{"window": {"left": 127, "right": 0}}, {"and": [...]}, {"or": [...]}, {"not": ...}, {"per_head": [...]}; bare "full" and "causal"."""
    if isinstance(pattern, (pt.And, pt.Or)):
        return {"and" if isinstance(pattern, pt.And) else "or": [to_data(part) for part in pattern.parts]}
    if isinstance(pattern, pt.Not):
        return {"not": to_data(pattern.part)}
    if isinstance(pattern, pt.PerHead):
        return {"per_head": [to_data(part) for part in pattern.patterns]}
    if pattern in (pt.Full(), pt.Causal()):
        return "full" if pattern == pt.Full() else "causal"
    key = _KEY[type(pattern).__name__]
    values = {}
    for name, default in _FIELDS[key][1].items():
        if name == "mask":
            value = pack(pattern.mask_bits)
        elif name == "tokens":
            value = [lo if hi - lo == 1 else [lo, hi] for lo, hi in pattern.runs]
        elif name == "exclude":
            value = [to_data(part) for part in pattern.exclude]
        else:
            value = getattr(pattern, name)
            value = list(value) if isinstance(value, tuple) else value
        if value != default or key == "window" and name != "block":
            values[name] = value
    return {key: values}


def from_data(data, where: str = "pattern") -> pt.Pattern:
    """The pattern of `to_data`, or of its text; ValueError names the entry."""
    if isinstance(data, str):
        return {"full": pt.Full, "causal": pt.Causal}[data]() if data in ("full", "causal") else read(data)
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(f"{where}: expected one pattern such as {{window: {{left: 127, right: 0}}}} or a text, got {_short(data)}; see Pattern.to_data")
    (key, value), = data.items()
    where = f"{where}.{key}"
    if key in ("and", "or", "per_head"):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where}: expected a list of patterns, got {_short(value)}; give at least one")
        parts = [from_data(part, f"{where}[{n}]") for n, part in enumerate(value)]
        return pt.PerHead(parts) if key == "per_head" else pt.intersection(parts) if key == "and" else pt.union(parts)
    if key == "not":
        return ~from_data(value, where)
    if key not in _FIELDS:
        raise ValueError(f"{where}: expected one of {sorted([*_FIELDS, 'and', 'or', 'not', 'per_head'])}, got {_short(key)}; choose one of these")
    name, fields = _FIELDS[key]
    value = {} if value is None else value
    if not isinstance(value, dict) or not set(value) <= set(fields):
        raise ValueError(f"{where}: expected fields {sorted(fields)}, got {_short(value)}; leave out what is not among them")
    missing = [field for field, default in fields.items() if default is ... and field not in value]
    if missing:
        raise ValueError(f"{where}: expected fields {sorted(fields)}, got none for {missing}; give it")
    values = dict(value)
    if "tokens" in values:
        values["tokens"] = _runs(values["tokens"], where)
    if "exclude" in values:
        if not isinstance(values["exclude"], list):
            raise ValueError(f"{where}.exclude: expected a list of patterns, got {_short(values['exclude'])}")
        values["exclude"] = [from_data(part, f"{where}.exclude[{n}]") for n, part in enumerate(values["exclude"])]
    try:
        return _NAMES[name](**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _runs(tokens, where):
    if not isinstance(tokens, list):
        raise ValueError(f"{where}.tokens: expected a list of positions and [first, one past the last] runs, got {_short(tokens)}")
    out = []
    for token in tokens:
        if isinstance(token, list):
            if len(token) != 2 or any(type(t) is not int for t in token) or not 0 <= token[1] - token[0] <= 2 ** 27:
                raise ValueError(f"{where}.tokens: expected a run [first, one past the last], got {_short(token)}")
            out.extend(range(*token))
        else:
            out.append(token)
    return out


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def to_yaml(pattern: pt.Pattern) -> str:
    """The YAML text of `to_data`."""
    import yaml
    return yaml.safe_dump(to_data(pattern), sort_keys=False, default_flow_style=None, width=120)


def load_yaml(text: str, what: str):
    """Plain data of a YAML text: safe loader, bounded size, no aliases (they can unfold without bound)."""
    import yaml
    if not isinstance(text, str) or len(text) > _LIMIT:
        raise ValueError(f"{what}: expected YAML text of at most {_LIMIT} characters, got {_short(text)}; give what to_yaml writes")
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{what}: expected YAML without aliases, got *{event.anchor}; write the entry out")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{what}: expected plain YAML, got {_short(text)}; {' '.join(str(error).split())[:200]}") from None


def from_yaml(text: str) -> pt.Pattern:
    """The pattern of a YAML text."""
    return from_data(load_yaml(text, "pattern"))
