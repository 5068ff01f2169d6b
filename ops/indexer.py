"""The lightning indexer: scores of all keys by a light scorer, exact top-k, and both in one without ever holding the scores."""
from dataclasses import dataclass, replace
from typing import Any

from sparsetile.backends import arrays, devices, places
from sparsetile.backends.contract import Problem, Unsupported
from sparsetile.ops import checks, dispatch
from sparsetile.ops.caches.paged import Cache
from sparsetile.ops.selection import Selection

FLOATS = ("float32", "float16", "bfloat16", "float8_e4m3fn")
WEIGHTS = ("float32", "float16", "bfloat16")
MOST = 2 ** 24  # entries a query may ask for: every row has as many, keys or not


@dataclass(frozen=True)
class Call:
    """One checked call of the indexer."""
    op: str
    q: Any
    k: Any
    weights: Any
    k_scale: Any
    causal: bool
    q_start: Any
    key_start: Any
    key_end: Any
    activation: str | None
    backend: str | None
    config: Any
    caller: str
    device: int | None
    table: Any = None  # [B,pages] int32: k [N,page,D] and k_scale [N,page] are pages of a cache

    @property
    def sizes(self):
        """B, H, T, S, D"""
        return *self.q.shape[:3], self.k.shape[1] * (1 if self.table is None else self.table.shape[1]), self.q.shape[3]


def indexer_scores(q, k, weights, *, k_scale=None, causal=True, q_start=None, key_start=None, key_end=None, activation="relu", backend=None, config=None):
    """score[b,t,s] = k_scale[b,s] * sum_h weights[b,h,t] * relu(q[b,h,t] . k[b,s])

    q [B,H,T,D], k [B,S,D] or an IndexerKeys (float32, float16, bfloat16, float8_e4m3fn), weights [B,H,T] (floats; fp8: q's scale is folded into them), k_scale [B,S] float32.
    causal       keys past the query's position p = q_start + t score -inf; q_start is S - T by default, an int or [B] int32
    key_start, key_end   [B,T] or [T] int32: keys outside [key_start, key_end) score -inf
    activation   "relu", or None for plain products
    Returns scores [B,T,S] float32. Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 1.
    """
    call = check("indexer_scores", q, k, weights, k_scale, causal, q_start, key_start, key_end, activation, backend, config)
    B, H, T, S, D = call.sizes
    if call.caller == "torch" and not dispatch.is_explaining():
        from sparsetile.ops import torch_ops
        torch_ops.no_tangents(k_scale)
        if torch_ops.wanted(q, call.k, weights):
            _whole(call)
            return torch_ops.indexer_scores(call)
    if call.caller == "jax":
        from sparsetile.ops import jax_ops
        if jax_ops.traced(q, k, weights, k_scale, q_start, key_start, key_end):
            options = dict(causal=causal, activation=activation, backend=backend, config=config)
            return jax_ops.callback(lambda q, k, w, ks, qs, lo, hi: indexer_scores(q, k, w, k_scale=ks, q_start=qs, key_start=lo, key_end=hi, **options),
                                    (((B, T, S), "float32"),), q, k, weights, k_scale, q_start, key_start, key_end)[0]
    return scores(call)


def scores(call: Call):
    """indexer_scores of checked arguments."""
    B, H, T, S, D = call.sizes
    choice, place = _choose(call, call.op)
    with place.guard():
        if B * T * S == 0 or H == 0:
            return place.give(place.zeros((B, T, S), "float32"))
        return place.give(choice.kernel.run(*_natives(call, place), place=place, config=choice.config, **_window(call, place)))


def scores_backward(call: Call, dscores, config=None):
    """Gradients of a checked call's scores: dscores [B,T,S] -> dq [B,H,T,D], dk [B,S,D], dweights [B,H,T], float32."""
    B, H, T, S, D = call.sizes
    choice, place = _choose(replace(call, config=config), "indexer_scores_backward")
    with place.guard():
        if B * T * S == 0 or H == 0:
            got = place.zeros((B, H, T, D), "float32"), place.zeros((B, S, D), "float32"), place.zeros((B, H, T), "float32")
        else:
            given = place.packed(place.cast(place.native(dscores), "float32"))
            got = choice.kernel.run(*_natives(call, place), given, place=place, config=choice.config, **_window(call, place))
        return tuple(place.give(x) for x in got)


