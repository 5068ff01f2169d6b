"""What a profile file may say, and the safe loader. A bad file is one error that names file and entry; nothing in it is ever executed."""
import json
import re
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import yaml

from sparsetile.backends.contract import BACKENDS, KERNELS

VERSION = "sparsetile-profile/1"
MAX_BYTES = 2 << 20
MAX_ENTRIES = 2_000
MAX_EVENTS = 200_000  # of the parser: half a second, and a hundred for each of the most entries
STATUS = ("tuned", "partial", "inherited", "manual", "pinned")
RULES = ("exact", "pow2_up", "bucket")
OPS = (*KERNELS, "latent_attention")  # whose one knob is its mode


class ProfileError(ValueError):
    """A profile file that cannot be used: says which file, which entry, and what is wrong."""


_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
MAX_DEPTH = 16
_NUMBER = re.compile(r"([-+]?(?:0|[1-9]\d*))|[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?", re.A)  # as the writer writes them: a digest like 12e45678 is a word


def _plain_data(text: str):
    """Mappings, lists and scalars straight from the parser's events: nothing is constructed from tags, and anchors (a few of them can describe a billion
    nodes) are refused. Twice as fast as yaml.load, which builds nodes first."""
    root = []
    stack, keys = [root], []
    for count, event in enumerate(yaml.parse(text, _PARSER)):
        kind = type(event)
        if count > MAX_EVENTS:
            raise yaml.YAMLError(f"more than {MAX_EVENTS} scalars and brackets, enough for {MAX_ENTRIES} entries")
        if kind is yaml.ScalarEvent:
            if event.anchor or event.tag:
                raise yaml.YAMLError("tags and anchors are not allowed in a profile")
            value = _scalar(event.value) if event.implicit[0] else event.value
            top = stack[-1]
            if type(top) is list:
                top.append(value)
            elif keys[-1] is None:
                keys[-1] = (value,)
            else:
                top[keys[-1][0]] = value
                keys[-1] = None
        elif kind is yaml.MappingStartEvent or kind is yaml.SequenceStartEvent:
            if event.anchor or event.tag:
                raise yaml.YAMLError("tags and anchors are not allowed in a profile")
            if len(stack) > MAX_DEPTH:
                raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH}")
            value, top = ({} if kind is yaml.MappingStartEvent else []), stack[-1]
            if type(top) is list:
                top.append(value)
            elif keys[-1] is None:
                raise yaml.YAMLError("a key is a mapping or a list")
            else:
                top[keys[-1][0]] = value
                keys[-1] = None
            stack.append(value)
            if type(value) is dict:
                keys.append(None)
        elif kind is yaml.MappingEndEvent:
            stack.pop(), keys.pop()
        elif kind is yaml.SequenceEndEvent:
            stack.pop()
        elif kind is yaml.AliasEvent:
            raise yaml.YAMLError("aliases are not allowed in a profile")
    return root[0] if len(root) == 1 else None


@lru_cache(4096)  # the same words and sizes come again and again
def _scalar(text: str):
    lower = text.lower()
    if lower in _WORDS:
        return _WORDS[lower]
    kind = _NUMBER.fullmatch(text)
    return text if kind is None else int(text) if kind[1] else float(text)


def load(path) -> dict:
    """The checked content of one file. Raises ProfileError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ProfileError(f"{path}: expected at most {MAX_BYTES} bytes, got {size}; split or regenerate it")
        data = _plain_data(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError, ValueError) as error:
        if isinstance(error, ProfileError):
            raise
        raise ProfileError(f"{path}: not a readable profile: {str(error).splitlines()[0] if str(error) else type(error).__name__}; delete or regenerate it") from None
    problem = check(data)
    if problem:
        raise ProfileError(f"{path}: {problem}; correct it, or delete it and run `sparsetile tune`")
    return data


def check(data) -> str | None:
    """None if the data is a profile, else one sentence."""
    if not isinstance(data, dict):
        return f"expected a mapping at the top, got {type(data).__name__}"
    if data.get("schema") != VERSION:
        return f"schema: expected {VERSION!r}, got {data.get('schema')!r}"
    if data.get("op") not in OPS:
        return f"op: expected one of {', '.join(OPS)}, got {data.get('op')!r}"
    device = data.get("device")
    if not isinstance(device, dict) or not isinstance(device.get("name"), str) or not isinstance(device.get("arch"), str):
        return "device: expected a mapping with name and arch"
    dims = data.get("dims")
    if not isinstance(dims, dict) or any(rule not in RULES for rule in dims.values()):
        return f"dims: expected axis -> one of {', '.join(RULES)}"
    entries = data.get("entries")
    if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
        return f"entries: expected a list of at most {MAX_ENTRIES}"
    for number, entry in enumerate(entries):
        wrong = _check_entry(entry)
        if wrong:
            return f"entry {number}: {wrong}"
    return None


def _check_entry(entry) -> str | None:
    if not isinstance(entry, dict):
        return f"expected a mapping, got {type(entry).__name__}"
    key = entry.get("key")
    if not isinstance(key, dict) or not isinstance(key.get("dims"), dict) or not isinstance(key.get("dtypes"), dict):
        return "key: expected a mapping with dims and dtypes"
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in key["dims"].values()):
        return "key.dims: expected axis -> whole number"
    if any(not isinstance(kind, str) for kind in key["dtypes"].values()):
        return "key.dtypes: expected argument -> element type"
    if not isinstance(key.get("features", []), list) or any(not isinstance(word, str) for word in key.get("features", [])):
        return "key.features: expected a list of words"
    if not isinstance(key.get("density", 1.0), (int, float)) or not isinstance(key.get("granularity", 1), int):
        return "key: expected numbers for density and granularity"
    if entry.get("backend") not in BACKENDS:
        return f"backend: expected one of {', '.join(BACKENDS)}, got {entry.get('backend')!r}"
    config = entry.get("config")
    if not isinstance(config, dict) or any(not isinstance(name, str) or not isinstance(value, (int, float, str, bool)) for name, value in config.items()):
        return "config: expected knob -> number or word"
    if entry.get("status", "tuned") not in STATUS:
        return f"status: expected one of {', '.join(STATUS)}, got {entry.get('status')!r}"
    for name in ("time_us", "default_us"):
        if name in entry and not isinstance(entry[name], (int, float)):
            return f"{name}: expected a number"
    return None


def json_schema() -> dict:
    """The same rules for other tools."""
    return json.loads(files(__package__).joinpath("schema.json").read_text())
