"""Which backend runs a call, with which config, and why.

Order of precedence, written only here:
  backend   argument > SPARSETILE_BACKEND_<OP> > SPARSETILE_BACKEND > auto. A named backend runs or raises Unsupported; it never falls back.
            auto: the profile's winner for this device and problem, else the first of contract.BACKENDS that supports the problem.
  config    argument > pinned > user profile directory > user cache > shipped profile of this device > shipped profile of its architecture > the kernel's heuristic.
  tuning    SPARSETILE_TUNE=off ignores profiles, cache (default) reads them, on tunes at a miss through the hook that autotune installs.
"""
import importlib
import itertools
import logging
import os
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

from sparsetile.backends import devices
from sparsetile.backends.contract import BACKENDS, TUNED, Problem, Resources, Unsupported
from sparsetile.profiles.environment import reader

log = logging.getLogger("sparsetile")
_PACKAGE = __name__.rpartition(".ops.")[0]
tune_hook = None  # set by autotune: (problem, device, backend, pattern) -> None, writes a profile entry that the next lookup finds


class Choice(NamedTuple):
    """Who runs a problem: the backend's name, the kernel's module, its config, and where the config came from."""
    backend: str
    kernel: ModuleType
    config: dict
    source: str


@dataclass(frozen=True)
class Explanation:
    """Why a call runs where it runs. `reasons` has one sentence for each backend not taken; `before` says who runs the kernels that prepare the call: kernel -> backend."""
    op: str
    kernel: str
    backend: str | None
    config: dict
    source: str
    reasons: dict
    problem: Problem
    before: dict = field(default_factory=dict)

    def __str__(self):
        lines = [f"{self.op}: {self.backend or 'no backend'} runs {self.kernel}", f"  config: {self.config}", f"  from: {self.source}"]
        lines += [f"  before it: {name} runs {kernel}" for kernel, name in self.before.items()]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.reasons.items()])


class _Explained(Exception):
    """Ends a call that is only being explained, at the choice of its main kernel."""

    def __init__(self, explanation):
        self.explanation = explanation


_explaining = ContextVar("sparsetile_explaining", default=None)  # of a call that is being explained: Explanation.before so far
_depth = 0  # how many calls are being explained anywhere: torch.compile can read a number, not a ContextVar


# --------------------------------------------------------------------------------------------------------------- environment
_readers = {}  # op -> how its variables are read
VARIABLES = ("SPARSETILE_BACKEND", "SPARSETILE_TUNE", "SPARSETILE_PROFILE_DIR")


def environment(op: str) -> tuple:
    """All that the environment says about a call, as a key."""
    read = _readers.get(op)
    if read is None:
        read = _readers[op] = reader("SPARSETILE_BACKEND_" + op.upper(), *VARIABLES)
    return read()


_OP_OF = {"attention_delta": "sparse_attention", "selection_bitmaps": "sparse_attention", "grouped_matmul": "latent_attention", "indexer_scores_backward": "indexer_scores",
          **{f"{keys}_attention{direction}": "sparse_attention" for keys in ("block", "gather") for direction in ("", "_backward")}}


def op_of(kernel: str) -> str:
    """The op that asks for a kernel by itself, and whose variable rules it."""
    return _OP_OF.get(kernel, kernel)


def requested_backend(op: str, backend: str | None) -> str:
    """The backend asked for by argument or environment, or "auto"."""
    own = "SPARSETILE_BACKEND_" + op.upper()
    for value, origin in ((backend, "backend"), (os.environ.get(own), own), (os.environ.get("SPARSETILE_BACKEND"), "SPARSETILE_BACKEND")):
        if value:
            if value not in BACKENDS and value != "auto":
                raise ValueError(f"{origin}: expected one of auto, {', '.join(BACKENDS)}, got {value!r}; choose one of these")
            return value
    return "auto"


