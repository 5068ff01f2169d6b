"""Patterns as pictures: text for a terminal, PNG in the style of the papers (queries downwards, keys to the right, one colour per kind of rule)."""
import numpy as np

from sparsetile.ops import patterns as pt
from sparsetile.ops import regions

_SHADES = " ░▒▓█"
_COLOURS = {"window": "#7fb3d5", "global": "#f1948a", "random": "#f5b041", "strided": "#82c99d", "blocks": "#a9a4d9", "documents": "#b7b76b", "sink": "#d98cb3", "other": "#9aa5ab"}
_NAMES = {pt.Window: "window", pt.Dilated: "strided", pt.Strided: "strided", pt.Compressed: "strided", pt.Fixed: "strided", regions.Columns: "strided", pt.Global: "global",
          pt.Sink: "sink", pt.RandomBlocks: "random", pt.Blocks: "blocks", pt.Documents: "documents"}


def plot(pattern, T: int, S: int, path=None, width: int = 64) -> str:
    """Text, one picture per distinct rule of a pattern with heads; with `path` a PNG of the same pictures too."""
    rules = pattern.rules()
    if path is not None:
        _png(pattern, rules, T, S, path)
    blocks = []
    for n, rule in enumerate(rules):
        head = [h for h, number in enumerate(pattern.head_map()) if number == n]
        title = f"{rule!r}" + (f"  heads {head}" if pattern.heads is not None else "")
        blocks.append("\n".join([title[:200], f"{rule.pairs(T, S):,} of {T * S:,} pairs, density {rule.density(T, S):.4g}", *_text(rule, T, S, width)]))
    return "\n\n".join(blocks)


def shares(rule, T: int, S: int, rows: int, cols: int) -> np.ndarray:
    """[rows, cols] share of pairs seen in each cell of a grid over the mask; cells of large masks are sampled at up to 8 x 8 points."""
    p_edges, s_edges = np.linspace(0, T, rows + 1).astype(int), np.linspace(0, S, cols + 1).astype(int)
    points = [np.unique(np.concatenate([np.unique(np.linspace(a, b - 1, 8).astype(int)) for a, b in zip(e[:-1], e[1:]) if b > a])) for e in (p_edges, s_edges)]
    seen = np.concatenate([rule.visible(S - T + points[0][a:a + 512, None], points[1], S) for a in range(0, len(points[0]), 512)])
    sums = np.add.reduceat(np.add.reduceat(seen.astype(np.float64), np.searchsorted(points[0], p_edges[:-1]), 0), np.searchsorted(points[1], s_edges[:-1]), 1)
    counts = np.outer(*(np.diff(np.append(np.searchsorted(x, e[:-1]), len(x))) for x, e in zip(points, (p_edges, s_edges))))
    return sums / counts


def _text(rule, T, S, width):
    if not T or not S:
        return ["(no pairs)"]
    cols = min(S, width)
    rows = min(T, max(1, round(cols * T / S / (2 if cols < S or T > 32 else 1))), 2 * width)
    levels = np.ceil(shares(rule, T, S, rows, cols) * (len(_SHADES) - 1)).astype(int)
    return ["|" + "".join(_SHADES[level] for level in row) + "|" for row in levels]


def _layers(rule):
    """The parts of a union, each with the kind that colours it; what restricts them all is applied to each."""
    if isinstance(rule, pt.Or):
        return [piece for part in rule.parts for piece in _layers(part)]
    if isinstance(rule, pt.And):
        unions = [part for part in rule.parts if isinstance(part, pt.Or)]
        if len(unions) == 1:
            rest = pt.intersection(part for part in rule.parts if part is not unions[0])
            return [(kind, piece & rest) for kind, piece in _layers(unions[0])]
        kinds = [_NAMES.get(type(part), "other") for part in rule.parts if part != pt.Causal()]
        return [(kinds[0] if kinds else "window", rule)]
    return [(_NAMES.get(type(rule), "other"), rule)]


def _png(pattern, rules, T, S, path):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot: a PNG needs matplotlib; install it with: pip install 'sparsetile[plot]'") from error
    figure = Figure(figsize=(4.2 * len(rules), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for n, rule in enumerate(rules):
        axes = figure.add_subplot(1, len(rules), n + 1)
        rows, cols = min(T, 512) or 1, min(S, 512) or 1
        image, kinds = np.ones((rows, cols, 3)), []
        if T and S:
            for kind, piece in sorted(_layers(rule), key=lambda item: item[0] != "random"):  # random blocks below what they leave out
                share = shares(piece, T, S, rows, cols)[:, :, None]
                strength = np.where(share > 0, 0.35 + 0.65 * share, 0)
                image = image * (1 - strength) + np.asarray(to_rgb(_COLOURS[kind])) * strength
                kinds.append(kind)
        axes.imshow(image, interpolation="nearest", extent=(-0.5, S - 0.5, T - 0.5, -0.5), aspect="equal" if T == S else "auto")
        if T == S and T <= 64:
            axes.set_xticks(np.arange(-0.5, S), minor=True)
            axes.set_yticks(np.arange(-0.5, T), minor=True)
            axes.grid(which="minor", color="white", linewidth=0.6)
            axes.tick_params(which="minor", length=0)
        text = repr(rule)
        axes.set_title(text if len(text) <= 60 else text[:57] + "...", fontsize=7)
        axes.set_xlabel("keys"), axes.set_ylabel("queries")
        axes.legend(handles=[Patch(color=_COLOURS[kind], label=kind) for kind in dict.fromkeys(kinds)], fontsize=6, loc="upper center",
                    bbox_to_anchor=(0.5, -0.1), ncols=4, frameon=False)
    figure.savefig(path, dpi=160)
