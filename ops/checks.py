"""Errors for users: argument, what was expected, what came, what to do."""
import math

import numpy as np

from sparsetile.backends import arrays
from sparsetile.backends.contract import BACKENDS
from sparsetile.ops.pattern import shown

HALF = ("float16", "bfloat16")


def array(name, x, ndim=None, axes="", dtypes=None, optional=False):
    """An array argument: its framework is known, its rank and element type fit."""
    what = f"array {axes}".rstrip()
    if x is None:
        if optional:
            return None
        raise TypeError(f"{name}: expected an {what}, got None; pass a NumPy, PyTorch, CuPy or JAX array")
    framework = arrays.framework(x)
    if framework is None:
        raise TypeError(f"{name}: expected a NumPy, PyTorch, CuPy or JAX {what}, got {type(x).__name__}; {_how_to_pass(x)}")
    if framework == "torch":
        _strided(name, x, what)
    if framework == "numpy" and isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an {what} without a mask of its own, got a MaskedArray; call filled(), and say by a pattern or a length what is seen")
    if ndim is not None and x.ndim not in (ndim if isinstance(ndim, tuple) else (ndim,)):
        raise ValueError(f"{name}: expected {ndim if isinstance(ndim, int) else ' or '.join(map(str, ndim))} axes {axes}, got shape {list(x.shape)}; add or remove axes with reshape")
    if dtypes is not None:
        kind = arrays.dtype_name(x)
        if kind not in dtypes:
            raise TypeError(f"{name}: expected element type {' or '.join(dtypes)}, got {kind}; convert it first")
    return x


def _how_to_pass(x) -> str:
    """What makes an argument of x, which is no array of a framework that we know."""
    if hasattr(x, "gather"):
        return "a cache stands where keys of attention, of the indexer or latents do: pass the arrays of its gather()"
    if hasattr(x, "__dlpack__"):
        return "read it in place with numpy.from_dlpack or torch.from_dlpack"
    return "wrap it with numpy.asarray or torch.as_tensor"


def _strided(name, x, what):
    import torch
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense {what}, got a tensor of layout {x.layout}; call to_dense() first")
    if x.is_nested:
        raise TypeError(f"{name}: expected a dense {what}, got a nested tensor; pad it with to_padded_tensor, and give kv_length, or pack it and use Documents")


def same(name, what, expected, got, remedy):
    if expected != got:
        raise ValueError(f"{name}: expected {what} {expected}, got {got}; {remedy}")


def together(named: dict):
    """All arrays are of one framework and on one device. Returns (framework, device)."""
    first = None
    for name, x in named.items():
        if x is None:
            continue
        framework = arrays.framework(x)
        if framework in (None, "torch"):
            array(name, x)
        device = arrays.device_of(x)
        here = framework, "meta" if framework == "torch" and x.is_meta and device is None else device  # what compiles ahead gives them a device
        if first is None:
            first, origin = here, name
        elif here != first:
            raise ValueError(f"{name}: expected {_where(first)} as {origin} is, got {_where(here)}; convert or move it, nothing is moved for you")
    return first if first is None or first[1] != "meta" else (first[0], None)


def _where(place):
    framework, device = place
    return f"a {framework} array on {'the CPU' if device is None else 'no device (meta)' if device == 'meta' else f'CUDA device {device}'}"


def number(name, value, low=None, high=None, optional=False):
    if value is None and optional:
        return None
    try:
        if isinstance(value, str) or getattr(value, "ndim", 0) or str(getattr(value, "dtype", type(value).__name__)).endswith("bool"):
            raise TypeError
        exact = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {shown(value)} of type {type(value).__name__}; pass a Python float") from None
    except OverflowError:
        exact = math.inf
    if not math.isfinite(exact) or low is not None and not exact > low or high is not None and not exact < high:
        raise ValueError(f"{name}: expected a finite number{f' above {low}' if low is not None else ''}{f' below {high}' if high is not None else ''}, got {shown(value)}; choose one in range")
    return exact


def integer(name, value, low=None, high=None, optional=False):
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, int):  # in this order torch.compile can read a length that it knows as a symbol
        value = _index(name, value)
    if low is not None and value < low or high is not None and value > high:
        bounds = f"{'' if low is None else f' from {low}'}{'' if high is None else f' to {high}'}"
        raise ValueError(f"{name}: expected an integer{bounds}, got {shown(value)}; choose one in range")
    return value


def _index(name, value) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, got {shown(value)} of type {type(value).__name__}; pass a Python int")
    try:
        return value.__index__()
    except TypeError:  # arrays of floats have an __index__ that refuses
        raise TypeError(f"{name}: expected an integer, got {shown(value)}; pass a Python int") from None


def choice(name, value, values):
    if not (value is None or isinstance(value, str)) or value not in values:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, values))}, got {shown(value)}; choose one of these")
    return value


def flag(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}; pass a bool")
    return value


def options(backend, config):
    """The arguments that every op has: who shall run it, and how."""
    if backend is not None:
        choice("backend", backend, ("auto", *BACKENDS))
    if config is not None:
        if not hasattr(config, "keys"):
            raise TypeError(f"config: expected a dict of knobs or None, got {shown(config)}; see sparsetile.explain for the knobs in use")
        for knob in config:
            if not isinstance(knob, str) or not isinstance(config[knob], (bool, int, float, str)):
                raise TypeError(f"config: expected names of knobs and plain values, got {shown(knob)}: {shown(config[knob])}; see sparsetile.explain for the knobs in use")


def lengths(name, x, shape, what):
    """An int32 array of lengths or positions on the device of the call."""
    if x is None:
        return None
    array(name, x, len(shape), what, ("int32",))
    same(name, f"shape {what}", list(shape), list(x.shape), "one entry for each")
    return x


def start(q_start, B, default):
    """Position of query 0: a number, int32 [B] on the device of the call, or the default."""
    if q_start is None:
        return default
    if not isinstance(q_start, int) and getattr(q_start, "ndim", 0) > 0 and arrays.framework(q_start) is not None:  # in this order torch.compile can read a number
        return lengths("q_start", q_start, (B,), "[B]")
    return integer("q_start", q_start, -2 ** 31, 2 ** 31 - 1)


def width(name, value):
    if not 1 <= value <= 576:
        raise ValueError(f"{name}: expected a width from 1 to 576, got {value}; split wider heads")


def row(name, x, shape, what, dtypes=("float32",)):
    if x is None:
        return None
    array(name, x, len(shape), what, dtypes)
    same(name, f"shape {what} =", list(shape), list(x.shape), "one value for each")
    return x
