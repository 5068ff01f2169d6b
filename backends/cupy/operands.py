"""How the attention kernels of this folder take their arguments: element kinds, copy widths, structs (lists.cuh), tiles of value columns."""
import math
from functools import lru_cache

from sparsetile.backends.arrays import View

KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "float8_e4m3fn": 3}  # numbers.cuh
LISTS = "8Q6i"      # struct ListArrays
POSITIONS = "2Q4i"  # struct Positions
PAGES = "Q2i"       # struct Pages
HALVES = ("float16", "bfloat16")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def padded(width: int) -> int:
    """Widths are padded to the 16 columns of one tensor-core product."""
    return ceil_div(width, 16) * 16


@lru_cache(None)
def sliced(width: int, most: int = 256) -> tuple[int, int]:
    """(slices, padded width of one): how many CTAs share a row of `width` columns when one holds at most `most`."""
    slices = ceil_div(padded(width), most)
    return slices, padded(ceil_div(width, slices))


def copy_bytes(*views) -> int:
    """The widest copy that is aligned in every row of every view: 16, 8 or 4 bytes, else one element (which takes any stride of the last axis too)."""
    return _copy_bytes(views[0].itemsize, tuple([(x.ptr % 16, x.itemsize, x.shape, x.strides) for x in views]))


@lru_cache(4096)
def _copy_bytes(least, arrays):
    bytes_ = 16
    for ptr, size, shape, strides in arrays:
        if shape[-1] > 1 and strides[-1] != 1:
            return size
        bytes_ = math.gcd(bytes_, ptr or 16, shape[-1] * size, *(s * size for n, s in zip(shape[:-1], strides) if n > 1))
    return max(bytes_, least)