def indexer_topk(q, k, weights, top_k, *, k_scale=None, causal=True, q_start=None, key_start=None, key_end=None, activation="relu", pool=1, force_first=0,
                 force_last=0, return_scores=False, backend=None, config=None):
    """The top_k best keys (or blocks of `pool` keys) of every query, exactly, without holding the scores: memory is O(T * top_k).

    Arguments as in indexer_scores, and:
    top_k         how many entries a query gets; rows with fewer visible keys get all of them, then -1
    pool          g > 1: blocks of g keys compete by the maximum over their visible keys; the Selection has granularity g
    force_first, force_last   so many blocks at the start and at the end of what a query sees are always taken; they count in top_k
    return_scores also return the chosen scores [B,1,T,K] float32, -inf where the index is -1
    Returns a Selection [B,1,T,top_k] (causal as the indexer was), indices ascending, then -1; `lengths` says how many are real. Largest scores first chosen,
    equal scores by the smaller index, -0.0 equals 0.0, NaN and -inf are never chosen. A row with no more than top_k keys gets all of them and no score is
    computed, unless scores are asked for. For finite scores the set equals topk(indexer_scores(...)) of the same backend bit for bit.
    """
    call = check("indexer_topk", q, k, weights, k_scale, causal, q_start, key_start, key_end, activation, backend, config)
    top_k, pool = checks.integer("top_k", top_k, 1, MOST), checks.integer("pool", pool, 1, 2 ** 31 - 1)
    force_first, force_last = checks.integer("force_first", force_first, 0, MOST), checks.integer("force_last", force_last, 0, MOST)
    checks.flag("return_scores", return_scores)
    if force_first + force_last > top_k:
        raise ValueError(f"force_first: expected force_first + force_last <= top_k = {top_k}, got {force_first} + {force_last}; forced blocks count in top_k")
    B, H, T, S, D = call.sizes
    options = dict(pool=pool, force_first=force_first, force_last=force_last, return_scores=return_scores)
    if call.caller == "torch" and not dispatch.is_explaining():
        from sparsetile.ops import torch_ops
        torch_ops.no_tangents(k_scale)
        if torch_ops.wanted(q, call.k, weights):
            _whole(call)
            indices, lengths, best = torch_ops.indexer_topk(call, top_k, options)
            return _selection(indices, lengths, best, pool, causal)
    if call.caller == "jax":
        from sparsetile.ops import jax_ops
        if jax_ops.traced(q, k, weights, k_scale, q_start, key_start, key_end):
            rest = dict(causal=causal, activation=activation, backend=backend, config=config, **options)

            def host(q, k, w, ks, qs, lo, hi):
                got = indexer_topk(q, k, w, top_k, k_scale=ks, q_start=qs, key_start=lo, key_end=hi, **rest)
                selection, best = got if return_scores else (got, None)
                return (selection.indices[:, 0], selection.lengths[:, 0]) + ((best[:, 0],) if return_scores else ())
            shapes = [((B, T, top_k), "int32"), ((B, T), "int32")] + ([((B, T, top_k), "float32")] if return_scores else [])
            indices, lengths, *best = jax_ops.callback(host, shapes, q, k, weights, k_scale, q_start, key_start, key_end)
            return _selection(indices, lengths, best[0] if best else None, pool, causal)
    return _selection(*select(call, top_k, options), pool, causal)


