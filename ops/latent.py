"""Latent KV (MLA): rebuild keys and values from a latent, or attend in the latent width itself."""
from sparsetile.backends import arrays, devices, places
from sparsetile.backends.contract import Problem, Unsupported
from sparsetile.ops import attention, checks, dispatch, latent_mode
from sparsetile.ops.caches.latent import parts
from sparsetile.ops.caches.paged import Cache
from sparsetile.ops.latent_mode import MODES, WIDEST

FLOATS = ("float32", "float16", "bfloat16", "float64")


def latent_decompress(latent, w_uk, w_uv, *, k_rope=None, latent_scale=None, backend=None, config=None):
    """k[b,h,s] = [w_uk[h]^T (latent[b,s] * scale), k_rope[b,s]],  v[b,h,s] = w_uv[h]^T (latent[b,s] * scale)

    latent [B,S,R], w_uk [H,R,Dn], w_uv [H,R,Dv] (float32, float16, bfloat16, float64 on CPU; a transposed view of the weights is read in place),
    k_rope [B,S,P] shared by all heads; latent_scale [B,S,ceil(R/128)] float32 multiplies groups of 128 latent values (the latent may then be float8_e4m3fn).
    latent may be a PagedLatent with k_rope=None: its rows are gathered first, S the longest sequence by the host's book; keys and values past a sequence's tokens are 0.
    Returns k [B,H,S,Dn+P], v [B,H,S,Dv] in w_uk's element type. Source: DeepSeek-V2 (arXiv 2405.04434), equations 9-11 and 14-16.
    """
    checks.options(backend, config)
    if isinstance(latent, Cache):
        latent, k_rope, latent_scale = _gathered(latent, k_rope, latent_scale, arrays.dtype_name(w_uk))
    sizes, caller, device = _check_latent(latent, w_uk, w_uv, k_rope, latent_scale)
    if caller == "torch" and not dispatch.is_explaining():
        from sparsetile.ops import torch_ops
        torch_ops.no_tangents(latent_scale)
        if torch_ops.wanted(latent, w_uk, w_uv, k_rope):
            return torch_ops.latent_decompress(latent, w_uk, w_uv, k_rope, latent_scale, backend, config)
    if caller == "jax":
        from sparsetile.ops import jax_ops
        if jax_ops.traced(latent, w_uk, w_uv, k_rope, latent_scale):
            B, S, H, R, Dn, Dv, P = sizes
            shapes = ((B, H, S, Dn + P), w_uk.dtype), ((B, H, S, Dv), w_uk.dtype)
            return jax_ops.callback(lambda c, uk, uv, r, s: latent_decompress(c, uk, uv, k_rope=r, latent_scale=s, backend=backend, config=config), shapes,
                                    latent, w_uk, w_uv, k_rope, latent_scale)
    return decompress(latent, w_uk, w_uv, k_rope, latent_scale, backend, config, caller, device)


def decompress(latent, w_uk, w_uv, k_rope, latent_scale, backend, config, caller, device, op="latent_decompress"):
    """latent_decompress of checked arguments."""
    B, S, H, R, Dn, Dv, P = _sizes(latent, w_uk, w_uv, k_rope)
    kind = arrays.dtype_name(w_uk)
    problem = Problem.of("latent_decompress", dict(B=B, S=S, H=H, R=R, Dn=Dn, Dv=Dv, P=P), dict(latent=arrays.dtype_name(latent), w_uk=kind),
                         devices.device_info(device).arch, ["scale"] * (latent_scale is not None))
    choice = dispatch.choose(op, problem, device, backend, config)
    place = places.place_for(dispatch.package(choice.backend).NATIVE, caller, device)
    with place.guard():
        if B * S * H == 0:
            return place.give(place.zeros((B, H, S, Dn + P), kind)), place.give(place.zeros((B, H, S, Dv), kind))
        scale = None if latent_scale is None else place.packed(place.native(latent_scale))
        k, v = choice.kernel.run(place.native(latent), place.weights(w_uk), place.weights(w_uv), place=place, config=choice.config,
                                 k_rope=None if k_rope is None else place.native(k_rope), latent_scale=scale)
        return place.give(k), place.give(v)