def problem_copy_bytes(problem, *axes) -> int:
    """The same for a problem: what contiguous arrays give."""
    size = {"float32": 4, "float8_e4m3fn": 1}.get(problem.dtype("q"), 2)
    row = [] if latent_shape(problem) is None else [problem["Dv"] + problem["Dv"] // 32 + 2 * (problem["D"] - problem["Dv"])]
    return max(size, math.gcd(16, *row, *(problem[axis] * size for axis in axes)))


def lists_values(lists) -> tuple:
    """The fields of struct ListArrays, made once for a part."""
    found = lists.extras.get("cupy.values")
    if found is not None:
        return found
    at = lists.list_of.shape
    ptr = lambda x: 0 if x is None else x.ptr  # noqa: E731
    found = lists.extras["cupy.values"] = (lists.offsets.ptr, lists.cols.ptr, lists.kinds.ptr, ptr(lists.intervals), ptr(lists.bitmaps), lists.list_of.ptr, ptr(lists.q_order), ptr(lists.k_order),
            at[1] if at[0] > 1 else 0, 1 if at[1] > 1 else 0, lists.first, lists.nq, lists.nk, 0)
    return found


def position_values(T: int, S: int, kv_length, q_start) -> tuple:
    """The fields of struct Positions. q_start: int, device array, or None = kv_length - T (S - T without lengths)."""
    if q_start is None:
        value, array, source = (S - T, 0, 0) if kv_length is None else (0, 0, 2)
    elif isinstance(q_start, int):
        value, array, source = q_start, 0, 0
    else:
        value, array, source = 0, q_start.ptr, 1
    return (0 if kv_length is None else kv_length.ptr, array, T, S, value, source)


def through_pages(table, *keys) -> tuple:
    """(keys of a sequence, each of `keys`, fields of struct Pages, defines). Keys [N,H,page,W] behind a table [B,pages] become one tensor of rows that batches share, [1,H,N * page,W]."""
    S, *pages = pages_of(table, keys[0])
    return S, *(keys if table is None else map(_rows_of_pool, keys)), *pages


def _rows_of_pool(x) -> View:
    N, H, page, W = x.shape
    n, h, row, w = x.strides
    return View(x.ptr, (1, H, N * page, W), (0, h, row if page > 1 else n, w), x.dtype, x.device, x.owner)


def pages_of(table, keys) -> tuple:
    """(keys of a sequence, fields of struct Pages, defines) of keys [N,...,page,W] behind a table [B,pages], or [B,...,S,W] in one piece."""
    N, page = keys.shape[0], keys.shape[-2]
    return (page, (), {}) if table is None else (page * table.shape[1], (table.ptr, table.shape[1], N), dict(PAGE=page))


def latent_shape(problem) -> tuple | None:
    """(R, P) where keys are rows of the fp8 layout of a latent cache (latents.cuh)."""
    return (problem["Dv"], problem["D"] - problem["Dv"]) if problem.dtype("k") == "latent_fp8" else None


def fp8_defines(latent) -> dict:
    return {} if latent is None else dict(LATENT=latent[0])


def is_float8(problem) -> bool:
    """Whether keys and values are float8 (float8.cuh)."""
    return problem.dtype("k") == "float8_e4m3fn"


def product_kind(kind: str) -> str:
    """The type in which queries of this type are multiplied."""
    return "float16" if kind == "float8_e4m3fn" else kind


def output_kind(kind: str) -> str:
    """The type of the output for queries of this type, unless told otherwise."""
    return "bfloat16" if kind == "float8_e4m3fn" else kind


def float8_defines(kind: str, keys: str, copy: int) -> dict:
    """copy: bytes that divide every row of keys and values"""
    return dict(FLOAT8=2 if kind == keys else 1, COPY8=copy if copy >= 4 else 1) if keys == "float8_e4m3fn" else {}


SCALES = "3Q"  # struct Scales


def scale_values(k, scales) -> tuple:
    """The fields of struct Scales, which calls on float8 keys alone have."""
    return tuple(0 if x is None else x.ptr for x in scales) if k.dtype == "float8_e4m3fn" else ()


def page_defines(problem) -> dict:
    """Of a problem, for compiling ahead: the page size that caches have unless told otherwise."""
    return dict(PAGE=64) if "paged" in problem.features else {}


def query_tiles(lists, T: int, q_start, S: int, kv_length) -> int:
    """Tiles of lists.block_q absolute positions that T queries may touch: exact where q_start is known on the host."""
    if lists.q_order is not None:
        return lists.nq
    if q_start is None and kv_length is None:
        q_start = S - T
    if isinstance(q_start, int):
        return (q_start + T - 1) // lists.block_q - q_start // lists.block_q + 1 if T else 0
    return (T + lists.block_q - 2) // lists.block_q + 1 if T else 0


SELECTED = "2Q4i"  # struct Selected


def selected_values(indices, lengths, granularity: int, causal: bool) -> tuple:
    """The fields of struct Selected."""
    return indices.ptr, 0 if lengths is None else lengths.ptr, indices.shape[1], indices.shape[3], granularity, int(causal)


def head_groups(G: int, Hq: int, Hk: int, rows: int) -> int:
    """CTAs for the heads of one query: heads that share list and keys stand together, `rows` at most."""
    apart = 1 if G == Hq else Hq // Hk
    return Hq // apart * ceil_div(apart, rows)


def same_memory(k, v) -> bool:
    """v is the first columns of k."""
    return v.ptr == k.ptr and v.strides == k.strides and v.shape[3] <= k.shape[3]


def column_slices(D: int, Dv: int, most: int = 256) -> tuple[int, int, int]:
    """(CTAs that share a key tile, columns of dK, columns of dV each makes) when one holds at most `most` columns."""
    n = 1
    while padded(ceil_div(D, n)) + padded(ceil_div(Dv, n)) > most:
        n += 1
    return n, padded(ceil_div(D, n)), padded(ceil_div(Dv, n))


def first_fitting(problem, resources, candidates) -> dict:
    """The first config that `resources` does not refuse, else the last."""
    for config in candidates:
        if not isinstance(resources(problem, config), str):
            break
    return config
