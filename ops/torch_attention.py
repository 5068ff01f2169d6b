"""PyTorch's operator of sparse_attention, its backward, and the rule as text that crosses their boundary.

    "p<pattern>"                     a pattern's canonical text
    "s<granularity>,<causal>,<distinct>"   a selection; tables = [indices] or [indices, lengths]
    "l<T>,<S>;<part>;..."            a layout; tables = its parts' arrays, in order; a part's text is its numbers and which arrays it has
"""
from dataclasses import replace
from functools import lru_cache

import torch

from sparsetile.backends.contract import Lists
from sparsetile.ops import attention as attention_op, attention_call
from sparsetile.ops.float8 import is_float8
from sparsetile.ops.layout import Layout
from sparsetile.ops.patterns import Pattern
from sparsetile.ops.selection import Selection
from sparsetile.ops.torch_library import define, device_of, differentiable, knobs, no_batches, options_text, plain, start_arguments, start_of


def encode(rule) -> tuple[str, list]:
    if isinstance(rule, Pattern):
        return "p" + rule.canonical(), []
    if isinstance(rule, Selection):
        return f"s{rule.granularity},{int(rule.causal)},{int(rule.distinct)}", [rule.indices] + ([] if rule.lengths is None else [rule.lengths])
    tables, text = [], f"l{rule.T},{rule.S}"
    for part in rule.parts:
        held = [getattr(part, name) for name in attention_call.ARRAYS]
        tables += [torch.as_tensor(x) for x in held if x is not None]
        numbers = [int(getattr(part, name)) for name in _NUMBERS]
        # f"{n}", not str(n): torch.compile can do that to a length which it keeps as a symbol, and is told the number
        text += ";" + ",".join([f"{n}" for n in numbers] + ["0" if x is None else "1" for x in held])
    return text, tables


_NUMBERS = ("block_q", "block_k", "first", "nq", "nk", "has_intervals", "has_bitmaps", "longest")


@lru_cache(256)
def pattern_of(text: str) -> Pattern:
    return Pattern.parse(text)


def decode(text: str, tables):
    if text[0] == "p":
        return pattern_of(text[1:])
    if text[0] == "s":
        granularity, causal, distinct = map(int, text[1:].split(","))
        return Selection(tables[0], granularity, tables[1] if len(tables) > 1 else None, bool(causal), distinct=bool(distinct))
    sizes, *said = text[1:].split(";")
    T, S = map(int, sizes.split(","))
    tables, parts = iter(tables), []
    for part in said:
        values = list(map(int, part.split(",")))
        numbers = dict(zip(_NUMBERS, values)) | {name: bool(dict(zip(_NUMBERS, values))[name]) for name in ("has_intervals", "has_bitmaps")}
        parts.append(Lists(**numbers, **{name: next(tables) if has else None for name, has in zip(attention_call.ARRAYS, values[len(_NUMBERS):])}))
    return Layout(tuple(parts), T, S)


# --------------------------------------------------------------------------------------------------------------------- attention
_RULE = ("str rule, Tensor[] tables, Tensor? sink_logits, Tensor? kv_length, Tensor? q_start, SymInt start, float scale, float softcap, SymInt value_width, "
         "bool deterministic, str backend, str config")


def _call(q, k, v, rule, tables, sink_logits, kv_length, q_start, start, scale, softcap, value_width, deterministic, backend, config):
    return attention_call.Call(q, k, v, decode(rule, tables), scale, sink_logits, softcap or None, kv_length, start_of(q_start, start), value_width, deterministic, backend or None,
                             knobs(config), "torch", device_of(q))


class _Straight(torch.autograd.Function):
    """The operator's forward and formula without the operator: its dispatch, which serves torch.compile, costs an eager call as much as everything else that Python does for it."""

    @staticmethod
    def forward(ctx, call, q, k, v, sink_logits, kv_length, q_start):
        out, lse = attention_op.forward(call, True)
        ctx.save_for_backward(q, k, v, sink_logits, kv_length, q_start, out, lse)
        ctx.call = replace(call, q=None, k=None, v=None, sink_logits=None, kv_length=None, config=None, q_start=call.q_start if q_start is None else None)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        no_batches(dout, dlse)
        q, k, v, sink_logits, kv_length, q_start, out, lse = ctx.saved_tensors
        call = replace(ctx.call, q=q, k=k, v=v, sink_logits=sink_logits, kv_length=kv_length, q_start=ctx.call.q_start if q_start is None else q_start)
        dout = torch.zeros_like(out) if dout is None else dout
        if torch.is_grad_enabled():  # create_graph: what they are made of is recorded, and refuses
            dq, dk, dv, dsink = _attention_backward(dout, dlse, out, lse, q, k, v, *_rest(call))
        else:
            dq, dk, dv, dsink = attention_op.backward(call, out, lse, dout, dlse)
        return None, dq, dk, dv if v is not None else None, dsink if sink_logits is not None else None, None, None


def _rest(call):
    """All that the operators take behind the tensors."""
    rule, tables = encode(call.rule)
    return (rule, tables, call.sink_logits, call.kv_length, *start_arguments(call.q_start), call.scale, call.softcap or 0.0, call.value_width,
            call.deterministic, call.backend or "", options_text(call.config))


def attention(call):
    """(out, lse) of a checked call, through the registered operator unless nobody would see it: on the CPU, where Python's part is not hidden behind a kernel."""
    start = None if isinstance(call.q_start, int) else call.q_start
    if call.device is None and isinstance(call.rule, Pattern) and not call.scaled and call.out_dtype is None and plain(call.q, call.k, call.v, call.sink_logits, call.kv_length, start):
        return _Straight.apply(call, call.q, call.k, call.v, call.sink_logits, call.kv_length, start)
    rest = _rest(call)
    if is_float8(call.k):
        return _attention_float8(call.q, call.k, call.v, *call.scales, call.out_kind, *rest)
    return _attention(call.q, call.k, call.v, *rest)


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
    no_batches(dout, dlse)
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


_attention = define(f"attention(Tensor q, Tensor k, Tensor? v, {_RULE}) -> (Tensor out, Tensor lse)", _attention_run, _attention_fake)
_attention_backward = define(f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor? v, {_RULE}) "
                             "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsink)", _attention_backward_run, _attention_backward_fake)
differentiable("attention", _attention_autograd, _attention_setup)


# ------------------------------------------------------------------------------------------------------------------- float8
def _float8_run(q, k, v, q_scale, k_scale, v_scale, out_dtype, *rest):
    call = replace(_call(q, k, v, *rest), scales=(q_scale, k_scale, v_scale), out_dtype=out_dtype if is_float8(q) else None)
    return attention_op.forward(call, True)


def _float8_fake(q, k, v, q_scale, k_scale, v_scale, out_dtype, rule, tables, sink_logits, kv_length, q_start, start, scale, softcap, value_width, *rest):
    B, Hq, T, _ = q.shape
    return q.new_empty((B, Hq, T, value_width), dtype=getattr(torch, out_dtype)), q.new_empty((B, Hq, T), dtype=torch.float32)


_attention_float8 = define("attention_float8(Tensor q, Tensor k, Tensor? v, Tensor? q_scale, Tensor? k_scale, Tensor? v_scale, str out_dtype, "
                           f"{_RULE}) -> (Tensor out, Tensor lse)", _float8_run, _float8_fake)
