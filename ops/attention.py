"""sparse_attention: softmax attention over the keys that a pattern, a layout or a selection lets each query see."""
from dataclasses import replace

from sparsetile.backends import arrays, places
from sparsetile.backends.contract import Problem, Unsupported
from sparsetile.ops import checks, dispatch, float8, ready, selected_blocks
from sparsetile.ops.attention_call import OP, Call, choose, lists_for, problem_of
from sparsetile.ops.caches.paged import Cache
from sparsetile.ops.layout import Layout
from sparsetile.ops.patterns import Full, Pattern
from sparsetile.ops.selection import Selection

FLOATS = ("float32", "float16", "bfloat16", "float64")


def sparse_attention(q, k, v=None, pattern=None, *, scale=None, sink_logits=None, softcap=None, kv_length=None, q_start=None, value_width=None,
                     q_scale=None, k_scale=None, v_scale=None, out_dtype=None, return_lse=False, deterministic=True, allow_tf32=False, backend=None, config=None):
    """softmax(scale * q k^T) v over the keys each query sees.

    q [B,Hq,T,D], k [B,Hk,S,D], v [B,Hk,S,Dv] (Hq % Hk == 0; float32, float16, bfloat16, float64 on CPU; float8_e4m3fn as below; any D, Dv in 1..576), of NumPy, PyTorch,
    CuPy or JAX, all on one device. k may be a cache (PagedKV, PagedLatent, RollingKV) with v=None: lengths and values are its own, and nothing is differentiable
    but q over a selection. v=None with value_width=Dv takes the first Dv columns of k (the shared latent of MLA).
    pattern       a Pattern, a Layout or a Selection; None is Full(). Query t stands at position p = q_start + t.
    scale         of the products; D**-0.5 by default
    sink_logits   [Hq] float32, added to the denominator only, not scaled; -inf switches a head's sink off, +inf gives out 0
    softcap       c: scores become c * tanh(scores / c) before masking
    kv_length     [B] int32: keys at or past it do not exist (values are clamped to 0..S)
    q_start       int, or [B] int32 on the device; kv_length - T by default, S - T without lengths (bottom-right). With a pattern, values on the device reach
                  from -T to S: queries that stand farther out may see nothing
    q_scale, k_scale, v_scale   of float8_e4m3fn (CuPy has no such arrays), float32: q's [B,Hq,T], k's and v's [B,Hk,ceil(S/128)], one for 128 keys; None is 1. k and v are of that type both, q is too or
                  is float16 or bfloat16. Not differentiable, nor for selections and caches
    out_dtype     of float8 queries: bfloat16 (default), float16 or float32
    return_lse    also return the natural logarithm of the sum over keys (without the sink) [B,Hq,T] float32 (float64 for float64 inputs); in rows whose sink exceeds it by
                  more than 80 its gradient is 0 on the CPU
    deterministic False permits another order of additions in the backward
    allow_tf32    permits TF32 products of float32 inputs where a backend has them (none has yet)

    Returns out [B,Hq,T,Dv] in q's element type (or out_dtype), of the caller's array type, on the caller's device and stream [, lse]. A query that sees no key: out 0,
    LSE -inf, gradients 0. A key that no query sees is never read into a result, even if it holds NaN. Differentiable in PyTorch: q, k, v, sink_logits, LSE.
    Raises ValueError or TypeError for bad arguments, Unsupported for a limit of the chosen backend.
    """
    key = None
    if config is None and q_scale is None and k_scale is None and v_scale is None and out_dtype is None:
        key, tensors = ready.attention_key(q, k, v, pattern, scale, softcap, sink_logits, kv_length, q_start, value_width, backend, return_lse, deterministic, allow_tf32)
        found = ready.find(key)
        if found is not None:
            results = found(*tensors)
            return tuple(results) if return_lse else results[0]
    checks.flag("return_lse", return_lse), checks.flag("deterministic", deterministic), checks.flag("allow_tf32", allow_tf32)
    call = check(q, k, v, pattern, scale, sink_logits, softcap, kv_length, q_start, value_width, deterministic, backend, config, q_scale, k_scale, v_scale, out_dtype)
    if call.caller == "torch" and not dispatch.is_explaining():
        from sparsetile.ops import torch_ops
        if float8.is_float8(call.k):
            float8.no_gradients(*call.arrays, *call.scales), torch_ops.no_tangents(*call.scales)
        if torch_ops.wanted(*call.arrays):
            if call.table is not None or call.latent is not None:
                raise Unsupported("k: a cache read through its pages is neither differentiated nor traced by torch.compile yet; call under torch.no_grad(), or pass cache.gather()")
            out, lse = torch_ops.attention(call)
            return (out, lse) if return_lse else out
    elif call.caller == "jax":
        from sparsetile.ops import jax_ops
        if jax_ops.traced(*call.arrays, *call.scales, kv_length, q_start, jax_ops.tables(call.rule)):
            return jax_ops.attention(call, return_lse)
    out, lse = forward(call, return_lse, key)
    return (out, lse) if return_lse else out


