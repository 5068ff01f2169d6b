"""Entries of a selection as rows of a cache's pool, in one pass. CUDA-graph safe.

    indices [B,G,T,K] int32  table [B,pages] int32  kv_length [B] int32  lengths [B,G,T] int32 or None  ->  rows [B,G,T,K * granularity] int32

Entry e stands for keys e * granularity ... + granularity - 1; key s of sequence b is row table[b, s // page_size] * page_size + s % page_size. -1 for what does not exist: past
`lengths`, outside the sequence's keys, past the query where causal (query t stands at q_start + t, by default at kv_length - T + t), in a page that is none of 0 .. pages_of_pool - 1.
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Resources
from sparsetile.backends.triton.gather_attention import keys_of
from sparsetile.backends.triton.launch import known_start
from sparsetile.backends.triton.pages import page_of
from sparsetile.backends.triton.tiles import place_of, taken

TUNABLES = ()
BLOCK = 512


@triton.jit(do_not_specialize=["T", "K", "pages", "N", "q_start"])
def page_rows(indices, lengths, table, kv_length, q_starts, rows, G, T, K, pages, N, q_start, PAGE: tl.constexpr, GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr,
              FROM_LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK keys of one list."""
    x = tl.program_id(0).to(tl.int64)
    t, b = x % T, x // T // G
    limit, start = place_of(b, T, pages * PAGE, q_start, q_starts, kv_length, FROM_LENGTH)
    count = taken(lengths, x, K)
    first = tl.program_id(1) * BLOCK
    key, ok = keys_of(indices + x * K, first, count, limit, start + t, GRANULARITY, CAUSAL, BLOCK)
    page, there = page_of(table + b * pages, tl.where(ok, key, -1), limit, N, PAGE)
    place = first + tl.arange(0, BLOCK)
    tl.store(rows + x * K * GRANULARITY + place, tl.where(there, page * PAGE + key % PAGE, -1).to(tl.int32), mask=place < K * GRANULARITY)


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=128)


def default_config(problem):
    return {}


def artifacts(problem, config):
    arrays, numbers = ("indices", "lengths", "table", "kv_length", "rows"), ("G", "T", "K", "pages", "N", "q_start")
    return [{"fn": page_rows, "signature": dict.fromkeys(arrays, "*i32") | dict.fromkeys(numbers, "i32"), "options": {"num_warps": 4},
             "constexprs": dict(PAGE=64, GRANULARITY=granularity, CAUSAL=granularity > 1, FROM_LENGTH=True, BLOCK=BLOCK)} for granularity in (1, 64)]


def run(indices, table, kv_length, *, place, config, page_size, pages_of_pool, lengths=None, granularity=1, causal=False, q_start=None):
    B, G, T, K = indices.shape
    rows = place.empty((B, G, T, K * granularity), "int32")
    if rows.numel():
        host, starts = known_start(q_start)
        page_rows[(B * G * T, triton.cdiv(K * granularity, BLOCK))](indices, lengths, table, kv_length, starts, rows, G, T, K, table.shape[1], pages_of_pool, host or 0, PAGE=page_size,
                                                                   GRANULARITY=granularity, CAUSAL=causal, FROM_LENGTH=q_start is None, BLOCK=BLOCK, num_warps=4)
    return rows
