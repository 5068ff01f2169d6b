"""Calls that are not compiled again and again: functions found by name when code is loaded, and threads for any of them.

Numba compiles what a function calls into that function, once more at every level: a chain of five kernels is optimised five times, and a `prange` around it
doubles that. A `far` function is compiled once; its callers refer to it by a symbol that the linker resolves. `on_threads` is the one parallel function.

    @far("iif", "i")                     # as in simd.op: i int64, f float32, d float64
    def count_above(values, count, limit): ...

A far function is called like any other from compiled code. Python starts with `on_threads(work, job)`, which first links all that `work` refers to.
"""
import os
import struct
from functools import lru_cache
from types import FunctionType

import numba
import numpy as np
from llvmlite import binding, ir
from numba import prange, types
from numba.core import cgutils
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic
from numba.np.ufunc import parallel

from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import LANES, address, get_i64

_LETTERS = {"i": types.int64, "f": types.float32, "d": types.float64, None: types.void}
_FAR = {}  # intrinsic -> Far


class Far:
    def __init__(self, function, takes, returns):
        self.function, self.dispatcher = function, kernel(function)
        self.arguments, self.returns = tuple(_LETTERS[letter] for letter in takes), _LETTERS[returns]
        self.symbol, self.address = f"sparsetile{LANES}.{function.__module__}.{function.__qualname__}", 0

    def link(self) -> int:
        """Compile or load it, after all that it refers to; from then on its symbol is known."""
        if not self.address:
            for other in _far_in(self.function):
                other.link()
            self.dispatcher.compile(self.arguments)
            compiled = self.dispatcher.overloads[self.arguments]
            if compiled.signature.return_type != self.returns:
                raise TypeError(f"{self.symbol} returns {compiled.signature.return_type}, declared was {self.returns}")
            self.address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
            binding.add_symbol(self.symbol, self.address)
        return self.address


def _far_in(function: FunctionType, seen=None):
    """The far functions that a function or the kernels it calls refer to."""
    seen = set() if seen is None else seen
    for name in function.__code__.co_names:
        x = function.__globals__.get(name)
        try:
            if x is None or x in seen:
                continue
        except TypeError:  # not hashable: no function
            continue
        if x in _FAR:
            seen.add(x)
            yield _FAR[x]
        elif isinstance(x, Dispatcher):
            seen.add(x)
            yield from _far_in(x.py_func, seen)


def far(takes: str, returns: str | None = None):
    def wrap(function):
        there = Far(function, takes, returns)

        def make(context):
            there.link()
            signature = there.returns(*there.arguments)

            def generate(context_, builder, signature_, args):
                convention = context_.call_conv
                callee = cgutils.get_or_insert_function(builder.module, convention.get_function_type(there.returns, there.arguments), there.symbol)
                status, result = convention.call_function(builder, callee, there.returns, there.arguments, args)
                with cgutils.if_unlikely(builder, status.is_error):
                    convention.return_status_propagate(builder, status)
                return context_.get_dummy_value() if returns is None else result
            return signature, generate
        names = ", ".join(f"a{n}" for n in range(len(takes)))
        scope = {"make": make}
        exec(f"def {function.__name__}(context, {names}):\n    return make(context)", scope)
        call = intrinsic(scope[function.__name__])
        _FAR[call] = there
        return call
    return wrap


@intrinsic
def _invoke(context, function, job, thread):
    """Call void(int64, int64) at an address; 0, or 1 if it raised."""
    def generate(context_, builder, signature, args):
        convention = context_.call_conv
        kind = convention.get_function_type(types.void, (types.int64, types.int64))
        callee = builder.inttoptr(args[0], kind.as_pointer())
        status, _ = convention.call_function(builder, callee, types.void, (types.int64, types.int64), args[1:])
        return builder.zext(status.is_error, ir.IntType(64))
    return types.int64(types.int64, types.int64, types.int64), generate


@kernel(parallel=True)
def _spread(threads, function, job):
    failed = 0
    for thread in prange(threads):
        failed += _invoke(function, job, thread)
    return failed


@kernel
def _alone(function, job):
    return _invoke(function, job, 0)


def record_at(dtype):
    """A function for compiled code: the record of this type at an address."""
    kind = numba.from_dtype(dtype)

    @intrinsic
    def record(context, address):
        def generate(context_, builder, signature, args):
            return builder.inttoptr(args[0], context_.get_value_type(kind))
        return kind(types.int64), generate
    return record


_kept = []
KEEP = 80 << 20  # bytes


def take(size: int) -> np.ndarray:
    """size bytes in whole cache lines, of a call before where they suffice: clearing new pages would cost a large call a tenth of its time. Give them back by `keep`."""
    memory = _kept.pop() if _kept else None
    if memory is None or len(memory) < size:
        memory = np.empty(size + 64, np.uint8)
        memory = memory[-memory.__array_interface__["data"][0] % 64:]
    return memory


def keep(memory: np.ndarray):
    if len(memory) <= KEEP:
        _kept[:] = [memory]


@lru_cache(maxsize=None)
def _fields(dtype):
    """Of a record of eight-byte fields: how they are packed, their names with nothing in them, and which word each is."""
    return struct.Struct("".join("d" if kind == np.float64 else "q" for kind, _ in dtype.fields.values())), dict.fromkeys(dtype.names, 0), {name: n for n, name in enumerate(dtype.names)}


def make_record(dtype, values: dict) -> np.ndarray:
    """A record [1] with these fields, all others 0, as packed words: NumPy takes half a microsecond for each, of a small call half its time."""
    packer, nothing, _ = _fields(dtype)
    fields = {**nothing, **values}
    if len(fields) > len(nothing):
        raise KeyError(f"no fields of the record: {sorted(values.keys() - nothing.keys())}")
    return np.frombuffer(bytearray(packer.pack(*fields.values())), dtype)


def set_fields(job: np.ndarray, **values):
    """Set these eight-byte integers of a record, by words for the same reason."""
    place, words = _fields(job.dtype)[2], job.view(np.int64)
    for name, x in values.items():
        words[place[name]] = x


def scratch(job: np.ndarray, threads: int, **sizes: int) -> np.ndarray:
    """Memory for each thread: field x of the job becomes the offset of its `sizes[x]` bytes in what thread n has at job.memory + n * job.memory_step."""
    total, place, words = 0, _fields(job.dtype)[2], job.view(np.int64)
    for name, size in sizes.items():
        words[place[name]] = total
        total += -(-size // 64) * 64
    memory = np.empty(threads * total + 64, np.uint8)
    words[place["memory"]], words[place["memory_step"]] = -(-memory.__array_interface__["data"][0] // 64) * 64, total  # whole cache lines: a vector never straddles two
    return memory


_forked = []


def _after_fork():
    """OpenMP's threads do not survive a fork, and starting others would end the process: the child of a process that had them computes alone."""
    if getattr(parallel, "_is_initialized", True):
        _forked.append(True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def on_threads(work, job: np.ndarray, threads: int | None = None):
    """work(address of job, thread) on each of some threads (all); work is far("ii"). The interpreter's lock is held: calls from many Python threads run in turn,
    each on Numba's threads, and never on more than those together."""
    count = 1 if _forked else numba.get_num_threads() if threads is None else threads
    function, record = _FAR[work].link(), address(job.view(np.uint8))  # a record's own array interface describes every field
    if _alone(function, record) if count == 1 else _spread(count, function, record):  # waking threads costs more than a small call
        raise MemoryError(f"{_FAR[work].symbol}: no memory for its scratch")
