"""importance_topk: the blocks of keys that matter most to a query, by what a coarser attention gave to compressed keys; exact, without all blocks' scores."""
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

from sparsetile.backends import arrays, devices, places
from sparsetile.backends.contract import Problem
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks, dispatch, ready
from sparsetile.ops.selection import Selection

OP, FLOATS, MOST = "importance_topk", ("float32", "float16", "bfloat16", "float64"), 2 ** 24


@dataclass(frozen=True)
class Call:
    """One checked call. `keys` is S; q_start None means kv_length - T."""
    q: Any
    k: Any
    lse: Any
    top_k: int
    block: int
    stride: int
    select_block: int
    keys: int
    scale: float
    kv_length: Any
    q_start: Any
    force_first: int
    force_last: int
    return_scores: bool
    backend: str | None
    config: Any
    caller: str
    device: int | None

    @property
    def sizes(self):
        """B, Hq, Hk, T, C, D; C compressed keys"""
        (B, Hq, T, D), (_, Hk, C, _) = self.q.shape, self.k.shape
        return B, Hq, Hk, T, C, D


def importance_topk(q, k, lse, top_k, *, block=32, stride=16, select_block=64, keys=None, scale=None, kv_length=None, q_start=None, force_first=1, force_last=2,
                    return_scores=False, backend=None, config=None):
    """The top_k most important blocks of `select_block` keys of every query and key head, from the attention over compressed keys.

    q [B,Hq,T,D], k [B,Hk,C,D] (float32, float16, bfloat16, float64 on CPU): compressed key i stands for the keys i * stride ... i * stride + block - 1 and is seen by
    the queries at p >= i * stride + block - 1, if all its keys exist. lse [B,Hq,T] float32 (float64 beside float64): natural logarithm of the sum over the
    compressed keys that the query sees, with `scale`, as sparse_attention(q, k, v, Compressed(block, stride), return_lse=True) returns it.
    importance[j] = sum over the group's heads h, m < select_block / stride, n < block / stride of exp(scale * q_h . k_i - lse_h),  i = j * select_block / stride + m - n,
    over the compressed keys i that are seen: a compressed key's share counts once for each of its strides that lies in block j.
    block, select_block   multiples of stride
    keys          S, the number of keys that k was compressed from; (C - 1) * stride + block by default
    kv_length, q_start    as in sparse_attention, over the S keys: query t stands at q_start + t, by default kv_length - T, and S - T without lengths
    force_first, force_last   so many blocks at the start and at the end of what a query sees are always taken; they count in top_k
    return_scores also return the importance of the chosen blocks [B,Hk,T,top_k] float32, -inf where the index is -1; not differentiable
    Returns a causal Selection [B,Hk,T,top_k] of granularity select_block: blocks that begin at or before p and below the length compete, largest importance first,
    equal ones by the smaller index, NaN never unless forced; indices ascending, then -1; `lengths` says how many are real. A row with no more than top_k such blocks gets all of
    them. Scores of T x blocks are never held: memory is O(T * top_k) and a bounded scratch. Nothing of it is differentiated.
    Source: Native Sparse Attention (arXiv 2502.11089), equations 8 to 11; its formula counts blocks and compressed keys from 1.
    """
    on_device = not (q_start is None or isinstance(q_start, int)) and getattr(q_start, "ndim", 0) > 0  # in this order torch.compile can read a number
    key = None
    if config is None:
        options = top_k, block, stride, select_block, keys, scale, None if on_device else q_start, force_first, force_last, return_scores, backend
        key = ready.key_of(OP, (q, k, lse, kv_length, q_start if on_device else None), options)
        found = ready.find(key)
        if found is not None:
            call = replace(found.kept, q=q, k=k, lse=lse, kv_length=kv_length, **dict(q_start=q_start) if on_device else {})
            indices, lengths, *scores = found(q, k, lse, *ends_of(call))
            return selection(call, indices, lengths, *scores or [None])
    call = check(q, k, lse, top_k, block, stride, select_block, keys, scale, kv_length, q_start, force_first, force_last, return_scores, backend, config)
    if call.caller == "torch" and not dispatch.is_explaining():
        from sparsetile.ops import torch_ops
        if torch_ops.wanted(q, k, lse):
            return selection(call, *torch_ops.importance_topk(call))
    if call.caller == "jax":
        from sparsetile.ops import jax_ops
        if jax_ops.traced(q, k, lse, kv_length, q_start):
            return selection(call, *_traced(call, jax_ops))
    return selection(call, *select(call, key))