def check(q, k, v, pattern, scale, sink_logits, softcap, kv_length, q_start, value_width, deterministic, backend, config,
          q_scale=None, k_scale=None, v_scale=None, out_dtype=None) -> Call:
    """Everything that can be said of the arguments before a backend is chosen."""
    checks.options(backend, config)
    checks.array("q", q, 4, "[B,Hq,T,D]")
    table = latent = None
    if isinstance(k, Cache):
        k, v, pattern, kv_length, q_start, value_width, table, latent = _cached(q, k, v, pattern, kv_length, q_start, value_width, backend)
    checks.array("k", k, 4, "[B,Hk,S,D]")
    checks.array("v", v, 4, "[B,Hk,S,Dv]", optional=True)
    B, Hq, T, D = q.shape
    _, Hk, S, _ = k.shape
    S = S if table is None else S * table.shape[1]
    kind, keys = arrays.dtype_name(q), arrays.dtype_name(k)
    if latent is None and float8.FLOAT8 in (kind, keys):
        float8.types(kind, keys)
    else:
        checks.array("q", q, 4, "[B,Hq,T,D]", FLOATS)
    if latent is None and keys != float8.FLOAT8:
        checks.same("k", "element type of q", kind, keys, "convert q, k and v to one type")
    checks.same("k", "batch size of q", B, (k if table is None else table).shape[0], "expand it with a zero stride or repeat it")
    checks.same("k", "width D of q", D, k.shape[3] if latent is None else sum(latent), "q and k are multiplied over D")
    if Hk == 0 or Hq % Hk:
        raise ValueError(f"k: expected a number of key heads Hk that divides Hq = {Hq}, got Hk = {Hk}; repeat or drop heads")
    checks.width("q", D)
    if v is None:
        if value_width is None:
            raise ValueError("v: expected an array [B,Hk,S,Dv], or value_width=Dv with v=None, got None for both; pass one of them")
        checks.integer("value_width", value_width, *((1, D) if latent is None else (latent[0],) * 2))
    else:
        checks.same("v", f"element type of {'k' if keys == float8.FLOAT8 else 'q'}", keys, arrays.dtype_name(v), "convert q, k and v to one type")
        checks.same("v", "shape [B,Hk,S] of k", list(k.shape[:3]), list(v.shape[:3]), "k and v hold the same keys")
        checks.width("v", v.shape[3])
        if value_width is not None and checks.integer("value_width", value_width) != v.shape[3]:
            raise ValueError(f"value_width: expected {v.shape[3]}, the width of v, or None, got {checks.shown(value_width)}; it is for v=None")
        value_width = v.shape[3]
    rule = Full() if pattern is None else pattern
    if not isinstance(rule, (Pattern, Layout, Selection)):
        raise TypeError(f"pattern: expected a Pattern, a Layout, a Selection or None, got {type(rule).__name__}; see sparsetile.Causal(), Window(left), Selection(indices)")
    scale = D ** -0.5 if scale is None else checks.number("scale", scale)
    softcap = checks.number("softcap", softcap, 0, optional=True)
    given = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    float8.scales(given, {"q_scale": kind, "k_scale": keys, "v_scale": keys}, float8.shapes_of(B, Hq, Hk, T, S), latent is not None or table is not None)
    out_dtype = float8.output(out_dtype, kind)
    checks.row("sink_logits", sink_logits, (Hq,), "[Hq]")
    checks.lengths("kv_length", kv_length, (B,), "[B]")
    q_start = checks.start(q_start, B, None if kv_length is not None else S - T)
    named = {"q": q, "k": k, "v": v, **given, "sink_logits": sink_logits, "page_table": table, "kv_length": kv_length, "q_start": None if isinstance(q_start, int) else q_start}
    if isinstance(rule, Selection):
        if keys == float8.FLOAT8:
            raise Unsupported("pattern: a Selection over float8 keys is not supported by any backend yet; pass k and v in the type of q")
        rule.check(B, Hq, Hk, T)
        rule = rule.within(S)
        named |= {"pattern.indices": rule.indices, "pattern.lengths": rule.lengths}
    elif isinstance(rule, Layout):
        rule.check(B, Hq, T, S, q_start if isinstance(q_start, int) else None)
    elif isinstance(rule, Pattern):
        rule.check(Hq, Hk)
    caller, device = checks.together(named)
    if isinstance(rule, Selection) and rule.restriction is not None:
        rule = rule.resolve(S, q_start, kv_length)
    return Call(q, k, v, rule, scale, sink_logits, softcap, kv_length, q_start, value_width, deterministic, backend, config, caller, device, table, latent,
                (q_scale, k_scale, v_scale), out_dtype)


