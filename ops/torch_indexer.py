"""PyTorch's operators of indexer_scores, indexer_topk, topk and importance_topk."""
import torch

from sparsetile.ops import importance as importance_op
from sparsetile.ops import indexer as indexer_op
from sparsetile.ops import torch_gradients
from sparsetile.ops.torch_library import define, device_of, differentiable, knobs, like, options_text, start_arguments, start_of

_WINDOW = "Tensor? k_scale, bool causal, Tensor? q_start, SymInt start, Tensor? key_start, Tensor? key_end, str activation, str backend, str config"


def _indexer_call(op, q, k, weights, k_scale, causal, q_start, start, key_start, key_end, activation, backend, config):
    return indexer_op.Call(op, q, k, weights, k_scale, causal, start_of(q_start, start), key_start, key_end, activation or None, backend or None,
                           knobs(config), "torch", device_of(q))


def _indexer_arguments(call):
    return (call.q, call.k, call.weights, call.k_scale, call.causal, *start_arguments(call.q_start), call.key_start, call.key_end,
            call.activation or "", call.backend or "", options_text(call.config))


_scores = define(f"indexer_scores(Tensor q, Tensor k, Tensor weights, {_WINDOW}) -> Tensor",
                 lambda *a: indexer_op.scores(_indexer_call("indexer_scores", *a)),
                 lambda q, k, *rest: q.new_empty((q.shape[0], q.shape[2], k.shape[1]), dtype=torch.float32))


def _scores_setup(ctx, inputs, output):
    q, k, weights, k_scale, causal, q_start, start, key_start, key_end, *rest = inputs
    ctx.save_for_backward(q, k, weights, k_scale, q_start, key_start, key_end)
    ctx.causal, ctx.start, ctx.rest = causal, start, rest


def _saved_indexer(ctx):
    """The inputs from q on, in the operators' order."""
    q, k, weights, k_scale, q_start, key_start, key_end, *more = ctx.saved_tensors
    return (q, k, weights, k_scale, ctx.causal, q_start, ctx.start, key_start, key_end, *ctx.rest), more


_scores_backward = define(f"indexer_scores_backward(Tensor dscores, Tensor q, Tensor k, Tensor weights, {_WINDOW}) -> (Tensor, Tensor, Tensor)",
                          lambda dscores, *a: torch_gradients.indexer_scores(_indexer_call("indexer_scores", *a), dscores), lambda dscores, q, k, weights, *rest: like(q, k, weights))
differentiable("indexer_scores", lambda ctx, dscores: (*_scores_backward(dscores, *_saved_indexer(ctx)[0]), *[None] * 9), _scores_setup)


def indexer_scores(call):
    return _scores(*_indexer_arguments(call))


def _select_run(q, k, weights, top_k, pool, force_first, force_last, return_scores, *rest):
    options = dict(pool=pool, force_first=force_first, force_last=force_last, return_scores=return_scores)
    indices, lengths, best = indexer_op.select(_indexer_call("indexer_topk", q, k, weights, *rest), top_k, options)
    return indices, lengths, q.new_empty(0, dtype=torch.float32) if best is None else best


def _select_fake(q, k, weights, top_k, pool, force_first, force_last, return_scores, *rest):
    B, _, T, _ = q.shape
    best = q.new_empty((B, T, top_k) if return_scores else 0, dtype=torch.float32)
    return q.new_empty((B, T, top_k), dtype=torch.int32), q.new_empty((B, T), dtype=torch.int32), best


_select = define("indexer_topk(Tensor q, Tensor k, Tensor weights, SymInt top_k, int pool, int force_first, int force_last, bool return_scores, "
                 f"{_WINDOW}) -> (Tensor, Tensor, Tensor)", _select_run, _select_fake)
_select_backward = define(f"indexer_topk_backward(Tensor indices, Tensor best, Tensor dbest, int pool, Tensor q, Tensor k, Tensor weights, {_WINDOW}) -> (Tensor, Tensor, Tensor)",
                          lambda indices, best, dbest, pool, *a: torch_gradients.indexer_topk(_indexer_call("indexer_topk", *a), indices, best, dbest, pool),
                          lambda indices, best, dbest, pool, q, k, weights, *rest: like(q, k, weights))


def _select_setup(ctx, inputs, output):
    q, k, weights, top_k, ctx.pool, force_first, force_last, return_scores, *rest = inputs
    indices, lengths, best = output
    _scores_setup(ctx, (q, k, weights, *rest), None)
    ctx.save_for_backward(q, k, weights, rest[0], rest[2], rest[4], rest[5], indices, best)
    ctx.mark_non_differentiable(indices, lengths, *([] if return_scores else [best]))
    ctx.set_materialize_grads(False)


def _select_autograd(ctx, _, __, dbest):
    if dbest is None:
        return (None,) * 17
    inputs, (indices, best) = _saved_indexer(ctx)
    dq, dk, dweights = _select_backward(indices, best, dbest, ctx.pool, *inputs)
    return dq, dk, dweights, *[None] * 14


differentiable("indexer_topk", _select_autograd, _select_setup)


def indexer_topk(call, top_k, options):
    q, k, weights, *rest = _indexer_arguments(call)
    indices, lengths, best = _select(q, k, weights, top_k, *(options[name] for name in ("pool", "force_first", "force_last", "return_scores")), *rest)
    return indices, lengths, best if options["return_scores"] else None


_topk = define("topk(Tensor scores, SymInt top_k, Tensor? key_start, Tensor? key_end, str backend, str config) -> (Tensor, Tensor)",
               lambda scores, top_k, lo, hi, backend, config: indexer_op.best(scores, top_k, lo, hi, backend or None, knobs(config), "torch", device_of(scores)),
               lambda scores, top_k, *rest: (scores.new_empty((*scores.shape[:2], top_k), dtype=torch.int32), scores.new_empty(scores.shape[:2], dtype=torch.int32)))


def topk(scores, top_k, key_start, key_end, backend, config):
    return _topk(scores.detach(), top_k, key_start, key_end, backend or "", options_text(config))


def _importance_run(q, k, lse, top_k, block, stride, select_block, keys, scale, kv_length, q_start, start, force_first, force_last, return_scores, backend, config):
    indices, lengths, scores = importance_op.select(importance_op.Call(
        q, k, lse, top_k, block, stride, select_block, keys, scale, kv_length, start_of(q_start, start), force_first, force_last, return_scores, backend or None,
        knobs(config), "torch", device_of(q)))
    return indices, lengths, q.new_empty(0, dtype=torch.float32) if scores is None else scores


def _importance_fake(q, k, lse, top_k, *rest):
    rows = q.shape[0], k.shape[1], q.shape[2]
    return (q.new_empty((*rows, top_k), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32),
            q.new_empty((*rows, top_k) if rest[-3] else 0, dtype=torch.float32))


_importance = define("importance_topk(Tensor q, Tensor k, Tensor lse, SymInt top_k, int block, int stride, int select_block, SymInt keys, float scale, Tensor? kv_length, "
                     "Tensor? q_start, SymInt start, int force_first, int force_last, bool return_scores, str backend, str config) -> (Tensor, Tensor, Tensor)",
                     _importance_run, _importance_fake)


def importance_topk(call):
    indices, lengths, scores = _importance(call.q.detach(), call.k.detach(), call.lse.detach(), call.top_k, call.block, call.stride, call.select_block, call.keys, call.scale, call.kv_length,
                                           *start_arguments(call.q_start), call.force_first, call.force_last, call.return_scores, call.backend or "", options_text(call.config))
    return indices, lengths, scores if call.return_scores else None
