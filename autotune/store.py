"""Profiles on disk: entries merged by key, written whole and renamed into place, one writer at a time."""
import contextlib
import os
import tempfile
from pathlib import Path

import yaml

from sparsetile.profiles import lookup, schema

try:
    import fcntl
except ImportError:  # Windows: the rename alone keeps files whole
    fcntl = None


class _Flow(dict):
    """A mapping written on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Flow, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True))
_Dumper.add_representer(tuple, lambda dumper, data: dumper.represent_list(data))
_FLOW = ("dims", "dtypes", "config", "spread", "runner_up", "err", "search", "device", "tuned_with", "regime")


def _flow(value, name=None):
    if isinstance(value, dict):
        inner = {k: _flow(v, k) for k, v in value.items()}
        return _Flow(inner) if name in _FLOW else inner
    return [_flow(v) for v in value] if isinstance(value, (list, tuple)) else value


def dump(data: dict) -> str:
    """A profile as text: sorted keys, short mappings on one line, so that diffs are small."""
    return yaml.dump(_flow(data), Dumper=_Dumper, sort_keys=True, width=200, default_flow_style=False)


@contextlib.contextmanager
def _locked(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as handle:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def writable(root: Path) -> None:
    """ValueError if profiles cannot be written there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        raise ValueError(f"profiles: expected a directory that can be written, got {str(root)!r} ({error.strerror}); name another, or set SPARSETILE_CACHE_DIR") from None


def _same(a: dict, b: dict, rules: dict) -> bool:
    return lookup._flat(a["key"], rules) == lookup._flat(b["key"], rules) and a["backend"] == b["backend"]


def add(root: Path, op: str, device: dict, entry: dict, tuned_with: dict, regime: dict, keep_pinned: bool = True) -> Path:
    """Put an entry into <root>/<device>/<op>.yaml, replacing the one of the same key and backend; pinned ones stay, unless told otherwise. Returns the path."""
    path = Path(root) / lookup.slug(device["name"]) / f"{op}.yaml"
    with _locked(path.parent):
        data = None
        if path.exists():
            try:
                data = schema.load(path)
            except schema.ProfileError:  # kept beside, never overwritten in silence
                os.replace(path, path.with_suffix(".broken"))
        data = data or {"schema": schema.VERSION, "op": op, "device": device, "dims": dict(lookup.DIMS), "entries": []}
        data |= {"tuned_with": tuned_with, "regime": regime}
        rules = data["dims"]
        pinned = keep_pinned and any(_same(e, entry, rules) and e.get("status") == "pinned" for e in data["entries"])
        if not pinned:
            data["entries"] = [e for e in data["entries"] if not _same(e, entry, rules)] + [entry]
        # the winner of a key comes first: lookups without a named backend take it
        data["entries"].sort(key=lambda e: (str(lookup._flat(e["key"], rules)[:2]), sorted(e["key"].get("features", [])), e["key"].get("density", 1.0),
                                            e.get("status") != "pinned", e.get("time_us", float("inf")), e["backend"]))
        wrong = schema.check(data)
        assert wrong is None, wrong
        for left in path.parent.glob(f".{path.name}.*") if fcntl else ():  # by a writer that was killed: one writes at a time
            left.unlink()
        write(path, dump(data))
    lookup.forget()
    return path


def write(path: Path, text: str) -> None:
    """All of the text or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
