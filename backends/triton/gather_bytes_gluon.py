"""Attention over selected rows of a latent cache in DeepSeek-V3.2's fp8 layout (latents.py) for Hopper in Gluon: the roles of latent_gluon.py, where `gather_bytes` asks
for a tile's rows two tiles ahead and makes elements of them. Holes of the list are zeros in a tile, nothing is read for them.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import latent_gluon
from sparsetile.backends.triton.gather_attention_gluon import item_of, probabilities, values
from sparsetile.backends.triton.gluon_items import limit_of
from sparsetile.backends.triton.latent_gluon import ARRIVALS, HEADS, KEYS, LATENT, ROTARY, after, copy_query, make_memory

STAGES = gl.constexpr(4)
COMING = gl.constexpr(2)  # tiles whose bytes are on their way
CHUNK = gl.constexpr(64)  # bytes of a row that four threads convert together: eight chunks of float8 values, behind which stand four scales, and two of rotary columns


@gluon.jit
def ask(keys, entry, ok, sks, n, bytes_):
    """The bytes of tile n: rows of `keys`, zeros where not ok."""
    codes, rotary, scales = bytes_
    s = n % COMING
    A: gl.constexpr = ok.type.layout.parent.parent  # [chunk, key, byte]
    L: gl.constexpr = gl.SliceLayout(0, A)
    rows = gl.expand_dims(keys + gl.where(ok, entry, 0).to(gl.int64) * sks, 1)
    there = gl.expand_dims(ok, 1)
    chunk = rows + gl.expand_dims(gl.arange(0, CHUNK, gl.SliceLayout(0, L)), 0)
    _copy_chunks(codes.index(s), chunk, there, 8, A)
    _copy_chunks(rotary.index(s), chunk + (LATENT + 16), there, 2, A)
    async_copy.async_copy_global_to_shared(scales.index(s), rows + (LATENT + gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, L)), 0)), mask=there, cache_modifier=".cg")
    async_copy.commit_group()


@gluon.jit
def _copy_chunks(to, chunk, there, N: gl.constexpr, A: gl.constexpr):
    """N chunks at once: between two copies into one piece of memory the compiler puts a bar.sync."""
    which = gl.expand_dims(gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, gl.SliceLayout(2, A))), 1), 2)
    async_copy.async_copy_global_to_shared(to, gl.expand_dims(chunk, 0) + which * CHUNK, mask=gl.expand_dims(there, 0), cache_modifier=".cg")


@gluon.jit
def convert(latents, elements, slot, n, bytes_):
    """Elements of tile n into a slot of the ring."""
    B: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0])
    E: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    codes, rotary, scales = bytes_
    kind: gl.constexpr = latents.dtype
    s = n % COMING
    four = scales.index(s)._reinterpret(gl.float32, [KEYS, 4], flat)
    values_, columns = codes.index(s)._reinterpret(gl.uint8, [8 * KEYS, CHUNK], flat), rotary.index(s)._reinterpret(gl.bfloat16, [2 * KEYS, CHUNK // 2], flat)
    for c in gl.static_range(8):
        x = values_.slice(KEYS * c, KEYS).load(B).to(gl.float8e4nv, bitcast=True).to(gl.float32) * four.slice(c // 2, 1, dim=1).load(B)
        latents.index(slot).slice(c * CHUNK, CHUNK, dim=1).store(x.to(kind))
    for c in gl.static_range(2):
        x = columns.slice(KEYS * c, KEYS).load(E)
        elements.index(slot).slice(c * (CHUNK // 2), CHUNK // 2, dim=1).store(x.to(gl.float32).to(kind))


@gluon.jit
def gather_bytes(q, k, indices, lengths, at, sizes, strides, items, CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr, queries, memory, bytes_):
    Q: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    A: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 8, 4], [1, 4, 1], [2, 1, 0])  # a thread has one row of a tile
    Hq, parts, T, S, K = sizes
    sqb, sqh, sqt, skb, sks = strides
    latents, elements, found, full, free = memory
    r = gl.arange(0, KEYS, gl.SliceLayout(1, gl.SliceLayout(0, A)))
    slot = 0
    phase = 0
    n = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, line, count = item_of(items - 1 - it, sizes, lengths, HEADS)  # late queries have long rows: first
        if count > 0:
            limit = limit_of(b, t, at, T, S, CAUSAL, FROM_LENGTH)
            keys = k + b.to(gl.int64) * skb
            row = indices + line
            entry = gl.load(row + r, mask=r < count, other=-1)
            ok = (entry >= 0) & (entry < limit)
            ask(keys, entry, ok, sks, n, bytes_)
            entry = gl.load(row + KEYS + r, mask=KEYS + r < count, other=-1)
            ok1 = (entry >= 0) & (entry < limit)
            ask(keys, entry, ok1, sks, n + 1, bytes_)
            entry = gl.load(row + 2 * KEYS + r, mask=2 * KEYS + r < count, other=-1)
            slot, phase = copy_query(q + b.to(gl.int64) * sqb + t.to(gl.int64) * sqt, head, Hq, sqh, slot, phase, j, queries, memory, Q)
            j += 1
            for first in range(0, count, KEYS):
                async_copy.wait_group(1)
                mbarrier.wait(free.index(slot), phase ^ 1)
                convert(latents, elements, slot, n, bytes_)
                found.index(slot).store(ok.to(gl.int8))
                fence_async_shared()
                mbarrier.arrive(full.index(slot), count=ARRIVALS)  # no copies of threads to wait for
                slot, phase = after(slot, phase, STAGES)
                ok = ok1
                ok1 = (entry >= 0) & (entry < limit)
                ask(keys, entry, ok1, sks, n + 2, bytes_)
                entry = gl.load(row + first + 3 * KEYS + r, mask=first + 3 * KEYS + r < count, other=-1)  # a tile ahead
                n += 1
            async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["Hq", "parts", "T", "S", "K", "items", "q_start"])
def gather_bytes_gluon(q, k, out, lse, indices, lengths, kv_length, q_starts, sinks, sqb, sqh, sqt, skb, sks, Hq, parts, T, S, K, items, q_start, scale,
                       CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr):
    chunks: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    queries, keys, weights, end = make_memory(q.dtype.element_ty, STAGES)
    bytes_ = (gl.allocate_shared_memory(gl.uint8, [COMING, 8, KEYS, CHUNK], chunks), gl.allocate_shared_memory(gl.uint8, [COMING, 2, KEYS, CHUNK], chunks),
              gl.allocate_shared_memory(gl.uint8, [COMING, KEYS, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])))
    sizes = (Hq, parts, T, S, K)
    strides = (sqb, sqh, sqt, skb, sks)
    gl.warp_specialize([
        (values, (0, out, lengths, sizes, items, keys, weights, end)),
        (values, (1, out, lengths, sizes, items, keys, weights, end)),
        (probabilities, (q, lse, lengths, sinks, sizes, strides, items, scale, queries, keys, weights, end)),
        (gather_bytes, (q, k, indices, lengths, (q_start, q_starts, kv_length), sizes, strides, items, CAUSAL, FROM_LENGTH, queries, keys, bytes_)),
    ], [4, 4, 4], [160, 144, 48])


# ---------------------------------------------------------------------------------------------------------------- the host
def takes(q, k, indices, granularity: int, scale: float, softcap, kind: str, latent) -> bool:
    """Whether this call is one for `gather_bytes_gluon`: one list for all heads, of tokens, rows of DeepSeek's widths that 16-byte copies can read, q's type."""
    ours = (latent, k.shape[1], indices.shape[1], granularity) == ((LATENT.value, ROTARY.value), 1, 1, 1) and softcap is None and kind == str(q.dtype)[6:]
    return ours and 1e-30 < scale < 1e38 and not any(x.data_ptr() % 16 or any(s % 16 for s in x.stride()[:3]) for x in (q, k))


def resources() -> Resources:
    return latent_gluon.resources(STAGES.value, COMING.value * KEYS.value * (LATENT.value + 16 + 2 * ROTARY.value))
