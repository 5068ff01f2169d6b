"""The catalogue as a page: docs/catalogue.md, written by `sparsetile catalogue --markdown`; a test compares it with the code."""
from functools import lru_cache

import numpy as np

from sparsetile.autotune import matrix
from sparsetile.backends.contract import BACKENDS
from sparsetile.catalogue import speed, store
from sparsetile.catalogue.entries import SYSTEMS
from sparsetile.catalogue.system import FAMILIES, FINDS, GPU, SMALL, Inputs, System

OURS = [system for system in SYSTEMS if not system.refusal]
SIDE = 32       # tokens of a picture
LENGTH = 65536  # where operations and cache are counted
BESIDE = ("python", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "numba", "fla-core")  # versions that a time depends on


@lru_cache(None)
def asked(kernel: str, backend: str):
    return matrix.ask(kernel, backend)


def runs(kernels, backend: str) -> str:
    """Element types in which a backend has all these kernels on all its architectures; else why not, in its own words. topk chooses by float32 scores of arrays of any type."""
    if not kernels:
        return "the caller's framework computes"
    missing = [name for name in kernels if asked(name, backend) is None]
    if missing:
        return f"{backend} has no {missing[0]} kernel"
    takes = lambda name, kind: ("float32" if name == "topk" else kind) in asked(name, backend)[0]  # noqa: E731
    kinds = [kind for kind in matrix.SHORT if all(takes(name, kind) for name in kernels)]
    return " ".join(matrix.SHORT[kind] for kind in kinds) or next(sentence for name in kernels for sentence, _, _ in asked(name, backend)[1])


def is_types(answer: str) -> bool:
    """Whether an answer of `runs` names element types: it is no refusal."""
    return answer.split()[0] in matrix.SHORT.values()


def picture(system: System) -> list[str]:
    """SIDE lines of text, queries downwards, keys to the right; none for what has no pairs of its own."""
    if system.small is None and system.chosen is None:
        return []
    seen = system.small.mask(SIDE, SIDE) if system.small is not None else system.chosen(Inputs(SMALL, SIDE))
    return ["".join("#" if here else "." for here in line) for line in np.asarray(seen)]


def shown(count: float, unit: str = "") -> str:
    """Three digits and a thousandfold letter."""
    for letter in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 999.5 or letter == "P":
            return f"{count:.3g} {letter}{unit}".rstrip()
        count /= 1000


def cache_words(system: System, shape=GPU) -> str:
    """Bytes a token and layer, how many tokens are kept, and what does not grow."""
    per, fixed = system.token(shape), system.state(shape)
    kept = system.kept(1 << 40)
    words = [f"{per:,} B" + (f", the last {kept:,} tokens only" if kept < 1 << 40 else "")] if per else ["0 B"]
    return " and ".join(words + [f"{fixed:,} B in all"] * bool(fixed))


def record(system: System) -> dict:
    """One entry as plain data, with what was measured."""
    words = ("name", "family", "title", "paper", "refusal") if system.refusal else \
        ("name", "family", "title", "paper", "call", "complexity", "sees", "reach", "finds", "trained", "causal", "kernels", "backward")
    found = {name: getattr(system, name) for name in words}
    if system.refusal:
        return found
    return found | {
        "reach_of_picture": None if system.small is None else system.small.hops(SIDE), "picture": picture(system),
        "counted_at": LENGTH, "cache_bytes": system.cache(GPU, LENGTH), "operations": system.operations(GPU, LENGTH),
        "backends": {name: runs(system.kernels, name) for name in BACKENDS}, "backends_backward": {name: runs(system.backward, name) for name in BACKENDS},
        "measured": {data["device"]["name"]: [row for row in data["rows"] if row["system"] == system.name] for data in store.shipped()}}


def table(head, rows) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in cells)]


def _systems():
    rows = [(f"[{s.name}](#{s.name})", s.family, s.paper, s.complexity, s.sees, s.reach, FINDS[s.finds], "causal" if s.causal else "both ways") for s in OURS]
    return table(("system", "family", "arXiv", "complexity", "one query sees", "layers to reach everything", "finds", "direction"), rows)


