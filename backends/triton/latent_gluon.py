"""Attention with a latent 576 wide whose first 512 columns are the values (DeepSeek's), for Hopper in Gluon, float16 and bfloat16: what the kernels over selections
(gather_attention_gluon.py) and over block lists (block_attention_latent.py) share. They differ in who brings a tile's 64 keys.

A persistent block of threads takes one query and up to 64 heads that share its keys at a time. A group of warps brings the query, then tiles of 64 keys into two
slots; keys that nobody sees are zeros there. Two groups make the same scores each, for their own 256 value columns: half as much again is multiplied as would have
to be, but probabilities never leave registers, the groups never wait for each other, and the exponentials of one run beside the products of the other.
Scores and sums are rounded as in the portable source (tiles.py), hence as in the backward.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton.tiles import finish, soften

HEADS = gl.constexpr(64)
KEYS = gl.constexpr(64)
HALF = gl.constexpr(256)  # of the values
ROTARY = gl.constexpr(64)
STAGES = gl.constexpr(2)
COPIERS = gl.constexpr(128)  # threads of the group that brings tiles, each of which arrives


@gluon.jit
def make_memory(kind: gl.constexpr):
    """Tiles of the query and of keys, which of a tile's keys are seen, and the barriers that say that a tile is full and that it is free."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = (gl.allocate_shared_memory(kind, [1, HEADS, HALF], tile), gl.allocate_shared_memory(kind, [1, HEADS, HALF], tile),
               gl.allocate_shared_memory(kind, [1, HEADS, ROTARY], tile))
    k_tiles = (gl.allocate_shared_memory(kind, [STAGES, KEYS, HALF], tile), gl.allocate_shared_memory(kind, [STAGES, KEYS, HALF], tile),
               gl.allocate_shared_memory(kind, [STAGES, KEYS, ROTARY], tile))
    found = gl.allocate_shared_memory(gl.int32, [STAGES, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], B)
    q_free = gl.allocate_shared_memory(gl.int64, [1, 1], B)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    mbarrier.init(q_full.index(0), count=COPIERS)
    mbarrier.init(q_free.index(0), count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=COPIERS + 1)
        mbarrier.init(free.index(s), count=2)
    fence_async_shared()
    return q_tiles, k_tiles, found, (q_full, q_free), (full, free)


@gluon.jit
def copy_rows(tiles, s, rows, ok, B: gl.constexpr):
    """Rows of 576 columns, where `rows` points, into slot s: zeros where not ok."""
    for n in gl.static_range(3):
        c = n * HALF + gl.arange(0, tiles[n].shape[2], gl.SliceLayout(0, B))
        async_copy.async_copy_global_to_shared(tiles[n].index(s), gl.expand_dims(rows, 1) + gl.expand_dims(c, 0), mask=gl.expand_dims(ok, 1), cache_modifier=".cg")


@gluon.jit
def copy_query(q, head, Hq, sqh, j, q_tiles, q_bars, B: gl.constexpr):
    """Heads head .. of the query where `q` points, the j-th of this block of threads: zeros past the last."""
    q_full, q_free = q_bars
    h = gl.arange(0, HEADS, gl.SliceLayout(1, B))
    exists = h < Hq - head
    mbarrier.wait(q_free.index(0), (j & 1) ^ 1)
    copy_rows(q_tiles, 0, q + (head + gl.where(exists, h, 0)).to(gl.int64) * sqh, exists, B)
    async_copy.mbarrier_arrive(q_full.index(0), increment_count=False)


@gluon.jit
def attend(W: gl.constexpr, count, n, j, scale2, memory):
    """`count` tiles, from tile n of this block of threads on, with its query j: (sums of value columns 256 W .., maximum and sum of each row). A group of warps."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    R: gl.constexpr = gl.SliceLayout(1, L)
    q_tiles, k_tiles, found, q_bars, k_bars = memory
    q_full, q_free = q_bars
    full, free = k_bars
    m = gl.full([HEADS], float("-inf"), gl.float32, R)
    l = gl.zeros([HEADS], gl.float32, R)
    acc = gl.zeros([HEADS, HALF], gl.float32, O)
    zero = gl.zeros([HEADS, KEYS], gl.float32, L)
    if count > 0:
        mbarrier.wait(q_full.index(0), j & 1)
    for i in range(count):
        s = (n + i) % STAGES
        mbarrier.wait(full.index(s), ((n + i) // STAGES) & 1)
        fence_async_shared()  # copies of threads, read by products
        st = warpgroup_mma(q_tiles[0].index(0), k_tiles[0].index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
        st = warpgroup_mma(q_tiles[1].index(0), k_tiles[1].index(s).permute((1, 0)), st, is_async=True)
        st = warpgroup_mma(q_tiles[2].index(0), k_tiles[2].index(s).permute((1, 0)), st, is_async=True)
        ok = found.index(s).load(gl.SliceLayout(0, L))
        x = warpgroup_mma_wait(0, deps=(st, ))
        mbarrier.arrive(q_free.index(0), pred=i + 1 == count)
        x = gl.where(gl.expand_dims(ok, 0) != 0, x, float("-inf"))
        p, f, m, l = soften(x, m, l, scale2, True)
        acc = acc * gl.expand_dims(gl.convert_layout(f, gl.SliceLayout(1, O)), 1)
        ot = warpgroup_mma(gl.convert_layout(p.to(k_tiles[W].dtype), P), k_tiles[W].index(s), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(ot, ))
        mbarrier.arrive(free.index(s))
    return acc, m, l


@gluon.jit
def store(W: gl.constexpr, acc, m, l, out, lse, sinks, line, step, head, Hq, scale):
    """An item's answer: head h of out and lse at line + h * step."""
    O: gl.constexpr = acc.type.layout
    r = gl.arange(0, HEADS, m.type.layout)
    h = head + gl.where(r < Hq - head, r, 0)
    factor, logs = finish(m, l, scale, scale * 1.4426950408889634, sinks, h, sinks is not None)
    if lse is not None:
        if W == 0:
            gl.store(lse + line + h.to(gl.int64) * step, logs, mask=r < Hq - head)
    y = (acc * gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, O)), 1)).to(out.dtype.element_ty)
    row = gl.arange(0, HEADS, gl.SliceLayout(1, O))
    at = out + (line + (head + row).to(gl.int64) * step) * (2 * HALF) + W * HALF
    gl.store(gl.expand_dims(at, 1) + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, O)), 0), y, mask=gl.expand_dims(row < Hq - head, 1))


# ---------------------------------------------------------------------------------------------------------------- the host
def fits(q, k, v, scale: float, softcap, kind: str) -> bool:
    """One key head of the latent's widths, a positive scale, no cap, an answer of q's type, rows that 16-byte copies can read."""
    shared = k.data_ptr() == v.data_ptr() and k.stride()[:3] == v.stride()[:3]
    ours = (q.shape[3], v.shape[3], k.shape[1]) == (576, 512, 1) and softcap is None and 1e-30 < scale < 1e38 and kind == str(q.dtype)[6:]
    return ours and shared and not any(x.data_ptr() % 16 or any(s % 16 for s in x.stride()[:3]) for x in (q, k))


def resources() -> Resources:
    slots, row = 1 + STAGES.value, 2 * (2 * HALF.value + ROTARY.value)
    return Resources(threads=384, shared=slots * KEYS.value * row + 4 * STAGES.value * KEYS.value + 512, registers=168)