def tune_mode() -> str:
    mode = os.environ.get("SPARSETILE_TUNE") or "cache"
    if mode not in ("off", "cache", "on"):
        raise ValueError(f"SPARSETILE_TUNE: expected off, cache or on, got {mode!r}; choose one of these")
    return mode


# ----------------------------------------------------------------------------------------------------------------- discovery
@lru_cache(None)
def package(backend: str) -> ModuleType:
    return importlib.import_module(f"{_PACKAGE}.backends.{backend}")


@lru_cache(None)
def has_kernel(backend: str, name: str) -> bool:
    """Discovery is the file name."""
    return find_spec(f"{_PACKAGE}.backends.{backend}.{name}") is not None


@lru_cache(None)
def kernel(backend: str, name: str) -> ModuleType:
    """A kernel's module. A broken import inside it is an error, not an absence."""
    return importlib.import_module(f"{_PACKAGE}.backends.{backend}.{name}")


def backends() -> dict:
    """Backend -> None, or the sentence that says why it cannot run here."""
    return {name: package(name).unavailable() for name in BACKENDS}


def refusal(backend: str, problem: Problem, device: int | None) -> str | None:
    """None if the backend runs this problem on this device, else one sentence."""
    native = package(backend).NATIVE
    if native == "numpy" and device is not None:
        return f"{backend} computes on the CPU and the arrays are on CUDA device {device}; nothing is moved between host and device: use triton or cupy, or move the arrays"
    if native == "view" and device is None:
        return f"{backend} computes on CUDA devices and the arrays are on the CPU: use numba, or move the arrays to a GPU"
    if native == "torch" and device is None and not package(backend).interpreted():
        return f"{backend} computes on GPUs and the arrays are on the CPU: use numba, or set TRITON_INTERPRET=1 before the first call to interpret it slowly"
    missing = package(backend).unavailable()
    if missing:
        return missing
    if not has_kernel(backend, problem.op):
        return f"{backend} has no {problem.op} kernel"
    return kernel(backend, problem.op).supports(problem)


def _portable(module: ModuleType, problem: Problem, known: dict, config: dict):
    """Configs of the portable path, the first of its values, around the knobs that are given: its own default, then every other."""
    least = {name: knob.values[0] for name, knob in known.items()}
    if hasattr(module, "portable_config"):
        yield {**least, **module.portable_config(problem), **config}
    free = [knob for knob in known.values() if knob.name not in (*config, "path") and (not knob.paths or least["path"] in knob.paths)]
    for values in itertools.product(*(knob.values for knob in free)):
        yield {**least, **{knob.name: value for knob, value in zip(free, values)}, **config}


def check_config(module: ModuleType, problem: Problem, config: dict, origin: str) -> dict:
    """The config with the kernel's defaults for knobs it does not name; errors name the knob."""
    known = {t.name: t for t in module.TUNABLES}
    for name, value in config.items():
        if name not in known:
            raise ValueError(f"{origin}: expected knobs of {problem.op} ({', '.join(known) or 'it has none'}), got {name!r}; leave it out")
        if value not in known[name].values:
            raise ValueError(f"{origin}: expected {name} in {known[name].values}, got {value!r}; choose one of these")
    config = {name: known[name].values[known[name].values.index(value)] for name, value in config.items()}  # 64.0 is 64
    full = {**module.default_config(problem), **config}
    asked = module.resources(problem, full)
    if isinstance(asked, Resources):
        return full
    sentences = [asked]
    if "path" in known and "path" not in config:  # the default's variant is not for this, e.g. for a layout's blocks
        for full in _portable(module, problem, known, config):
            asked = module.resources(problem, full)
            if isinstance(asked, Resources):
                return full
            sentences.append(asked)
    raise Unsupported(f"{origin}: {sentences[:2][-1]}")  # of the portable path, where that was tried


