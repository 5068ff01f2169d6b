"""Attention with a latent 576 wide whose first 512 columns are the values (DeepSeek's), for Hopper in Gluon, float16 and bfloat16: what the kernels over selections
(gather_attention_gluon.py, gather_bytes_gluon.py) and over block lists (block_attention_latent.py) share. They differ in who brings a tile's 32 keys.

A persistent block of threads takes one query and up to 64 heads that share its keys at a time, in four groups of warps: one brings tiles into a ring, `score` makes
scores and probabilities with 384 columns of the query in registers, two `add_values` hold 256 value columns each. The query arrives as two more tiles of the ring, and the
probabilities of a tile overwrite its rotary columns, which no value needs. Values of a tile are multiplied while the probabilities of the next are made, not beside its
scores: `score` says when. Keys that nobody sees are zeros in a tile and -inf in the scores. What is rare (holes, a reference that moves, sums that have to follow it) stands
behind a branch: `score` is the longest chain of a tile. Scores and sums are rounded as in the portable source (tiles.py), hence as in the backward.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.contract import Resources

HEADS = gl.constexpr(64)
KEYS = gl.constexpr(32)
LATENT = gl.constexpr(512)
ROTARY = gl.constexpr(64)
HALF = gl.constexpr(256)  # value columns of a group
PIECE = gl.constexpr(128)  # columns of a product of values
HELD = gl.constexpr(384)  # columns of the query in registers
STAGES = gl.constexpr(5)
TAKEN = gl.constexpr(2)  # of them by a query
COPIERS = gl.constexpr(128)  # threads of a group
ARRIVALS = gl.constexpr(129)  # for a tile: each thread of those that bring it with its copies, and which keys are seen
SEEN = gl.constexpr(0x01010101)  # four keys that are
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
LOWEST = gl.constexpr(-3.4028235e38)
# Of a thread's two rows: the largest product so far of its own keys, the one that probabilities are relative to, the scale (to base 2). When a row of the warp has grown by 2^8
# (0f41000000), the references of those that have move to their largest products. New references, and what sums so far are multiplied by.
FOLLOW = gl.constexpr("""{.reg .pred p, q; .reg .f32 a, b, c;
mov.f32 $0, $6; mov.f32 $1, $7; mov.f32 $2, 0f3F800000; mov.f32 $3, 0f3F800000;
sub.f32 a, $4, $6; sub.f32 b, $5, $7; max.f32 a, a, b; mul.f32 a, a, $8;
setp.gt.f32 p, a, 0f41000000;
vote.sync.any.pred p, p, -1;
@!p bra STAYS;
shfl.sync.bfly.b32 c, $4, 1, 31, -1; max.f32 a, c, $4; shfl.sync.bfly.b32 c, a, 2, 31, -1; max.f32 a, a, c;
shfl.sync.bfly.b32 c, $5, 1, 31, -1; max.f32 b, c, $5; shfl.sync.bfly.b32 c, b, 2, 31, -1; max.f32 b, b, c;
sub.f32 c, a, $6; mul.f32 c, c, $8; setp.gt.f32 q, c, 0f41000000; @q mov.f32 $0, a;
sub.f32 c, b, $7; mul.f32 c, c, $8; setp.gt.f32 q, c, 0f41000000; @q mov.f32 $1, b;
sub.f32 a, $6, $0; sub.f32 b, $7, $1; mul.f32 a, a, $8; mul.f32 b, b, $8;
ex2.approx.ftz.f32 $2, a; ex2.approx.ftz.f32 $3, b;
STAYS: }""")


@gluon.jit
def make_memory(kind: gl.constexpr, STAGES: gl.constexpr):
    """The rest of a query; tiles of keys and which of them are seen; probabilities, what sums are multiplied by before a tile (as each thread of a quad says) and whether
    by 1; the same at the end; barriers."""
    B: gl.constexpr = mbarrier.MBarrierLayout()
    rest = (gl.allocate_shared_memory(kind, [1, HEADS, LATENT - HELD], TILE), gl.allocate_shared_memory(kind, [1, HEADS, ROTARY], TILE))
    latents = gl.allocate_shared_memory(kind, [STAGES, KEYS, LATENT], TILE)
    rotary = gl.allocate_shared_memory(kind, [STAGES, KEYS, ROTARY], TILE)
    found = gl.allocate_shared_memory(gl.int8, [STAGES, KEYS], FLAT)
    p_tiles = rotary._reinterpret(kind, [STAGES, HEADS, KEYS], gl.NVMMASharedLayout(64, 16, 2))
    factors = gl.allocate_shared_memory(gl.float32, [STAGES, 4 * HEADS], FLAT)
    moved = gl.allocate_shared_memory(gl.int8, [STAGES, 4 * HEADS], FLAT)
    last = gl.allocate_shared_memory(gl.float32, [1, HEADS], FLAT)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], B)  # full, free
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    start = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    last_bars = gl.allocate_shared_memory(gl.int64, [2, 1], B)
    mbarrier.init(q_bars.index(0), count=COPIERS)
    mbarrier.init(q_bars.index(1), count=1)
    mbarrier.init(last_bars.index(0), count=1)
    mbarrier.init(last_bars.index(1), count=2)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=ARRIVALS)
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(start.index(s), count=1)
        mbarrier.init(free.index(s), count=2)
    fence_async_shared()
    return (rest, q_bars), (latents, rotary, found, full, free), (p_tiles, factors, moved, ready, start), (last, last_bars)


@gluon.jit
def after(s, phase, STAGES: gl.constexpr):
    """The slot behind slot s of the ring, and its phase."""
    wraps = s == STAGES - 1
    return gl.where(wraps, 0, s + 1), phase ^ wraps.to(gl.int32)


@gluon.jit
def copy_rows(to, rows, ok, FIRST: gl.constexpr, B: gl.constexpr):
    """Columns FIRST .. of rows, where `rows` points: zeros where not ok."""
    c = FIRST + gl.arange(0, to.shape[1], gl.SliceLayout(0, B))
    async_copy.async_copy_global_to_shared(to, gl.expand_dims(rows, 1) + gl.expand_dims(c, 0), mask=gl.expand_dims(ok, 1), cache_modifier=".cg")


@gluon.jit
def copy_keys(s, rows, ok, keys, B: gl.constexpr):
    latents, rotary, found, full, free = keys
    copy_rows(latents.index(s), rows, ok, 0, B)
    copy_rows(rotary.index(s), rows, ok, LATENT, B)
    async_copy.mbarrier_arrive(full.index(s), increment_count=False)
    found.index(s).store(ok.to(gl.int8))
    mbarrier.arrive(full.index(s))


@gluon.jit
def as_query(latents, s, W: gl.constexpr):
    """The first of a slot of the ring as W columns of a query."""
    return latents.index(s)._reinterpret(latents.dtype, [KEYS * LATENT // HEADS // W, HEADS, W], TILE).index(0)


@gluon.jit
def copy_query(q, head, Hq, sqh, s, phase, j, queries, keys, B: gl.constexpr):
    """Heads head .. of the query where `q` points, the j-th of this block of threads, zeros past the last: what `score` holds into the next two slots, which are behind
    (s, phase) then, and what it does not."""
    rest, q_bars = queries
    latents, rotary, found, full, free = keys
    STAGES: gl.constexpr = latents.shape[0]
    h = gl.arange(0, HEADS, gl.SliceLayout(1, B))
    exists = h < Hq - head
    rows = q + (head + gl.where(exists, h, 0)).to(gl.int64) * sqh
    for n in gl.static_range(TAKEN):
        mbarrier.wait(free.index(s), phase ^ 1)
        copy_rows(as_query(latents, s, HALF if n == 0 else HELD - HALF), rows, exists, n * HALF, B)
        async_copy.mbarrier_arrive(full.index(s), increment_count=False)
        mbarrier.arrive(full.index(s))
        s, phase = after(s, phase, STAGES)
    mbarrier.wait(q_bars.index(1), (j & 1) ^ 1)
    copy_rows(rest[0].index(0), rows, exists, HELD, B)
    copy_rows(rest[1].index(0), rows, exists, LATENT, B)
    async_copy.mbarrier_arrive(q_bars.index(0), increment_count=False)
    return s, phase


@gluon.jit
def take_query(s, phase, keys, weights, A: gl.constexpr):
    """The columns that `score` holds, from two slots, which go on to be freed."""
    latents, rotary, found, full, free = keys
    p_tiles, factors, moved, ready, start = weights
    STAGES: gl.constexpr = latents.shape[0]
    mbarrier.wait(full.index(s), phase)
    q0 = as_query(latents, s, HALF).load(A)
    t, phase = after(s, phase, STAGES)
    mbarrier.wait(full.index(t), phase)
    q1 = as_query(latents, t, HELD - HALF).load(A)
    mbarrier.arrive(start.index(s))
    mbarrier.arrive(start.index(t))
    mbarrier.arrive(ready.index(s))
    mbarrier.arrive(ready.index(t))
    s, phase = after(t, phase, STAGES)
    return q0, q1, s, phase


@gluon.jit
def products(q0, q1, rest, s, keys, L: gl.constexpr):
    """Scores of a tile, on their way."""
    latents, rotary, found, full, free = keys
    tile = latents.index(s)
    zero = gl.zeros([HEADS, KEYS], gl.float32, L)
    x = warpgroup_mma(q0, tile.slice(0, HALF, dim=1).permute((1, 0)), zero, use_acc=False, is_async=True)
    x = warpgroup_mma(q1, tile.slice(HALF, HELD - HALF, dim=1).permute((1, 0)), x, is_async=True)
    x = warpgroup_mma(rest[0].index(0), tile.slice(HELD, LATENT - HELD, dim=1).permute((1, 0)), x, is_async=True)
    return warpgroup_mma(rest[1].index(0), rotary.index(s).permute((1, 0)), x, is_async=True)


@gluon.jit
def landed(s, phase, keys):
    """When a tile is there: whether all of its keys are seen (SEEN, else less)."""
    latents, rotary, found, full, free = keys
    mbarrier.wait(full.index(s), phase)
    words = found.index(s)._reinterpret(gl.int32, [KEYS // 4], FLAT).load(gl.BlockedLayout([KEYS // 4], [32], [4], [0]))
    fence_async_shared()  # copies of threads, and probabilities of the tile before, read by products
    return gl.min(words, 0)


@gluon.jit
def of_thread(x):
    """[heads, keys] as [heads, pair of keys, thread of a quad, key of a pair]: no thread needs another's."""
    return x.reshape([HEADS, KEYS // 8, 4, 2])


@gluon.jit
def weigh(x, s, seen, top, sums, ref, scale2, found, weights):
    """Scores of a tile become probabilities relative to exp2(scale2 * ref), up to 2^8, and sums of each thread's own keys."""
    p_tiles, factors, moved, ready, start = weights
    L: gl.constexpr = x.type.layout
    if seen != SEEN:
        ok = found.index(s).load(gl.SliceLayout(0, L))
        x = gl.where(gl.expand_dims(ok, 0) != 0, x, float("-inf"))
    y = of_thread(x)
    top = gl.maximum(top, gl.max(gl.max(y, 3), 1))
    ref, f = gl.inline_asm_elementwise(FOLLOW, "=&f,=&f,=&f,=&f,f,f,f,f,f,f", [top, ref, scale2], (gl.float32, gl.float32), False, 2)
    p = gl.exp2((y - gl.expand_dims(gl.expand_dims(ref, 1), 3)) * scale2)
    p_tiles.index(s).store(gl.convert_layout(p.reshape([HEADS, KEYS]), L, assert_trivial=True).to(p_tiles.dtype))
    f_of = f.permute((1, 0))
    factors.index(s)._reinterpret(gl.float32, [4, HEADS], ROWS).store(f_of)
    moved.index(s)._reinterpret(gl.int8, [4, HEADS], ROWS).store((f_of != 1.0).to(gl.int8))
    return top, sums * f + gl.sum(gl.sum(p, 3), 1), ref


@gluon.jit
def score(scale2, tiles, s, phase, j, queries, keys, weights):
    """Probabilities of `tiles` tiles, for this block's query j, which begins at slot s: each row's largest product, its sum relative to that, what sums of values are
    multiplied by to be so, too, and the slot behind them. Of a key that decides, sums of values hold the probability as it was rounded, so they are divided by a sum that does, too."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    R: gl.constexpr = gl.SliceLayout(1, L)
    S: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, of_thread(gl.zeros([HEADS, KEYS], gl.float32, L)).type.layout))
    rest, q_bars = queries
    latents, rotary, found, full, free = keys
    p_tiles, factors, moved, ready, start = weights
    STAGES: gl.constexpr = latents.shape[0]
    top = gl.full([HEADS, 4], float("-inf"), gl.float32, S)
    sums = gl.zeros([HEADS, 4], gl.float32, S)
    ref = gl.full([HEADS, 4], LOWEST, gl.float32, S)
    if tiles > 0:
        q0, q1, s, phase = take_query(s, phase, keys, weights, gl.DotOperandLayout(0, L, 2))
        mbarrier.wait(q_bars.index(0), j & 1)
        seen = landed(s, phase, keys)
        x = warpgroup_mma_wait(0, deps=(products(q0, q1, rest, s, keys, L), ))
        for i in range(1, tiles):
            top, sums, ref = weigh(x, s, seen, top, sums, ref, scale2, found, weights)
            before = s
            s, phase = after(s, phase, STAGES)
            seen = landed(s, phase, keys)
            mbarrier.arrive(ready.index(before))
            x = products(q0, q1, rest, s, keys, L)
            mbarrier.arrive(start.index(before))
            x = warpgroup_mma_wait(0, deps=(x, ))
        mbarrier.arrive(q_bars.index(1))
        top, sums, ref = weigh(x, s, seen, top, sums, ref, scale2, found, weights)
        fence_async_shared()
        mbarrier.arrive(ready.index(s))
        mbarrier.arrive(start.index(s))
        s, phase = after(s, phase, STAGES)
    m = gl.convert_layout(gl.max(top, 1), R)
    ahead = (m - gl.convert_layout(gl.max(ref, 1), R)) * scale2
    most = gl.exp2(ahead)  # as `weigh` made it: a reference moves in the tile of a larger product only
    total = gl.convert_layout(gl.sum(sums, 1), R)
    unit = gl.where(m == float("-inf"), 1.0, gl.exp2(-ahead))
    rounded = gl.where(m == float("-inf"), 1.0, total + (most.to(p_tiles.dtype).to(gl.float32) - most))
    return m, total * unit, unit * (total / rounded), s, phase


@gluon.jit
def add_values(W: gl.constexpr, tiles, s, phase, keys, weights):
    """Sums of value columns 256 W .. over `tiles` tiles behind a query's slots s .., as two halves; the last slot, not yet free, and the one behind it."""
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    latents, rotary, found, full, free = keys
    p_tiles, factors, moved, ready, start = weights
    STAGES: gl.constexpr = latents.shape[0]
    a = gl.zeros([HEADS, PIECE], gl.float32, O)
    b = gl.zeros([HEADS, PIECE], gl.float32, O)
    last = s
    if tiles > 0:
        for n in gl.static_range(TAKEN):  # the query passes by
            mbarrier.wait(ready.index(s), phase)
            mbarrier.arrive(free.index(s))
            s, phase = after(s, phase, STAGES)
    for i in range(tiles):
        mbarrier.wait(ready.index(s), phase)
        words = moved.index(s).slice(0, HEADS)._reinterpret(gl.int32, [HEADS // 4], FLAT).load(gl.BlockedLayout([HEADS // 4], [32], [4], [0]))
        if gl.max(words, 0) != 0:
            f = gl.expand_dims(factors.index(s).slice(0, HEADS).load(gl.SliceLayout(1, O)), 1)
            a = a * f
            b = b * f
        mbarrier.wait(start.index(s), phase)
        a = warpgroup_mma(p_tiles.index(s), latents.index(s).slice(HALF * W, PIECE, dim=1), a, is_async=True)
        b = warpgroup_mma(p_tiles.index(s), latents.index(s).slice(HALF * W + PIECE, PIECE, dim=1), b, is_async=True)
        a, b = warpgroup_mma_wait(0, deps=(a, b))
        if i < tiles - 1:
            mbarrier.arrive(free.index(s))
        last = s
        s, phase = after(s, phase, STAGES)
    return a, b, last, s, phase


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
def rows_at(to, head, step, FIRST: gl.constexpr, C: gl.constexpr, B: gl.constexpr):
    """Where columns FIRST .. FIRST + C of heads head .. are: head h of 512 columns stands at to + 512 h step."""
    at = to + (head + gl.arange(0, HEADS, gl.SliceLayout(1, B))).to(gl.int64) * step * LATENT + FIRST
    return gl.expand_dims(at, 1) + gl.expand_dims(gl.arange(0, C, gl.SliceLayout(0, B)), 0)


@gluon.jit
def store(sums, to, head, step, Hq, FIRST: gl.constexpr):
    """[64, 128] for value columns FIRST .., from where they are held."""
    O: gl.constexpr = sums.type.layout
    gl.store(rows_at(to, head, step, FIRST, PIECE, O), sums.to(to.dtype.element_ty), mask=gl.expand_dims(gl.arange(0, HEADS, gl.SliceLayout(1, O)) < Hq - head, 1))


@gluon.jit
def store_lines(sums, place, to, head, step, Hq, FIRST: gl.constexpr):
    """[64, 64] in whole lines of memory, through `place`."""
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    place.store(gl.convert_layout(sums, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]), assert_trivial=True).to(to.dtype.element_ty))
    gl.store(rows_at(to, head, step, FIRST, 64, B), place.load(B), mask=gl.expand_dims(gl.arange(0, HEADS, gl.SliceLayout(1, B)) < Hq - head, 1))


@gluon.jit
def store_through(W: gl.constexpr, a, b, s, keys, to, head, step, Hq):
    """An item's sums of `add_values`, through this group's half of its last tile, which is free then."""
    latents, rotary, found, full, free = keys
    places = latents.index(s)._reinterpret(latents.dtype, [KEYS * LATENT // HEADS // 64, HEADS, 64], TILE)
    for n in gl.static_range(2):
        c, d = (a if n == 0 else b).reshape([HEADS, 2, 64]).permute((0, 2, 1)).split()
        store_lines(c, places.index(2 * W), to, head, step, Hq, HALF * W + PIECE * n)
        store_lines(d, places.index(2 * W + 1), to, head, step, Hq, HALF * W + PIECE * n + 64)
    mbarrier.arrive(free.index(s))


# ---------------------------------------------------------------------------------------------------------------- the host
def fits(q, k, v, scale: float, softcap, kind: str) -> bool:
    """One key head of the latent's widths, a positive scale, no cap, an answer of q's type, rows that 16-byte copies can read."""
    shared = k.data_ptr() == v.data_ptr() and k.stride()[:3] == v.stride()[:3]
    ours = (q.shape[3], v.shape[3], k.shape[1]) == (576, 512, 1) and softcap is None and 1e-30 < scale < 1e38 and kind == str(q.dtype)[6:]
    return ours and shared and not any(x.data_ptr() % 16 or any(s % 16 for s in x.stride()[:3]) for x in (q, k))


def resources(stages: int = STAGES.value, more: int = 0) -> Resources:
    """`more` bytes beside the query, the tiles, their masks and factors; a few for barriers and for what the groups of warps are told."""
    rest, tile = 2 * HEADS.value * (LATENT.value - HELD.value + ROTARY.value), 2 * KEYS.value * (LATENT.value + ROTARY.value)
    return Resources(threads=512, shared=rest + stages * (tile + KEYS.value + 20 * HEADS.value) + more + 880, registers=128)
