"""What steps of the backward's kernels in Gluon have in common: what is known of rows, how a step is brought, how its products begin and end, how gradients leave."""
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from sparsetile.backends.triton.block_attention_gluon import bring_tile


@triton.jit
def probabilities(raw, lse, scale):
    """The score is rounded first, as the forward rounds it: score - lse is right however large both are."""
    return tl.math.exp2((raw * scale - lse) * 1.4426950408889634)


@gluon.jit
def known(lse, delta, at, ok):
    """(lse, delta) of rows; lse +inf, hence P = 0, where a row is not there, sees no key, or its sink holds all."""
    logs = gl.load(lse + at, mask=ok, other=float("inf"))
    return gl.where(gl.abs(logs) != float("inf"), logs, float("inf")), gl.load(delta + at, mask=ok, other=0.0)


@gluon.jit
def bring_step(maps, at, logs, less, s, turn, D1: gl.constexpr, BYTES: gl.constexpr, tiles, rows, bars):
    """Queries and dout of a step, from `at` on, and what is known of their rows, as soon as stage s, taken `turn` times before, is free.
    What else comes with them, and that it is all, the caller says."""
    q0, q1, dout = maps
    sq0, sq1, sg = tiles
    full, free = bars
    mbarrier.wait(free.index(s), (turn & 1) ^ 1)
    mbarrier.expect(full.index(s), BYTES)
    bring_tile(q0, q1, full.index(s), sq0.index(s), sq1.index(s), at, D1)
    tma.async_copy_global_to_shared(dout, at, full.index(s), sg.index(s))
    rows[0].index(s).store(logs)
    rows[1].index(s).store(less)


@gluon.jit
def begin_by_query(memory, w, s, v_full, phase, zero, D1: gl.constexpr):
    """Scores and dP of a step under way: queries in buffer w, keys in stage s."""
    sq0, sq1, sg, sk0, sk1, sv = memory
    st = warpgroup_mma(sq0.index(w), sk0.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)
    if D1:
        st = warpgroup_mma(sq1.index(w), sk1.index(s).permute((1, 0)), st, is_async=True)
    mbarrier.wait(v_full.index(s), phase)
    return st, warpgroup_mma(sg.index(w), sv.index(s).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def end_by_query(st, gt, logs, shift, scale, v_free, s):
    """dS, less the scale, when they have ended."""
    x = warpgroup_mma_wait(1, deps=(st, ))
    p = probabilities(x, gl.expand_dims(logs, 1), scale)
    grad = warpgroup_mma_wait(0, deps=(gt, ))
    mbarrier.arrive(v_free.index(s))
    return p * (grad - gl.expand_dims(shift, 1))


@gluon.jit
def add_by_key(p, ds, sq, sg, s, acc_k, acc_v):
    """Sums of dK and dV after a step."""
    vt = warpgroup_mma(gl.convert_layout(p.to(sg.dtype), gl.DotOperandLayout(0, acc_v.type.layout, 2)), sg.index(s), acc_v, is_async=True)
    ds = ds.to(sq.dtype)
    kt = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, acc_k.type.layout, 2)), sq.index(s), acc_k, is_async=True)
    acc_v, acc_k = warpgroup_mma_wait(0, deps=(vt, kt))
    return acc_k, acc_v


@gluon.jit
def exist(row, limit, L: gl.constexpr):
    """Which of the 64 keys from `row` on do: gradients of the others are 0."""
    return gl.expand_dims(row + gl.arange(0, 64, gl.SliceLayout(1, L)) < limit, 1)


@gluon.jit
def leave(y, out, out_map, head, row, rows, through, line, COL: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr):
    """64 rows of a gradient, from column COL on, to where they stand: rows row .. of the `rows` that the head has, of `out` from `line` on. By the copy engine through shared memory, unless
    a row is negative (it takes none) or there is no such memory."""
    W0: gl.constexpr = y.shape[1]
    if through is None:
        r = row + gl.arange(0, 64, gl.SliceLayout(1, L))
        c = COL + gl.arange(0, W0, gl.SliceLayout(0, L))
        inside = gl.expand_dims((r >= 0) & (r < rows), 1) & gl.expand_dims(c < WIDTH, 0)
        gl.store(out + line * WIDTH + gl.expand_dims(r.to(gl.int64) * WIDTH, 1) + gl.expand_dims(c, 0), y, mask=inside)
    else:
        through.store(y)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_map, [head, row, COL], through)


@gluon.jit
def leave_sums(y, to, row, COL: gl.constexpr, WIDTH: gl.constexpr, L: gl.constexpr):
    """64 rows of a section's sums, from column COL on, to rows row .. of a matrix of WIDTH columns."""
    r = row + gl.arange(0, 64, gl.SliceLayout(1, L))
    c = COL + gl.arange(0, y.shape[1], gl.SliceLayout(0, L))
    gl.store(to + gl.expand_dims(r * WIDTH, 1) + gl.expand_dims(c, 0), y)
