"""Calls that came before: an eager PyTorch call of sparse_attention whose like was checked once goes straight to its kernel.

What the checks, the choice of backend and the lists depend on is the key (shapes, strides, types, devices, the pattern, options, the environment), so a
call that finds its key has nothing left to ask; only pointers are read anew. On a GPU the second call notes its kernel's launches, and later ones repeat them (backends/tape.py).
Calls that need a gradient, selections, layouts, configs and positions on the device take the long way.
"""
from sparsetile.backends import devices, places
from sparsetile.ops import dispatch
from sparsetile.ops.pattern import Pattern
from sparsetile.profiles.environment import reader

MOST = 1024  # shapes come and go
_environment = reader("SPARSETILE_BACKEND_SPARSE_ATTENTION", "SPARSETILE_BACKEND", "SPARSETILE_TUNE", "SPARSETILE_PROFILE_DIR")
_calls = {}
dispatch.PLAN_CACHES.append(_calls)


def transformed(torch) -> bool:
    """Whether this is a call inside of torch.func, where tensors have no memory of their own."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def key_of(q, k, v, pattern, scale, softcap, sink_logits, kv_length, q_start, value_width, backend, return_lse, deterministic, allow_tf32):
    """What makes two calls alike, or None for a call that takes the long way."""
    if type(q).__module__ != "torch":
        return None
    import torch  # not looked for in sys.modules: torch.compile would walk over all of them, while they grow
    if type(q) is not torch.Tensor or torch.compiler.is_compiling() or dispatch.is_explaining() or transformed(torch):
        return None
    if not (pattern is None or isinstance(pattern, Pattern)) or not (type(return_lse) is type(deterministic) is type(allow_tf32) is bool):  # 1 == True, and is refused
        return None
    if not ((scale is None or type(scale) is float) and (softcap is None or type(softcap) is float)):
        return None
    if not ((q_start is None or type(q_start) is int) and (value_width is None or type(value_width) is int) and (backend is None or type(backend) is str)):
        return None
    tensor, strided, grad = torch.Tensor, torch.strided, torch.is_grad_enabled()
    found = [pattern, scale, softcap, q_start, value_width, backend, return_lse, deterministic, allow_tf32, _environment()]
    for x in (q, k, v, sink_logits, kv_length):
        if x is None:
            found.append(None)
        elif type(x) is not tensor or grad and x.requires_grad or x.layout is not strided or x.is_nested or x.is_neg():
            return None
        else:
            found += x.shape, x.stride(), x.dtype, x.device
    return tuple(found)


def find(key):
    return _calls.get(key)


def remember(key, call, choice, parts, return_lse) -> None:
    if len(_calls) >= MOST:
        _calls.clear()
    _calls[key] = _Ready(call, choice, parts, return_lse)


class _Ready:
    """One prepared call: everything but the pointers."""

    def __init__(self, call, choice, part, return_lse):
        self.native, self.device = dispatch.package(choice.backend).NATIVE, call.device
        self.run, self.part, self.value_width, self.return_lse = choice.kernel.run, part, call.value_width if call.v is None else None, return_lse
        self.options = dict(config=choice.config, scale=call.scale, softcap=call.softcap, q_start=call.q_start, return_lse=return_lse)
        self.tape, self.trials = None, 0 if self.device is None else 3  # the first may find a kernel that is not compiled for it, or arrays that lie oddly

    def __call__(self, q, k, v, sink_logits, kv_length):
        results = None
        if self.tape is not None and devices.is_current(self.device):
            results = self.tape(devices.stream_of("torch", self.device), q, k, k if v is None else v, sink_logits, kv_length)
        if results is None:
            results = self._run(q, k, v, sink_logits, kv_length)
        return tuple(results) if self.return_lse else results[0]

    def _run(self, q, k, v, sink_logits, kv_length):
        place = places.place_for(self.native, "torch", self.device)
        with place.guard():
            if self.tape is None and self.trials:
                return self._note(place, q, k, v, sink_logits, kv_length)
            return tuple(None if x is None else place.give(x) for x in self._launch(place, *self._natives(place, q, k, v, sink_logits, kv_length)))

    def _natives(self, place, q, k, v, sink_logits, kv_length):
        q, k = place.native(q), place.native(k)
        v = place.first_columns(k, self.value_width) if v is None else place.native(v)
        return q, k, v, *(None if x is None else place.packed(place.native(x)) for x in (sink_logits, kv_length))

    def _launch(self, place, q, k, v, sink, length):
        return self.run(q, k, v, self.part, place=place, sink_logits=sink, kv_length=length, **self.options)

    def _note(self, place, q, k, v, sink_logits, kv_length):
        """As ever, and noted: the caller's arrays as objects of their own, for one may stand in several places."""
        from sparsetile.backends.tape import Recorder
        given = [None if x is None else x.detach() for x in (q, k, v, sink_logits, kv_length)]
        natives = self._natives(place, *given)
        recorder = Recorder(place, self.part, natives, (q, k, k if v is None else v, sink_logits, kv_length))
        out, lse = self._launch(recorder, *natives)
        self.tape, self.trials = recorder.tape(out, lse), self.trials - 1
        return place.give(out), None if lse is None else place.give(lse)
