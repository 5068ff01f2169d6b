"""Calls that came before: an eager PyTorch call whose like was checked once goes straight to its kernel.

What the checks, the choice of backend and the lists depend on is the key (shapes, strides, types, devices, the pattern, options, the environment), so a
call that finds its key has nothing left to ask; only pointers are read anew. On a GPU the second call notes its kernel's launches, and later ones repeat them (backends/tape.py).
So run sparse_attention over patterns and selections, importance_topk and weighted_sum. Calls that need a gradient, layouts, configs and positions on the device take the long way.
"""
from types import SimpleNamespace

from sparsetile.backends import devices, places
from sparsetile.ops import dispatch
from sparsetile.ops.pattern import Pattern
from sparsetile.ops.selection import Selection
from sparsetile.profiles.environment import reader

MOST = 1024  # shapes come and go
PLAIN = frozenset((int, float, bool, str, type(None)))
_readers, _calls = {}, {}
dispatch.PLAN_CACHES.append(_calls)
NO_LISTS = SimpleNamespace(extras={})


def transformed(torch) -> bool:
    """Whether this is a call inside of torch.func, where tensors have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode(torch) -> bool:
    """Whether this is a call at a level of forward-mode AD, where a tensor may carry a tangent."""
    return torch.autograd.forward_ad._current_level >= 0


def key_of(op: str, tensors, options: tuple, rule=None):
    """What makes two calls of the op alike, or None for a call that takes the long way. The rest of `tensors` may be None."""
    if type(tensors[0]).__module__ != "torch":
        return None
    import torch  # not looked for in sys.modules: torch.compile would walk over all of them, while they grow
    if type(tensors[0]) is not torch.Tensor or torch.compiler.is_compiling() or dispatch.is_explaining() or transformed(torch) or forward_mode(torch):
        return None
    kinds = tuple(map(type, options))  # 1 == True, and is refused
    if not PLAIN.issuperset(kinds):
        return None
    tensor, strided, grad = torch.Tensor, torch.strided, torch.is_grad_enabled()
    read = _readers.get(op)
    if read is None:
        read = _readers[op] = reader("SPARSETILE_BACKEND_" + op.upper(), "SPARSETILE_BACKEND", "SPARSETILE_TUNE", "SPARSETILE_PROFILE_DIR")
    found = [op, rule, options, kinds, read()]
    for x in tensors:
        if x is None:
            found.append(None)
        elif type(x) is not tensor or grad and x.requires_grad or x.layout is not strided or x.is_nested or x.is_neg():
            return None
        else:
            found += x.shape, x.stride(), x.dtype, x.device
    return tuple(found)


def attention_key(q, k, v, pattern, scale, softcap, sink_logits, kv_length, q_start, value_width, backend, return_lse, deterministic, allow_tf32):
    """key_of a call of sparse_attention and the tensors that its kernel reads, or None twice."""
    entries = ()
    if not (pattern is None or isinstance(pattern, Pattern)):
        if not isinstance(pattern, Selection) or pattern.restriction is not None:
            return None, None
        entries, pattern = (pattern.indices, pattern.lengths), (pattern.granularity, pattern.causal, pattern.distinct)
    tensors = q, k, v, sink_logits, kv_length, *entries
    return key_of("sparse_attention", tensors, (scale, softcap, q_start, value_width, backend, return_lse, deterministic, allow_tf32), pattern), tensors


def find(key):
    return _calls.get(key)


def remember(key, ready) -> None:
    if len(_calls) >= MOST:
        _calls.clear()
    _calls[key] = ready


class Ready:
    """One prepared call: everything but the pointers."""

    def __init__(self, choice, device, launch, lists=NO_LISTS, *, plain: int, value_width=None, kept=None):
        """launch(place, *natives): the kernel's run, of as many native arrays as a call has tensors, the first `plain` of them as they lie, the others packed.

        lists: what else it reads. value_width: a third tensor that is None stands for so many columns of the second. kept: whatever else a caller needs at the next call.
        """
        self.native, self.device, self.launch, self.lists, self.plain, self.value_width, self.kept = dispatch.package(choice.backend).NATIVE, device, launch, lists, plain, value_width, kept
        self.tape, self.trials = None, 0 if device is None else 3  # the first may find a kernel that is not compiled for it, or arrays that lie as later ones do not

    def __call__(self, *tensors):
        """The kernel's results that are not None."""
        if self.tape is not None and devices.is_current(self.device):
            q, k, v, *more = tensors
            results = self.tape(devices.stream_of("torch", self.device), q, k, k if v is None else v, *more)
            if results is not None:
                return results
        place = places.place_for(self.native, "torch", self.device)
        with place.guard():
            if self.trials:
                return self._note(place, tensors)
            return [place.give(x) for x in self.launch(place, *self._natives(place, tensors)) if x is not None]

    def _natives(self, place, tensors):
        found = [None if x is None else place.native(x) if n < self.plain else place.packed(place.native(x)) for n, x in enumerate(tensors)]
        if self.value_width is not None:
            found[2] = place.first_columns(found[1], self.value_width)
        return found

    def _note(self, place, tensors):
        """As ever, and noted: the caller's arrays as objects of their own, for one may stand in several places."""
        from sparsetile.backends.tape import Recorder
        natives = self._natives(place, [None if x is None else x.detach() for x in tensors])
        q, k, v, *more = tensors
        recorder = Recorder(place, self.lists, natives, (q, k, k if v is None else v, *more))
        results = self.launch(recorder, *natives)
        self.tape, self.trials = recorder.tape(*results) or self.tape, self.trials - 1
        return [place.give(x) for x in results if x is not None]
