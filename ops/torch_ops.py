"""PyTorch: registered operators with fake kernels and autograd, so that torch.compile, opcheck and training see plain operators.

Only tensors and a canonical string cross the operators' boundary. A rule crosses as
    "p<pattern>"                     a pattern's canonical text
    "s<granularity>,<causal>"        a selection; tables = [indices] or [indices, lengths]
    "l<T>,<S>;<part>;..."            a layout; tables = its parts' arrays, in order; a part's text is its numbers and which arrays it has
Eager calls that need no gradient do not come here: they go straight to the kernel.
"""
import json
from functools import lru_cache

import torch

from sparsetile.backends.contract import Lists, Unsupported
from sparsetile.ops import attention as attention_op
from sparsetile.ops import importance as importance_op
from sparsetile.ops import indexer as indexer_op
from sparsetile.ops import latent as latent_op
from sparsetile.ops import merge as merge_op
from sparsetile.ops import torch_gradients
from sparsetile.ops.layout import Layout
from sparsetile.ops.patterns import Causal, Full, Pattern
from sparsetile.ops.ready import transformed
from sparsetile.ops.selection import Selection

lib = torch.library.Library("sparsetile", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def wanted(*tensors) -> bool:
    """Whether a call must go through the registered operators: a gradient is needed, or the tensors are not plain ones."""
    if torch.compiler.is_compiling():
        return True
    if transformed(torch):
        raise Unsupported("a call inside torch.func (vmap, grad, jvp) is not supported by any backend; batch along B, and take gradients with torch.autograd")
    grad = torch.is_grad_enabled()
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_meta or grad and x.requires_grad):
            return True
    return False


for shared in (Full(), Causal()):  # one object for all callers: its text must not come while torch.compile looks at it
    shared.canonical(), hash(shared)


@torch.compiler.assume_constant_result
def latent_mode(rule, T, B, S, *about) -> str:
    """latent.decide while torch.compile traces: it counts pairs and reads profiles, which no graph can hold. rule: a pattern's text, a number of keys or None."""
    *widths, kind, device, backend = about
    return latent_op.decide(_pattern(rule) if isinstance(rule, str) else rule, T, (B, S, *widths), kind, device, backend)


def _device(x):
    return x.device.index if x.is_cuda else None


def _define(schema: str, run, fake):
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


def _differentiable(name, backward, setup):
    torch.library.register_autograd(f"sparsetile::{name}", backward, setup_context=setup, lib=lib)


# -------------------------------------------------------------------------------------------------------------- the rule as text
def encode(rule) -> tuple[str, list]:
    if isinstance(rule, Pattern):
        return "p" + rule.canonical(), []
    if isinstance(rule, Selection):
        return f"s{rule.granularity},{int(rule.causal)}", [rule.indices] + ([] if rule.lengths is None else [rule.lengths])
    tables, text = [], f"l{rule.T},{rule.S}"
    for part in rule.parts:
        held = [getattr(part, name) for name in attention_op._ARRAYS]
        tables += [torch.as_tensor(x) for x in held if x is not None]
        numbers = [int(getattr(part, name)) for name in _NUMBERS]
        text += ";" + ",".join([str(n) for n in numbers] + ["0" if x is None else "1" for x in held])
    return text, tables


_NUMBERS = ("block_q", "block_k", "first", "nq", "nk", "has_intervals", "has_bitmaps", "longest")


@lru_cache(256)
def _pattern(text: str):
    return Pattern.parse(text)


def decode(text: str, tables):
    if text[0] == "p":
        return _pattern(text[1:])
    if text[0] == "s":
        granularity, causal = map(int, text[1:].split(","))
        return Selection(tables[0], granularity, tables[1] if len(tables) > 1 else None, bool(causal))
    sizes, *said = text[1:].split(";")
    T, S = map(int, sizes.split(","))
    tables, parts = iter(tables), []
    for part in said:
        values = list(map(int, part.split(",")))
        numbers = dict(zip(_NUMBERS, values)) | {name: bool(dict(zip(_NUMBERS, values))[name]) for name in ("has_intervals", "has_bitmaps")}
        parts.append(Lists(**numbers, **{name: next(tables) if has else None for name, has in zip(attention_op._ARRAYS, values[len(_NUMBERS):])}))
    return Layout(tuple(parts), T, S)


def _options(config) -> str:
    return "" if config is None else json.dumps(dict(config), sort_keys=True)


def _knobs(config: str):
    return json.loads(config) if config else None


# --------------------------------------------------------------------------------------------------------------------- attention
_RULE = ("str rule, Tensor[] tables, Tensor? sink_logits, Tensor? kv_length, Tensor? q_start, SymInt start, float scale, float softcap, SymInt value_width, "
         "bool deterministic, str backend, str config")


