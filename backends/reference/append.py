"""New rows of a cache, quantised and scattered through a page table, NumPy.

    rows [B,n,...]  pools [N,page,...]  table [B,pages] int32  lengths [B] int32  counts [B] int32 or None  ->  written into the pools, in place

Row i < counts[b] of sequence b stands at position p = lengths[b] + i, in slot p; in a ring (pinned, window) in slot p < pinned ? p : pinned + (p - pinned) % window,
and of the rows that fall on one slot the last is written. Slot x lies in page table[b, x // page_size] at offset x % page_size. A row whose slot lies outside
the table, or whose page is not one of 0 .. N - 1, is skipped.

    form "copy"         rows[x] [B,n,H,C] -> pools[x] [N,page,H,C], the same bits
    form "latent_fp8"   rows (latent [B,n,R], rotary [B,n,P]) -> pools[0] [N,page,R + R/32 + 2P] bytes: R float8_e4m3fn, R/128 float32 scales, P bfloat16
    form "indexer_fp8"  rows[0] [B,n,D] -> pools[0] [N,page * (D + 4)] bytes: of all keys of the page D float8_e4m3fn each, then of all keys a float32 scale

A group of values (128 of a latent, a whole indexer key) is stored as float8(x / scale), nearest even, beside its scale = max |x| / 448, at least the smallest normal
float32; power_of_two: the next power of two that is not smaller. A group that holds NaN or inf is NaN, its scale too.
"""
import ml_dtypes
import numpy as np

from sparsetile.backends.contract import Resources

TUNABLES = ()
LARGEST, SMALLEST = np.float32(448), np.finfo(np.float32).tiny


def supports(problem):
    return None


def resources(problem, config):
    return Resources()


def default_config(problem):
    return {}


def quantise(x, power_of_two):
    """One group of values -> its float8 bytes and its scale."""
    x = x.astype(np.float32)
    if not np.isfinite(x).all():
        return np.full(len(x), 0x7F, np.uint8), np.float32(np.nan)
    scale = np.maximum(np.abs(x).max(initial=0) / LARGEST, SMALLEST)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)                                          # scale = mantissa * 2**exponent, mantissa in [1/2, 1)
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
    return np.clip(x / scale, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).view(np.uint8), np.float32(scale)


def latent_bytes(latent, rotary, power_of_two):
    groups = [quantise(group, power_of_two) for group in latent.reshape(-1, 128)]
    parts = [values for values, _ in groups] + [np.array([scale for _, scale in groups], "<f4").view(np.uint8)]
    return np.concatenate(parts + [r.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint8) for r in rotary])


def slots(start, count, ring):
    """(row, slot) of the rows that are written."""
    for i in range(count):
        p = start + i
        if p < 0:
            continue
        if ring is None or p < ring[0]:
            yield i, p
        elif p + ring[1] >= start + count:                                            # no later row of this call falls on its slot
            yield i, ring[0] + (p - ring[0]) % ring[1]


def run(rows, pools, table, lengths, *, place=None, config=None, form, page_size, counts=None, ring=None, power_of_two=False):
    B, n = rows[0].shape[:2]
    with np.errstate(all="ignore"):
        for b in range(B):
            count = n if counts is None else int(np.clip(counts[b], 0, n))
            for i, slot in slots(int(lengths[b]), count, ring):
                page, offset = divmod(slot, page_size)
                page = int(table[b, page]) if page < table.shape[1] else -1
                if not 0 <= page < len(pools[0]):
                    continue
                if form == "copy":
                    for row, pool in zip(rows, pools):
                        pool[page, offset] = row[b, i]
                elif form == "latent_fp8":
                    pools[0][page, offset] = latent_bytes(rows[0][b, i], [row[b, i] for row in rows[1:]], power_of_two)
                else:
                    D = rows[0].shape[2]
                    values, scale = quantise(rows[0][b, i], power_of_two)
                    pools[0][page, offset * D:(offset + 1) * D] = values
                    at = page_size * D + 4 * offset
                    pools[0][page, at:at + 4] = np.frombuffer(scale.astype("<f4").tobytes(), np.uint8)
