"""Problems that no profile had an answer for: counted, and with SPARSETILE_RECORD_SHAPES=path written as the list of work that `sparsetile tune --shapes path` takes.

One line of JSON for each bucket and backend, appended in one write, so that processes share a file. Reading it executes nothing.
"""
import json
import logging
import os
from collections import Counter
from functools import lru_cache
from pathlib import Path

from sparsetile.backends.contract import BACKENDS, KERNELS, Problem
from sparsetile.profiles import lookup

log = logging.getLogger("sparsetile")
MOST_TEXT = 2000  # a pattern's text that is longer (documents, block masks) is left out: its kind and density stand for it
counts = Counter()  # (kernel, backend) -> misses of this process
_written = set()


def note(problem: Problem, backend: str, rule=None) -> None:
    counts[problem.op, backend] += 1
    path = os.environ.get("SPARSETILE_RECORD_SHAPES")
    if not path:
        return
    key = json.dumps([problem.op, lookup.key_of(problem), backend, problem.arch, path], sort_keys=True)
    if key not in _written:
        _written.add(key)
        text = None if rule is None else rule.canonical()
        line = {"op": problem.op, "backend": backend, "arch": problem.arch, "dims": dict(problem.dims), "dtypes": dict(problem.dtypes), "features": sorted(problem.features),
                "density": problem.density, "granularity": problem.granularity, "pattern": text if text and len(text) <= MOST_TEXT else None}
        try:
            with open(path, "ab", buffering=0) as file:
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:  # a full disk ends no program that serves
            _unwritten(path, error.strerror)


@lru_cache(None)
def _unwritten(path: str, why: str) -> None:
    """Said once."""
    log.warning("SPARSETILE_RECORD_SHAPES: expected a file that can be written, got %r (%s); name another, or unset the variable: shapes are not recorded", path, why)


def read(path) -> list[tuple[Problem, str, str | None]]:
    """(problem, backend, text of the pattern or None) of each distinct line. ValueError names the line that cannot be one."""
    found = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            problem = Problem.of(data["op"], data["dims"], data["dtypes"], data["arch"], data["features"], float(data["density"]), int(data["granularity"]))
            sizes = all(isinstance(n, int) and 0 <= n < 2 ** 31 for n in data["dims"].values())
            if problem.op not in KERNELS or data["backend"] not in BACKENDS or not sizes or not isinstance(data["pattern"], (str, type(None))):
                raise ValueError("not a problem of ours")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: line {number}: expected a problem as SPARSETILE_RECORD_SHAPES writes it, got {line[:80]!r} ({type(error).__name__}: {error}); delete the line") from None
        found.setdefault((json.dumps(lookup.key_of(problem), sort_keys=True), problem.op, problem.arch), (problem, data["backend"], data["pattern"]))
    return list(found.values())