def _call(q, k, v, rule, tables, sink_logits, kv_length, q_start, start, scale, softcap, value_width, deterministic, backend, config):
    start = q_start if q_start is not None else None if kv_length is not None and start == _FROM_LENGTH else start
    return attention_op.Call(q, k, v, decode(rule, tables), scale, sink_logits, softcap or None, kv_length, start, value_width, deterministic, backend or None,
                             _knobs(config), "torch", _device(q))


_FROM_LENGTH = -2 ** 40  # no position: "start at kv_length - T"


def attention(call):
    """(out, lse) of a checked call, through the registered operator."""
    rule, tables = encode(call.rule)
    device_start = None if call.q_start is None or isinstance(call.q_start, (int, torch.SymInt)) else call.q_start
    start = _FROM_LENGTH if call.q_start is None else 0 if device_start is not None else call.q_start
    return _attention(call.q, call.k, call.v, rule, tables, call.sink_logits, call.kv_length, device_start, start, call.scale, call.softcap or 0.0, call.value_width,
                      call.deterministic, call.backend or "", _options(call.config))


def _attention_run(q, k, v, *rest):
    out, lse = attention_op.forward(_call(q, k, v, *rest), True)
    return out, lse


def _attention_fake(q, k, v, rule, tables, sink_logits, kv_length, q_start, start, scale, softcap, value_width, *rest):
    B, Hq, T, _ = q.shape
    return q.new_empty((B, Hq, T, value_width)), q.new_empty((B, Hq, T), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _attention_setup(ctx, inputs, output):
    q, k, v, rule, tables, sink_logits, kv_length, q_start, *rest = inputs
    ctx.save_for_backward(q, k, v, sink_logits, kv_length, q_start, *output, *tables)
    ctx.rule, ctx.rest, ctx.count = rule, rest, len(tables)
    ctx.set_materialize_grads(False)


def _attention_autograd(ctx, dout, dlse):
    q, k, v, sink_logits, kv_length, q_start, out, lse, *tables = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, dsink = _attention_backward(dout, dlse, out, lse, q, k, v, ctx.rule, tables, sink_logits, kv_length, q_start, *ctx.rest)
    return dq, dk, dv if v is not None else None, None, [None] * ctx.count, dsink if sink_logits is not None else None, *[None] * (2 + len(ctx.rest))


def _attention_backward_run(dout, dlse, out, lse, q, k, v, *rest):
    call = _call(q, k, v, *rest)
    dq, dk, dv, dsink = attention_op.backward(call, out, lse, dout, dlse)
    return dq, dk, q.new_empty(0) if dv is None else dv, q.new_empty(0, dtype=torch.float32) if dsink is None else dsink


def _attention_backward_fake(dout, dlse, out, lse, q, k, v, rule, tables, sink_logits, *rest):
    dv = q.new_empty(0) if v is None else v.new_empty(v.shape)
    dsink = q.new_empty(0, dtype=torch.float32) if sink_logits is None else sink_logits.new_empty(sink_logits.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), dv, dsink


_attention = _define(f"attention(Tensor q, Tensor k, Tensor? v, {_RULE}) -> (Tensor out, Tensor lse)", _attention_run, _attention_fake)
_attention_backward = _define(f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor? v, {_RULE}) "
                              "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)", _attention_backward_run, _attention_backward_fake)
_differentiable("attention", _attention_autograd, _attention_setup)


# ------------------------------------------------------------------------------------------------------------------------- merge
def _merge_run(outs, lses, sink_logits, backend, config):
    return merge_op.merge(tuple(outs), tuple(lses), sink_logits, backend or None, _knobs(config), "torch", _device(outs[0]))


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


_merge = _define("merge(Tensor[] outs, Tensor[] lses, Tensor? sink_logits, str backend, str config) -> (Tensor out, Tensor lse)", _merge_run, _merge_fake)
_differentiable("merge", _merge_autograd, _merge_setup)


def merge(outs, lses, sink_logits, backend, config):
    return _merge(list(outs), list(lses), sink_logits, backend or "", _options(config))


def _weighted_setup(ctx, inputs, output):
    outs, weights, _ = inputs
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *weights)


def _weighted_autograd(ctx, dout):
    """do_n = w_n do,  dw_n = do . o_n"""
    outs, weights = ctx.saved_tensors[:ctx.parts], ctx.saved_tensors[ctx.parts:]
    wide = dout if dout.dtype == torch.float64 else dout.float()
    return [(w[..., None] * wide).to(dout.dtype) for w in weights], [(wide * o).sum(-1).to(w.dtype) for w, o in zip(weights, outs)], None


