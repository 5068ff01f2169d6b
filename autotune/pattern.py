"""`sparsetile pattern`: a pattern in words, counted, drawn, and as the blocks that kernels read."""
import ast
import importlib
import inspect

_PACKAGE = __name__.partition(".autotune.")[0]
WORDS = ("Full", "Causal", "Window", "Dilated", "Strided", "Compressed", "Fixed", "Global", "Sink", "RandomBlocks", "Documents", "PerHead", "sparse_transformer_strided",
         "sparse_transformer_fixed", "longformer", "bigbird", "mistral", "streaming_llm", "dense")


def parse(text: str):
    """A pattern from Python-like words: calls of WORDS with plain values, |, & and ~. Nothing is evaluated."""
    try:
        return _build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"pattern: expected something like \"Window(255) | Sink(4)\", got {text[:80]!r}; {getattr(error, 'msg', 'it is nested too deeply')}") from None


def _build(node):
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd)):
        left, right = _build(node.left), _build(node.right)
        return left | right if isinstance(node.op, ast.BitOr) else left & right
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_build(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in WORDS and all(k.arg for k in node.keywords):
        face = importlib.import_module(_PACKAGE)
        args, named = list(map(_value, node.args)), {k.arg: _value(k.value) for k in node.keywords}
        try:
            inspect.signature(getattr(face, node.func.id)).bind(*args, **named)
        except TypeError as error:
            raise ValueError(f"pattern: expected the arguments of {node.func.id}{inspect.signature(getattr(face, node.func.id))}, got {ast.unparse(node)[:80]!r}; {error}") from None
        return getattr(face, node.func.id)(*args, **named)
    raise ValueError(f"pattern: expected one of {', '.join(WORDS)} with plain values, joined by | & ~, got {ast.unparse(node)!r}")


def _value(node):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        args = list(map(_value, node.args))
        if not 1 <= len(args) <= 3 or any(type(a) is not int for a in args) or args[2:] == [0]:
            raise ValueError(f"pattern: expected range(end) or range(first, end) of whole numbers, got {ast.unparse(node)[:80]!r}; write the numbers out")
        return range(*args)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(x) for x in node.elts]
    if isinstance(node, (ast.Call, ast.BinOp)) or isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return _build(node)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise ValueError(f"pattern: expected plain values, got {ast.unparse(node)[:80]!r}; write numbers, lists, ranges, True, False or None") from None


def report(text: str, T: int, S: int, block: int, plot: str | None) -> dict:
    pattern = parse(text)
    heads = len(pattern.patterns) if type(pattern).__name__ == "PerHead" else None
    parts = importlib.import_module(f"{_PACKAGE}.ops.lowering").lower(pattern, S - T, S, S, block, block, heads)
    found = {"pattern": str(pattern), "T": T, "S": S, "pairs": int(pattern.pairs(T, S)), "density": float(pattern.density(T, S)), "hops": pattern.hops(T) if T == S and T <= 4096 else None,
             "blocks": {"size": block, "parts": len(parts), "kept": sum(int(p.offsets[-1]) for p in parts), "of": -(-T // block) * -(-S // block) * (len(pattern.rules()) if heads else 1)}, "picture": None, "plot": plot}
    if T <= 64 and S <= 64 and heads is None:
        found["picture"] = ["".join("#" if seen else "." for seen in row) for row in pattern.mask(T, S)]
    if plot:
        pattern.plot(T, S, plot)
    return found


def text(r: dict) -> str:
    lines = [r["pattern"], f"  queries {r['T']}, keys {r['S']}: {r['pairs']} pairs, density {r['density']:.4%}"]
    if r["hops"] is not None or r["T"] <= 4096:
        lines.append(f"  hops until every position can reach every other (or every earlier one): {r['hops']}")
    b = r["blocks"]
    lines.append(f"  blocks of {b['size']}: {b['kept']} kept of {b['of']} in {b['parts']} part{'s' if b['parts'] > 1 else ''}")
    if r["plot"]:
        lines.append(f"  drawn to {r['plot']}")
    return "\n".join(lines + (r["picture"] or []))
