"""JAX: eager arrays go straight to the kernels by DLPack; under jit the call becomes a host callback on the CPU."""
from dataclasses import replace

import jax
import numpy as np

from sparsetile.ops.layout import Layout
from sparsetile.ops.selection import Selection

_ENTRIES = ("indices", "lengths")
_LISTS = ("offsets", "cols", "kinds", "by_key_offsets", "by_key_rows", "by_key_kinds", "intervals", "bitmaps", "list_of", "q_order", "k_order")


def traced(*values) -> bool:
    """Whether any argument is a tracer, so that only shapes are known now."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values))


def tables(rule) -> tuple:
    """The arrays of a selection, or of a layout made of JAX arrays: they cross into the callback beside q, k and v, whether traced or not."""
    if isinstance(rule, Selection):
        return tuple(getattr(rule, name) for name in _ENTRIES)
    return tuple(tuple(getattr(part, name) for name in _LISTS) for part in rule.parts) if isinstance(rule, Layout) and not isinstance(rule.parts[0].offsets, np.ndarray) else ()


def on_the_host(rule, arrays):
    """The rule again, with `arrays` for its `tables`."""
    if isinstance(rule, Selection):
        return replace(rule, **dict(zip(_ENTRIES, arrays)))
    return replace(rule, parts=tuple(replace(part, extras={}, **dict(zip(_LISTS, held))) for part, held in zip(rule.parts, arrays))) if arrays else rule


def callback(function, shapes, *values):
    """function(*values) on the host when the traced program runs; shapes: (shape, dtype) of each result. Values may be None or sequences of arrays."""
    from sparsetile.backends.contract import Unsupported
    if jax.default_backend() != "cpu":
        raise Unsupported("JAX under jit is supported on the CPU; on CUDA arrays call sparsetile outside jit (eagerly), where nothing is copied")

    def host(*values):
        got = function(*jax.tree.map(np.asarray, values))
        return tuple(np.asarray(x) for x in (got if isinstance(got, tuple) else (got,)))
    return jax.pure_callback(host, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes), *values, vmap_method="sequential")


def weighted_sum(outs, weights):
    """merge.weighted_sum of traced arrays, left to XLA, which fuses it and differentiates it."""
    wide = "float64" if outs[0].dtype == "float64" else "float32"
    return sum(w.astype(wide)[..., None] * x.astype(wide) for x, w in zip(outs, weights)).astype(outs[0].dtype)


def attention(call, return_lse):
    """sparse_attention of traced arrays."""
    from sparsetile.ops.attention import sparse_attention
    B, Hq, _, T, _, _, Dv = call.sizes

    def host(q, k, v, scales, sink, length, start, held):
        got = sparse_attention(q, k, v, on_the_host(call.rule, held), scale=call.scale, sink_logits=sink, softcap=call.softcap, kv_length=length, q_start=start if start is None or start.ndim else int(start),
                               value_width=call.value_width if v is None else None, return_lse=return_lse, backend=call.backend, config=call.config,
                               out_dtype=call.out_dtype, **dict(zip(("q_scale", "k_scale", "v_scale"), scales)))
        return got if return_lse else (got,)
    shapes = [((B, Hq, T, Dv), call.out_kind)] + [((B, Hq, T), "float64" if str(call.q.dtype) == "float64" else "float32")] * return_lse
    start = np.int32(call.q_start) if isinstance(call.q_start, int) else call.q_start
    got = callback(host, shapes, call.q, call.k, call.v, call.scales, call.sink_logits, call.kv_length, start, tables(call.rule))
    return tuple(got) if return_lse else got[0]
