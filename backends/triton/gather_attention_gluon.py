"""Attention over selected keys for Hopper in Gluon, for keys of width 576 whose first 512 columns are the values (DeepSeek's latent), float16 and bfloat16:
the roles of latent_gluon.py, where `gather` brings the keys of a list. Holes of the list are zeros in a tile, nothing is read for them.
"""
from functools import lru_cache

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sparsetile.backends.triton import latent_gluon, relaunch
from sparsetile.backends.triton.gluon_items import limit_of
from sparsetile.backends.triton.latent_gluon import (HALF, HEADS, KEYS, LATENT, PIECE, STAGES, add_values, after, copy_keys, copy_query, give_last, make_memory,
                                                     score, store, store_through, take_last)
from sparsetile.backends.triton.latents import latent_of
from sparsetile.backends.triton.launch import POINTER, known_start
from sparsetile.backends.triton.tiles import finish


@gluon.jit
def item_of(number, sizes, lengths, HEADS: gl.constexpr):
    """(batch, query, first head, line of its list, how many entries)."""
    Hq, parts, T, S, K = sizes
    y = number // parts
    b = y // T
    t = y - b * T
    count = K
    if lengths is not None:
        count = gl.minimum(gl.maximum(gl.load(lengths + y), 0), K)
    return b, t, (number - y * parts) * HEADS, y.to(gl.int64) * K, count


@gluon.jit
def gather(q, k, indices, lengths, at, sizes, strides, items, CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr, queries, memory):
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    Hq, parts, T, S, K = sizes
    sqb, sqh, sqt, skb, sks = strides
    latents, rotary, found, full, free = memory
    r = gl.arange(0, KEYS, gl.SliceLayout(1, B))
    slot = 0
    phase = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, line, count = item_of(items - 1 - it, sizes, lengths, HEADS)  # late queries have long rows: first
        if count > 0:
            limit = limit_of(b, t, at, T, S, CAUSAL, FROM_LENGTH)
            slot, phase = copy_query(q + b.to(gl.int64) * sqb + t.to(gl.int64) * sqt, head, Hq, sqh, slot, phase, j, queries, memory, B)
            j += 1
            keys = k + b.to(gl.int64) * skb
            entry = gl.load(indices + line + r, mask=r < count, other=-1)
            for first in range(0, count, KEYS):
                ok = (entry >= 0) & (entry < limit)
                rows = keys + gl.where(ok, entry, 0).to(gl.int64) * sks
                entry = gl.load(indices + line + first + KEYS + r, mask=first + KEYS + r < count, other=-1)  # asked for a tile ahead
                mbarrier.wait(free.index(slot), phase ^ 1)
                copy_keys(slot, rows, ok, memory, B)
                slot, phase = after(slot, phase, STAGES)


@gluon.jit
def probabilities(q, lse, lengths, sinks, sizes, strides, items, scale, queries, keys, weights, end):
    Hq, parts, T, S, K = sizes
    sqb, sqh, sqt, skb, sks = strides
    slot = 0
    phase = 0
    j = 0
    turn = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, line, count = item_of(items - 1 - it, sizes, lengths, HEADS)
        tiles = (count + KEYS - 1) // KEYS
        m, l, unit, slot, phase = score(scale * 1.4426950408889634, tiles, slot, phase, j, queries, keys, weights)
        r = gl.arange(0, HEADS, m.type.layout)
        h = head + gl.where(r < Hq - head, r, 0)
        factor, logs = finish(m, l, scale, scale * 1.4426950408889634, sinks, h, sinks is not None)
        if lse is not None:
            gl.store(lse + (b.to(gl.int64) * Hq + h) * T + t, logs, mask=r < Hq - head)
        give_last(factor * unit, turn, end)
        j += (tiles > 0).to(gl.int32)
        turn += 1


