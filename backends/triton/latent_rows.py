"""Selected rows of a latent cache in DeepSeek-V3.2's fp8 layout (latents.py) as 16-bit keys in the order of their lists, for kernels that read such keys only.

pool [B,1,S,bytes] uint8, indices [B,1,T,K] int32  ->  keys [B,1,T * K,R + P], found [B,1,T,K] int32: where an entry's key stands among its sequence's, -1 for holes, whose keys
are not written. Each list's keys are written and read once more: fine for few queries, not for many, whose lists share keys.
"""
import triton
import triton.language as tl

from sparsetile.backends.triton.latents import latent_tile, mode, rotary_tile
from sparsetile.backends.triton.tiles import place_of

MOST = 2 ** 29  # bytes of keys at a time
BLOCK = 16


@triton.jit(do_not_specialize=["T", "S", "K", "q_start"])
def latent_rows(pool, keys, found, indices, lengths, kv_length, q_starts, spb, sps, T, S, K, q_start, R: tl.constexpr, P: tl.constexpr, LATENT: tl.constexpr, CAUSAL: tl.constexpr,
                FROM_LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK entries of one list."""
    line = tl.program_id(0).to(tl.int64)
    b, t = line // T, line % T
    limit, start = place_of(b, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    count = K
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + line), 0), K)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(indices + line * K + place, mask=place < count, other=-1)
    ok = (entry >= 0) & (entry < limit)
    if CAUSAL:
        ok = ok & (entry <= start + t)
    tl.store(found + line * K + place, tl.where(ok, t * K + place, -1).to(tl.int32), mask=place < K)
    rows = tl.where(ok, entry, 0).to(tl.int64) * sps
    to = keys + (line * K + place)[:, None] * (R + P)
    tl.store(to + tl.arange(0, R)[None, :], latent_tile(pool + b * spb, rows, ok, R, keys.dtype.element_ty, LATENT), mask=ok[:, None])
    tl.store(to + R + tl.arange(0, P)[None, :], rotary_tile(pool + b * spb, rows, ok, R, P, P, keys.dtype.element_ty), mask=ok[:, None])


def constants(R: int, P: int, causal: bool, from_length: bool, arch: str) -> dict:
    return dict(R=R, P=P, LATENT=mode((R, P), arch), CAUSAL=causal, FROM_LENGTH=from_length, BLOCK=BLOCK)


def sequences(T: int, K: int, width: int) -> int:
    """Of how many sequences the keys are made at a time; 0: those of one are too many."""
    return MOST // max(2 * T * K * width, 1)


def launch(pool, indices, kind, place, *, lengths, causal, kv_length, q_start, latent):
    """(keys, found) of all lists of the call."""
    (B, _, T, K), S = indices.shape, pool.shape[2]
    keys, found = place.empty((B, 1, T * K, sum(latent)), kind), place.empty((B, 1, T, K), "int32")
    host = q_start if isinstance(q_start, int) else None
    latent_rows[(B * T, triton.cdiv(K, BLOCK))](pool, keys, found, indices, lengths, kv_length, None if q_start is None or host is not None else q_start, pool.stride(0), pool.stride(2), T, S, K,
                                                host or 0, **constants(*latent, bool(causal), q_start is None, place.arch), num_warps=4)
    return keys, found


def artifacts(problem) -> list[dict]:
    has, kind = problem.features.__contains__, {"float16": "*fp16", "bfloat16": "*bf16"}[problem.dtype("q")]
    names = ["found", "indices", "lengths"] + ["kv_length"] * has("kv_length") + ["q_starts"] * has("q_start")
    signature = dict(pool="*u8", keys=kind) | dict.fromkeys(names, "*i32") | dict.fromkeys(("spb", "sps", "T", "S", "K", "q_start"), "i32")
    made = constants(problem["Dv"], problem["D"] - problem["Dv"], has("causal"), has("kv_length") and not has("q_start"), problem.arch)
    return [dict(fn=latent_rows, signature=signature, constexprs=made, options={"num_warps": 4}, div16=("pool", "keys", *names, "spb", "sps"))]
