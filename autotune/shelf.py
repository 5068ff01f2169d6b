"""Profiles as a reviewer and an operator handle them: show, diff, merge, export."""
import csv
import io
from pathlib import Path

from sparsetile.autotune import store
from sparsetile.ops import dispatch
from sparsetile.profiles import lookup, schema

RANK = {status: n for n, status in enumerate(("inherited", "partial", "tuned", "manual", "pinned"))}


def files(paths: list) -> list[Path]:
    """Profile files of the paths, which are files or directories of any depth; none: where calls look."""
    roots = [Path(p) for p in paths] or [lookup.user_cache(), lookup.SHIPPED]
    found = [path for root in roots for path in ([root] if root.is_file() else sorted(root.rglob("*.yaml")))]
    missing = [str(p) for p in paths if not Path(p).exists()]
    if missing:
        raise ValueError(f"profiles: expected files or directories that exist, got {', '.join(missing)}; see sparsetile doctor")
    return found


def short(key: dict) -> str:
    dims = " ".join(f"{axis}{size}" for axis, size in sorted(key["dims"].items()))
    rest = [*key.get("features", ())] + [f"density {key['density']:g}"] * (key.get("density", 1.0) != 1.0) + [f"granularity {key['granularity']}"] * (key.get("granularity", 1) != 1)
    return " ".join([dims, "/".join(sorted(set(key["dtypes"].values()))), *rest])


def rows(path: Path) -> list[dict]:
    """One row for each entry, with whether its kernel is the one that was tuned."""
    data = schema.load(path)
    return [{"device": data["device"]["name"], "op": data["op"], "workload": e.get("workload", ""), "key": short(e["key"]), "backend": e["backend"], "time_us": e.get("time_us"),
             "default_us": e.get("default_us"), "config": dict(e["config"]), "status": e.get("status", "tuned"), "ties": e.get("ties"), "band": e.get("band"),
             "default": lookup.keeps_default(e), "stale": stale(data["op"], e)} for e in data["entries"]]


def stale(op, entry) -> bool | None:
    """Whether the kernel's code has changed since; None where that cannot be said here."""
    from sparsetile.autotune import provenance
    folder = lookup.SHIPPED.parent / "backends" / entry["backend"]
    if "code" not in entry or not (folder / f"{op}.py").exists():
        return None
    return provenance.of(folder / f"{op}.py") != entry["code"]


def lacks(w, device: str, backends, root=None) -> bool:
    """Whether one of the backends has no entry for a workload on the device that was made by its kernel as it is today, in a directory (None: the user cache) or among the shipped."""
    fresh = set()
    for folder in (Path(root) if root else lookup.user_cache(), lookup.SHIPPED):
        path = folder / lookup.slug(device) / f"{w.kernel}.yaml"
        fresh |= {e["backend"] for e in (schema.load(path)["entries"] if path.exists() else ()) if e.get("workload") == w.name and not stale(w.kernel, e)}
    return not {b for b in backends if dispatch.has_kernel(b, w.kernel)} <= fresh


def table(found: list[dict]) -> str:
    lines = []
    for r in found:
        gain = f"{r['default_us'] / r['time_us']:6.3f} x" if r["time_us"] and r["default_us"] else " " * 8
        lines.append(f"{r['op']:26} {r['backend']:7} {r['time_us'] or 0:12.2f} us {gain}  {r['status']}{', stale' if r['stale'] else ''}  {r['workload'] or r['key']}\n    {r['config']}{', then the default: calls take the default of today' * r['default']}")
    return "\n".join(lines) or "no entries"


def _entries(paths) -> dict:
    """(device, op, key, backend) -> entry."""
    found = {}
    for path in files(paths):
        data = schema.load(path)
        for e in data["entries"]:
            found[data["device"]["name"], data["op"], str(lookup._flat(e["key"], data["dims"])), e["backend"]] = e
    return found


def diff(a, b) -> list[str]:
    """What changed from a to b, an entry a line: speed and config."""
    before, after, lines = _entries([a]), _entries([b]), []
    for where in sorted({*before, *after}):
        old, new = before.get(where), after.get(where)
        name = f"{where[0]} {where[1]} {where[3]} {(new or old).get('workload') or short((new or old)['key'])}"
        if old is None or new is None:
            lines.append(f"{'+' if old is None else '-'} {name}: {(new or old)['config']}")
        elif old["config"] != new["config"] or old.get("time_us") != new.get("time_us"):
            knobs = {k: (old["config"].get(k), new["config"].get(k)) for k in {*old["config"], *new["config"]} if old["config"].get(k) != new["config"].get(k)}
            speed = f"{old['time_us']} -> {new['time_us']} us ({new['time_us'] / old['time_us'] - 1:+.1%})" if old.get("time_us") and new.get("time_us") else "untimed"
            lines.append(f"~ {name}: {speed}" + "".join(f", {k} {x} -> {y}" for k, (x, y) in sorted(knobs.items())))
    return lines


def merge(target, sources: list) -> list[str]:
    """Put the entries of the sources into the target directory: of two for one key and backend a pinned one stays, else the one of today's kernel (a time of other code says nothing of it), then the higher
    status, then the lower time. Returns the conflicts, a line each; the outcome does not depend on the order of the sources."""
    conflicts = []
    mine = _entries([target]) if Path(target).exists() else {}
    for path in files(sources):
        data = schema.load(path)
        worth = lambda entry: _worth(data["op"], entry)
        for e in data["entries"]:
            where = data["device"]["name"], data["op"], str(lookup._flat(e["key"], data["dims"])), e["backend"]
            other = mine.get(where)
            if other is not None and other["config"] != e["config"]:
                first = min((other, e), key=worth)
                conflicts.append(f"{where[0]} {where[1]} {where[3]} {short(e['key'])}: {first['config']} ({first.get('time_us')} us) stays, "
                                 f"{(e if first is other else other)['config']} ({(e if first is other else other).get('time_us')} us) does not")
            if other is None or worth(e) < worth(other):
                mine[where] = e
                store.add(Path(target), data["op"], data["device"], e, data.get("tuned_with", {}), data.get("regime", {}), keep_pinned=False)
    return conflicts


def _worth(op, entry) -> tuple:
    status = entry.get("status", "tuned")
    return status != "pinned", stale(op, entry) is True, -RANK.get(status, 0), entry.get("time_us", float("inf")), str(sorted(entry["config"].items()))


def to_csv(paths) -> str:
    text = io.StringIO()
    found = [row for path in files(paths) for row in rows(path)]
    writer = csv.DictWriter(text, list(found[0]) if found else ["device"])
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()