def select(call: Call, top_k: int, options: dict):
    """indexer_topk of checked arguments: indices [B,T,K], lengths [B,T], scores [B,T,K] or None."""
    B, H, T, S, D = call.sizes
    options = options | dict(pool=min(options["pool"], max(S, 1)))  # one block holds no more than all keys
    words = [w for w in ("pool", "force_first", "force_last") if options[w] > (w == "pool")] + ["return_scores"] * options["return_scores"]
    choice, place = _choose(call, call.op, words=words, granularity=options["pool"], K=top_k)
    with place.guard():
        if B * T * S == 0 or H == 0:
            best = place.full((B, T, top_k), "float32", float("-inf")) if options["return_scores"] else None
            got = place.full((B, T, top_k), "int32", -1), place.zeros((B, T), "int32"), best
        else:
            got = choice.kernel.run(*_natives(call, place), top_k, place=place, config=choice.config, **_window(call, place), **options)
        return tuple(None if x is None else place.give(x) for x in got)


def topk(scores, top_k, *, key_start=None, key_end=None, backend=None, config=None):
    """Exact, deterministic top-k of every row. scores [B,T,S] float32 (rows may be strided); key_start, key_end [B,T] or [T] int32 window each row.

    Returns a Selection [B,1,T,top_k]: indices ascending, then -1; lengths [B,1,T]. Largest first chosen, equal scores by the smaller index, -0.0 equals 0.0,
    NaN and -inf are never chosen. Identical on all backends.
    """
    checks.options(backend, config)
    checks.array("scores", scores, 3, "[B,T,S]", ("float32",))
    top_k = checks.integer("top_k", top_k, 1, MOST)
    B, T, S = scores.shape
    key_start, key_end = _row("key_start", key_start, B, T), _row("key_end", key_end, B, T)
    caller, device = checks.together({"scores": scores, "key_start": key_start, "key_end": key_end})
    if caller == "torch" and not dispatch.is_explaining():
        from sparsetile.ops import torch_ops
        if torch_ops.wanted(scores):
            return _selection(*torch_ops.topk(scores, top_k, key_start, key_end, backend, config), None, 1, False)
    if caller == "jax":
        from sparsetile.ops import jax_ops
        if jax_ops.traced(scores, key_start, key_end):
            def host(x, lo, hi):
                got = topk(x, top_k, key_start=lo, key_end=hi, backend=backend, config=config)
                return got.indices[:, 0], got.lengths[:, 0]
            return _selection(*jax_ops.callback(host, (((B, T, top_k), "int32"), ((B, T), "int32")), scores, key_start, key_end), None, 1, False)
    return _selection(*best(scores, top_k, key_start, key_end, backend, config, caller, device), None, 1, False)


def best(scores, top_k, key_start, key_end, backend, config, caller, device):
    """topk of checked arguments: indices [B,T,K], lengths [B,T]."""
    B, T, S = scores.shape
    problem = Problem.of("topk", dict(B=B, T=T, S=S, K=top_k), dict(scores="float32"), devices.device_info(device).arch)
    choice = dispatch.choose("topk", problem, device, backend, config)
    place = places.place_for(dispatch.package(choice.backend).NATIVE, caller, device)
    with place.guard():
        if B * T * S == 0:
            got = place.full((B, T, top_k), "int32", -1), place.zeros((B, T), "int32")
        else:
            got = choice.kernel.run(place.native(scores), top_k, place=place, config=choice.config, key_start=_full(place, key_start, B, T), key_end=_full(place, key_end, B, T))
        return tuple(place.give(x) for x in got)


