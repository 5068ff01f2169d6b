"""Lists of blocks from a grid of blocks, made on the device without a host round trip, inside a CUDA graph too.

    mask [L,nq,nk] bool or uint8 (kept blocks are full), or int32 kinds (-2 absent, -1 full, else a row of a table)  ->  dict of the arrays of contract.Lists:
    offsets, cols, kinds, by_key_offsets, by_key_rows, by_key_kinds

Full blocks first, each half ascending. The arrays have the capacity of L * nq * nk entries and one more; what stands past the last entry is 0 (-1 for kinds).
"""
from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import ceil_div

TUNABLES = (Tunable("threads", (1024,), "a block of threads takes 32 rows, or 32 columns in 32 slices"),)
FIELDS = "7Q3q4i"
SHARED = 2 * 1024 * 4


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=1024, shared=SHARED)


def default_config(problem):
    return {"threads": 1024}


def artifacts(problem, config):
    return [dict(source="layout", defines=dict(TABLE=table), names=["count_lines", "add_up", "fill_lines"]) for table in (0, 1)]


def run(mask, *, place, config):
    L, nq, nk = mask.shape
    size, rows, columns = L * nq * nk + 1, 2 * L * nq + 1, 2 * L * nk + 1
    made = {"offsets": place.zeros((rows,), "int32"), "cols": place.zeros((size,), "int32"), "kinds": place.full((size,), "int32", -1),
            "by_key_offsets": place.zeros((columns,), "int32"), "by_key_rows": place.zeros((size,), "int32"), "by_key_kinds": place.full((size,), "int32", -1)}
    if size == 1:
        return made
    defines = dict(TABLE=int(mask.dtype == "int32"))
    row_groups = ceil_div(L * nq, 32)
    values = (mask.ptr, *(x.ptr for x in made.values()), *mask.strides, L, nq, nk, row_groups)
    for name, blocks in (("count_lines", row_groups + L * ceil_div(nk, 32)), ("add_up", 2), ("fill_lines", row_groups + L * ceil_div(nk, 32))):
        nvrtc.function("layout", name, FIELDS, defines, place)(blocks, 1024, SHARED, place.stream, *values)
    return made
