"""What the environment says, as the key of a cache: three variables cost 0.2 us instead of the 2.5 us of os.environ, which encodes and decodes at every reading."""
import os

_raw = getattr(os.environ, "_data", None)  # the dict behind it: bytes on POSIX; what another Python may call otherwise is read the slow way


def reader(*names: str):
    """A function that reads these variables now. The values are for comparing only: bytes, words or None."""
    if _raw is None:
        return lambda: tuple(map(os.environ.get, names))
    get, keys = _raw.get, tuple(map(os.environ.encodekey, names))
    return lambda: tuple(map(get, keys))
