"""Path "tokens" of gather_attention: few heads of DeepSeek's latent (576 wide, of which the first 512 columns are the values) for Hopper in Gluon, float16 and bfloat16.

A product has at least 64 rows. Heads as rows (gather_attention_gluon.py) pad 16 heads to 64; here tokens are the rows of both products and heads their columns:
    S^T [64 tokens, HEADS] = K Q^T        O^T [512, HEADS] += V^T P^T
A persistent block of threads takes one query and up to HEADS of its heads at a time, in three groups of four warps: `gather` brings a step of 64 keys after the other into a ring, two take turns at
them (`attend`), each from scores to sums, so that one multiplies while the other makes probabilities. Each has maxima and sums of its own, which are brought together at an item's end.
Shared memory has no room for three whole steps: the front of a step, FORE of the five pieces of a key, has three slots, its back two, one for each group. Scores begin with the front while the back is
on its way, values with the back, which is waited for. Holes are zeros in a slot and -inf in the scores, nothing is read for them.
"""
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton.gather_attention_gluon import item_of
from sparsetile.backends.triton.gluon_items import limit_of, make_bars
from sparsetile.backends.triton.latent_gluon import COPIERS, PIECE, ROTARY
from sparsetile.backends.triton.tiles import finish

KEYS = gl.constexpr(64)
FRONT = gl.constexpr(3)  # slots