_weighted = _define("weighted_sum(Tensor[] outs, Tensor[] weights, str backend) -> Tensor",
                    lambda outs, weights, backend: merge_op.add_weighted(tuple(outs), tuple(weights), backend or None, "torch", _device(outs[0])),
                    lambda outs, *rest: torch.empty_like(outs[0], memory_format=torch.contiguous_format))
_differentiable("weighted_sum", _weighted_autograd, _weighted_setup)


def weighted_sum(outs, weights, backend):
    return _weighted(list(outs), list(weights), backend or "")


# --------------------------------------------------------------------------------------------------------- indexer and latent
_WINDOW = "Tensor? k_scale, bool causal, Tensor? q_start, SymInt start, Tensor? key_start, Tensor? key_end, str activation, str backend, str config"


def _indexer_call(op, q, k, weights, k_scale, causal, q_start, start, key_start, key_end, activation, backend, config):
    return indexer_op.Call(op, q, k, weights, k_scale, causal, start if q_start is None else q_start, key_start, key_end, activation or None, backend or None,
                           _knobs(config), "torch", _device(q))


def _indexer_arguments(call):
    plain = isinstance(call.q_start, (int, torch.SymInt))
    return (call.q, call.k, call.weights, call.k_scale, call.causal, None if plain else call.q_start, call.q_start if plain else 0, call.key_start, call.key_end,
            call.activation or "", call.backend or "", _options(call.config))


_scores = _define(f"indexer_scores(Tensor q, Tensor k, Tensor weights, {_WINDOW}) -> Tensor",
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


_like = lambda *tensors: tuple(x.new_empty(x.shape) for x in tensors)  # noqa: E731
_scores_backward = _define(f"indexer_scores_backward(Tensor dscores, Tensor q, Tensor k, Tensor weights, {_WINDOW}) -> (Tensor, Tensor, Tensor)",
                           lambda dscores, *a: torch_gradients.indexer_scores(_indexer_call("indexer_scores", *a), dscores), lambda dscores, q, k, weights, *rest: _like(q, k, weights))
_differentiable("indexer_scores", lambda ctx, dscores: (*_scores_backward(dscores, *_saved_indexer(ctx)[0]), *[None] * 9), _scores_setup)


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


_select = _define("indexer_topk(Tensor q, Tensor k, Tensor weights, SymInt top_k, int pool, int force_first, int force_last, bool return_scores, "
                  f"{_WINDOW}) -> (Tensor, Tensor, Tensor)", _select_run, _select_fake)
_select_backward = _define(f"indexer_topk_backward(Tensor indices, Tensor best, Tensor dbest, int pool, Tensor q, Tensor k, Tensor weights, {_WINDOW}) -> (Tensor, Tensor, Tensor)",
                           lambda indices, best, dbest, pool, *a: torch_gradients.indexer_topk(_indexer_call("indexer_topk", *a), indices, best, dbest, pool),
                           lambda indices, best, dbest, pool, q, k, weights, *rest: _like(q, k, weights))


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


_differentiable("indexer_topk", _select_autograd, _select_setup)


def indexer_topk(call, top_k, options):
    q, k, weights, *rest = _indexer_arguments(call)
    indices, lengths, best = _select(q, k, weights, top_k, *(options[name] for name in ("pool", "force_first", "force_last", "return_scores")), *rest)
    return indices, lengths, best if options["return_scores"] else None


_topk = _define("topk(Tensor scores, SymInt top_k, Tensor? key_start, Tensor? key_end, str backend, str config) -> (Tensor, Tensor)",
                lambda scores, top_k, lo, hi, backend, config: indexer_op.best(scores, top_k, lo, hi, backend or None, _knobs(config), "torch", _device(scores)),
                lambda scores, top_k, *rest: (scores.new_empty((*scores.shape[:2], top_k), dtype=torch.int32), scores.new_empty(scores.shape[:2], dtype=torch.int32)))


def topk(scores, top_k, key_start, key_end, backend, config):
    return _topk(scores.detach(), top_k, key_start, key_end, backend or "", _options(config))


def _importance_run(q, k, lse, top_k, block, stride, select_block, keys, scale, kv_length, q_start, start, force_first, force_last, return_scores, backend, config):
    start = q_start if q_start is not None else None if start == _FROM_LENGTH else start
    indices, lengths, scores = importance_op.select(importance_op.Call(
        q, k, lse, top_k, block, stride, select_block, keys, scale, kv_length, start, force_first, force_last, return_scores, backend or None,
        _knobs(config), "torch", _device(q)))
    return indices, lengths, q.new_empty(0, dtype=torch.float32) if scores is None else scores


def _importance_fake(q, k, lse, top_k, *rest):
    rows = q.shape[0], k.shape[1], q.shape[2]
    return (q.new_empty((*rows, top_k), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32),
            q.new_empty((*rows, top_k) if rest[-3] else 0, dtype=torch.float32))


_importance = _define("importance_topk(Tensor q, Tensor k, Tensor lse, SymInt top_k, int block, int stride, int select_block, SymInt keys, float scale, Tensor? kv_length, "
                      "Tensor? q_start, SymInt start, int force_first, int force_last, bool return_scores, str backend, str config) -> (Tensor, Tensor, Tensor)",
                      _importance_run, _importance_fake)


def importance_topk(call):
    device_start = None if call.q_start is None or isinstance(call.q_start, (int, torch.SymInt)) else call.q_start
    start = _FROM_LENGTH if call.q_start is None else 0 if device_start is not None else call.q_start
    indices, lengths, scores = _importance(call.q.detach(), call.k.detach(), call.lse.detach(), call.top_k, call.block, call.stride, call.select_block, call.keys, call.scale, call.kv_length,
                                           device_start, start, call.force_first, call.force_last, call.return_scores, call.backend or "", _options(call.config))
    return indices, lengths, scores if call.return_scores else None


_decompress = _define("latent_decompress(Tensor latent, Tensor w_uk, Tensor w_uv, Tensor? k_rope, Tensor? latent_scale, str backend, str config) -> (Tensor, Tensor)",
                      lambda c, uk, uv, rope, scale, backend, config: latent_op.decompress(c, uk, uv, rope, scale, backend or None, _knobs(config), "torch", _device(c)),
                      lambda c, uk, uv, rope, *rest: (uk.new_empty((c.shape[0], uk.shape[0], c.shape[1], uk.shape[2] + (0 if rope is None else rope.shape[2]))),
                                                               uk.new_empty((c.shape[0], uk.shape[0], c.shape[1], uv.shape[2]))))


def _decompress_backward_run(dk, dv, c, uk, uv, rope, scale, backend):
    *got, drope = torch_gradients.latent_decompress(dk, dv, c, uk, uv, rope, scale, backend or None)
    return *got, uk.new_empty(0) if drope is None else drope


def _decompress_backward_fake(dk, dv, c, uk, uv, rope, scale, backend):
    return c.new_empty(c.shape, dtype=uk.dtype), *_like(uk, uv), uk.new_empty(0) if rope is None else rope.new_empty(rope.shape)


_decompress_backward = _define("latent_decompress_backward(Tensor dk, Tensor dv, Tensor latent, Tensor w_uk, Tensor w_uv, Tensor? k_rope, Tensor? latent_scale, str backend) "
                               "-> (Tensor, Tensor, Tensor, Tensor)", _decompress_backward_run, _decompress_backward_fake)


def _decompress_setup(ctx, inputs, output):
    *tensors, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors)


