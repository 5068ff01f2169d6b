"""Attention with a latent 576 wide whose first 512 columns are the values (DeepSeek's), for Hopper in Gluon, float16 and bfloat16: what the kernels over selections
(gather_attention_gluon.py) and over block lists (block_attention_latent.py) share. They differ in who brings a tile's 32 keys.

A persistent block of threads takes one query and up to 64 heads that share its keys at a time, in four groups of warps: one brings tiles into a ring, `score` makes
scores and probabilities with 384 columns of the query in registers, two `gather_values` hold 256 value columns each. While values of one tile are multiplied, the
probabilities of the next are made. Keys that nobody sees are zeros in a tile and -inf in the scores. Scores and sums are rounded as in the portable source (tiles.py), hence as in the backward.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton.tiles import finish, soften

HEADS = gl.constexpr(64)
KEYS = gl.constexpr(32)
PIECE = gl.constexpr(128)  # columns of a piece of the latent, of which there are four; a fifth are the rotary columns
ROTARY = gl.constexpr(64)
HELD = gl.constexpr(3)  # pieces of the query in registers
STAGES = gl.constexpr(5)
COPIERS = gl.constexpr(128)  # threads of the group that brings tiles
ARRIVALS = gl.constexpr(129)  # each of them with its copies, and which keys are seen


@gluon.jit
def make_memory(kind: gl.constexpr, STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """Pieces of the query and of keys, probabilities, which of a tile's keys are seen, what sums are multiplied by before a tile and at the end, barriers: a tile is there after
    ARRIVALS of the threads that bring it."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = (gl.allocate_shared_memory(kind, [1, HEADS, PIECE], tile), gl.allocate_shared_memory(kind, [1, HEADS, ROTARY], tile))
    k_tiles = (gl.allocate_shared_memory(kind, [STAGES, KEYS, PIECE], tile), gl.allocate_shared_memory(kind, [STAGES, KEYS, PIECE], tile),
               gl.allocate_shared_memory(kind, [STAGES, KEYS, PIECE], tile), gl.allocate_shared_memory(kind, [STAGES, KEYS, PIECE], tile),
               gl.allocate_shared_memory(kind, [STAGES, KEYS, ROTARY], tile))
    p_tiles = gl.allocate_shared_memory(kind, [STAGES, HEADS, KEYS], gl.NVMMASharedLayout(64, 16, 2))
    found = gl.allocate_shared_memory(gl.int8, [STAGES, KEYS], flat)
    factors = gl.allocate_shared_memory(gl.float32, [STAGES, HEADS], flat)
    last = gl.allocate_shared_memory(gl.float32, [1, HEADS], flat)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], B)  # full, free
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    last_bars = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    mbarrier.init(q_bars.index(0), count=COPIERS)
    mbarrier.init(q_bars.index(1), count=1)
    mbarrier.init(last_bars.index(0), count=1)
    mbarrier.init(last_bars.index(1), count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=ARRIVALS)
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=2)
    fence_async_shared()
    return (q_tiles, q_bars), (k_tiles, found, full, free), (p_tiles, factors, ready), (last, last_bars)


@gluon.jit
def copy_rows(tiles, s, rows, ok, FIRST: gl.constexpr, B: gl.constexpr):
    """Rows, where `rows` points, from piece FIRST on into slot s: zeros where not ok."""
    for n in gl.static_range(5 - FIRST):
        c = (FIRST + n) * PIECE + gl.arange(0, tiles[n].shape[2], gl.SliceLayout(0, B))
        async_copy.async_copy_global_to_shared(tiles[n].index(s), gl.expand_dims(rows, 1) + gl.expand_dims(c, 0), mask=gl.expand_dims(ok, 1), cache_modifier=".cg")