@gluon.jit
def make_memory(kind: gl.constexpr, HEADS: gl.constexpr, FORE: gl.constexpr):
    """Pieces of the query and of keys, which of a step's keys are seen, probabilities, what the groups tell each other of an item (in turn: one may be an item ahead), barriers."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = ()
    k_tiles = ()
    for n in gl.static_range(5):
        q_tiles = q_tiles + (gl.allocate_shared_memory(kind, [1, HEADS, PIECE if n < 4 else ROTARY], tile), )
        k_tiles = k_tiles + (gl.allocate_shared_memory(kind, [FRONT if n < FORE else 2, KEYS, PIECE if n < 4 else ROTARY], tile), )
    p_tiles = gl.allocate_shared_memory(kind, [2, HEADS, KEYS], tile)
    found = gl.allocate_shared_memory(gl.int8, [2, KEYS], flat)
    tops = gl.allocate_shared_memory(gl.float32, [4, HEADS], flat)
    sums = gl.allocate_shared_memory(gl.float32, [4, HEADS], flat)
    q_full, q_free = make_bars(1, (COPIERS, 2))
    front_full, front_free = make_bars(FRONT, (COPIERS, 1))
    back_full, back_free = make_bars(2, (COPIERS + 1, 1))  # and which keys are seen
    met, = make_bars(4, (1, ))
    fence_async_shared()
    return (q_tiles, q_full, q_free), (k_tiles, found, (front_full, back_full), (front_free, back_free)), p_tiles, (tops, sums, met)


@gluon.jit
def steps_of(count):
    """An even number: both groups have as many."""
    return (count + 2 * KEYS - 1) // (2 * KEYS) * 2


@gluon.jit
def copy_pieces(tiles, s, rows, ok, FIRST: gl.constexpr, LAST: gl.constexpr, B: gl.constexpr):
    """Pieces FIRST .. LAST - 1 of rows, where `rows` points, into slot s: zeros where not ok."""
    for n in gl.static_range(FIRST, LAST):
        c = n * PIECE + gl.arange(0, tiles[n].shape[2], gl.SliceLayout(0, B))
        async_copy.async_copy_global_to_shared(tiles[n].index(s), gl.expand_dims(rows, 1) + gl.expand_dims(c, 0), mask=gl.expand_dims(ok, 1), cache_modifier=".cg")


@gluon.jit
def gather(q, k, indices, lengths, at, sizes, strides, items, HEADS: gl.constexpr, FORE: gl.constexpr, CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr, queries, memory):
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    Hq, parts, T, S, K = sizes
    sqb, sqh, sqt, skb, sks = strides
    q_tiles, q_full, q_free = queries
    k_tiles, found, full, free = memory
    r = gl.arange(0, KEYS, gl.SliceLayout(1, B))
    h = gl.arange(0, HEADS, gl.SliceLayout(1, B))
    n = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, line, count = item_of(items - 1 - it, sizes, lengths, HEADS)  # late queries have long rows: first
        if count > 0:
            limit = limit_of(b, t, at, T, S, CAUSAL, FROM_LENGTH)
            keys = k + b.to(gl.int64) * skb
            entry = gl.load(indices + line + r, mask=r < count, other=-1)
            for i in range(steps_of(count)):
                ok = (entry >= 0) & (entry < limit)
                rows = keys + gl.where(ok, entry, 0).to(gl.int64) * sks
                place = (i + 1) * KEYS + r
                entry = gl.load(indices + line + place, mask=place < count, other=-1)  # asked for a step ahead
                mbarrier.wait(free[0].index(n % FRONT), ((n // FRONT) & 1) ^ 1)
                copy_pieces(k_tiles, n % FRONT, rows, ok, 0, FORE, B)
                async_copy.mbarrier_arrive(full[0].index(n % FRONT), increment_count=False)
                mbarrier.wait(free[1].index(n % 2), ((n // 2) & 1) ^ 1)
                copy_pieces(k_tiles, n % 2, rows, ok, FORE, 5, B)
                async_copy.mbarrier_arrive(full[1].index(n % 2), increment_count=False)
                found.index(n % 2).store(ok.to(gl.int8))
                mbarrier.arrive(full[1].index(n % 2))
                n += 1
                if i == 0:  # behind the first keys, which need not wait for the last scores of the item before
                    exists = h < Hq - head
                    lines = q + b.to(gl.int64) * sqb + t.to(gl.int64) * sqt + (head + gl.where(exists, h, 0)).to(gl.int64) * sqh
                    mbarrier.wait(q_free.index(0), (j & 1) ^ 1)
                    copy_pieces(q_tiles, 0, lines, exists, 0, 5, B)
                    async_copy.mbarrier_arrive(q_full.index(0), increment_count=False)
                    j += 1


@gluon.jit
def products(x, q_tiles, none, k_tiles, s, FIRST: gl.constexpr, LAST: gl.constexpr):
    """Scores by pieces FIRST .. LAST - 1 of slot s, on their way."""
    for n in gl.static_range(FIRST, LAST):
        x = warpgroup_mma(k_tiles[n].index(s), q_tiles[n].index(none).permute((1, 0)), x, use_acc=n > 0, is_async=True)
    return x


@gluon.jit
def as_float32(tile, ROWS: gl.constexpr, HEADS: gl.constexpr):
    """Memory of a tile of 16 bits as [ROWS, HEADS]."""
    return tile._reinterpret(gl.float32, [ROWS, HEADS], gl.SwizzledSharedLayout(4, 32 // HEADS, HEADS // 4, [1, 0]))


@gluon.jit
def largest(x, tile):
    """Of each column of [64, HEADS], with the help of a tile's memory: by the layout of products a thread has eight columns of two rows, whose exchanges ptxas puts one after the other."""
    L: gl.constexpr = x.type.layout
    HEADS: gl.constexpr = x.shape[1]
    T: gl.constexpr = gl.BlockedLayout([1, 1], [128 // HEADS, HEADS // 4], [1, 4], [0, 1])  # a thread has one column
    room = as_float32(tile, 32, HEADS)
    room.store(gl.max(x.reshape([4, 2, 8, HEADS]), 1).reshape([32, HEADS]))
    return gl.convert_layout(gl.max(room.load(T), 0), gl.SliceLayout(0, L))


@gluon.jit
def soften(x, m, l, scale2, tile):
    """One step of the softmax down the columns: probabilities, the factor of what was summed before, new maximum of the products, new sums, which each token's row keeps for itself."""
    new = gl.maximum(m, largest(x, tile))
    ref = gl.where(new == float("-inf"), 0.0, new)
    p = gl.exp2((x - gl.expand_dims(ref, 0)) * scale2)
    a = gl.expand_dims(gl.exp2((m - ref) * scale2), 0)
    return p, a, new, l * a + p


@gluon.jit
def store(x, own, others, to, exists, tile, any_):
    """[128, HEADS] of both groups to rows of heads, through the piece where the other group's came: coalesced. Zeros where the item has no step."""
    HEADS: gl.constexpr = x.shape[1]
    B: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    y = gl.zeros([HEADS, PIECE], to.dtype.element_ty, B)
    if any_:
        x = x * own + as_float32(tile, PIECE, HEADS).load(x.type.layout) * others
        rows = tile.slice(0, HEADS)
        rows.store(x.to(to.dtype.element_ty).permute((1, 0)))
        y = rows.load(B)
    gl.store(gl.expand_dims(to, 1) + gl.expand_dims(gl.arange(0, PIECE, gl.SliceLayout(0, B)), 0), y, mask=gl.expand_dims(exists, 1))


@gluon.jit
def attend(W: gl.constexpr, out, lse, lengths, sinks, sizes, items, scale, HEADS: gl.constexpr, FORE: gl.constexpr, queries, memory, p_tiles, shares):
    """Steps W, W + 2 .. of every item; at its end value columns 256 W .. of both groups."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])  # of scores and of sums
    C: gl.constexpr = gl.SliceLayout(0, L)
    R: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
    Hq, parts, T, S, K = sizes
    q_tiles, q_full, q_free = queries
    k_tiles, found, full, free = memory
    tops, sums, met = shares
    scale2 = scale * 1.4426950408889634
    n = 0
    j = 0
    for it in range(gl.program_id(0), items, gl.num_programs(0)):
        b, t, head, line, count = item_of(items - 1 - it, sizes, lengths, HEADS)
        end = n + steps_of(count)
        m = gl.full([HEADS], float("-inf"), gl.float32, C)
        l = gl.zeros([KEYS, HEADS], gl.float32, L)
        w = gl.zeros([PIECE, HEADS], gl.float32, L)
        x = gl.zeros([PIECE, HEADS], gl.float32, L)
        y = gl.zeros([PIECE, HEADS], gl.float32, L)
        z = gl.zeros([PIECE, HEADS], gl.float32, L)
        if count > 0:
            mbarrier.wait(q_full.index(0), j & 1)
        for i in range(n + W, end, 2):
            none = gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [i], gl.int32, False, 1)  # else descriptors of tiles that stay are kept in registers, and spill
            front = i % FRONT
            back = W + none
            mbarrier.wait(full[0].index(front), (i // FRONT) & 1)
            fence_async_shared()  # copies of threads, read by products
            s = products(gl.zeros([KEYS, HEADS], gl.float32, L), q_tiles, none, k_tiles, front, 0, FORE)
            mbarrier.wait(full[1].index(back), (i // 2) & 1)
            fence_async_shared()
            s = products(s, q_tiles, none, k_tiles, back, FORE, 5)
            ok = gl.expand_dims(found.index(W).load(gl.SliceLayout(1, L)), 1)
            s = warpgroup_mma_wait(0, deps=(s, ))
            if i >= end - 2:
                mbarrier.arrive(q_free.index(0))
            p, a, m, l = soften(gl.where(ok != 0, s, float("-inf")), m, l, scale2, p_tiles.index(back))
            p_tiles.index(back).store(p.to(p_tiles.dtype).permute((1, 0)))
            fence_async_shared()
            w = w * a
            x = x * a
            y = y * a
            z = z * a
            p = p_tiles.index(back).permute((1, 0))
            z = warpgroup_mma(k_tiles[3].index(back).permute((1, 0)), p, z, is_async=True)
            y = warpgroup_mma(k_tiles[2].index(front if FORE == 3 else back).permute((1, 0)), p, y, is_async=True)
            w = warpgroup_mma(k_tiles[0].index(front).permute((1, 0)), p, w, is_async=True)
            x = warpgroup_mma(k_tiles[1].index(front).permute((1, 0)), p, x, is_async=True)
            w, x, y, z = warpgroup_mma_wait(FORE, deps=(w, x, y, z))
            mbarrier.arrive(free[1].index(W))
            w, x, y, z = warpgroup_mma_wait(0, deps=(w, x, y, z))
            if i < end - 2:  # sums pass through the last ones
                mbarrier.arrive(free[0].index(front))
        total = gl.sum(l, 0)
        own = gl.full([HEADS], 1.0, gl.float32, C)
        others = own
        theirs = (end + FRONT - 1 - W) % FRONT  # slot of the other group's last step
        if count > 0:
            mine = (end + FRONT - 2 + W) % FRONT
            turn = 2 * (j & 1)
            as_float32(k_tiles[0].index(mine), PIECE, HEADS).store(w if W else y)
            as_float32(k_tiles[1].index(mine), PIECE, HEADS).store(x if W else z)
            tops.index(turn + W).store(m)
            sums.index(turn + W).store(total)
            mbarrier.arrive(met.index(turn + W))
            mbarrier.wait(met.index(turn + 1 - W), (j >> 1) & 1)
            top = tops.index(turn + 1 - W).load(C)
            new = gl.maximum(m, top)
            ref = gl.where(new == float("-inf"), 0.0, new)
            own = gl.exp2((m - ref) * scale2)
            others = gl.exp2((top - ref) * scale2)
            total = total * own + sums.index(turn + 1 - W).load(C) * others
            m = new
            j += 1
        r = gl.arange(0, HEADS, C)
        h = head + gl.where(r < Hq - head, r, 0)
        factor, logs = finish(m, total, scale, scale2, sinks, h, sinks is not None)
        if W == 0:
            if lse is not None:
                gl.store(lse + (b.to(gl.int64) * Hq + h) * T + t, logs, mask=r < Hq - head)
        own = gl.expand_dims(own * factor, 0)
        others = gl.expand_dims(others * factor, 0)
        r = gl.arange(0, HEADS, R)
        to = out + ((b.to(gl.int64) * Hq + head + r) * T + t) * (4 * PIECE) + 2 * W * PIECE
        store(y if W else w, own, others, to, r < Hq - head, k_tiles[0].index(theirs), count > 0)
        store(z if W else x, own, others, to + PIECE, r < Hq - head, k_tiles[1].index(theirs), count > 0)
        if count > 0:
            mbarrier.arrive(free[0].index(theirs))
        n = end


@gluon.jit(do_not_specialize=["Hq", "parts", "T", "S", "K", "items", "q_start"])
def gather_tokens_gluon(q, k, out, lse, indices, lengths, kv_length, q_starts, sinks, sqb, sqh, sqt, skb, sks, Hq, parts, T, S, K, items, q_start, scale,
                        CAUSAL: gl.constexpr, FROM_LENGTH: gl.constexpr, HEADS: gl.constexpr):
    FORE: gl.constexpr = 3 if HEADS == 16 else 2  # what there is room for
    queries, memory, p_tiles, shares = make_memory(q.dtype.element_ty, HEADS, FORE)
    sizes = (Hq, parts, T, S, K)
    strides = (sqb, sqh, sqt, skb, sks)
    gl.warp_specialize([
        (attend, (0, out, lse, lengths, sinks, sizes, items, scale, HEADS, FORE, queries, memory, p_tiles, shares)),
        (attend, (1, out, lse, lengths, sinks, sizes, items, scale, HEADS, FORE, queries, memory, p_tiles, shares)),
        (gather, (q, k, indices, lengths, (q_start, q_starts, kv_length), sizes, strides, items, HEADS, FORE, CAUSAL, FROM_LENGTH, queries, memory)),
    ], [4, 4], [200 if HEADS == 16 else 208, 104 if HEADS == 16 else 88])


# ---------------------------------------------------------------------------------------------------------------- the host
def heads_of(Hq: int) -> int:
    """Columns of a product. Eight would be read as slowly as 16."""
    return 16 if Hq <= 16 else 32


def resources(Hq: int) -> Resources:
    """1600 bytes for what is told of items and steps, for barriers and for the exchanges of the groups of warps."""
    heads, slots = heads_of(Hq), 3 * (384 if Hq <= 16 else 256) + 2 * (192 if Hq <= 16 else 320)
    return Resources(threads=384, shared=2 * heads * (4 * PIECE.value + ROTARY.value + 2 * KEYS.value) + 2 * KEYS.value * slots + 32 * heads + 1600, registers=168)
