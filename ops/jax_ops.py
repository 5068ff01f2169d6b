"""JAX: eager arrays go straight to the kernels by DLPack; under jit the call becomes a host callback on the CPU."""
import jax
import numpy as np


def traced(*values) -> bool:
    """Whether any argument is a tracer, so that only shapes are known now."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(values))


def callback(function, shapes, *values):
    """function(*values) on the host when the traced program runs; shapes: (shape, dtype) of each result. Values may be None or sequences of arrays."""
    from sparsetile.backends.contract import Unsupported
    if jax.default_backend() != "cpu":
        raise Unsupported("JAX under jit is supported on the CPU; on CUDA arrays call sparsetile outside jit (eagerly), where nothing is copied")

    def host(*values):
        got = function(*jax.tree.map(np.asarray, values))
        return tuple(np.asarray(x) for x in (got if isinstance(got, tuple) else (got,)))
    return jax.pure_callback(host, tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes), *values)


def weighted_sum(outs, weights):
    """merge.weighted_sum of traced arrays, left to XLA, which fuses it and differentiates it."""
    wide = "float64" if outs[0].dtype == "float64" else "float32"
    return sum(w.astype(wide)[..., None] * x.astype(wide) for x, w in zip(outs, weights)).astype(outs[0].dtype)


def attention(call, return_lse):
    """sparse_attention of traced arrays."""
    from sparsetile.ops.attention import sparse_attention
    from sparsetile.ops.selection import Selection
    B, Hq, _, T, _, _, Dv = call.sizes
    rule = call.rule
    selected = isinstance(rule, Selection)
    tables = (rule.indices, rule.lengths) if selected else (None, None)

    def host(q, k, v, sink, length, start, indices, lengths):
        pattern = Selection(indices, rule.granularity, lengths, rule.causal) if selected else rule
        got = sparse_attention(q, k, v, pattern, scale=call.scale, sink_logits=sink, softcap=call.softcap, kv_length=length, q_start=start if start is None or start.ndim else int(start),
                               value_width=call.value_width if v is None else None, return_lse=return_lse, backend=call.backend, config=call.config)
        return got if return_lse else (got,)
    shapes = [((B, Hq, T, Dv), call.q.dtype)] + [((B, Hq, T), "float64" if str(call.q.dtype) == "float64" else "float32")] * return_lse
    start = np.int32(call.q_start) if isinstance(call.q_start, int) else call.q_start
    got = callback(host, shapes, call.q, call.k, call.v, call.sink_logits, call.kv_length, start, *tables)
    return tuple(got) if return_lse else got[0]
