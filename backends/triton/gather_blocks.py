"""Path "blocks" of gather_attention: queries that chose the same block of keys are brought together, each tile of them multiplies with that block alone.

A pair is a query row and one of its entries; pair x of a key head's list is (head of the group, query, place), the last fastest. `count_pairs` and `place_pairs` sort the pairs by entry, each entry's
from a whole tile on; `attend` runs a tile of ROWS pairs through its block, and the parts of a row are merged by LSE in the order of its list, so no order of additions hangs on the sort.
Scratch: a float32 row [Dv] for each pair, and what counts them, of so many key heads at a time as SCRATCH holds. Nothing returns to the host; a CUDA graph holds it. An entry given twice is two pairs.
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton.launch import POINTER, known_start, parts, power, scales, shared_limit
from sparsetile.backends.triton.tiles import capped, finish, load, negated, place_of, product, soften, store

ROWS, KEYS, CHUNK, SCRATCH, GRID = 128, 64, 128, 1 << 30, 65535  # CUDA's most in y
OPTIONS = dict(num_warps=8, num_stages=3, enable_fp_fusion=False)


@triton.jit
def pairs_of(x, b, hk, there, indices, lengths, limit, start, Hq, Hk, G, T, K, GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr):
    """(head, query, entry, whether it has keys) of pairs x."""
    group = Hq // Hk
    h = hk * group + x // K // T
    t = (x // K % T).to(tl.int64)
    line = (b * G + h // (Hq // G)) * T + t
    entry = tl.load(indices + line * K + x % K, mask=there, other=-1)
    ok = (entry >= 0) & (entry < (limit + GRANULARITY - 1) // GRANULARITY)
    if lengths is not None:
        ok = ok & (x % K < tl.load(lengths + line, mask=there, other=0))
    if CAUSAL:
        ok = ok & (tl.where(ok, entry, 0).to(tl.int64) * GRANULARITY <= start + t)
    return h, t, tl.where(ok, entry, 0), ok


@triton.jit(do_not_specialize=["first", "Hq", "Hk", "G", "T", "S", "K", "pairs", "bins", "chunks", "q_start"])
def count_pairs(indices, lengths, kv_length, q_starts, counts, first, Hq, Hk, G, T, S, K, pairs, bins, chunks, q_start, GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr,
          FROM_LENGTH: tl.constexpr, CHUNK: tl.constexpr):
    """counts [lists, bins, chunks]: the pairs of each chunk with each entry."""
    list_ = tl.program_id(1)
    b = ((first + list_) // Hk).to(tl.int64)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    x = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    _, _, entry, ok = pairs_of(x, b, (first + list_) % Hk, x < pairs, indices, lengths, limit, start, Hq, Hk, G, T, K, GRANULARITY, CAUSAL)
    tl.atomic_add(counts + (list_.to(tl.int64) * bins + entry) * chunks + tl.program_id(0), 1, mask=ok, sem="relaxed")


@triton.jit(do_not_specialize=["first", "Hq", "Hk", "G", "T", "S", "K", "pairs", "bins", "chunks", "capacity", "q_start"])
def place_pairs(indices, lengths, kv_length, q_starts, begins, order, first, Hq, Hk, G, T, S, K, pairs, bins, chunks, capacity, q_start, GRANULARITY: tl.constexpr,
          CAUSAL: tl.constexpr, FROM_LENGTH: tl.constexpr, CHUNK: tl.constexpr):
    """order [lists, capacity]: pairs by entry, in their own order within one; begins [lists, bins, chunks]: where each chunk's begin."""
    list_ = tl.program_id(1)
    b = ((first + list_) // Hk).to(tl.int64)
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    x = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    _, _, entry, ok = pairs_of(x, b, (first + list_) % Hk, x < pairs, indices, lengths, limit, start, Hq, Hk, G, T, K, GRANULARITY, CAUSAL)
    key = tl.where(ok, entry, -1)
    before = (key[None, :] == key[:, None]) & (tl.arange(0, CHUNK)[None, :] < tl.arange(0, CHUNK)[:, None])
    at = tl.load(begins + (list_.to(tl.int64) * bins + entry) * chunks + tl.program_id(0), mask=ok, other=0) + tl.sum(before.to(tl.int32), 1)
    tl.store(order + list_.to(tl.int64) * capacity + at, x, mask=ok)


@triton.jit
def list_of(first, Hk):
    """(list, batch, key head) of a program that multiplies."""
    list_ = tl.program_id(1).to(tl.int64)
    return list_, (first + list_) // Hk, (first + list_) % Hk


@triton.jit
def step(acc, m, l, q0, q1, k, v, key, ok, mask, sks, svs, scale2, inner, outer, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
         V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr):
    """BK keys; MASK: only those ok are read, and a row sees what `mask` [BQ, BK] says."""
    k0 = load(k, key * sks, ok, 0, D0, D, MASK)
    s = product(q0, tl.trans(k0), tl.zeros([BQ, BK], tl.float32))
    if D1:
        s = product(q1, tl.trans(load(k, key * sks, ok, D0, D1, D, MASK)), s)
    if CAP:
        s = capped(s, inner, outer)
    if MASK:
        s = tl.where(mask, s, float("-inf"))
    p, a, m, l = soften(s, m, l, scale2, MASK)
    v0 = load(v, key * svs, ok, 0, V0, DV, MASK)
    return product(p.to(v0.dtype), v0, acc * a[:, None]), m, l


@triton.jit(do_not_specialize=["first", "Hq", "Hk", "G", "T", "S", "K", "pairs", "capacity", "q_start"])
def attend(q, k, v, out, lse, order, indices, lengths, kv_length, q_starts, sqb, sqh, sqt, skb, skh, sks, svb, svh, svs, first, Hq, Hk, G, T, S, K, pairs, capacity,
           q_start, scale, inner, outer, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, V0: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
           GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr, NEGATE: tl.constexpr, CAP: tl.constexpr, FROM_LENGTH: tl.constexpr):
    """A tile of pairs: out [lists, pairs, Dv], lse [lists, pairs], float32."""
    list_, b, hk = list_of(first, Hk)
    order += list_ * capacity + tl.program_id(0) * BQ
    head_of_tile = tl.load(order)
    if head_of_tile >= 0:
        limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
        x = tl.load(order + tl.arange(0, BQ))
        row_ok = x >= 0
        x = tl.where(row_ok, x, head_of_tile)
        h, t, _, _ = pairs_of(x, b, hk, row_ok, indices, lengths, limit, start, Hq, Hk, G, T, K, GRANULARITY, CAUSAL)
        line = (b * G + (hk * (Hq // Hk) + head_of_tile // K // T) // (Hq // G)) * T + head_of_tile // K % T
        begin = tl.load(indices + line * K + head_of_tile % K).to(tl.int64) * GRANULARITY
        end = tl.minimum(begin + GRANULARITY, limit)
        whole = end
        if CAUSAL:
            p = start + t
            end = tl.minimum(end, tl.max(p, 0) + 1)
            whole = tl.minimum(end, tl.maximum(tl.min(p, 0) + 1, begin))
        full = ((whole - begin) // BK * BK).to(tl.int32)
        rest = (end - begin).to(tl.int32)
        rows = q + b * sqb
        at = h.to(tl.int64) * sqh + t * sqt
        q0 = load(rows, at, row_ok, 0, D0, D, True)
        q1 = 0.0
        if D1:
            q1 = load(rows, at, row_ok, D0, D1, D, True)
        if NEGATE:
            q0 = negated(q0)
            if D1:
                q1 = negated(q1)
        k += b * skb + hk * skh + begin * sks
        v += b * svb + hk * svh + begin * svs
        m = tl.full([BQ], float("-inf"), tl.float32)
        l = tl.zeros([BQ], tl.float32)
        acc = tl.zeros([BQ, V0], tl.float32)
        scale2 = scale * 1.4426950408889634
        for n in tl.range(0, full, BK):
            key = (n + tl.arange(0, BK)).to(tl.int64)
            acc, m, l = step(acc, m, l, q0, q1, k, v, key, row_ok, row_ok, sks, svs, scale2, inner, outer, D, D0, D1, DV, V0, BQ, BK, CAP, False)
        for n in tl.range(full, rest, BK):
            key = (n + tl.arange(0, BK)).to(tl.int64)
            ok = key < rest
            mask = ok[None, :] & row_ok[:, None]
            if CAUSAL:
                mask = mask & ((begin + key)[None, :] <= p[:, None])
            acc, m, l = step(acc, m, l, q0, q1, k, v, key, ok, mask, sks, svs, scale2, inner, outer, D, D0, D1, DV, V0, BQ, BK, CAP, True)
        factor, logs = finish(m, l, scale, scale2, lse, h, False)
        to = list_ * pairs + x
        tl.store(lse + to, logs, mask=row_ok)
        store(out, to * DV, row_ok, acc * factor[:, None], 0, V0, DV)


# ---------------------------------------------------------------------------------------------------------------- the host
def refusal(problem) -> str | None:
    """Why path blocks is not for this problem."""
    kind = problem.dtype("q")
    if kind not in ("float16", "bfloat16") or problem.dtype("k") == "latent_fp8":
        return f"path blocks takes queries and keys of 16 bits, not {kind} and {problem.dtype('k')}; take portable"
    if max(problem["D"], problem["Dv"]) > 128:
        return f"path blocks takes widths up to 128, not {problem['D']} and {problem['Dv']}; take portable"
    if problem.granularity < KEYS or problem["K"] > 64:
        return f"path blocks takes up to 64 entries of at least {KEYS} keys, not {problem['K']} of {problem.granularity}; take portable"
    if resources().shared > shared_limit(problem.arch):
        return f"path blocks: {resources().shared} bytes of shared memory, {problem.arch} has {shared_limit(problem.arch)}; take portable"
    return None


def lists_at_once(pairs: int, width: int, bins: int) -> int:
    """Key heads whose pairs' float32 rows SCRATCH holds, and whose counts, four arrays [bins, chunks] that are quadratic in the length; 0: not even one."""
    return min(GRID, SCRATCH // max(1, pairs * width * 4, 4 * bins * -(-pairs // CHUNK) * 4))


def pays(problem) -> bool:
    """Whether it is the first choice: heads with lists of their own, long blocks, whole tiles of pairs for each, and scratch for a key head."""
    if refusal(problem) is not None or "per_head" not in problem.features or problem.granularity < 2 * KEYS:
        return False
    pairs, bins = problem["Hq"] // problem["Hk"] * problem["T"] * problem["K"], -(-problem["S"] // problem.granularity)
    return pairs >= ROWS * bins and lists_at_once(pairs, max(problem["D"], problem["Dv"]), bins) > 0


def takes(q, k, v, indices, latent, granularity: int) -> bool:
    """The same for arrays: pairs that 32 bits can count, and scratch for a key head."""
    if latent is not None or indices.shape[3] > 64 or q.shape[1] * q.shape[2] * indices.shape[3] >= 2 ** 31:
        return False
    return lists_at_once(q.shape[1] // k.shape[1] * q.shape[2] * indices.shape[3], max(q.shape[3], v.shape[3]), -(-k.shape[2] // granularity)) > 0


def resources():
    return Resources(threads=256, shared=(ROWS + 2 * KEYS * 3) * 256)


def constants(D: int, DV: int, granularity: int, causal: bool, from_length: bool) -> dict:
    return dict(GRANULARITY=granularity, CAUSAL=causal, FROM_LENGTH=from_length), dict(zip(("D", "D0", "D1"), (D, *parts(D)))) | dict(DV=DV, V0=power(DV), BQ=ROWS, BK=KEYS)


def artifacts(problem) -> list[dict]:
    pointer, has = POINTER[problem.dtype("q")], problem.features.__contains__
    how, tile = constants(problem["D"], problem["Dv"], problem.granularity, has("causal"), has("kv_length") and not has("q_start"))
    tile = tile | how | dict(NEGATE=False, CAP=has("softcap"))
    arrays = dict.fromkeys(("indices", "lengths", "counts", "begins", "order"), "*i32") | {n: "*i32" for n, on in (("kv_length", has("kv_length")), ("q_starts", has("q_start"))) if on}
    arrays |= dict.fromkeys("qkv", pointer) | dict.fromkeys(("out", "lse"), "*fp32")
    found = []
    for fn, fixed, how_compiled in ((count_pairs, {**how, "CHUNK": CHUNK}, dict(num_warps=4)), (place_pairs, {**how, "CHUNK": CHUNK}, dict(num_warps=4)), (attend, tile, OPTIONS)):
        found.append(artifact(problem, fn, arrays, fixed, how_compiled))
    return found


def artifact(problem, fn, arrays: dict, fixed: dict, options: dict) -> dict:
    """Of a kernel that takes some of these arrays; positions that are not among them are not given."""
    names = [n for n in fn.arg_names if n not in fixed and not (n in ("kv_length", "q_starts") and n not in arrays)]
    signature = {n: arrays.get(n) or ("fp32" if n in ("scale", "inner", "outer") else "i32") for n in names}
    aligned = [n for n in names if n in arrays or n.startswith("s") and len(n) == 3 and problem["D"] % 16 == 0 and problem["Dv"] % 16 == 0]
    return dict(fn=fn, signature=signature, constexprs=fixed, options=options, div16=tuple(aligned))


def run(q, k, v, indices, out_kind, place, *, lengths, granularity, causal, scale, sink_logits, softcap, kv_length, q_start):
    from sparsetile.backends.triton import merge_attention
    (B, Hq, T, D), (Hk, S), DV, (G, K) = q.shape, k.shape[1:3], v.shape[3], indices.shape[1::2]
    group = Hq // Hk
    pairs = group * T * K
    most = lists_at_once(pairs, DV, -(-S // granularity))  # key heads at a time: of whole batches, or of one
    at_once = most // Hk * Hk or most
    outs, lses = [], []
    for first in ([*range(0, B * Hk, at_once)] if at_once >= Hk else [b * Hk + h for b in range(B) for h in range(0, Hk, at_once)]):
        lists = min(at_once, B * Hk - first if at_once >= Hk else Hk - first % Hk)
        part, logs = some(q, k, v, indices, lengths, kv_length, q_start, place, first, lists, granularity, causal, scale, softcap)
        shape = (lists // Hk, Hq, T, K) if at_once >= Hk else (1, lists * group, T, K)
        part, logs = part.view(*shape, DV), logs.view(shape)
        sinks = sink_logits if sink_logits is None or at_once >= Hk else sink_logits[first % Hk * group:(first % Hk + lists) * group]
        out, lse = merge_attention.run([part[..., n, :] for n in range(K)], [logs[..., n] for n in range(K)], place=place, config=dict(rows=8, num_warps=4), sink_logits=sinks, out_dtype=out_kind)
        outs.append(out), lses.append(lse)
    if len(outs) == 1:
        return outs[0], lses[0]
    import torch
    axis = int(at_once < Hk)
    return torch.cat(outs, axis).view(B, Hq, T, DV), torch.cat(lses, axis).view(B, Hq, T)


def sorted_pairs(given, sizes, lists, host, place, how):
    """order [lists, capacity]: pairs by entry, -1 after those of an entry; where each entry's begin, and how many they are [lists, bins]."""
    *_, S, _, pairs = sizes
    bins = -(-S // how["GRANULARITY"])
    chunks, capacity = -(-pairs // CHUNK), (bins + -(-pairs // ROWS)) * ROWS
    counts = place.zeros((lists, bins, chunks), "int32")
    count_pairs[(chunks, lists)](*given, counts, *sizes, bins, chunks, host, **how, CHUNK=CHUNK, num_warps=4)
    running = counts.cumsum(2, dtype=counts.dtype)
    rows = (running[:, :, -1:] + (ROWS - 1)) // ROWS * ROWS
    first = rows.cumsum(1, dtype=counts.dtype) - rows
    order = place.full((lists, capacity), "int32", -1)
    place_pairs[(chunks, lists)](*given, running - counts + first, order, *sizes, bins, chunks, capacity, host, **how, CHUNK=CHUNK, num_warps=4)
    return order, first[:, :, 0].contiguous(), running[:, :, -1].contiguous()


def some(q, k, v, indices, lengths, kv_length, q_start, place, first, lists, granularity, causal, scale, softcap):
    """The parts of the key heads first ... first + lists - 1 of all batches' key heads."""
    (B, Hq, T, D), (Hk, S), DV, (G, K) = q.shape, k.shape[1:3], v.shape[3], indices.shape[1::2]
    how, tile = constants(D, DV, granularity, causal, q_start is None)
    host, starts = known_start(q_start)
    pairs = Hq // Hk * T * K
    given, sizes = (indices, lengths, kv_length, starts), (first, Hq, Hk, G, T, S, K, pairs)
    order, _, _ = sorted_pairs(given, sizes, lists, host or 0, place, how)
    capacity = order.shape[1]
    out, lse = place.empty((lists, pairs, DV), "float32"), place.full((lists, pairs), "float32", float("-inf"))
    size, inner, outer, negate = scales(scale, softcap)
    attend[(capacity // ROWS, lists)](q, k, v, out, lse, order, *given, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *sizes, capacity, host or 0, size, inner, outer, **tile, **how,
                                      NEGATE=negate, CAP=softcap is not None, **OPTIONS)
    return out, lse
