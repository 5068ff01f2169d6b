"""New rows of a cache, quantised and scattered through a page table, in one pass. CUDA-graph safe.

    rows [B,n,...]  pools [N,page,...]  table [B,pages] int32  lengths [B] int32  counts [B] int32 or None  ->  written into the pools, in place

Row i < counts[b] of sequence b stands at position p = lengths[b] + i, in slot p; in a ring (pinned, window) in slot p < pinned ? p : pinned + (p - pinned) % window,
and of the rows that fall on one slot the last is written. A row whose slot lies outside the table, or whose page is not one of 0 .. N - 1, is skipped.
    "copy"         rows[x] [B,n,H,C] -> pools[x] [N,page,H,C], the same bits
    "latent_fp8"   rows (latent [B,n,R], rotary [B,n,P]) -> R float8_e4m3fn, R/128 float32 scales, P bfloat16 a token
    "indexer_fp8"  rows[0] [B,n,D] -> D float8_e4m3fn of each key of a page, then a float32 scale of each
"""
from sparsetile.backends.contract import Resources
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import KINDS, ceil_div, copy_bytes

TUNABLES = ()
WHERE = "3Q2q8i"
COPY, QUANTISE = "2Q6q2i" + WHERE, "3Q5q2i" + WHERE
GROUP = 128
TYPES = ("float32", "float16", "bfloat16")


def supports(problem):
    kind = problem.dtype("rows")
    if problem["B"] * problem["T"] >= 2 ** 31:
        return "CuPy appends fewer than 2^31 rows at once; append in parts"
    return None if kind in TYPES else f"CuPy appends float32, float16 or bfloat16, not {kind}; cast the rows, or keep the cache on the CPU, where numba takes float64"


def resources(problem, config):
    return Resources(threads=128, shared=0)


def default_config(problem):
    return {}


def _defines(kind, copy=16, group=GROUP, planar=False, power_of_two=False):
    return dict(KIND=KINDS[kind], COPY=copy, GROUP=group, PLANAR=int(planar), POWER=int(power_of_two))


def artifacts(problem, config):
    kind = problem.dtype("rows")
    if "copy" in problem.features:
        return [dict(source="append", defines=_defines("float32", copy), names=["copy_rows"]) for copy in (4 if kind == "float32" else 2, 16)]
    planar = "indexer_fp8" in problem.features
    return [dict(source="append", defines=_defines(kind, 16, problem["D"] if planar else GROUP, planar, power), names=["quantise_rows"]) for power in (False, True)]


def run(rows, pools, table, lengths, *, place, config, form, page_size, counts=None, ring=None, power_of_two=False):
    B, n = rows[0].shape[:2]
    pinned, window = ring or (0, 0)
    where = (table.ptr, lengths.ptr, nvrtc.ptr(counts), table.strides[0], lengths.strides[0] if lengths.shape[0] > 1 else 0, B * n, n, table.shape[1], pools[0].shape[0], page_size, pinned, window, 0)
    if form == "copy":
        for row, pool in zip(rows, pools):
            H, C = row.shape[2:]
            at_once = copy_bytes(row, pool)
            function = nvrtc.function("append", "copy_rows", COPY, _defines("float32", at_once), place)
            function(B * n, 128, 0, place.stream, row.ptr, pool.ptr, *(s * row.itemsize for x in (row, pool) for s in x.strides[:3]), H, C * row.itemsize, *where)
        return
    D, planar, pool = rows[0].shape[2], form == "indexer_fp8", pools[0]
    P = rows[1].shape[2] if len(rows) > 1 else 0
    group = D if planar else GROUP
    function = nvrtc.function("append", "quantise_rows", QUANTISE, _defines(rows[0].dtype, 16, group, planar, power_of_two), place)
    function(ceil_div(B * n * (D // group + (P > 0)), 4), 128, 0, place.stream, rows[0].ptr, rows[-1].ptr, pool.ptr, *rows[0].strides[:2], *rows[-1].strides[:2], pool.strides[0], D, P, *where)
