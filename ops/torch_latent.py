"""PyTorch's operators of latent_decompress and of the products that absorb w_uk and w_uv; and the choice of a mode under torch.compile."""
import torch

from sparsetile.ops import latent as latent_op
from sparsetile.ops import latent_mode as modes
from sparsetile.ops import torch_gradients
from sparsetile.ops.patterns import Causal, Full
from sparsetile.ops.torch_attention import pattern_of
from sparsetile.ops.torch_library import define, device_of, differentiable, knobs, like, options_text

for shared in (Full(), Causal()):  # one object for all callers: its text must not come while torch.compile looks at it
    shared.canonical(), hash(shared)


@torch.compiler.assume_constant_result
def latent_mode(rule, T, B, S, *about) -> str:
    """latent_mode.decide while torch.compile traces: it counts pairs and reads profiles, which no graph can hold. rule: a pattern's text, a number of keys or None."""
    *widths, kind, device, backend = about
    return modes.decide(pattern_of(rule) if isinstance(rule, str) else rule, T, (B, S, *widths), kind, device, backend)


_decompress = define("latent_decompress(Tensor latent, Tensor w_uk, Tensor w_uv, Tensor? k_rope, Tensor? latent_scale, str backend, str config) -> (Tensor, Tensor)",
                     lambda c, uk, uv, rope, scale, backend, config: latent_op.decompress(c, uk, uv, rope, scale, backend or None, knobs(config), "torch", device_of(c)),
                     lambda c, uk, uv, rope, *rest: (uk.new_empty((c.shape[0], uk.shape[0], c.shape[1], uk.shape[2] + (0 if rope is None else rope.shape[2]))),
                                                              uk.new_empty((c.shape[0], uk.shape[0], c.shape[1], uv.shape[2]))))


def _decompress_backward_run(dk, dv, c, uk, uv, rope, scale, backend):
    *got, drope = torch_gradients.latent_decompress(dk, dv, c, uk, uv, rope, scale, backend or None)
    return *got, uk.new_empty(0) if drope is None else drope


def _decompress_backward_fake(dk, dv, c, uk, uv, rope, scale, backend):
    return c.new_empty(c.shape, dtype=uk.dtype), *like(uk, uv), uk.new_empty(0) if rope is None else rope.new_empty(rope.shape)


_decompress_backward = define("latent_decompress_backward(Tensor dk, Tensor dv, Tensor latent, Tensor w_uk, Tensor w_uv, Tensor? k_rope, Tensor? latent_scale, str backend) "
                              "-> (Tensor, Tensor, Tensor, Tensor)", _decompress_backward_run, _decompress_backward_fake)


def _decompress_setup(ctx, inputs, output):
    *tensors, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors)


def _decompress_autograd(ctx, dk, dv):
    c, rope = ctx.saved_tensors[0], ctx.saved_tensors[3]
    dc, duk, duv, drope = _decompress_backward(dk, dv, *ctx.saved_tensors, ctx.backend)
    return None if c.dtype != dc.dtype else dc, duk, duv, None if rope is None else drope, None, None, None


differentiable("latent_decompress", _decompress_autograd, _decompress_setup)


def latent_decompress(latent, w_uk, w_uv, k_rope, latent_scale, backend, config):
    return _decompress(latent, w_uk, w_uv, k_rope, latent_scale, backend or "", options_text(config))


_matmul = define("grouped_matmul(Tensor x, Tensor w, Tensor? tail, str backend) -> Tensor",
                 lambda x, w, tail, backend: latent_op.matmul(x, w, tail, backend or None, "torch", device_of(x)),
                 lambda x, w, tail, backend: x.new_empty((*x.shape[:3], w.shape[1] + (0 if tail is None else tail.shape[3]))))
_matmul_backward = define("grouped_matmul_backward(Tensor dout, Tensor x, Tensor w, str backend) -> (Tensor, Tensor)",
                          lambda dout, x, w, backend: torch_gradients.grouped_matmul(dout, x, w, backend or None), lambda dout, x, w, backend: like(x, w))


def _matmul_setup(ctx, inputs, output):
    x, w, tail, ctx.backend = inputs
    ctx.save_for_backward(x, w)
    ctx.tail = tail is not None


def _matmul_autograd(ctx, dout):
    x, w = ctx.saved_tensors
    return *_matmul_backward(dout, x, w, ctx.backend), dout[..., w.shape[1]:] if ctx.tail else None, None


differentiable("grouped_matmul", _matmul_autograd, _matmul_setup)


def grouped_matmul(x, w, tail, backend):
    return _matmul(x, w, tail, backend or "")