def check(q, k, lse, top_k, block, stride, select_block, keys, scale, kv_length, q_start, force_first, force_last, return_scores, backend, config) -> Call:
    checks.options(backend, config)
    checks.array("q", q, 4, "[B,Hq,T,D]", FLOATS)
    checks.array("k", k, 4, "[B,Hk,C,D]", FLOATS)
    B, Hq, T, D = q.shape
    _, Hk, C, _ = k.shape
    checks.same("k", "element type of q", arrays.dtype_name(q), arrays.dtype_name(k), "convert both to one type")
    checks.same("k", "batch size and width [B, D] of q", [B, D], [k.shape[0], k.shape[3]], "q and k are multiplied over D")
    if Hk == 0 or Hq % Hk:
        raise ValueError(f"k: expected a number of key heads Hk that divides Hq = {Hq}, got Hk = {Hk}; repeat or drop heads")
    checks.width("q", D)
    checks.array("lse", lse, 3, "[B,Hq,T]", ("float64",) if arrays.dtype_name(q) == "float64" else ("float32",))
    checks.same("lse", "shape [B,Hq,T]", [B, Hq, T], list(lse.shape), "one for each query, as the attention over k returns it")
    top_k, stride = checks.integer("top_k", top_k, 1, MOST), checks.integer("stride", stride, 1, 2 ** 30)
    for name, size in (("block", block), ("select_block", select_block)):
        if checks.integer(name, size, 1, 2 ** 30) % stride:
            raise ValueError(f"{name}: expected a multiple of stride = {stride}, got {size}; shares are counted in whole strides")
    force_first, force_last = checks.integer("force_first", force_first, 0, MOST), checks.integer("force_last", force_last, 0, MOST)
    if force_first + force_last > top_k:
        raise ValueError(f"force_first: expected force_first + force_last <= top_k = {top_k}, got {force_first} + {force_last}; forced blocks count in top_k")
    checks.flag("return_scores", return_scores)
    least, most = ((C - 1) * stride + block, C * stride + block - 1) if C else (0, block - 1)
    keys = least if keys is None else checks.integer("keys", keys, 0, 2 ** 31 - 1)
    if not least <= keys <= most:
        raise ValueError(f"keys: expected {least} to {most}, of which {C} blocks of {block} at stride {stride} are made, got {keys}; pass the number of keys before compression")
    checks.lengths("kv_length", kv_length, (B,), "[B]")
    q_start = checks.start(q_start, B, None if kv_length is not None else keys - T)
    scale = D ** -0.5 if scale is None else checks.number("scale", scale)
    named = dict(q=q, k=k, lse=lse, kv_length=kv_length, q_start=None if isinstance(q_start, int) else q_start)
    return Call(q, k, lse, top_k, block, stride, select_block, keys, scale, kv_length, q_start, force_first, force_last, return_scores, backend, config, *checks.together(named))