def latent_attention(q_nope, q_rope, latent, k_rope, w_uk, w_uv, pattern=None, *, latent_scale=None, scale=None, mode="auto", sink_logits=None, softcap=None,
                     kv_length=None, q_start=None, return_lse=False, deterministic=True, backend=None, config=None):
    """Attention of MLA over a latent cache.

    q_nope [B,H,T,Dn], q_rope [B,H,T,P] or None, latent [B,S,R], k_rope [B,S,P] or None, w_uk [H,R,Dn], w_uv [H,R,Dv]; pattern and the rest as in
    sparse_attention. scale defaults to (Dn + P)**-0.5 in both modes (never the absorbed width).
    mode   "absorbed": queries times w_uk, attention with the latent as the one shared key and value head (width R + P -> R), result times w_uv;
           "decompressed": keys and values of all heads are rebuilt first; "auto": what an entry of a profile's latent_attention.yaml says of these sizes
           (config {mode: absorbed}), else the cheaper by `latent_mode.latent_cost`, a stated count of operations and bytes. Under torch.compile B, T and S count as the next power of two,
           so that one graph serves many lengths: near the boundary "auto" may be the other mode than the eager call's, and its last bits another's; name a mode where they must agree.
    latent_scale [B,S,ceil(R/128)] float32 multiplies groups of 128 latent values (decompressed mode).
    latent may be a PagedLatent with k_rope=None. Absorbed its latents are read where they lie, in 16 or 32 bits or in the fp8 layout; decompressed they are gathered first, as many as
    the host's book knows of: a CUDA graph that records this does not see them grow, so "auto" is "absorbed" while one is recorded and for up to 64 queries, without a book, for layouts and
    rules over all of S, and where what is rebuilt would take more than 4 GiB.
    Returns out [B,H,T,Dv] in q_nope's element type [, lse [B,H,T] float32]. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
    """
    checks.options(backend, config)
    if backend is None and dispatch.environment("latent_attention")[0]:  # this op's own variable rules the kernels of other ops that it calls
        backend = dispatch.requested_backend("latent_attention", None)
    cache = latent if isinstance(latent, Cache) else None
    if cache is not None:
        latent, k_rope, latent_scale = _cached(cache, k_rope, latent_scale)
    sizes, caller, device = _check_latent(latent, w_uk, w_uv, k_rope, latent_scale, dict(q_nope=q_nope, q_rope=q_rope, sink_logits=sink_logits, kv_length=kv_length))
    B, S, H, R, Dn, Dv, P = sizes
    B = B if cache is None else cache.lengths.shape[0]
    checks.array("q_nope", q_nope, 4, "[B,H,T,Dn]", FLOATS)
    T = q_nope.shape[2]
    checks.same("q_nope", "shape [B,H,T,Dn]", [B, H, T, Dn], list(q_nope.shape), "heads and widths are those of w_uk")
    kind = arrays.dtype_name(q_nope)
    checks.same("w_uk", "element type of q_nope", kind, arrays.dtype_name(w_uk), "convert queries, rotary part and weights to one type")
    if (q_rope is None) != (k_rope is None):
        raise ValueError("q_rope: expected both q_rope and k_rope, or neither, got one; the rotary products need both")
    if q_rope is not None:
        checks.array("q_rope", q_rope, 4, "[B,H,T,P]", (kind,))
        checks.same("q_rope", "shape [B,H,T,P]", [B, H, T, P], list(q_rope.shape), "its width is that of k_rope")
    checks.choice("mode", mode, ("auto", *MODES))
    scale = (Dn + P) ** -0.5 if scale is None else checks.number("scale", scale)
    plain = cache is not None or latent_scale is None and arrays.dtype_name(latent) == kind and (k_rope is None or arrays.dtype_name(k_rope) == kind)
    if mode == "absorbed" and not plain:
        raise Unsupported("mode: 'absorbed' needs latent and k_rope in q_nope's element type and no latent_scale, which these arguments are not; mode='decompressed' takes scales")
    if mode == "auto" and cache is not None:
        mode = latent_mode.of_cache(cache, pattern, T, (B, *sizes[1:]), kind, device, backend, caller)
    elif mode == "auto":
        mode = latent_mode.of(pattern, T, sizes, kind, device, backend, caller) if plain and R + P <= WIDEST else "decompressed"
    if cache is not None and mode == "decompressed":
        if not latent_mode.of_any_length(pattern):
            raise Unsupported("pattern: mode='decompressed' rebuilds as many keys of a cache as its longest sequence holds, got a rule over all that it may hold; mode='absorbed' takes it")
        kv_length = cache.shorter(kv_length)
        if dispatch.is_explaining():
            latent, k_rope, latent_scale = (x if x is None else _shaped(x, (B, cache.held(), x.shape[2]), caller, device) for x in (latent, k_rope, latent_scale))
        else:
            latent, k_rope, latent_scale = _gathered(cache, None, None, kind)
    if caller == "jax":
        from sparsetile.ops import jax_ops
        held = jax_ops.tables(pattern)
        if jax_ops.traced(q_nope, q_rope, latent, k_rope, w_uk, w_uv, latent_scale, sink_logits, kv_length, q_start, held):
            rest = dict(scale=scale, mode=mode, softcap=softcap, return_lse=return_lse, deterministic=deterministic, backend=backend, config=config)

            def host(qn, qr, c, kr, uk, uv, ls, sink, length, start, held):
                got = latent_attention(qn, qr, c, kr, uk, uv, jax_ops.on_the_host(pattern, held), latent_scale=ls, sink_logits=sink, kv_length=length, q_start=start, **rest)
                return got if return_lse else (got,)
            shapes = [((B, H, T, Dv), q_nope.dtype)] + [((B, H, T), "float64" if kind == "float64" else "float32")] * return_lse
            got = jax_ops.callback(host, shapes, q_nope, q_rope, latent, k_rope, w_uk, w_uv, latent_scale, sink_logits, kv_length, q_start, held)
            return tuple(got) if return_lse else got[0]
    options = dict(scale=scale, sink_logits=sink_logits, softcap=softcap, kv_length=kv_length, q_start=q_start, deterministic=deterministic, backend=backend)
    if mode == "decompressed":
        if dispatch.is_explaining():
            return decompress(latent, w_uk, w_uv, k_rope, latent_scale, backend, None, caller, device, op="latent_attention")
        k, v = latent_decompress(latent, w_uk, w_uv, k_rope=k_rope, latent_scale=latent_scale, backend=backend)
        q = q_nope if q_rope is None else _concat(q_nope, q_rope, caller, device)
        return attention.sparse_attention(q, k, v, pattern, return_lse=return_lse, config=config, **options)
    if R + P > WIDEST:
        raise Unsupported(f"mode: 'absorbed' works in width R + P, which must be at most {WIDEST} and is {R + P}; mode='decompressed' would run it")
    keys = cache
    if cache is None:
        keys = _unsqueeze(latent if k_rope is None else _joined(latent, k_rope, caller, device))  # [B,1,S,R+P]
    if dispatch.is_explaining():  # the attention kernel is the one to explain; queries of the right shape are all it needs
        return attention.sparse_attention(_shaped(q_nope, (B, H, T, R + P), caller, device), keys, None, pattern, value_width=R, config=config, **options)
    q = absorb(q_nope, w_uk, q_rope, backend)                                      # [B,H,T,R+P]
    got = attention.sparse_attention(q, keys, None, pattern, value_width=R, return_lse=return_lse, config=config, **options)
    out, lse = got if return_lse else (got, None)                                  # [B,H,T,R]
    out = absorb(out, _transposed(w_uv), None, backend)                            # [B,H,T,Dv]
    return (out, lse) if return_lse else out


