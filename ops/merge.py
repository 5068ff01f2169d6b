"""merge_attention: parts of one attention (split keys, ranks, branches) joined by their LSE."""
from sparsetile.backends import arrays, devices, places
from sparsetile.backends.contract import Problem
from sparsetile.ops import checks, dispatch, ready
from sparsetile.ops.attention import FLOATS

OP = "merge_attention"


def merge_attention(outs, lses, *, sink_logits=None, backend=None, config=None):
    """Attention over the union of disjoint sets of keys, from the attention over each.

    outs  sequence of [B,Hq,T,Dv] (float32, float16, bfloat16, float64 on CPU), computed without a sink; lses  as many [B,Hq,T] float32 (float64 beside
    float64 outs), natural logarithms; sink_logits [Hq] float32, applied once, to the denominator only.
    Returns out in the element type of outs[0], lse float32 over the keys of all parts (without the sink). Parts are added in the given order. A row that is empty (-inf) in every
    part: out 0, LSE -inf. Differentiable in PyTorch. Source: the online softmax of FlashAttention (arXiv 2205.14135), section 3.
    """
    checks.options(backend, config)
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"{name}: expected a list of arrays, one for each part, got {type(parts).__name__}; pass a list or a tuple")
    outs, lses = tuple(outs), tuple(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs: expected as many parts as lses and at least one, got {len(outs)} and {len(lses)}; pass one LSE for each part")
    for n, (out, lse) in enumerate(zip(outs, lses)):
        checks.array(f"outs[{n}]", out, 4, "[B,Hq,T,Dv]", FLOATS)
        checks.same(f"outs[{n}]", "shape of outs[0]", list(outs[0].shape), list(out.shape), "all parts answer the same queries")
        checks.same(f"outs[{n}]", "element type of outs[0]", arrays.dtype_name(outs[0]), arrays.dtype_name(out), "convert all parts to one type")
        checks.array(f"lses[{n}]", lse, 3, "[B,Hq,T]", ("float64",) if arrays.dtype_name(out) == "float64" else ("float32",))
        checks.same(f"lses[{n}]", "shape [B,Hq,T]", list(out.shape[:3]), list(lse.shape), "one value for each row")
    checks.width("outs[0]", outs[0].shape[3])
    checks.row("sink_logits", sink_logits, (outs[0].shape[1],), "[Hq]")
    named = {f"outs[{n}]": x for n, x in enumerate(outs)} | {f"lses[{n}]": x for n, x in enumerate(lses)} | {"sink_logits": sink_logits}
    caller, device = checks.together(named)
    if caller == "torch" and not dispatch.is_explaining():
        from sparsetile.ops import torch_ops
        if torch_ops.wanted(*outs, *lses, sink_logits):
            return torch_ops.merge(outs, lses, sink_logits, backend, config)
    elif caller == "jax":
        from sparsetile.ops import jax_ops
        if jax_ops.traced(*outs, *lses, sink_logits):
            shapes = (outs[0].shape, outs[0].dtype), (lses[0].shape, lses[0].dtype)
            return jax_ops.callback(lambda o, l, s: merge_attention(o, l, sink_logits=s, backend=backend, config=config), shapes, outs, lses, sink_logits)
    return merge(outs, lses, sink_logits, backend, config, caller, device)


def merge(outs, lses, sink_logits, backend, config, caller, device):
    """merge_attention of checked arguments."""
    choice = _choose(outs, sink_logits, backend, config, device)
    place = places.place_for(dispatch.package(choice.backend).NATIVE, caller, device)
    with place.guard():
        if 0 in outs[0].shape[:3]:
            return place.give(place.zeros(outs[0].shape, arrays.dtype_name(outs[0]))), place.give(place.zeros(lses[0].shape, arrays.dtype_name(lses[0])))
        sink = None if sink_logits is None else place.native(sink_logits)
        out, lse = choice.kernel.run([place.native(x) for x in outs], [place.native(x) for x in lses], place=place, config=choice.config, sink_logits=sink)
        return place.give(out), place.give(lse)


def weighted_sum(outs, weights, backend=None):
    """Sum of weights[n][..., None] * outs[n] by the kernels of merge_attention, which are given the weights in place of the LSEs.

    outs  N x [B,Hq,T,Dv] of one type; weights  N x [B,Hq,T], all of that type or all float32 (float64 beside float64), multiplied as they are; any strides.
    Returns [B,Hq,T,Dv] of the outs' type: added in the given order in float32 (float64 for float64), rounded once. Differentiable in PyTorch, and in JAX where JAX traces.
    """
    outs, weights = tuple(outs), tuple(weights)
    key = ready.key_of(OP, (*outs, *weights), ("weighted_sum", len(outs), backend)) if len(outs) + len(weights) > 2 else None
    found = ready.find(key)
    if found is not None:
        return found(*outs, *(x[..., None] for x in weights))[0]
    caller, device = checks.together({f"outs[{n}]": x for n, x in enumerate(outs)} | {f"weights[{n}]": x for n, x in enumerate(weights)})
    if caller == "torch" and not dispatch.is_explaining():
        from sparsetile.ops import torch_ops
        if torch_ops.wanted(*outs, *weights):
            return torch_ops.weighted_sum(outs, weights, backend)
    elif caller == "jax":
        from sparsetile.ops import jax_ops
        if jax_ops.traced(*outs, *weights):
            return jax_ops.weighted_sum(outs, weights)
    return add_weighted(outs, weights, backend, caller, device, key)


def add_weighted(outs, weights, backend, caller, device, key=None):
    """weighted_sum of arrays of one framework on one device. A call with a key is remembered under it."""
    choice = _choose(outs, None, backend, None, device, weights)
    place = places.place_for(dispatch.package(choice.backend).NATIVE, caller, device)
    with place.guard():
        if 0 in outs[0].shape[:3]:
            return place.give(place.zeros(outs[0].shape, arrays.dtype_name(outs[0])))
        # [B,Hq,T,1]: gates that lie side by side have a step between rows, and are read in place
        N = len(outs)
        launch = lambda place, *given: choice.kernel.run(given[:N], None, place=place, config=choice.config, weights=given[N:])[:1]  # noqa: E731
        if key is not None:
            ready.remember(key, ready.Ready(choice, device, launch, plain=2 * N))
        return place.give(launch(place, *map(place.native, outs), *(place.native(x[..., None]) for x in weights))[0])


def merge_native(outs, lses, sink, dtype, backend, place, device):
    """The parts of one layout, already native to a backend's place."""
    choice = _choose(outs, sink, backend, None, device)
    return choice.kernel.run(outs, lses, place=place, config=choice.config, sink_logits=sink, out_dtype=dtype)


def _choose(outs, sink, backend, config, device, weights=()):
    B, Hq, T, Dv = outs[0].shape
    problem = Problem.of(OP, dict(B=B, Hq=Hq, T=T, Dv=Dv, N=len(outs)), dict(out=arrays.dtype_name(outs[0])) | {"weights": arrays.dtype_name(x) for x in weights[:1]}, devices.device_info(device).arch,
                         ["sink"] * (sink is not None) + ["weights"] * bool(weights))
    return dispatch.choose(OP, problem, device, backend, config)
