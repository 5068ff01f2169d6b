"""What was measured, on disk: one YAML file a device, with a line for each row. `sparsetile catalogue --measure` writes it, the page and the advice read it.

A row: system, tokens, pass ("forward" or "training": forward and backward of one call), backend (none where the caller's framework or another package computes), commit, then
    time_us, dense_us, times_dense, p20, p80, n    the system's time, that of dense attention by the fastest backend in the same rounds, dense_us / time_us, the spread of time_us
    refused or failed                              instead: the library's own sentence, or what went wrong
Nothing is scaled from another device or length: what was not measured is not there.
"""
import os
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import yaml

from sparsetile.autotune import provenance
from sparsetile.backends import devices
from sparsetile.catalogue.system import Shape
from sparsetile.ops.notation import load_yaml
from sparsetile.profiles import lookup

SCHEMA, SHIPPED = 1, Path(__file__).with_name("measured")
KEY = ("system", "tokens", "pass", "backend")
TIMES = ("time_us", "times_dense")


def user_folder() -> Path:
    return lookup.user_cache().parent / "catalogue"


def file_of(device: int | None, folder: Path) -> Path:
    return Path(folder) / f"{lookup.slug(devices.device_info(device).name)}.yaml"


def key(row: dict) -> tuple:
    return tuple(row.get(name) for name in KEY)


def begun(path: Path, device: int | None, shape: Shape, note: str | None = None) -> dict:
    """A file's content to go on with: its rows, if they were measured with these sizes; else none. note: words that the page shows, kept where none are given."""
    old = load(path) if path.is_file() else {"rows": [], "shape": None}
    note = note or old.get("note")
    return {"schema": SCHEMA, "device": provenance.device(device), "measured_with": provenance.versions(), "shape": asdict(shape),
            **({"note": note} if note else {}), "rows": old["rows"] if old["shape"] == asdict(shape) else []}


def put(data: dict, row: dict) -> None:
    """In the place of the row it replaces, else last."""
    keys = [key(one) for one in data["rows"]]
    at = keys.index(key(row)) if key(row) in keys else len(keys)
    data["rows"][at:at + 1] = [row]


def write(data: dict, path: Path) -> None:
    """Whole, and renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        yaml.safe_dump({name: value for name, value in data.items() if name != "rows"}, file, sort_keys=True, width=200)
        lines = "".join(f"- {yaml.safe_dump(row, default_flow_style=True, sort_keys=False, width=10 ** 6)}" for row in data["rows"])
        file.write("rows:\n" + lines if lines else "rows: []\n")
    os.replace(file.name, path)


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
    numbers = lambda row: all(isinstance(row.get(name), (int, float)) and row[name] > 0 for name in TIMES)  # noqa: E731
    return None if all(isinstance(why_not(row), str) or numbers(row) for row in rows) else "rows without a time or a refusal"


def why_not(row: dict) -> str | None:
    """Why a row has no time."""
    return row.get("refused") or (f"failed: {row['failed']}" if row.get("failed") else None)


def shipped() -> list[dict]:
    return [load(path) for path in sorted(SHIPPED.glob("*.yaml"))]


def of(device: int | None) -> dict | None:
    """This device's own measurements: the user's, else shipped ones of the same device; None if there are none."""
    return next((load(path) for path in (file_of(device, folder) for folder in (user_folder(), SHIPPED)) if path.is_file()), None)


def row(data: dict | None, system: str, tokens: int, what: str = "forward") -> dict | None:
    """The fastest backend's row at the longest measured length that is not above `tokens`, else at the shortest; one without a time where no backend has one there."""
    rows = [r for r in (data or {"rows": ()})["rows"] if r["system"] == system and r["pass"] == what]
    lengths = {r["tokens"] for r in rows}
    at = max((N for N in lengths if N <= tokens), default=min(lengths, default=None))
    return max((r for r in rows if r["tokens"] == at), key=lambda r: r.get("times_dense", 0), default=None)