def _decompress_autograd(ctx, dk, dv):
    c, rope = ctx.saved_tensors[0], ctx.saved_tensors[3]
    dc, duk, duv, drope = _decompress_backward(dk, dv, *ctx.saved_tensors, ctx.backend)
    return None if c.dtype != dc.dtype else dc, duk, duv, None if rope is None else drope, None, None, None


_differentiable("latent_decompress", _decompress_autograd, _decompress_setup)


def latent_decompress(latent, w_uk, w_uv, k_rope, latent_scale, backend, config):
    return _decompress(latent, w_uk, w_uv, k_rope, latent_scale, backend or "", _options(config))


_matmul = _define("grouped_matmul(Tensor x, Tensor w, Tensor? tail, str backend) -> Tensor",
                  lambda x, w, tail, backend: latent_op.matmul(x, w, tail, backend or None, "torch", _device(x)),
                  lambda x, w, tail, backend: x.new_empty((*x.shape[:3], w.shape[1] + (0 if tail is None else tail.shape[3]))))
_matmul_backward = _define("grouped_matmul_backward(Tensor dout, Tensor x, Tensor w, str backend) -> (Tensor, Tensor)",
                           lambda dout, x, w, backend: torch_gradients.grouped_matmul(dout, x, w, backend or None), lambda dout, x, w, backend: _like(x, w))


def _matmul_setup(ctx, inputs, output):
    x, w, tail, ctx.backend = inputs
    ctx.save_for_backward(x, w)
    ctx.tail = tail is not None


def _matmul_autograd(ctx, dout):
    x, w = ctx.saved_tensors
    return *_matmul_backward(dout, x, w, ctx.backend), dout[..., w.shape[1]:] if ctx.tail else None, None


_differentiable("grouped_matmul", _matmul_autograd, _matmul_setup)


def grouped_matmul(x, w, tail, backend):
    return _matmul(x, w, tail, backend or "")