def _costs():
    base, rows = next(s for s in OURS if s.name == "gqa").operations(GPU, LENGTH), []
    for s in OURS:
        count = s.operations(GPU, LENGTH)
        rows.append((s.name, cache_words(s), shown(s.cache(GPU, LENGTH), "B"), shown(count, "FLOP"), f"{count / base:.3g}"))
    return table(("system", "cache a token and layer", f"cache a layer at {LENGTH:,}", f"operations of a forward at {LENGTH:,}", "of dense"), rows)


def _runners():
    """Refusals are told once, below the table, in the order they come."""
    told, rows, none = {}, [], ["-"] * len(BACKENDS)
    for system in OURS:
        cells = []
        for kernels in (system.kernels, system.backward):
            answers = [runs(kernels, name) for name in BACKENDS] if kernels else none
            cells += [", ".join(kernels), *(f"[{told.setdefault(answer, len(told) + 1)}]" if kernels and not is_types(answer) else answer for answer in answers)]
        if not system.kernels:
            cells[0] = "none: " + ("the caller's framework computes" if system.works(None) is None else "flash-linear-attention computes")
            cells[1 + len(BACKENDS)] = "by autograd"
        rows.append((system.name, *cells))
    head = ("system", "forward", *BACKENDS, "backward", *(f"{name} " for name in BACKENDS))
    return table(head, rows) + [""] + [f"{number}. {sentence}" for sentence, number in told.items()]


def measured(data: dict) -> list[str]:
    """Times dense of one file, lengths side by side; every system has its rows, those not measured too. Refusals and failures are told once, below."""
    device, shape, found = data["device"], data["shape"], {store.key(row): row for row in data["rows"]}
    lengths = sorted({row["tokens"] for row in data["rows"]})
    sizes = ", ".join(f"{name} {shape[name]}" for name in ("B", "Hq", "Hk", "D", "R", "top_k", "M"))
    asked = f"sparsetile catalogue --measure --device {'cpu' if device['arch'] == 'cpu' else 0} --tokens {' '.join(map(str, lengths))}"
    commits = ", ".join(dict.fromkeys(str(row.get("commit", "unknown")) for row in data["rows"]))
    beside = ", ".join(f"{name} {version}" for name, version in data["measured_with"].items() if name in BESIDE)
    cores = f", {device['sms']} cores" if device["arch"] == "cpu" else ""
    lines, told = ["", f"### {device['name']}{cores}", "", f"`{asked}` at {commits}; {beside}. {shape['dtype']}, {sizes}.{' ' * bool(data.get('note'))}{data.get('note', '')}"], {}
    for what in speed.PASSES:
        rows = [(system.name, backend or "-", *(_cell(found.get((system.name, N, what, backend)), told) for N in lengths))
                for system in OURS for backend in speed.backends(system, None if device["arch"] == "cpu" else 0)]
        lines += ["", f"{what}:", "", *table(("system", "backend", *(f"{N:,} tokens" for N in lengths)), rows)]
    return lines + [""] + [f"{number}. {sentence}" for sentence, number in told.items()]


def _cell(row: dict | None, told: dict) -> str:
    if row is None:
        return "not measured"
    why = store.why_not(row)
    return f"[{told.setdefault(why, len(told) + 1)}]" if why else _times(row)


def _times(row: dict) -> str:
    return store.why_not(row) or f"{row['times_dense']:.2f} x ({row['time_us'] / 1e3:.2f} ms)"


def _drawn(system: System) -> list[str]:
    lines = ["", f"### {system.name}", "", f"{system.title}, arXiv {system.paper}. `{system.call}`. Trained: {system.trained}.", ""]
    drawn = picture(system)
    if not drawn:
        return [*lines, "No picture: it has no pairs of queries and keys; all keys go into a summary."]
    said = f"Random inputs, {SMALL.top_k} keys a query or as the system cuts them." if system.small is None else f"`{system.small!r}`: everything is reached after {system.small.hops(SIDE)} layers."
    return [*lines, said, "", "```", *drawn, "```"]