def choose(op: str, problem: Problem, device: int | None, backend: str | None = None, config=None, fixed: dict | None = None, rule=None) -> Choice:
    """The backend and config for a problem of the public op `op`; Unsupported where none may run it. `fixed` are knobs the input decides (a layout's tiles); `rule` is its pattern, for what
    tunes and records. Remembered until clear_plans()."""
    if is_explaining():
        raise _Explained(_explanation(op, problem, device, backend, config, fixed, rule))
    choice, reasons = _remembered(op, problem, device, backend, config, fixed, rule)
    if choice is None:
        near = _nearest(problem, device, reasons) if requested_backend(op, backend) != "auto" else ""
        raise Unsupported(f"{op}: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) + near)
    return choice


def before(op: str, problem: Problem, device: int | None, backend: str | None = None) -> Choice:
    """As `choose`, for a kernel that prepares what the op's own one reads: a call that is being explained goes on, and its explanation tells."""
    choice, _ = _remembered(op, problem, device, backend)
    if choice is None:
        return choose(op, problem, device, backend)  # which says why
    if is_explaining():
        _explaining.get()[problem.op] = choice.backend
    return choice


def find(op: str, problem: Problem, device: int | None, backend: str | None = None, fixed: dict | None = None) -> Choice | None:
    """As `choose`, for work that an op can also do without this kernel: None where no backend may run it, or by itself only the reference would, which is slower than any other way. A variable
    that names this kernel's backend holds: it runs or raises."""
    choice, _ = _remembered(op, problem, device, backend, None, fixed)
    if choice is None and os.environ.get("SPARSETILE_BACKEND_" + op.upper()):
        return choose(op, problem, device, backend, None, fixed)
    by_itself = choice is not None and choice.backend == "reference" and requested_backend(op, backend) == "auto"
    return None if by_itself else choice


def _remembered(op, problem, device, backend, config=None, fixed=None, rule=None) -> tuple[Choice | None, dict]:
    key = (op, problem, device, backend, *(None if knobs is None else tuple(sorted(knobs.items())) for knobs in (config, fixed)), environment(op))
    choice, reasons = _choices.get(key), {}
    if choice is None:
        choice, reasons = _choose(op, problem, device, backend, config, fixed, rule)
        if choice is not None and not is_explaining():
            if len(_choices) >= 4096:  # shapes come and go
                _choices.clear()
            _choices[key] = choice
    return choice, reasons


def _choose(op, problem, device, backend, config, fixed, rule) -> tuple[Choice | None, dict]:
    """The choice, and why each backend that was asked before it refuses."""
    asked = requested_backend(op, backend)
    if asked == "auto":
        found = None if config or fixed or tune_mode() == "off" else looked_up(problem, device, None)
        if found and refusal(found.backend, problem, device) is None:
            return _configure(found.backend, problem, device, None, None, rule), {}
    reasons = {}
    for name in BACKENDS if asked == "auto" else (asked,):
        sentence = refusal(name, problem, device)
        if sentence is None:
            return _configure(name, problem, device, config, fixed, rule), reasons
        reasons[name] = sentence
    return None, reasons


def _explanation(op, problem, device, backend, config, fixed, rule) -> Explanation:
    asked, (choice, reasons) = requested_backend(op, backend), _choose(op, problem, device, backend, config, fixed, rule)
    for name in BACKENDS:
        if name in reasons or choice and name == choice.backend:
            continue
        if asked != "auto":
            reasons[name] = f"{asked} was asked for"
        else:
            first = choice.source if "profile" in choice.source else "the order of preference is " + ", ".join(BACKENDS)
            reasons[name] = refusal(name, problem, device) or f"{choice.backend} comes first: {first}"
    source = choice.source if choice else "no backend supports this" if asked == "auto" else f"{asked} was asked for and refuses this"
    return Explanation(op, problem.op, choice and choice.backend, choice.config if choice else {}, source, reasons, problem, dict(_explaining.get()))


def _nearest(problem, device, reasons) -> str:
    for name in BACKENDS:
        if name not in reasons and refusal(name, problem, device) is None:
            return f". backend={name!r} would run it"
    return ""


def _configure(backend: str, problem: Problem, device: int | None, config, fixed, rule) -> Choice:
    module = kernel(backend, problem.op)
    fixed = fixed or {}
    for name, value in fixed.items():
        if config is not None and config.get(name, value) != value:
            raise ValueError(f"config: expected {name} = {value}, the tile that the layout was made with, got {config[name]}; leave it out or make the layout with it")
    if config is not None:
        return Choice(backend, module, check_config(module, problem, {**dict(config), **fixed}, "config"), "the config argument")
    found = None
    if not fixed and tune_mode() != "off":
        found = looked_up(problem, device, backend)
        missed = found is None and problem.op in TUNED
        if missed and tune_mode() == "on" and tune_hook is None:
            _once("SPARSETILE_TUNE=on: expected before the first op of sparsetile is loaded, came after it, and nothing is tuned; set it earlier, or call sparsetile.autotune.hook.install()")
        elif missed and tune_mode() == "on":
            tune_hook(problem, device, backend, rule)
            found = looked_up(problem, device, backend)
        if missed and found is None and not is_explaining() and module.TUNABLES:
            _missed(problem, backend, rule)
    if found is not None:
        try:
            return Choice(backend, module, check_config(module, problem, dict(found.config), found.where), found.source)
        except (ValueError, Unsupported) as error:
            _once(f"{error}; the kernel's default config runs instead")
    return Choice(backend, module, check_config(module, problem, fixed, "layout"), "the kernel's heuristic" + (" and the layout's tiles" if fixed else ""))


def looked_up(problem: Problem, device: int | None, backend: str | None):
    from sparsetile.profiles import lookup
    found = lookup.find(problem, devices.device_info(device).name, backend)
    if found is not None and found.inherited:
        _once(f"{problem.op}: {found.source} is used for {devices.device_info(device).name}; run `sparsetile tune` for a profile of its own")
    return found


def _missed(problem: Problem, backend: str, rule) -> None:
    from sparsetile.profiles import misses
    misses.note(problem, backend, rule)


_said = set()


def _once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning(message)


# ------------------------------------------------------------------------------------------------------------------- explain
def explain(op, *args, **kwargs) -> Explanation:
    """What would run for this call: backend, config, where the config came from, one sentence for each backend not taken.

    op    a public function of sparsetile or its name; args and kwargs as for the call itself. Nothing is computed. An op of several kernels
          (latent_attention) explains its attention kernel.
    """
    if isinstance(op, str):
        face = importlib.import_module(_PACKAGE)
        if op not in face.__all__:
            raise ValueError(f"op: expected a public function of sparsetile, got {op!r}; see sparsetile.__all__")
        op = getattr(face, op)
    if not callable(op):
        raise TypeError(f"op: expected a public function of sparsetile or its name, got {type(op).__name__}; e.g. sparsetile.sparse_attention")
    with explaining():
        try:
            op(*args, **kwargs)
        except _Explained as stop:
            return stop.explanation
    raise ValueError(f"op: expected a function of sparsetile that runs a kernel for these arguments, got {getattr(op, '__name__', op)}, which ran none; e.g. sparsetile.sparse_attention")


@contextmanager
def explaining():
    """Calls in this context end at the choice of their main kernel, with _Explained."""
    global _depth
    token, _depth = _explaining.set({}), _depth + 1
    try:
        yield
    finally:
        _explaining.reset(token)
        _depth -= 1


def is_explaining() -> bool:
    return _depth > 0 and _explaining.get() is not None


def clear_plans() -> None:
    """Forget every cached choice: after a profile changed."""
    for cache in PLAN_CACHES:
        cache.clear()


_choices = {}
PLAN_CACHES = [_choices]  # and dicts of the op modules, keyed on raw shapes