def _cached(q, cache, v, pattern, kv_length, q_start, value_width, backend):
    """A cache in the place of k: (k, v, pattern, kv_length, q_start, value_width, table, latent)."""
    if v is not None:
        raise ValueError("v: expected None, got an array; a cache holds its own values")
    if q_start is not None and getattr(q_start, "ndim", 0) == 0:
        q_start = checks.integer("q_start", q_start, -2 ** 31, 2 ** 31 - 1)
    rule = Full() if pattern is None else pattern
    if not isinstance(rule, (Pattern, Layout, Selection)):
        raise TypeError(f"pattern: expected a Pattern, a Layout, a Selection or None, got {type(rule).__name__}; see sparsetile.Causal(), Window(left), Selection(indices)")
    checks.together({"q": q, "k.lengths": cache.lengths})
    k, v, rule, kv_length, q_start, table, latent = cache.keys(q.shape[2], rule, kv_length, q_start, backend)
    return k, v, rule, kv_length, q_start, cache.rank if v is None and value_width is None else value_width, table, latent


# ------------------------------------------------------------------------------------------------------------------- forward
def _natives(call: Call, place):
    """q, k, v, sink_logits, kv_length, q_start as the kernel takes them. v=None becomes k's first columns, the same memory."""
    q, k = place.native(call.q), place.native(call.k)
    v = place.first_columns(k, call.value_width) if call.v is None else place.native(call.v)  # of the fp8 layout the bytes of the latent
    start = call.q_start if call.q_start is None or isinstance(call.q_start, int) else place.packed(place.native(call.q_start))
    sink, length = (None if x is None else place.packed(place.native(x)) for x in (call.sink_logits, call.kv_length))
    return q, k, v, sink, length, start


def _entries(selection: Selection, place):
    """A selection's indices and lengths as packed native arrays."""
    return tuple(None if x is None else place.packed(place.native(x)) for x in (selection.indices, selection.lengths))


def forward(call: Call, return_lse: bool, key=None):
    """(out, lse or None) in the caller's array type. A call with a key is remembered under it where its kernel runs once on lists that stay, or on the caller's entries."""
    given, call = call, selected_blocks.where_they_pay(call, lambda call, keys: problem_of(call, f"{keys}_attention", lse=return_lse))
    key = key if call is given else None
    name = "gather_attention" if isinstance(call.rule, Selection) else "block_attention"
    choice = choose(call, name, lse=return_lse)
    place = places.place_for(dispatch.package(choice.backend).NATIVE, call.caller, call.device)
    with place.guard():
        out, lse = _forward(call, choice, place, return_lse, key)
        return place.give(out), None if lse is None else place.give(lse)


def _forward(call, choice, place, return_lse, key):
    B, Hq, Hk, T, S, D, Dv = call.sizes
    kind = call.out_kind
    wide = "float64" if kind == "float64" else "float32"
    if B * Hq * T == 0 or S == 0:
        return place.zeros((B, Hq, T, Dv), kind), place.full((B, Hq, T), wide, float("-inf"))
    q, k, v, sink, length, start = _natives(call, place)
    common = dict(place=place, scale=call.scale, softcap=call.softcap, kv_length=length, q_start=start, **float8.natives(call, place))
    if call.table is not None:
        common["table"] = place.packed(place.native(call.table))
    if call.latent is not None:
        common["latent"] = call.latent
    if isinstance(call.rule, Selection):
        s = call.rule
        indices, lengths = _entries(s, place)
        how = dict(granularity=s.granularity, causal=s.causal, config=choice.config, return_lse=return_lse)
        if key is not None:
            ready.remember(key, _ready(call, choice, lambda q, k, v, indices, lengths=None, **rest: choice.kernel.run(q, k, v, indices, lengths=lengths, **how, **rest)))
        return choice.kernel.run(q, k, v, indices, lengths=lengths, sink_logits=sink, **how, **common)
    parts = lists_for(call, choice.config, place)
    if len(parts) == 1:
        if call.out_dtype is not None:
            common["out_dtype"] = call.out_dtype
        elif key is not None:
            run = lambda q, k, v, **rest: choice.kernel.run(q, k, v, parts[0], config=choice.config, return_lse=return_lse, **rest)  # noqa: E731
            ready.remember(key, _ready(call, choice, run, parts[0]))
        return choice.kernel.run(q, k, v, parts[0], config=choice.config, sink_logits=sink, return_lse=return_lse, **common)
    if hasattr(choice.kernel, "run_parts") and not float8.is_float8(call.k):
        found = choice.kernel.run_parts(q, k, v, parts, config=choice.config, sink_logits=sink, return_lse=return_lse, **common)
        if found is not None:
            return found
    results = [choice.kernel.run(q, k, v, part, config=choice.config, out_dtype=wide, return_lse=True, **common) for part in parts]
    from sparsetile.ops.merge import merge_native
    return merge_native([out for out, _ in results], [lse for _, lse in results], sink, kind, choice.backend, place, call.device)