# -------------------------------------------------------------------------------------------------------------------- shared
def check(op, q, k, weights, k_scale, causal, q_start, key_start, key_end, activation, backend, config) -> Call:
    checks.options(backend, config)
    checks.array("q", q, 4, "[B,H,T,D]", FLOATS)
    table = None
    if isinstance(k, Cache):
        k, k_scale, q_start, key_end, table = _cached(q, k, k_scale, q_start, key_end)
    checks.array("k", k, 3, "[B,S,D]", FLOATS)
    checks.array("weights", weights, 3, "[B,H,T]", WEIGHTS)
    B, H, T, D = q.shape
    checks.same("k", "element type of q", arrays.dtype_name(q), arrays.dtype_name(k), "convert both to one type")
    checks.same("k", "batch size and width [B, D] of q", [B, D], [(k if table is None else table).shape[0], k.shape[2]], "q and k are multiplied over D")
    checks.same("weights", "shape [B,H,T]", [B, H, T], list(weights.shape), "one weight for each query head")
    checks.width("q", D)
    S = k.shape[1]
    checks.row("k_scale", k_scale, (k.shape[0], S), "[B,S]")
    checks.flag("causal", causal)
    checks.choice("activation", activation, ("relu", None))
    q_start = checks.start(q_start, B, S - T)
    key_start, key_end = _row("key_start", key_start, B, T), _row("key_end", key_end, B, T)
    named = dict(q=q, k=k, weights=weights, k_scale=k_scale, q_start=None if isinstance(q_start, int) else q_start, key_start=key_start, key_end=key_end, page_table=table)
    return Call(op, q, k, weights, k_scale, causal, q_start, key_start, key_end, activation, backend, config, *checks.together(named), table)


def _cached(q, cache, k_scale, q_start, key_end):
    """A cache in the place of k: (k, k_scale, q_start, key_end, table)."""
    if k_scale is not None:
        raise ValueError("k_scale: expected None, got an array; a cache holds its own scales")
    B, T = checks.array("q", q, 4, "[B,H,T,D]").shape[::2]
    checks.together({"q": q, "k.lengths": cache.lengths})
    k, scales, table, q_start, key_end = cache.scored(T, q_start, _row("key_end", key_end, B, T))
    return k, scales, q_start, key_end, table


def _row(name, x, B, T):
    """[B,T] or [T] int32."""
    if x is None:
        return None
    checks.array(name, x, (1, 2), "[B,T] or [T]", ("int32",))
    return checks.lengths(name, x, (T,) if x.ndim == 1 else (B, T), "[T]" if x.ndim == 1 else "[B,T]")


def _whole(call: Call):
    if call.table is not None:
        raise Unsupported("k: a cache read through its pages is neither differentiated nor traced by torch.compile yet; call under torch.no_grad(), or pass cache.gather()")


def _full(place, x, B, T):
    """A key bound as a contiguous [B,T] array."""
    return None if x is None else place.rows(place.native(x), (B, T))


def problem_of(call: Call, kernel: str, words=(), granularity: int = 1, **axes: int) -> Problem:
    B, H, T, S, D = call.sizes
    features = [*words, *(w for w, on in (("causal", call.causal), ("scale", call.k_scale is not None), ("window", call.key_start is not None or call.key_end is not None),
                                          ("q_start", not isinstance(call.q_start, int)), ("paged", call.table is not None)) if on)]
    kind = arrays.dtype_name(call.q)
    return Problem.of(kernel, dict(B=B, H=H, T=T, S=S, D=D, **axes), dict(q=kind, k=kind), devices.device_info(call.device).arch, features, 1.0, granularity)


def _choose(call: Call, kernel: str, **problem):
    choice = dispatch.choose(call.op, problem_of(call, kernel, **problem), call.device, call.backend, call.config)
    return choice, places.place_for(dispatch.package(choice.backend).NATIVE, call.caller, call.device)


def _natives(call: Call, place):
    return place.native(call.q), place.native(call.k), place.packed(place.cast(place.native(call.weights), "float32"))


def _window(call: Call, place) -> dict:
    B, _, T, _, _ = call.sizes
    start = call.q_start if isinstance(call.q_start, int) else place.native(call.q_start)
    scale = None if call.k_scale is None else place.native(call.k_scale)
    more = dict(k_scale=scale, table=place.packed(place.native(call.table))) if call.table is not None else dict(k_scale=None if scale is None else place.packed(scale))
    return dict(**more, causal=call.causal, q_start=start, activation=call.activation,
                key_start=_full(place, call.key_start, B, T), key_end=_full(place, call.key_end, B, T))


def _selection(indices, lengths, scores, pool, causal):
    selection = Selection(indices[:, None], pool, lengths[:, None], causal, distinct=True)
    return selection if scores is None else (selection, scores[:, None])
