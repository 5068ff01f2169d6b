"""Launching a Triton kernel again on like arguments. Triton binds and specialises each argument at each launch, 57 us of host time for forty of them;
a launch whose numbers, constants and alignments were seen before goes to the compiled kernel in 9 us.
"""
from functools import partial

from triton import knobs

from sparsetile.backends.triton.gluon_paths import known_triton

_KNOWN = known_triton()  # how a compiled kernel is called is Triton's own affair
_compiled = {}


class Constants(dict):
    """Compile-time constants as a key: equal only to itself."""
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg", "ptx_options")


def artifact(fn, constants: dict, arrays: dict, integers=(), floats=(), maps=None, *, aligned=(), unaligned=()) -> dict:
    """What is compiled ahead of a kernel that is launched with these constants: pointers, but for those `unaligned`, and integers `aligned` are multiples of 16."""
    made = {name: value for name, value in constants.items() if name not in OPTIONS}
    signature = {**(maps or {}), **arrays, **dict.fromkeys(integers, "i32"), **dict.fromkeys(floats, "fp32")}
    return dict(fn=fn, signature=signature, constexprs=made, options={name: constants[name] for name in OPTIONS if name in constants},
                div16=(*(name for name in arrays if name not in unaligned), *aligned))


def launch(fn, grid, place, pointers: tuple, numbers: tuple, constants: Constants, kinds=(), maps: tuple = ()) -> None:
    """fn[grid](*maps, *pointers, *numbers, **constants); a pointer may be a tuple of them. `constants` and `kinds` decide the pointers' element types, and the blocks of `maps`, tensor descriptors."""
    address = place.address
    addresses = [None if x is None else tuple(map(address, x)) if type(x) is tuple else address(x) for x in pointers]
    key = fn, place.device, tuple([None if x is None else tuple([y % 16 == 0 for y in x]) if type(x) is tuple else x % 16 == 0 for x in addresses]), numbers, constants, kinds
    found = _compiled.get(key)
    if found is None:
        kernel = place.noted(fn[grid])(*maps, *pointers, *numbers, **constants)
        if _KNOWN and kernel is not None and place.device is not None:
            if len(_compiled) >= 4096:  # shapes come and go
                _compiled.clear()
            rest = (constants[name] for name in fn.arg_names[len(maps) + len(pointers) + len(numbers):])
            _compiled[key] = partial(again, kernel), [x if isinstance(x, (int, float, str)) else None for x in rest]  # the kernel has them in it; what is left can stand on a tape
        return
    run, rest = found
    place.noted(run)(*grid, *(1,) * (3 - len(grid)), place.stream, *maps, *addresses, *numbers, *rest)


def again(kernel, x: int, y: int, z: int, stream: int, *values) -> None:
    if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:  # a profiler wants to know of every launch
        kernel[x, y, z](*values, stream=stream)
    else:
        kernel.run(x, y, z, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)
