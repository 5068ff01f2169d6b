"""A kernel's run again on like arrays: its launches as they were noted once, with nothing anew but addresses.

    recorder = Recorder(place, lists, natives, tensors);  out, lse = kernel.run(*natives[:3], lists, place=recorder, ...)
    tape = recorder.tape(out, lse);  out, lse = tape(stream, *tensors)

A run can be noted if all it does is to allocate by `empty` and to launch, and if each argument of a launch is a number, a constant, the address of an input or of an allocation, or one of
the lists. A Recorder knows these by their type and lets nothing else onto a tape. Tensors are alike if they agree in all but their addresses, and these in what kernels are compiled for:
how far they lie from multiples of 16 bytes, and whether k and v begin at the same place.
"""
import math
from itertools import accumulate

import torch

from sparsetile.backends.arrays import View


class Address(int):
    """An address, or the stream, that is another one the next time: that of its slot."""

    def __new__(cls, value: int, slot: int):
        found = super().__new__(cls, value)
        found.slot = slot
        return found


class Recorder:
    """Stands in for the place of one run and notes what the run does. Slots: the stream, q, k, v and further inputs, the allocations in their order."""

    def __init__(self, place, lists, natives, tensors):
        """natives: the kernel's inputs, an object each, that lie where the caller's tensors do (else nothing is noted)."""
        self._place, self._lists, self._slots, self._memory, self._made, self._steps = place, lists, {}, [], [], []
        self.stream = Address(place.stream, 0)
        at = [0 if x is None else x.data_ptr() for x in tensors]
        self._same, self._inputs = at[1] == at[2], len(at)
        self._rests, self._none = [a % 16 for a in at], at.count(0)
        self._refused = len({id(x) for x in natives if x is not None}) < sum(x is not None for x in natives)
        for slot, (x, a) in enumerate(zip(natives, at), 1):
            if x is not None:
                self._refused |= self._enter(x, slot) != a

    def _enter(self, x, slot: int) -> int:
        """The address of an array that from now on is known as the slot's."""
        tensor = x.owner if isinstance(x, View) else x
        memory = tensor.untyped_storage()
        self._memory.append(range(memory.data_ptr(), memory.data_ptr() + memory.nbytes()))
        self._slots[id(x)] = slot, x  # held, for an id is an object's own only while it lives
        if tensor is not x:
            x.ptr = Address(x.ptr, slot)
        return tensor.data_ptr()

    def __getattr__(self, name):
        found = getattr(self._place, name)
        self._refused |= callable(found)  # anything but `empty` may be work that a tape would forget
        return found

    def empty(self, shape, dtype):
        x = self._place.empty(shape, dtype)
        tensor = x.owner if isinstance(x, View) else x
        self._made.append((tensor.shape, tensor.stride(), tensor.dtype, tensor.device))
        self._enter(x, self._inputs + len(self._made))
        return x

    def address(self, x):
        """Of a tensor among a launch's pointers: a known one, or a view that begins where one of them alone does (they are all held, so nothing else is there)."""
        at = x.data_ptr()
        slot, _ = self._slots.get(id(x), (None, None))
        if slot is None and at:
            beginning = [n for n, known in self._slots.values() if self._start(known) == at]
            slot = beginning[0] if len(beginning) == 1 else None
        if slot is not None:
            return Address(at, slot)
        self._refused |= not any(x is held for held in (*vars(self._lists).values(), *self._lists.extras.values()))
        return at

    @staticmethod
    def _start(x) -> int:
        return (x.owner if isinstance(x, View) else x).data_ptr()

    def noted(self, call):
        def launch(*args, **named):
            several = {n for n, x in enumerate(args) if type(x) is tuple and x and all(type(y) is Address for y in x)}
            self._refused |= bool(named) or not all(self._plain(x) for n, x in enumerate(args) if n not in several)
            moves = [(n, tuple(y.slot for y in x) if n in several else x.slot) for n, x in enumerate(args) if n in several or type(x) is Address]
            self._steps.append((call, list(args), moves))
            return call(*args, **named)
        return launch

    def _plain(self, x) -> bool:
        """Whether it is the same the next time, or an address that is known: not a tensor, a tensor map, or an address that somebody has counted on from."""
        if type(x) is int:
            return not any(x in memory for memory in self._memory)
        return type(x) in (Address, float, bool, str, type(None)) or type(x) is tuple and not any(type(y) is Address for y in x) and all(map(self._plain, x))

    def tape(self, *results):
        """Repeats the run; its answers are the results that are not None. None if the run cannot be repeated."""
        first = self._inputs + 1
        kept = [self._slots.get(id(x), (0, x))[0] for x in results if x is not None]
        if self._refused or not self._steps or min(kept) < first:
            return None
        order = [*range(first), *kept, *(slot for slot in range(first, first + len(self._made)) if slot not in kept)]
        made = [self._made[slot - first] for slot in order[first:]]
        place = lambda slot: tuple(map(order.index, slot)) if type(slot) is tuple else order.index(slot)  # noqa: E731
        steps = [(call, args, [(n, place(slot)) for n, slot in moves]) for call, args, moves in self._steps]
        return Tape(made[:len(kept)], made[len(kept):], steps, self._same, self._rests, self._none)


class Tape:
    def __init__(self, made, scratch, steps, same: bool, rests: list, none: int):
        """made, scratch: shape, strides, type and device of each result, and of what else is allocated: one piece of memory here. rests: of the inputs' addresses by 16; none: how many of
        them are 0, of inputs that are None (another is a tensor of zeros without memory)."""
        self.made, self.steps, self.same, self.rests, self.none = made, steps, same, rests, none
        ends = list(accumulate([-(-math.prod(shape) * dtype.itemsize // 256) * 256 for shape, _, dtype, _ in scratch], initial=0))
        self.offsets, self.size, self.device = ends[:-1], ends[-1], made[0][3]

    def __call__(self, stream: int, q, k, v, *more):
        """The run's results on these tensors; None if their addresses are not alike, and nothing was done."""
        b, c = k.data_ptr(), v.data_ptr()
        slots = [stream, q.data_ptr(), b, c, *[0 if x is None else x.data_ptr() for x in more]]
        if (b == c) != self.same or [x % 16 for x in slots[1:]] != self.rests or slots.count(0) != self.none + (not stream):
            return None
        made = [torch.empty_strided(shape, strides, dtype=dtype, device=device) for shape, strides, dtype, device in self.made]
        slots += [x.data_ptr() for x in made]
        if self.offsets:
            scratch = torch.empty(self.size, dtype=torch.uint8, device=self.device)
            start = scratch.data_ptr()
            slots += [start + offset for offset in self.offsets]
        for call, args, moves in self.steps:
            args = args.copy()
            for n, slot in moves:
                args[n] = slots[slot] if type(slot) is int else tuple([slots[one] for one in slot])
            call(*args)
        return made
