"""latent_decompress for Hopper in Gluon: float16 or bfloat16 latents and weights of one type, R 512, Dn = Dv = 128, rotary width up to 64.

A persistent block of threads keeps 128 latent rows in registers (two groups of 64 rows x 512: 128 registers a thread), while `bring` streams weight tiles of 512 x 128
through a ring of 16 KB stages, the rows of the next block among them. The groups go through the stages beside each other: while one stores its sums, the other's
products run. Results and the rotary part leave by the copy engine; rows that do not exist are zeros on the way in and dropped on the way out.
"""
from functools import lru_cache

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton import relaunch
from sparsetile.backends.triton.gluon_maps import Map, map_type
from sparsetile.backends.triton.launch import POINTER
from sparsetile.backends.triton.maps import can_map

ROWS = gl.constexpr(128)   # of latents, of a block of threads
WIDTH = gl.constexpr(128)  # output columns of a tile: those of one head's keys or values
STEP = gl.constexpr(64)    # latent values of a stage
STEPS = gl.constexpr(8)
STAGES = gl.constexpr(11)


@gluon.jit
def share(g, blocks, width):
    """Which pairs (block of rows, tile) of window g are this program's: equal, contiguous pieces, row block by row block. Who has one more changes with the window."""
    at = ((gl.program_id(0) + g) % gl.num_programs(0)).to(gl.int64)
    pairs = blocks.to(gl.int64) * width
    return (at * pairs // gl.num_programs(0)).to(gl.int32), ((at + 1) * pairs // gl.num_programs(0)).to(gl.int32)


@gluon.jit
def visit(u, end, width):
    """(block of rows, first tile, one past the last) of a window, from pair u on."""
    block = u // width
    first = u - block * width
    return block, first, gl.minimum(width, first + end - u)


@gluon.jit
def bring(latent, w_uk, w_uv, blocks, each, width, windows, TURNED: gl.constexpr, ring, full, free):
    """A block's latents, then its weights, in steps of 64 latent values."""
    n = 0
    for g in range(windows):
        u, end = share(g, blocks, width)
        while u < end:
            block, first, last = visit(u, end, width)
            b = block // each
            for c in range(STEPS):
                s = n % STAGES
                mbarrier.wait(free.index(s), ((n // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(s), 2 * ROWS * STEP)
                tma.async_copy_global_to_shared(latent, [b, (block - b * each) * ROWS, c * STEP], full.index(s), ring.index(s))
                n += 1
            for t in range(g * width + first, g * width + last):
                for c in range(STEPS):
                    s = n % STAGES
                    mbarrier.wait(free.index(s), ((n // STAGES) & 1) ^ 1)
                    mbarrier.expect(full.index(s), 2 * WIDTH * STEP)
                    at = [t // 2, 0, c * STEP] if TURNED else [t // 2, c * STEP, 0]
                    if t % 2 == 0:
                        tma.async_copy_global_to_shared(w_uk, at, full.index(s), _weights(ring, s, TURNED))
                    else:
                        tma.async_copy_global_to_shared(w_uv, at, full.index(s), _weights(ring, s, TURNED))
                    n += 1
            u += last - first


@gluon.jit
def _weights(ring, s, TURNED: gl.constexpr):
    """A stage of weights as the copy engine fills it: [columns, latent values] where these are contiguous, else [latent values, columns]."""
    if TURNED:
        return ring.index(s)
    else:
        return ring.index(s)._reinterpret(ring.dtype, [STEP, WIDTH], ring.layout)


@gluon.jit
def bring_rotary(rope, blocks, each, width, windows, rotary, full, free):
    n = 0
    if rope is not None:
        for g in range(windows):
            u, end = share(g, blocks, width)
            while u < end:
                block, first, last = visit(u, end, width)
                mbarrier.wait(free.index(0), (n & 1) ^ 1)
                mbarrier.expect(full.index(0), 2 * ROWS * STEP)
                tma.async_copy_global_to_shared(rope, [block // each, block % each * ROWS, 0], full.index(0), rotary)
                n += 1
                u += last - first


@gluon.jit
def _rows(W: gl.constexpr, n, A: gl.constexpr, ring, full, free):
    """64 latent rows x 64 values, into registers."""
    s = n % STAGES
    mbarrier.wait(full.index(s), (n // STAGES) & 1)
    x = ring.index(s).slice(64 * W, 64).load(A)
    mbarrier.arrive(free.index(s))
    return x


@gluon.jit
def _product(x, n, acc, USE: gl.constexpr, TURNED: gl.constexpr, ring, full):
    s = n % STAGES
    mbarrier.wait(full.index(s), (n // STAGES) & 1)
    w = _weights(ring, s, TURNED)
    return warpgroup_mma(x, w.permute((1, 0)) if TURNED else w, acc, use_acc=USE, is_async=True)


@gluon.jit
def multiply(W: gl.constexpr, k_map, rotary_map, v_map, H, blocks, each, width, windows, TURNED: gl.constexpr, ring, full, free, staged, rotary, r_full, r_free):
    """A group of warps with rows 64 W .. of each block."""
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    zero = gl.zeros([64, WIDTH], gl.float32, L)
    out = staged.index(W)
    n = 0
    turn = 0
    for g in range(windows):
        u, end = share(g, blocks, width)
        while u < end:
            block, first, last = visit(u, end, width)
            b = block // each
            row = (block - b * each) * ROWS + 64 * W
            x = (_rows(W, n, A, ring, full, free), _rows(W, n + 1, A, ring, full, free), _rows(W, n + 2, A, ring, full, free), _rows(W, n + 3, A, ring, full, free),
                 _rows(W, n + 4, A, ring, full, free), _rows(W, n + 5, A, ring, full, free), _rows(W, n + 6, A, ring, full, free), _rows(W, n + 7, A, ring, full, free))
            n += STEPS
            for t in range(g * width + first, g * width + last):
                acc = _product(x[0], n, zero, False, TURNED, ring, full)
                for c in gl.static_range(1, STEPS):
                    acc = _product(x[c], n + c, acc, True, TURNED, ring, full)
                    acc = warpgroup_mma_wait(1, deps=(acc, ))
                    mbarrier.arrive(free.index((n + c - 1) % STAGES))
                acc = warpgroup_mma_wait(0, deps=(acc, ))
                mbarrier.arrive(free.index((n + STEPS - 1) % STAGES))
                n += STEPS
                tma.store_wait(0)  # what left before has been read
                out.store(acc.to(ring.dtype))
                fence_async_shared()
                if t % 2 == 0:
                    tma.async_copy_shared_to_global(k_map, [b * H + t // 2, row, 0], out)
                    if rotary_map is not None:
                        mbarrier.wait(r_full.index(0), turn & 1)
                        tma.async_copy_shared_to_global(rotary_map, [b * H + t // 2, row, WIDTH], rotary.slice(64 * W, 64))
                else:
                    tma.async_copy_shared_to_global(v_map, [b * H + t // 2, row, 0], out)
            if rotary_map is not None:
                mbarrier.wait(r_full.index(0), turn & 1)
                tma.store_wait(0)
                mbarrier.arrive(r_free.index(0))
            turn += 1
            u += last - first
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["H", "blocks", "each", "width", "windows"])
def decompress_gluon(latent, w_uk, w_uv, rope, k_map, rotary_map, v_map, H, blocks, each, width, windows, TURNED: gl.constexpr):
    """latent, ..., v_map: tensor maps; rope and rotary_map None where there is no rotary part. blocks of 128 rows, `each` of them in a batch; windows of `width` tiles, of
    which each head has two. TURNED: latent values are the weights' contiguous axis."""
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B: gl.constexpr = mbarrier.MBarrierLayout()
    ring = gl.allocate_shared_memory(latent.dtype, [STAGES, ROWS, STEP], tile)
    staged = gl.allocate_shared_memory(latent.dtype, [2, 64, WIDTH], tile)
    rotary = gl.allocate_shared_memory(latent.dtype, [ROWS, STEP], tile)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], B)
    r_full = gl.allocate_shared_memory(gl.int64, [1, 1], B)
    r_free = gl.allocate_shared_memory(gl.int64, [1, 1], B)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(free.index(s), count=2)
    mbarrier.init(r_full.index(0), count=1)
    mbarrier.init(r_free.index(0), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (multiply, (0, k_map, rotary_map, v_map, H, blocks, each, width, windows, TURNED, ring, full, free, staged, rotary, r_full, r_free)),
        (multiply, (1, k_map, rotary_map, v_map, H, blocks, each, width, windows, TURNED, ring, full, free, staged, rotary, r_full, r_free)),
        (bring, (latent, w_uk, w_uv, blocks, each, width, windows, TURNED, ring, full, free)),
        (bring_rotary, (rope, blocks, each, width, windows, rotary, r_full, r_free)),
    ], [4, 1, 1], [240, 24, 24])


# ---------------------------------------------------------------------------------------------------------------- the host
def turned(w) -> bool:
    return w.stride(2) != 1


def takes(latent, w_uk, w_uv, k_rope) -> bool:
    """Whether this call is one for `decompress_gluon`: arrays as the copy engine addresses them, weights that stand alike."""
    upright = [w.transpose(1, 2) if turned(w) else w for w in (w_uk, w_uv)]
    read = [latent, *upright] + ([] if k_rope is None else [k_rope])
    return turned(w_uk) == turned(w_uv) and all(x.dtype == latent.dtype and x.stride(-1) == 1 and can_map(x) for x in read)


@lru_cache
def constants(turn: bool) -> relaunch.Constants:
    return relaunch.Constants(TURNED=turn, num_warps=4)


def launch(latent, w_uk, w_uv, k_rope, k, v, place, config):
    """Fills k [B,H,S,128+P] and v [B,H,S,128]."""
    (B, S, _), H, turn = latent.shape, w_uk.shape[0], turned(w_uk)
    each, windows = -(-S // ROWS.value), next(n for n in (config["windows"], 4, 2, 1) if 2 * H % n == 0)
    weights = [Map(w.transpose(1, 2), WIDTH.value, STEP.value) if turn else Map(w, STEP.value, WIDTH.value) for w in (w_uk, w_uv)]
    outs = [x.view(B * H, S, x.shape[3]) for x in (k, v)]
    maps = (Map(latent, ROWS.value, STEP.value), *weights, None if k_rope is None else Map(k_rope, ROWS.value, STEP.value),
            Map(outs[0], 64, WIDTH.value), None if k_rope is None else Map(outs[0], 64, STEP.value), Map(outs[1], 64, WIDTH.value))
    numbers = (H, B * each, each, 2 * H // windows, windows)
    relaunch.launch(decompress_gluon, (max(place.sms, 1),), place, (), numbers, constants(turn), (latent.dtype, k_rope is None), maps)


def resources() -> Resources:
    return Resources(threads=384, shared=2 * ROWS.value * STEP.value * (STAGES.value + 3) + 256, registers=168)


def artifacts(problem) -> list[dict]:
    pointer = POINTER[problem.dtype("w_uk")]

    def mapped(rows, columns):
        return map_type(pointer, [1, rows, columns])

    def maps(turn):
        weights = mapped(WIDTH.value, STEP.value) if turn else mapped(STEP.value, WIDTH.value)
        rotary = dict(rope=mapped(ROWS.value, STEP.value), rotary_map=mapped(64, STEP.value)) if problem["P"] else {}
        return dict(latent=mapped(ROWS.value, STEP.value), w_uk=weights, w_uv=weights, k_map=mapped(64, WIDTH.value), v_map=mapped(64, WIDTH.value)) | rotary
    return [relaunch.artifact(decompress_gluon, constants(turn), {}, ("H", "blocks", "each", "width", "windows"), maps=maps(turn)) for turn in (False, True)]