def ends(call: Call):
    """(key_end, block_end) int32 [B,Hk,T]: compressed keys and blocks before them are seen by the query. Made where the arrays are."""
    B, _, Hk, T, C, _ = call.sizes
    lib, S, start = xp.module(call.q), call.keys, call.q_start
    length = None if call.kv_length is None else lib.clip(call.kv_length, 0, S).reshape(B, 1, 1)
    known = isinstance(start, int)
    if known:
        start = min(max(start, -T), S)  # farther out nothing changes, and sums stay in 32 bits
    else:
        start = length - T if start is None else lib.clip(start, -T, S).reshape(B, 1, 1)

    def before(extra):
        """One past the last key that may be seen, and `extra`, in few operations: each is a launch."""
        first = 1 + extra + (start if known else 0)
        end = xp.arange(call.q, first, first + T)[None, None]
        end = end if known else end + start
        return end if length is None else lib.minimum(end, length + extra)
    both = lib.clip(before(call.stride - call.block) // call.stride, 0, C), lib.clip(before(-1) // call.select_block + 1, 0, -(-S // call.select_block))
    return tuple(xp.astype(lib.broadcast_to(x, (B, Hk, T)), "int32") for x in both)


_ends = OrderedDict()
dispatch.PLAN_CACHES.append(_ends)


def ends_of(call: Call):
    """`ends`, which for positions that the host knows are kept, those of the last 16 shapes on a stream. A graph makes its own: the kept ones go when others come.
    PyTorch's are packed here: a call's kernel would else be given copies, which no tape (backends/tape.py) knows."""
    if call.caller != "torch":
        return ends(call)
    if call.kv_length is not None or not isinstance(call.q_start, int) or _captured(call):
        return _packed(call)
    stream = None if call.device is None else devices.stream_of("torch", call.device)
    key = call.sizes, call.block, call.stride, call.select_block, call.keys, call.q_start, call.device, stream
    if key not in _ends:
        _ends[key] = _packed(call)
        if len(_ends) > 16:
            _ends.popitem(last=False)
    return _ends[key]


def _packed(call: Call):
    return tuple(x.contiguous() for x in ends(call))


def _captured(call: Call) -> bool:
    """Whether what the call allocates is a CUDA graph's, or a tracer's."""
    import torch
    return torch.compiler.is_compiling() or type(call.q) is not torch.Tensor or ready.transformed(torch) or call.device is not None and torch.cuda.is_current_stream_capturing()


def select(call: Call, key=None):
    """Of a checked call: indices [B,Hk,T,K], lengths [B,Hk,T], scores [B,Hk,T,K] or None. One with a key is remembered under it."""
    B, Hq, Hk, T, C, D = call.sizes
    kind, K = arrays.dtype_name(call.q), call.top_k
    words = [w for w in ("force_first", "force_last", "return_scores") if getattr(call, w)]
    problem = Problem.of(OP, dict(B=B, Hq=Hq, Hk=Hk, T=T, S=call.keys, C=C, D=D, K=K), dict(q=kind, k=kind), devices.device_info(call.device).arch, words, 1.0, call.select_block)
    choice = dispatch.choose(OP, problem, call.device, call.backend, call.config)
    place = places.place_for(dispatch.package(choice.backend).NATIVE, call.caller, call.device)
    with place.guard():
        if B * Hq * T == 0 or call.keys == 0:
            scores = place.full((B, Hk, T, K), "float32", float("-inf")) if call.return_scores else None
            got = place.full((B, Hk, T, K), "int32", -1), place.zeros((B, Hk, T), "int32"), scores
        else:
            how = dict(config=choice.config, blocks=-(-call.keys // call.select_block), reach=call.block // call.stride, step=call.select_block // call.stride,
                       scale=call.scale, force_first=call.force_first, force_last=call.force_last, return_scores=call.return_scores)

            def launch(place, q, k, lse, key_end, block_end):
                return choice.kernel.run(q, k, lse, K, place=place, key_end=key_end, block_end=block_end, **how)
            if key is not None:
                ready.remember(key, ready.Ready(choice, call.device, launch, plain=2, kept=replace(call, **dict.fromkeys(("q", "k", "lse", "kv_length")),
                                                                                                 **{} if isinstance(call.q_start, int) else dict(q_start=None))))
            got = launch(place, place.native(call.q), place.native(call.k), *(place.packed(place.native(x)) for x in (call.lse, *ends_of(call))))
        return tuple(None if x is None else place.give(x) for x in got)


def selection(call: Call, indices, lengths, scores):
    found = Selection(indices, call.select_block, lengths, True, distinct=True)
    return (found, scores) if call.return_scores else found


def _traced(call: Call, jax_ops):
    from dataclasses import replace
    B, _, Hk, T, _, _ = call.sizes
    shapes = [((B, Hk, T, call.top_k), "int32"), ((B, Hk, T), "int32")] + [((B, Hk, T, call.top_k), "float32")] * call.return_scores
    whole = call.q_start is None or isinstance(call.q_start, int)

    def host(q, k, lse, length, start):
        got = select(replace(call, q=q, k=k, lse=lse, kv_length=length, q_start=call.q_start if whole else start, caller=arrays.framework(q)))
        return got[:2 + call.return_scores]
    got = jax_ops.callback(host, shapes, call.q, call.k, call.lse, call.kv_length, None if whole else call.q_start)
    return *got, *[None] * (not call.return_scores)
