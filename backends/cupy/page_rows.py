"""Entries of a selection as rows of a cache's pool, in one pass. CUDA-graph safe.

    indices [B,G,T,K] int32  table [B,pages] int32  kv_length [B] int32  lengths [B,G,T] int32 or None  ->  rows [B,G,T,K * granularity] int32

Entry e stands for keys e * granularity ... + granularity - 1; key s of sequence b is row table[b, s // page_size] * page_size + s % page_size. -1 for what does not exist: past
`lengths`, outside the sequence's keys, past the query where causal (query t stands at q_start + t, by default at kv_length - T + t), in a page that is none of 0 .. pages_of_pool - 1.
"""
from sparsetile.backends.contract import Resources, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import PAGES, POSITIONS, SELECTED, ceil_div, position_values, selected_values

TUNABLES = ()
FIELDS, CHUNK = PAGES + SELECTED + POSITIONS + "Q2i", 256


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=CHUNK, shared=0)


def default_config(problem):
    return {}


def artifacts(problem, config):
    return [dict(source="page_rows", defines=dict(PAGE=64), names=["page_rows"])]


def run(indices, table, kv_length, *, place, config, page_size, pages_of_pool, lengths=None, granularity=1, causal=False, q_start=None):
    (B, G, T, K), pages = indices.shape, table.shape[1]
    slots = K * granularity
    rows, chunks = place.empty((B, G, T, slots), "int32"), ceil_div(slots, CHUNK)
    if slots >= 2 ** 31 or B * G * T * chunks >= 2 ** 31:
        raise Unsupported(f"CuPy finds the rows of fewer than 2^31 keys of a list and 2^31 parts of 256 keys, not {slots} and {B * G * T * chunks}; split the batch")
    if B * G * T * slots:
        function = nvrtc.function("page_rows", "page_rows", FIELDS, dict(PAGE=page_size), place)
        function(B * G * T * chunks, CHUNK, 0, place.stream, table.ptr, pages, pages_of_pool, *selected_values(indices, lengths, granularity, causal),
                 *position_values(T, pages * page_size, kv_length, q_start), rows.ptr, slots, chunks)
    return rows