def _ready(call, choice, run, lists=ready.NO_LISTS) -> ready.Ready:
    """The next call like this one: run(q, k, v, a selection's entries and lengths) with what stays the same."""
    same = dict(scale=call.scale, softcap=call.softcap, q_start=call.q_start)

    def launch(place, q, k, v, sink, length, *entries):
        return run(q, k, v, *entries, place=place, sink_logits=sink, kv_length=length, **same)
    return ready.Ready(choice, call.device, launch, lists, plain=3, value_width=call.value_width if call.v is None else None)


# ------------------------------------------------------------------------------------------------------------------ backward
def backward(call: Call, out, lse, dout, dlse=None, config=None):
    """(dq, dk, dv or None, dsink or None) in the caller's array type; lse is over keys only, as the forward returned it."""
    call = replace(call, config=config)  # the call's own config speaks of the forward
    call = selected_blocks.where_they_pay(call, lambda call, keys: problem_of(call, f"{keys}_attention_backward", gradient=True))
    selected = isinstance(call.rule, Selection)
    choice = choose(call, "gather_attention_backward" if selected else "block_attention_backward", gradient=True)
    place = places.place_for(dispatch.package(choice.backend).NATIVE, call.caller, call.device)
    with place.guard():
        grads = _backward(call, choice, place, *(None if x is None else place.native(x) for x in (out, lse, dout, dlse)))
        return tuple(None if g is None else place.give(g) for g in grads)


def _backward(call, choice, place, out, lse, dout, dlse):
    B, Hq, Hk, T, S, D, Dv = call.sizes
    kind = arrays.dtype_name(call.q)
    wide = "float64" if kind == "float64" else "float32"
    if B * Hq * T == 0 or S == 0:
        dsink = None if call.sink_logits is None else place.zeros((Hq,), "float32")
        return place.zeros((B, Hq, T, D), kind), place.zeros((B, Hk, S, D), kind), None if call.v is None else place.zeros((B, Hk, S, Dv), kind), dsink
    q, k, v, sink, length, start = _natives(call, place)
    plain = sink is None and dlse is None and kind != "float64" and getattr(choice.kernel, "MAKES_DELTA", False)
    if plain:
        total, delta, dsink = lse, None, None
    else:
        problem = Problem.of("attention_delta", dict(B=B, Hq=Hq, T=T, Dv=Dv), dict(out=kind), place.arch, ["sink"] if sink is not None else [])
        first = dispatch.choose(OP, problem, call.device, choice.backend)
        total, delta, dsink = first.kernel.run(out, dout, lse, place=place, config=first.config, sink_logits=sink, dlse=dlse)
    common = dict(place=place, config=choice.config, scale=call.scale, softcap=call.softcap, kv_length=length, q_start=start, deterministic=call.deterministic)
    if plain:
        common["out"] = out
    if isinstance(call.rule, Selection):
        s = call.rule
        indices, lengths = _entries(s, place)
        runs = [lambda dtype: choice.kernel.run(q, k, v, indices, total, delta, dout, granularity=s.granularity, causal=s.causal, lengths=lengths, out_dtype=dtype, **common)]
    else:
        parts = lists_for(call, choice.config, place)
        if len(parts) > 1 and call.v is not None and hasattr(choice.kernel, "run_parts"):
            found = choice.kernel.run_parts(q, k, v, parts, total, delta, dout, **common)
            if found is not None:
                return *found, dsink
        runs = [lambda dtype, part=part: choice.kernel.run(q, k, v, part, total, delta, dout, out_dtype=dtype, **common) for part in parts]
    exact = len(runs) == 1 and call.v is not None  # else sums are made in float32 and rounded once
    grads = runs[0](None if exact else wide)
    for run in runs[1:]:
        grads = tuple(place.add(a, b) for a, b in zip(grads, run(wide)))
    dq, dk, dv = grads
    if call.v is None:  # a kernel may have added them itself
        dk, dv = dk if dv is None else place.add(dk, dv), None
    if not exact:
        dq, dk, dv = (None if g is None else place.cast(g, kind) for g in (dq, dk, dv))
    return dq, dk, dv, dsink