def _gathered(cache, k_rope, latent_scale, kind):
    """latent [B,S,R], k_rope [B,S,P] or None and latent_scale of a cache, S the longest sequence."""
    _cached(cache, k_rope, latent_scale)
    latent, rope, *scale = cache.gather(quantised=cache.quantised)
    return latent, None if rope is None else arrays.cast(rope, kind), scale[0] if scale else None


def _cached(cache, k_rope, latent_scale):
    """Pages of a cache's latents [N,page,R], rotary parts [N,page,P] and, of the fp8 layout, scales [N,page,R/128], which stand for them in the checks of types and widths."""
    if not hasattr(cache, "rank"):
        raise Unsupported(f"latent: {type(cache).__name__} holds no latents; pass a PagedLatent")
    for name, x in (("k_rope", k_rope), ("latent_scale", latent_scale)):
        if x is not None:
            raise ValueError(f"{name}: expected None, got an array; a cache holds its own")
    pool, R = cache.pools[0], cache.rank
    if cache.quantised:
        values, scale, rope = parts(pool, R, cache.rotary)
        return arrays.typed(values, "float8_e4m3fn"), rope, scale
    return pool[..., :R], pool[..., R:] if cache.rotary else None, None


def absorb(x, w, tail, backend):
    """out[b,h,t,m] = sum_n x[b,h,t,n] w[h,m,n], followed by the columns of tail: x [B,H,T,N], w [H,M,N], tail [B,H,T,P] -> [B,H,T,M+P]."""
    caller, device = checks.together(dict(x=x, w=w, tail=tail))
    if caller == "torch":
        from sparsetile.ops import torch_ops
        if torch_ops.wanted(x, w, tail):
            return torch_ops.grouped_matmul(x, w, tail, backend)
    return matmul(x, w, tail, backend, caller, device)


def product_problem(x, w, tail, device, out_dtype=None, inner_heads=False) -> Problem:
    """The problem of `matmul`."""
    (B, H, T, N), M, P, kind = x.shape, w.shape[1], 0 if tail is None else tail.shape[3], arrays.dtype_name(x)
    return Problem.of("grouped_matmul", dict(B=B, H=H, T=T, N=N, M=M, P=P), dict(x=kind, w=kind) | ({} if out_dtype in (None, kind) else dict(out=out_dtype)),
                      devices.device_info(device).arch, ["tail"] * (P > 0) + ["inner_heads"] * inner_heads)


