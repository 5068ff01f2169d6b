"""PyTorch: how operators are registered, with fake kernels and autograd, so that torch.compile, opcheck and training see plain operators.

Only tensors, numbers and canonical strings cross an operator's boundary. Eager calls that need no gradient do not go there: they go straight to the kernel.
"""
import json

import torch

from sparsetile.backends.contract import Unsupported
from sparsetile.ops.ready import forward_mode, transformed

lib = torch.library.Library("sparsetile", "DEF")
_BATCHED = torch._C._dispatch_key_parse("Batched")  # of torch.autograd's own vmap, which is not torch.func's
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def wanted(*tensors) -> bool:
    """Whether a call must go through the registered operators: a gradient is needed, or the tensors are not plain ones."""
    if torch.compiler.is_compiling():
        return True
    if transformed(torch):
        raise Unsupported("a call inside torch.func (vmap, grad, jvp) is not supported by any backend; batch along B, and take gradients with torch.autograd")
    no_tangents(*tensors)
    grad = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_meta or grad and x.requires_grad):
            return True
    return False


def no_tangents(*tensors) -> None:
    """Refuses tensors that carry a tangent: no kernel would carry it on."""
    if forward_mode(torch) and any(x is not None and torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise Unsupported("forward-mode AD (a tensor of make_dual, with a tangent) is not supported by any backend; take gradients with torch.autograd, in reverse")


def no_batches(*grads) -> None:
    """Refuses gradients of outputs that vmap runs over: a kernel would see one tensor where there are many."""
    if any(x is not None and (torch._C._dispatch_keys(x).has(_BATCHED) or torch._C._functorch.is_batchedtensor(x)) for x in grads):
        raise Unsupported("gradients of a batch of outputs' gradients at once (is_grads_batched, jacobian with vectorize=True, vmap) are not supported by any backend; call torch.autograd.grad "
                          "for one at a time, or jacobian with vectorize=False")


def plain(*tensors) -> bool:
    """Whether nobody but autograd would see an operator called with these: no compiler, no mode that watches operators, no tensors of another class."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0 and all(x is None or type(x) in _PLAIN and not x.is_meta for x in tensors)


def device_of(x):
    return x.device.index if x.is_cuda else None


def define(schema: str, run, fake):
    """An operator sparsetile::<schema> with one implementation for CPU and CUDA tensors and a fake one for shapes."""
    name = schema.partition("(")[0]
    lib.define(schema)
    for key in ("CPU", "CUDA"):
        lib.impl(name, run, key)
    torch.library.register_fake(f"sparsetile::{name}", fake, lib=lib)
    if name.endswith("_backward"):  # without a formula torch would warn and answer 0
        torch.library.register_autograd(f"sparsetile::{name}", _refuse_twice, lib=lib)
    return getattr(torch.ops.sparsetile, name).default


def _refuse_twice(ctx, *grads):
    raise Unsupported("gradients of gradients are not supported by any backend; leave create_graph=True out, or differentiate the dense formula in PyTorch twice")


def differentiable(name, backward, setup):
    torch.library.register_autograd(f"sparsetile::{name}", backward, setup_context=setup, lib=lib)


_FROM_LENGTH = -2 ** 40  # no position: "start at kv_length - T"


def start_arguments(q_start) -> tuple:
    """Where queries stand, as (tensor or None, number)."""
    if q_start is None or isinstance(q_start, (int, torch.SymInt)):
        return None, _FROM_LENGTH if q_start is None else q_start
    return q_start, 0


def start_of(q_start, start):
    """The other way."""
    return q_start if q_start is not None else None if start == _FROM_LENGTH else start


def options_text(config) -> str:
    return "" if config is None else json.dumps(dict(config), sort_keys=True)


def knobs(config: str):
    return json.loads(config) if config else None


def like(*tensors):
    """Tensors of their shapes and types, for a fake kernel."""
    return tuple(x.new_empty(x.shape) for x in tensors)
