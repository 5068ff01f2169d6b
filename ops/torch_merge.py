"""PyTorch's operators of merge_attention and weighted_sum."""
import torch

from sparsetile.ops import merge as merge_op
from sparsetile.ops.torch_library import define, device_of, differentiable, knobs, options_text


def _merge_run(outs, lses, sink_logits, backend, config):
    return merge_op.merge(tuple(outs), tuple(lses), sink_logits, backend or None, knobs(config), "torch", device_of(outs[0]))


def _merge_fake(outs, lses, *rest):
    return torch.empty_like(outs[0], memory_format=torch.contiguous_format), torch.empty_like(lses[0], memory_format=torch.contiguous_format)


def _merge_setup(ctx, inputs, output):
    outs, lses, sink_logits, *_ = inputs
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses, sink_logits, *output)
    ctx.set_materialize_grads(False)


def _merge_autograd(ctx, dout, dlse):
    """With w_i = exp(lse_i - total), total the denominator with the sink:  do_i = w_i do,  dlse_i = w_i (do.o_i - do.o) + dlse exp(lse_i - lse)."""
    n = ctx.parts
    outs, lses, (sink_logits, out, lse) = ctx.saved_tensors[:n], ctx.saved_tensors[n:2 * n], ctx.saved_tensors[2 * n:]
    total = lse if sink_logits is None else torch.logaddexp(lse, sink_logits[:, None].to(lse.dtype))
    dout = torch.zeros_like(out) if dout is None else dout
    wide = dout.to(lse.dtype)
    mean = (wide * out).sum(-1)
    douts, dlses = [], []
    for part, part_lse in zip(outs, lses):
        empty = part_lse == -torch.inf
        weight = torch.where(empty, 0, (part_lse - total).exp())
        douts.append((weight[..., None] * wide).to(part.dtype))
        grad = weight * ((wide * part).sum(-1) - mean)
        if dlse is not None:
            grad = grad + dlse * torch.where(empty, 0, (part_lse - lse).exp())
        dlses.append(torch.where(empty, 0, grad))
    dsink = None
    if sink_logits is not None:
        share = torch.where(torch.isinf(sink_logits)[:, None], 0, (sink_logits[:, None].to(lse.dtype) - total).exp())
        dsink = -(share * mean).sum((0, 2)).to(sink_logits.dtype)
    return douts, dlses, dsink, None, None


_merge = define("merge(Tensor[] outs, Tensor[] lses, Tensor? sink_logits, str backend, str config) -> (Tensor out, Tensor lse)", _merge_run, _merge_fake)
differentiable("merge", _merge_autograd, _merge_setup)


def merge(outs, lses, sink_logits, backend, config):
    return _merge(list(outs), list(lses), sink_logits, backend or "", options_text(config))


def _weighted_setup(ctx, inputs, output):
    outs, weights, _ = inputs
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *weights)


def _weighted_autograd(ctx, dout):
    """do_n = w_n do,  dw_n = do . o_n"""
    outs, weights = ctx.saved_tensors[:ctx.parts], ctx.saved_tensors[ctx.parts:]
    wide = dout if dout.dtype == torch.float64 else dout.float()
    return [(w[..., None] * wide).to(dout.dtype) for w in weights], [(wide * o).sum(-1).to(w.dtype) for w, o in zip(weights, outs)], None


_weighted = define("weighted_sum(Tensor[] outs, Tensor[] weights, str backend) -> Tensor",
                   lambda outs, weights, backend: merge_op.add_weighted(tuple(outs), tuple(weights), backend or None, "torch", device_of(outs[0])),
                   lambda outs, *rest: torch.empty_like(outs[0], memory_format=torch.contiguous_format))
differentiable("weighted_sum", _weighted_autograd, _weighted_setup)


def weighted_sum(outs, weights, backend):
    return _weighted(list(outs), list(weights), backend or "")
