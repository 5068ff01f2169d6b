"""A selection as bitmaps of blocks, on the device, without a host round trip, CUDA-graph safe.

    indices [B,G,T,K] int32, lengths [B,G,T] or None  ->  bitmaps [B*G*nq*nk, block_q, block_k / 32] int32, kinds [B*G, nq, nk] int32

Row t stands in block t // block_q; bit c % 32 of word c // 32 says whether it sees key j * block_k + c. Kind -2: no row of the block sees a key of it, else 2 n + 1 for row n of the bitmaps.
Holes, `lengths` and causality as in gather_attention; an entry given twice shows once.
"""
from sparsetile.backends.contract import Resources, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import POSITIONS, SELECTED, ceil_div, position_values, selected_values

TUNABLES = ()
FIELDS, THREADS, SHARED = SELECTED + POSITIONS + "2Q4i", 128, 4096


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=THREADS, shared=SHARED)


def default_config(problem):
    return {}


def artifacts(problem, config):
    return [dict(source="selection_bitmaps", defines=dict(WHOLE=int(problem.granularity % 32 == 0)), names=["selection_bitmaps"])]


def run(indices, *, place, config, S, block_q, block_k, lengths=None, granularity=1, causal=False, kv_length=None, q_start=None):
    B, G, T, K = indices.shape
    nq, nk = ceil_div(T, block_q), ceil_div(S, block_k)
    if B * G * T >= 2 ** 31 or 2 * B * G * nq * nk >= 2 ** 31:
        raise Unsupported(f"CuPy makes bitmaps of fewer than 2^31 rows and 2^30 blocks, not {B * G * T} and {B * G * nq * nk}; split the batch")
    bitmaps = (place.zeros if T % block_q else place.empty)((B * G * nq * nk, block_q, block_k // 32), "int32")  # rows past the last see nothing
    kinds = place.full((B * G, nq, nk), "int32", -2)
    if B * G * T * nk:
        function = nvrtc.function("selection_bitmaps", "selection_bitmaps", FIELDS, dict(WHOLE=int(granularity % 32 == 0)), place)
        function(B * G * T, THREADS, SHARED, place.stream, *selected_values(indices, lengths, granularity, causal), *position_values(T, S, kv_length, q_start),
                 bitmaps.ptr, kinds.ptr, nq, nk, block_q, block_k // 32)
    return bitmaps, kinds
