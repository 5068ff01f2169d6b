"""Which config a problem gets: pinned > user profile directory > user cache > shipped for this device > shipped for its architecture (a CPU inherits from none: "cpu" is no architecture).

A problem falls into a bucket by the rule of each axis; if the bucket has no entry, the nearest one at most one bucket away along the axes with a rule of
their own serves, else the answer is None and the kernel's heuristic runs. Never across architectures. Files are read once per process.
"""
import logging
import math
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from sparsetile.backends.contract import Problem
from sparsetile.profiles import environment, schema

log = logging.getLogger("sparsetile")
SHIPPED = Path(__file__).resolve().parent
DIMS = {"B": "pow2_up", "T": "pow2_up", "S": "pow2_up", "K": "pow2_up"}  # every other axis is exact
ALIKE = frozenset({"lse"})  # features that change no winner: one more float32 a row; training asks for it, inference does not


class Found(NamedTuple):
    """A profile's answer: who, with which config ({}: the kernel's default, which the search kept), from where (in words, and file and entry); inherited from another device of the architecture or not."""
    backend: str
    config: dict
    source: str
    where: str
    inherited: bool
    entry: dict


def slug(device: str) -> str:
    """NVIDIA H200 -> nvidia-h200"""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"


def user_cache() -> Path:
    root = os.environ.get("SPARSETILE_CACHE_DIR")
    return Path(root) / "profiles" if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsetile" / "profiles"


def pow2_up(n: int) -> int:
    return 1 << max(0, n - 1).bit_length() if n > 0 else 0


def bucket(dims: dict, rules: dict = DIMS) -> dict:
    """Axis sizes as a key has them."""
    return {axis: pow2_up(size) if rules.get(axis, "exact") == "pow2_up" else size for axis, size in dims.items()}


def key_of(problem: Problem) -> dict:
    """A problem as the key of an entry."""
    return {"dims": bucket(dict(problem.dims)), "dtypes": dict(problem.dtypes), "features": sorted(problem.features - ALIKE), "density": problem.density,
            "granularity": problem.granularity}


def _flat(key: dict, rules: dict) -> tuple:
    return (tuple(sorted(bucket(key["dims"], rules).items())), tuple(sorted(key["dtypes"].items())), frozenset(key.get("features", ())) - ALIKE, float(key.get("density", 1.0)),
            int(key.get("granularity", 1)))


