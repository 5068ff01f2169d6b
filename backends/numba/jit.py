"""Compiling and keeping: one decorator for every Numba function of this backend.

Numba's own `cache=True` looks at the file of the function alone, so a change in simd.py would go unseen; it raises where no directory is
writable; and a full disk or a damaged entry ends the call. Here the stamp covers every file of this folder that the function's file
imports, and a cache that cannot be read or written is a cache that is not there.

Vector helpers must be globals of their modules (an intrinsic in a closure gets a fresh identity in each process and never hits).
"""
import hashlib
import pickle
import re
from functools import lru_cache
from pathlib import Path

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

from sparsetile.backends.numba.simd import LANES

_IMPORT = re.compile(r"^from sparsetile\.backends\.numba\.(\w+) import|^from sparsetile\.backends\.numba import (\w+)", re.M)


@lru_cache(maxsize=None)
def _stamp(path: Path) -> str:
    """A hash of a module's source and of what it imports from this folder, directly or not."""
    files, todo = {}, [path]
    while todo:
        file = todo.pop()
        if file not in files:
            files[file] = file.read_text()
            todo += [path.parent / f"{a or b}.py" for a, b in _IMPORT.findall(files[file])]
    text = "\0".join(files[file] for file in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()


_DAMAGED = (OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError, AttributeError, ImportError, IndexError, TypeError)


class _Cache(FunctionCache):
    def __init__(self, function):
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path, filename_base=f"{self._impl.filename_base}-{LANES}",
            source_stamp=_stamp(Path(function.__code__.co_filename)))

    def load_overload(self, signature, target):
        try:
            return super().load_overload(signature, target)
        except _DAMAGED:
            return None

    def save_overload(self, signature, data):
        try:
            super().save_overload(signature, data)
        except OSError:
            self.disable()
        except _DAMAGED:  # the index, which is read before it is written
            try:
                self._cache_file.flush()
                super().save_overload(signature, data)
            except OSError:
                self.disable()


def kernel(function=None, *, parallel=False, signature=None):
    """Compile in nopython mode and keep the result on disk where that is possible.

    parallel   `prange` runs on Numba's threads; keep such a function small (a loop around a call), its passes are slow
    signature  compile for these types when decorated, so that the first call does not depend on flags such as writability
    """
    if function is None:
        return lambda f: kernel(f, parallel=parallel, signature=signature)
    compiled = numba.njit(parallel=parallel, error_model="numpy")(function)
    try:
        compiled._cache = _Cache(function)
    except (RuntimeError, OSError):  # no writable directory: every process compiles for itself
        pass
    if signature:
        compiled.compile(signature)
    return compiled