def matmul(x, w, tail, backend, caller, device, config=None, out_dtype=None, inner_heads=False):
    """absorb of checked arguments. inner_heads: summed over heads too, [B,1,T,M] without a tail."""
    (B, H, T, _), M, P = x.shape, w.shape[1], 0 if tail is None else tail.shape[3]
    problem = product_problem(x, w, tail, device, out_dtype, inner_heads)
    choice = dispatch.choose("latent_attention", problem, device, backend, config)
    place = places.place_for(dispatch.package(choice.backend).NATIVE, caller, device)
    with place.guard():
        if B * H * T == 0:
            return place.give(place.zeros((B, 1 if inner_heads else H, T, M + P), out_dtype or arrays.dtype_name(x)))
        return place.give(choice.kernel.run(place.native(x), place.weights(w), place=place, config=choice.config, tail=None if tail is None else place.native(tail),
                                            out_dtype=out_dtype, **({"inner_heads": True} if inner_heads else {})))


# -------------------------------------------------------------------------------------------------------------------- shared
def _sizes(latent, w_uk, w_uv, k_rope):
    (B, S, R), (H, _, Dn), Dv = latent.shape, w_uk.shape, w_uv.shape[2]
    return B, S, H, R, Dn, Dv, 0 if k_rope is None else k_rope.shape[2]


def _check_latent(latent, w_uk, w_uv, k_rope, latent_scale, more=None):
    checks.array("latent", latent, 3, "[B,S,R]", FLOATS + ("float8_e4m3fn",))
    checks.array("w_uk", w_uk, 3, "[H,R,Dn]", FLOATS)
    checks.array("w_uv", w_uv, 3, "[H,R,Dv]", FLOATS)
    B, S, R = latent.shape
    checks.same("w_uk", "latent rank R", R, w_uk.shape[1], "w_uk is [H,R,Dn]; transpose it")
    checks.same("w_uv", "heads and latent rank [H, R] of w_uk", list(w_uk.shape[:2]), list(w_uv.shape[:2]), "w_uv is [H,R,Dv]; transpose it")
    checks.same("w_uv", "element type of w_uk", arrays.dtype_name(w_uk), arrays.dtype_name(w_uv), "convert both to one type")
    if R < 1:
        raise ValueError(f"latent: expected a rank R of at least 1, got {R}; an empty latent holds nothing")
    if k_rope is not None:
        checks.array("k_rope", k_rope, 3, "[B,S,P]", FLOATS)
        checks.same("k_rope", "shape [B,S] of latent", [B, S], list(k_rope.shape[:2]), "one rotary part for each token")
    checks.width("w_uk", w_uk.shape[2] + (0 if k_rope is None else k_rope.shape[2])), checks.width("w_uv", w_uv.shape[2])
    kind = arrays.dtype_name(latent)
    if kind == "float8_e4m3fn" and latent_scale is None:
        raise ValueError("latent_scale: expected [B,S,ceil(R/128)] float32 beside a float8 latent, got None; pass the scales it was quantised with")
    if kind != "float8_e4m3fn" and kind != arrays.dtype_name(w_uk):
        raise TypeError(f"latent: expected the element type of w_uk ({arrays.dtype_name(w_uk)}) or float8_e4m3fn with a scale, got {kind}; convert it")
    checks.row("latent_scale", latent_scale, (B, S, -(-R // 128)), "[B,S,ceil(R/128)]")
    caller, device = checks.together(dict(latent=latent, w_uk=w_uk, w_uv=w_uv, k_rope=k_rope, latent_scale=latent_scale) | (more or {}))
    return _sizes(latent, w_uk, w_uv, k_rope), caller, device


def _namespace(caller):
    if caller == "torch":
        import torch
        return torch
    if caller == "numpy":
        import numpy
        return numpy
    if caller == "cupy":
        import cupy
        return cupy
    import jax.numpy
    return jax.numpy


def _concat(a, b, caller, device):
    return _namespace(caller).concatenate((a, b), -1)


def _joined(latent, k_rope, caller, device):
    """[latent, k_rope] along the width: the memory itself if one array holds them side by side, else one copy."""
    if caller == "torch":
        from sparsetile.ops import torch_ops
        if not torch_ops.wanted(latent, k_rope) and arrays.held(latent) is latent and arrays.held(k_rope) is k_rope and latent.stride() == k_rope.stride() and \
                k_rope.data_ptr() == latent.data_ptr() + latent.shape[2] * latent.element_size():
            return latent.as_strided((*latent.shape[:2], latent.shape[2] + k_rope.shape[2]), latent.stride())
    return _concat(latent, k_rope, caller, device)


def _unsqueeze(x):
    return x[:, None]


def _transposed(w):
    return w.swapaxes(1, 2)


def _shaped(x, shape, caller, device):
    return _namespace(caller).empty(shape, dtype=x.dtype, **({"device": x.device} if caller == "torch" else {}))
