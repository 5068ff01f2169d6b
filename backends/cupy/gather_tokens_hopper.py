"""Path "tokens" of gather_attention: few heads of DeepSeek's latent by warpgroup products whose rows are tokens (gather_tokens_hopper.cu).

A product has at least 64 rows. Heads as rows (path "hopper") pad 8 heads to 64; tokens as rows and heads as columns multiply 8, 16 or 32 heads, and read each gathered
tile twice instead of multiplying it eight times. More heads than 32 gather their tokens once for each 32.
"""
import math

from sparsetile.backends.contract import Resources, Unsupported
from sparsetile.backends.cupy import compile as nvrtc
from sparsetile.backends.cupy.operands import KINDS, POSITIONS, SELECTED, ceil_div, position_values, selected_values

FIELDS = "5Q" + SELECTED + POSITIONS + "4q3iI2f"
SOURCE, SLOT, MOST = "gather_tokens_hopper", 3 * 64 * 128, 32  # MOST: heads that gather their tokens once


def heads_of(Hq: int) -> int:
    """Columns of a product."""
    return 8 if Hq <= 8 else 16 if Hq <= 16 else MOST


def threads(heads: int) -> int:
    return 128 * (4 if heads == 32 else 5)  # up to 16 heads two warpgroups take turns at the scores


def shared_bytes(heads: int) -> int:
    slots, query, groups = (9, 0, 1) if heads == 32 else (8, 9 * 128, 2)  # 32 heads: the query stands in registers
    return slots * (SLOT + 16 + 3 * 8) + heads * (query + 2 * 128 + 48 * groups + 20) + 16 + 2 * (32 if heads == 32 else 16) + 4 * 8


def resources(Hq: int) -> Resources:
    heads = heads_of(Hq)
    return Resources(threads(heads), shared_bytes(heads), 128 if heads == 32 else 96)


def artifacts(kind: str, Hq: int) -> list[dict]:
    return [dict(source=SOURCE, defines=dict(KIND=KINDS[kind], HEADS=heads_of(Hq)), names=[SOURCE])]


def run(q, k, indices, out, lse, place, lengths, causal, scale, sink_logits, kv_length, q_start):
    (B, Hq, T, _), S = q.shape, k.shape[2]
    heads = heads_of(Hq)
    parts = ceil_div(Hq, heads)
    items = B * T * parts
    if items >= 2 ** 31:
        raise Unsupported(f"CuPy gather attention takes at most 2^31 - 1 tiles of {heads} heads, not {items}; split the batch")
    function = nvrtc.function(SOURCE, SOURCE, FIELDS, dict(KIND=KINDS[q.dtype], HEADS=heads), place)
    strides = [2 * s for s in (*q.strides[:3], k.strides[0])]
    function(min(items, max(place.sms, 1)), threads(heads), shared_bytes(heads), place.stream, q.ptr, k.ptr, out.ptr, nvrtc.ptr(lse), nvrtc.ptr(sink_logits),
             *selected_values(indices, lengths, 1, causal), *position_values(T, S, kv_length, q_start), *strides, Hq, parts, items, 2 * k.strides[2], scale, scale * math.log2(math.e))
    return out, lse