def markdown() -> str:
    """The whole page."""
    sizes = f"Hq {GPU.Hq}, Hk {GPU.Hk}, D {GPU.D}, R {GPU.R} + {GPU.P}, bfloat16"
    files = [line for data in store.shipped() for line in measured(data)] or ["", "No device was measured yet."]
    return "\n".join([
        "# Catalogue", "",
        "Written by `sparsetile catalogue --markdown > docs/catalogue.md` from `catalogue/entries.py`, the kernels' own refusals and the files in `catalogue/measured/`.",
        "T queries, S keys, D and Dv widths, W and w windows, l stride, c summaries or chunk, g globals, r random blocks of b, k chosen keys, n chosen blocks of b, C clusters,",
        "R latent rank or mixtures, M features. `sparsetile recommend --length N --memory GiB` chooses among these, with its reasons.",
        "", "## What each sees", "", *_systems(), "", "## What each keeps and counts", "",
        f"A layer with {sizes}; multi-head attention has {GPU.Hq} key heads. Operations are those inside the pattern, two for a multiplication and addition.", "", *_costs(),
        "", "## Who runs it", "", "Element types on every architecture that a backend is compiled for; numbers are the refusals below.",
        "On a GPU a long choice of 16 bits whose lists few heads share runs as blocks under its bitmaps where they pay: selection_bitmaps, layout and block_attention in the place of gather_attention.", "", *_runners(),
        "", "## How fast", "",
        "Times dense: the time of dense attention over the same grouped heads by the fastest backend, in the same interleaved rounds (both ways for what is both ways), over the system's.",
        "A dash: the caller's framework computes, or flash-linear-attention. Training is forward and backward of one call.", *files,
        "", "## Pictures", "", f"{SIDE} tokens, small sizes, queries downwards and keys to the right; the layers to reach everything are computed for the picture.",
        *(line for system in OURS for line in _drawn(system)),
        "", "## Out of scope", "", *(f"* {s.title} (arXiv {s.paper}): {s.refusal}." for s in SYSTEMS if s.refusal)]) + "\n"


def text() -> str:
    """A short table for a terminal."""
    lines = [f"{'system':30}{'complexity':44}{'finds':12}{'cache B/token/layer at ' + f'{LENGTH:,}':>36}"]
    for family in FAMILIES[:-1]:
        lines += ["", family] + [f"  {s.name:28}{s.complexity:44}{s.finds:12}{s.cache(GPU, LENGTH) / LENGTH:36,.1f}" for s in SYSTEMS if s.family == family]
    lines += ["", "out of scope"] + [f"  {s.name:28}{s.refusal}" for s in SYSTEMS if s.refusal]
    return "\n".join([*lines, "", "sparsetile catalogue NAME shows one with its picture; --markdown the whole page."])


def one(system: System) -> str:
    """One entry for a terminal."""
    if system.refusal:
        return f"{system.title} (arXiv {system.paper})\n  out of scope: {system.refusal}"
    r = record(system)
    lines = [f"{system.title} (arXiv {system.paper})", f"  {system.call}"]
    lines += [f"  {name:12}{r[name]}" for name in ("family", "complexity", "sees", "reach", "finds", "trained")] + [f"  {'cache':12}{cache_words(system)}, a layer"]
    for what, kernels, answers in (("forward", system.kernels, r["backends"]), ("backward", system.backward, r["backends_backward"])):
        lines.append(f"  {what:12}{', '.join(kernels) or 'no kernel: the framework of the caller'}")
        lines += [f"    {name:12}{answer}" for name, answer in answers.items() if kernels]
    lines += [f"  {device}, {row['tokens']:,} tokens, {row['pass']}, {row.get('backend') or '-'}: {_times(row)}" for device, rows in r["measured"].items() for row in rows]
    return "\n".join([*lines, "", *r["picture"]])
