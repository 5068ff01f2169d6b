"""What the systems take on this device, beside dense attention in the same interleaved run; one YAML file a device.

`sparsetile catalogue --measure` writes <user cache>/catalogue/<device>.yaml (or --into DIR); the files in catalogue/measured/ are shipped. Nothing is scaled from another
device or length: what was not measured is not there.
"""
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import yaml

import sparsetile as st
from sparsetile.autotune import provenance, timing
from sparsetile.backends import arrays
from sparsetile.catalogue.entries import SYSTEMS
from sparsetile.catalogue.system import CPU, GPU, Inputs, Shape
from sparsetile.ops.notation import load_yaml
from sparsetile.profiles import lookup

SCHEMA, SHIPPED = 1, Path(__file__).with_name("measured")
PASSES = ("forward", "training")  # training: forward and backward of one call
BASE = {True: "gqa", False: "dense, both ways"}  # dense attention over the same grouped heads, by System.causal


def measure(device: int | None, tokens, seconds: float = 2.0, systems=SYSTEMS, say=lambda row: None) -> dict:
    """A file's content: every system at every length, each pass interleaved with dense attention. `seconds` for each length and pass, at least five rounds."""
    shape, rows = CPU if device is None else GPU, []
    for N in tokens:
        for what in PASSES:
            for row in _rows(device, shape, N, what, seconds, systems):
                rows.append(row)
                say(row)
    sizes = {name: size for name, size in asdict(shape).items()}
    return {"schema": SCHEMA, "device": provenance.device(device), "measured_with": provenance.versions(), "shape": sizes, "rows": rows}


def _rows(device, shape, N, what, seconds, systems):
    watch, calls, refused = timing.Stopwatch(device), {}, []
    for name, call in _calls(shape, N, device, what, systems):
        why = _tried(call)
        if why is None:
            calls[name] = call
        else:
            refused.append({"system": name, "tokens": N, "pass": what, "refused": why})
    watch.synchronize()
    timed = dict(zip(calls, timing.finals(watch, list(calls.values()), seconds)))
    causal = {system.name: system.causal for system in systems}
    for name, samples in timed.items():
        time_us, base = watch.centre(samples), BASE[causal.get(name, name == BASE[True])]
        ratio = float(f"{watch.centre(timed[base]) / time_us:.4g}")
        yield {"system": name, "tokens": N, "pass": what, "time_us": round(time_us, 1), "times_dense": ratio, **timing.spread(samples)}
    yield from refused


def _calls(shape, N, device, what, systems):
    """(name, call) of the two dense baselines and of every system that is not out of scope."""
    x = Inputs(shape, N, device, what == "training")
    work = {BASE[True]: lambda: st.sparse_attention(x.q, x.k, x.v, st.Causal()), BASE[False]: lambda: st.sparse_attention(x.q, x.k, x.v, st.Full())}
    work |= {system.name: (lambda system=system: system.run(x, system.real)) for system in systems if system.run}
    for name, forward in work.items():
        yield name, forward if what == "forward" else lambda forward=forward: _differentiated(x, forward)


def _differentiated(x, forward):
    for leaf in x.made.values():
        leaf.grad = None
    forward().sum().backward()


def _tried(call) -> str | None:
    """None after one call, or why there is none: the library's refusal, or no room."""
    try:
        call()
    except st.Unsupported as refusal:
        return str(refusal)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return "out of memory"
    return None


# ------------------------------------------------------------------------------------------------------------------- on disk
def user_folder() -> Path:
    return lookup.user_cache().parent / "catalogue"


def write(data: dict, folder: Path) -> Path:
    """Whole, and renamed into place."""
    path = Path(folder) / f"{lookup.slug(data['device']['name'])}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        yaml.safe_dump({name: value for name, value in data.items() if name != "rows"}, file, sort_keys=True, width=200)
        file.write("rows:\n" + "".join(f"- {yaml.safe_dump(row, default_flow_style=True, sort_keys=False, width=10 ** 6)}" for row in data["rows"]))
    os.replace(file.name, path)
    return path


def load(path: Path) -> dict:
    """A file's content; ValueError, naming it, if it is none of ours."""
    try:
        data = load_yaml(Path(path).read_text(encoding="utf-8"), "file") if Path(path).stat().st_size < 1 << 20 else None
        wrong = _wrong(data)
    except ValueError as error:  # what is no text, or no plain YAML
        wrong = str(error)
    if wrong:
        raise ValueError(f"{path}: expected measurements of schema {SCHEMA}, got {wrong}; write them again with sparsetile catalogue --measure")
    return data


def _wrong(data) -> str | None:
    """None if the data is a file's content, else what it is."""
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        return "something else"
    if not isinstance(data.get("device"), dict) or not isinstance(data["device"].get("name"), str):
        return "no name of a device"
    sizes = data.get("shape")
    if not isinstance(sizes, dict) or {field.name for field in fields(Shape)} - {*sizes}:
        return "no shape with all its sizes"
    rows = data.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and isinstance(row.get("tokens"), int) and {"system", "pass"} <= {*row} for row in rows):
        return "rows without a system, tokens and a pass"
    numbers = lambda row: all(isinstance(row.get(name), (int, float)) and row[name] > 0 for name in ("time_us", "times_dense"))  # noqa: E731
    return None if all(isinstance(row.get("refused"), str) or numbers(row) for row in rows) else "rows without a time or a refusal"


def shipped() -> list[dict]:
    return [load(path) for path in sorted(SHIPPED.glob("*.yaml"))]


def of(device: int | None) -> dict | None:
    """This device's own measurements: the user's, else shipped ones of the same device; None if there are none."""
    name = f"{lookup.slug(arrays.device_info(device).name)}.yaml"
    return next((load(folder / name) for folder in (user_folder(), SHIPPED) if (folder / name).is_file()), None)


def row(data: dict | None, system: str, tokens: int, what: str = "forward") -> dict | None:
    """The row at the longest measured length that is not above `tokens`, else at the shortest."""
    rows = [r for r in (data or {"rows": ()})["rows"] if r["system"] == system and r["pass"] == what]
    below = [r for r in rows if r["tokens"] <= tokens]
    return max(below, key=lambda r: r["tokens"]) if below else min(rows, key=lambda r: r["tokens"], default=None)