@gluon.jit
def copy_query(q, head, Hq, sqh, j, queries, B: gl.constexpr):
    """What `score` does not hold of heads head .. of the query where `q` points, the j-th of this block of threads: zeros past the last."""
    q_tiles, q_bars = queries
    h = gl.arange(0, HEADS, gl.SliceLayout(1, B))
    exists = h < Hq - head
    mbarrier.wait(q_bars.index(1), (j & 1) ^ 1)
    copy_rows(q_tiles, 0, q + (head + gl.where(exists, h, 0)).to(gl.int64) * sqh, exists, HELD, B)
    async_copy.mbarrier_arrive(q_bars.index(0), increment_count=False)


@gluon.jit
def load_piece(q, head, Hq, sqh, n: gl.constexpr, A: gl.constexpr):
    h = gl.arange(0, HEADS, gl.SliceLayout(1, A))
    c = n * PIECE + gl.arange(0, PIECE, gl.SliceLayout(0, A))
    exists = h < Hq - head
    rows = q + (head + gl.where(exists, h, 0)).to(gl.int64) * sqh
    return gl.load(gl.expand_dims(rows, 1) + gl.expand_dims(c, 0), mask=gl.expand_dims(exists, 1), other=0.0)


@gluon.jit
def products(q0, q1, q2, q_tiles, n, k_tiles, full, L: gl.constexpr):
    """Scores of tile n, on their way."""
    STAGES: gl.constexpr = k_tiles[0].shape[0]
    s = n % STAGES
    zero = gl.zeros([HEADS, KEYS], gl.float32, L)
    mbarrier.wait(full.index(s), (n // STAGES) & 1)
    fence_async_shared()  # copies of threads, read by products
    x = warpgroup_mma(q0, k_tiles[0].index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    x = warpgroup_mma(q1, k_tiles[1].index(s).permute((1, 0)), x, is_async=True)
    x = warpgroup_mma(q2, k_tiles[2].index(s).permute((1, 0)), x, is_async=True)
    x = warpgroup_mma(q_tiles[0].index(0), k_tiles[3].index(s).permute((1, 0)), x, is_async=True)
    return warpgroup_mma(q_tiles[1].index(0), k_tiles[4].index(s).permute((1, 0)), x, is_async=True)


@gluon.jit
def weigh(x, n, m, l, scale2, found, weights):
    """Scores of tile n become probabilities for `add_values`."""
    p_tiles, factors, ready = weights
    s = n % p_tiles.shape[0]
    ok = found.index(s).load(gl.SliceLayout(0, x.type.layout))
    p, f, m, l = soften(gl.where(gl.expand_dims(ok, 0) != 0, x, float("-inf")), m, l, scale2, True)
    p_tiles.index(s).store(p.to(p_tiles.dtype))
    factors.index(s).store(f)
    fence_async_shared()
    mbarrier.arrive(ready.index(s))
    return m, l


@gluon.jit
def score(q, head, Hq, sqh, count, n, j, scale2, queries, keys, weights):
    """Probabilities of `count` tiles, from tile n of this block of threads on, for its query j where `q` points: maximum and sum of each row."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    R: gl.constexpr = gl.SliceLayout(1, L)
    q_tiles, q_bars = queries
    k_tiles, found, full, free = keys
    m = gl.full([HEADS], float("-inf"), gl.float32, R)
    l = gl.zeros([HEADS], gl.float32, R)
    q0 = load_piece(q, head, Hq, sqh, 0, A)
    q1 = load_piece(q, head, Hq, sqh, 1, A)
    q2 = load_piece(q, head, Hq, sqh, 2, A)
    if count > 0:
        mbarrier.wait(q_bars.index(0), j & 1)
        x = warpgroup_mma_wait(0, deps=(products(q0, q1, q2, q_tiles, n, k_tiles, full, L), ))
        for i in range(n, n + count - 1):
            following = products(q0, q1, q2, q_tiles, i + 1, k_tiles, full, L)
            m, l = weigh(x, i, m, l, scale2, found, weights)
            x = warpgroup_mma_wait(0, deps=(following, ))
        mbarrier.arrive(q_bars.index(1))
        m, l = weigh(x, n + count - 1, m, l, scale2, found, weights)
    return m, l


@gluon.jit
def add_values(W: gl.constexpr, count, n, keys, weights):
    """Sums of value columns 256 W .. over `count` tiles, from tile n of this block of threads on, as two halves."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    k_tiles, found, full, free = keys
    p_tiles, factors, ready = weights
    STAGES: gl.constexpr = p_tiles.shape[0]
    a = gl.zeros([HEADS, PIECE], gl.float32, O)
    b = gl.zeros([HEADS, PIECE], gl.float32, O)
    for i in range(count):
        s = (n + i) % STAGES
        mbarrier.wait(ready.index(s), ((n + i) // STAGES) & 1)
        f = gl.expand_dims(factors.index(s).load(gl.SliceLayout(1, O)), 1)
        a = a * f
        b = b * f
        a = warpgroup_mma(p_tiles.index(s), k_tiles[2 * W].index(s), a, is_async=True)
        b = warpgroup_mma(p_tiles.index(s), k_tiles[2 * W + 1].index(s), b, is_async=True)
        a, b = warpgroup_mma_wait(0, deps=(a, b))
        mbarrier.arrive(free.index(s))
    return a, b


@gluon.jit
def give_last(factor, turn, end):
    """From `score`: what sums of this block's item `turn` are multiplied by."""
    last, last_bars = end
    mbarrier.wait(last_bars.index(1), (turn & 1) ^ 1)
    last.index(0).store(factor)
    mbarrier.arrive(last_bars.index(0))


@gluon.jit
def take_last(turn, end, layout: gl.constexpr):
    last, last_bars = end
    mbarrier.wait(last_bars.index(0), turn & 1)
    factor = last.index(0).load(layout)
    mbarrier.arrive(last_bars.index(1))
    return factor


@gluon.jit
def store(sums, to, head, step, Hq, FIRST: gl.constexpr):
    """[64, 128] for heads head .. and value columns FIRST .., where head h of 512 columns stands at to + 512 h step."""
    O: gl.constexpr = sums.type.layout
    row = gl.arange(0, HEADS, gl.SliceLayout(1, O))
    at = to + (head + row).to(gl.int64) * step * (4 * PIECE) + FIRST
    gl.store(gl.expand_dims(at, 1) + gl.expand_dims(gl.arange(0, PIECE, gl.SliceLayout(0, O)), 0), sums.to(to.dtype.element_ty), mask=gl.expand_dims(row < Hq - head, 1))


# ---------------------------------------------------------------------------------------------------------------- the host
def fits(q, k, v, scale: float, softcap, kind: str) -> bool:
    """One key head of the latent's widths, a positive scale, no cap, an answer of q's type, rows that 16-byte copies can read."""
    shared = k.data_ptr() == v.data_ptr() and k.stride()[:3] == v.stride()[:3]
    ours = (q.shape[3], v.shape[3], k.shape[1]) == (576, 512, 1) and softcap is None and 1e-30 < scale < 1e38 and kind == str(q.dtype)[6:]
    return ours and shared and not any(x.data_ptr() % 16 or any(s % 16 for s in x.stride()[:3]) for x in (q, k))


def resources(stages: int = STAGES.value, more: int = 0) -> Resources:
    """`more` bytes beside the query, the tiles, their masks and factors; a few for barriers and for what the groups of warps are told."""
    held, tile = 2 * HEADS.value * ((4 - HELD.value) * PIECE.value + ROTARY.value), 2 * KEYS.value * (4 * PIECE.value + ROTARY.value) + 2 * HEADS.value * KEYS.value
    return Resources(threads=512, shared=held + stages * (tile + KEYS.value + 4 * HEADS.value) + more + 880, registers=128)