@gluon.jit
def values(W: gl.constexpr, out, lengths, sizes, items, keys, weights, end):
    Hq, parts, T, S, K = sizes
    slot = 0
    phase = 0
    turn = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, line, count = item_of(items - 1 - it, sizes, lengths, HEADS)
        x, y, last, slot, phase = add_values(W, (count + KEYS - 1) // KEYS, slot, phase, keys, weights)
        factor = gl.expand_dims(take_last(turn, end, gl.SliceLayout(1, x.type.layout)), 1)
        to = out + (b.to(gl.int64) * Hq * T + t) * LATENT
        if count > 0:
            store_through(W, x * factor, y * factor, last, keys, to, head, T, Hq)
        else:
            store(x, to, head, T, Hq, HALF * W)
            store(y, to, head, T, Hq, HALF * W + PIECE)
        turn += 1


@gluon.jit(do_not_specialize=["Hq", "parts", "T", "S", "K", "items", "q_start"])
def gather_gluon(q, k, out, lse, indices, lengths, kv_length, q_starts, sinks, sqb, sqh, sqt, skb, sks, Hq, parts, T, S, K, items, q_start, scale,
                 CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr):
    queries, keys, weights, end = make_memory(q.dtype.element_ty, STAGES)
    sizes = (Hq, parts, T, S, K)
    strides = (sqb, sqh, sqt, skb, sks)
    gl.warp_specialize([
        (values, (0, out, lengths, sizes, items, keys, weights, end)),
        (values, (1, out, lengths, sizes, items, keys, weights, end)),
        (probabilities, (q, lse, lengths, sinks, sizes, strides, items, scale, queries, keys, weights, end)),
        (gather, (q, k, indices, lengths, (q_start, q_starts, kv_length), sizes, strides, items, CAUSAL, FROM_LENGTH, queries, keys)),
    ], [4, 4, 4], [160, 160, 32])


# ---------------------------------------------------------------------------------------------------------------- the host
def takes(q, k, v, indices, granularity: int, scale: float, softcap, kind: str) -> bool:
    """Whether this call is one for `gather_gluon`: one list for all heads, of tokens, and what latent_gluon.fits asks for."""
    return (indices.shape[1], granularity) == (1, 1) and latent_gluon.fits(q, k, v, scale, softcap, kind)


@lru_cache
def constants(causal: bool, from_length: bool, heads: int) -> relaunch.Constants:
    return relaunch.Constants(CAUSAL=causal, FROM_LENGTH=from_length, **({} if heads == HEADS.value else dict(HEADS=heads)), num_warps=4, enable_fp_fusion=False)


def launch(kernel, heads: int, q, k, indices, out, lse, place, *, lengths, causal, scale, sink_logits, kv_length, q_start):
    """Fills out [B,Hq,T,512] and lse [B,Hq,T] (or None). kernel: gather_gluon, that over bytes (gather_bytes_gluon.py), that of few heads (gather_tokens_gluon.py); heads: how many it takes at a time."""
    (B, Hq, T, _), S, K = q.shape, k.shape[2], indices.shape[3]
    parts, (host, starts) = -(-Hq // heads), known_start(q_start)
    items = B * T * parts
    pointers = (q, k, out, lse, indices, lengths, kv_length, starts, sink_logits)
    numbers = (*q.stride()[:3], k.stride(0), k.stride(2), Hq, parts, T, S, K, items, host or 0, float(scale))
    relaunch.launch(kernel, (min(items, max(place.sms, 1)),), place, pointers, numbers, constants(bool(causal), q_start is None, heads), (q.dtype,))


def artifacts(kernel, heads: int, problem) -> list[dict]:
    has, pointer = problem.features.__contains__, POINTER[problem.dtype("q")]
    names, strides = ["indices", "lengths"] + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start"), ("sqb", "sqh", "sqt", "skb", "sks")
    pointers = dict(q=pointer, k="*u8" if latent_of(problem) else pointer, out=pointer, lse="*fp32") | dict.fromkeys(names, "*i32") | ({"sinks": "*fp32"} if has("sink") else {})
    made = constants(has("causal"), has("kv_length") and not has("q_start"), heads)
    return [relaunch.artifact(kernel, made, pointers, (*strides, "Hq", "parts", "T", "S", "K", "items", "q_start"), ("scale",), aligned=strides)]