class _File:
    """One loaded profile: entries by their flattened key."""

    def __init__(self, path: Path):
        self.path, data = path, schema.load(path)
        self.device, self.rules = data["device"], data["dims"]
        self.entries, self.number = {}, {}
        for number, entry in enumerate(data["entries"]):
            self.number[id(entry)] = number
            self.entries.setdefault(_flat(entry["key"], self.rules), []).append(entry)

    def near(self, problem: Problem):
        """Entries for the problem's bucket, then for those one bucket away, nearest first."""
        dims = bucket(dict(problem.dims), self.rules)
        moved = [dims] + [{**dims, axis: size} for axis in dims if self.rules.get(axis) == "pow2_up" for size in (dims[axis] * 2, dims[axis] // 2) if size > 0]
        for n, sizes in enumerate(moved):
            for density in (problem.density,) if n else (problem.density, problem.density * 2, problem.density / 2):
                key = (tuple(sorted(sizes.items())), problem.dtypes, problem.features - ALIKE, density, problem.granularity)
                yield from self.entries.get(key, ())


@lru_cache(None)
def _file(path: Path):
    """A loaded file; None if there is none. A bad one is said once and ignored: calls run on the heuristic."""
    if not path.is_file():
        return None
    try:
        return _File(path)
    except schema.ProfileError as error:
        log.error("%s", error)
        return None


@lru_cache(None)
def _missing(user: str) -> None:
    """Said once."""
    if not Path(user).is_dir():
        log.warning("SPARSETILE_PROFILE_DIR: expected a directory, got %r; make it, or unset the variable: profiles are looked for elsewhere", user)


@lru_cache(None)
def _candidates(op: str, device: str, arch: str, user: str | None, cache: str) -> tuple:
    """(file, source, inherited) in order of precedence."""
    roots = [(Path(user), "user profile")] if user else []
    roots += [(Path(cache), "user cache profile"), (SHIPPED, "shipped profile")]
    found = []
    for root, source in roots:
        file = _file(root / slug(device) / f"{op}.yaml")
        if file and file.device["arch"] == arch:
            found.append((file, source, False))
    for path in sorted(SHIPPED.glob(f"*/{op}.yaml")) if arch != "cpu" else ():
        file = _file(path)
        if file and file.device["arch"] == arch and path.parent.name != slug(device):
            found.append((file, f"shipped profile of {file.device['name']} (same architecture)", True))
    return tuple(found)


_found = {}
_environment = environment.reader("SPARSETILE_PROFILE_DIR", "SPARSETILE_CACHE_DIR", "XDG_CACHE_HOME")


def find(problem: Problem, device: str, backend: str | None = None, user: str | None = None) -> Found | None:
    """The config for a problem on a device, of one backend or (None) of the profile's winner. Remembered: the same question costs one look into a dict.

    user   a directory that comes before every other (default: SPARSETILE_PROFILE_DIR)
    """
    key = problem, device, backend, user, _environment()
    try:
        return _found[key]
    except KeyError:
        if len(_found) >= 4096:  # shapes come and go
            _found.clear()
        found = _found[key] = _find(problem, device, backend, user or os.environ.get("SPARSETILE_PROFILE_DIR"))
        return found


def _find(problem, device, backend, user) -> Found | None:
    best = None
    _missing(os.environ.get("SPARSETILE_PROFILE_DIR") or ".")
    for file, source, inherited in _candidates(problem.op, device, problem.arch, user, str(user_cache())):
        for entry in file.near(problem):
            if backend is not None and entry["backend"] != backend:
                continue
            where = f"{file.path}: entry {file.number[id(entry)]}"
            config = {} if keeps_default(entry) else dict(entry["config"])
            found = Found(entry["backend"], config, f"{source} {file.path.parent.name}/{file.path.name}", where, inherited, entry)
            if entry.get("status") == "pinned":
                return found
            best = best or found
    return best


def keeps_default(entry: dict) -> bool:
    """Whether its search found nothing better than the kernel's default. Such an entry names the backend, and a call takes the default of today: what was the default then would hold back what
    the kernel has learned since. A config that is written by hand is meant as it stands."""
    return "default_us" in entry and entry.get("time_us") == entry["default_us"] and entry.get("status", "tuned") not in ("manual", "pinned")


def related(problem: Problem, device: str, backend: str, most: int = 8, user: str | None = None) -> list[dict]:
    """Configs of a backend that won other buckets of this op, here or on devices of the architecture: the nearest first, the problem's own among them."""
    mine, found = key_of(problem), []
    for file, _, inherited in _candidates(problem.op, device, problem.arch, user or os.environ.get("SPARSETILE_PROFILE_DIR"), str(user_cache())):
        for entries in file.entries.values():
            found += [(_distance(mine, e["key"]) + inherited, len(found) + n, e["config"]) for n, e in enumerate(entries) if e["backend"] == backend]
    distinct = {tuple(sorted(config.items(), key=str)): config for _, _, config in sorted(found, key=lambda one: one[:2], reverse=True)}
    return [dict(config) for config in list(distinct.values())[::-1][:most]]


def _distance(a: dict, b: dict) -> float:
    """How many times a size doubles from one key to another; another type or feature counts as eight."""
    sizes = sum(abs(math.log2((a["dims"].get(axis, 0) + 1) / (b["dims"].get(axis, 0) + 1))) for axis in {*a["dims"], *b["dims"]})
    other = len({*a["features"]} ^ {*b.get("features", ())}) + (a["dtypes"] != b["dtypes"]) + (a["granularity"] != b.get("granularity", 1))
    return sizes + abs(math.log2(a["density"] / b.get("density", 1.0))) + 8 * other


def forget() -> None:
    """Read the files again: after one was written."""
    _found.clear()
    _file.cache_clear()
    _candidates.cache_clear()
    _missing.cache_clear()
