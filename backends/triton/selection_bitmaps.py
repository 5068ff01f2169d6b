"""A selection as bitmaps of blocks, on the device, without a host round trip, CUDA-graph safe.

    indices [B,G,T,K] int32, lengths [B,G,T] or None  ->  bitmaps [B*G*nq*nk, block_q, block_k / 32] int32, kinds [B*G, nq, nk] int32

Row t stands in block t // block_q; bit c % 32 of word c // 32 says whether it sees key j * block_k + c. Kind -2: no row of the block sees a key of it, else 2 n + 1 for row n of the bitmaps.
Holes, `lengths` and causality as in gather_attention; an entry given twice shows once.
Four entries that follow each other are joined first where they lie in one word of 32 keys, so that words, not entries, meet in the second-level cache; no matter in which order entries stand.
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Resources, Tunable
from sparsetile.backends.triton.tiles import place_of, taken

TUNABLES = (Tunable("entries", (1024, 256, 512, 2048), "keys of a row taken at a time"),)


@triton.jit
def _four(x):
    """The columns of x [N,4], which lie in one thread."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _bit(key):
    """A key's bit in its word; none of a hole."""
    return tl.where(key != 0xFFFFFFFF, tl.full(key.shape, 1, tl.uint32) << (key % 32), 0)


@triton.jit
def _leave(bitmaps, kinds, word, bits, next_word, block, row, BQ: tl.constexpr, WORDS: tl.constexpr):
    """Bits of a word of a row, if the next entry's is another one; a block is known to be seen by its last word."""
    column = word // WORDS
    tl.atomic_or(bitmaps + ((block + column.to(tl.int64)) * BQ + row) * WORDS + word % WORDS, bits.to(tl.int32, bitcast=True), mask=(bits != 0) & (word != next_word), sem="relaxed")
    tl.store(kinds + block + column.to(tl.int64), (2 * (block + column.to(tl.int64)) + 1).to(tl.int32), mask=(bits != 0) & (column != next_word // WORDS))


@triton.jit(do_not_specialize=["G", "T", "S", "nk", "q_start"])
def single_keys(indices, lengths, kv_length, q_starts, bitmaps, kinds, G, T, S, K, nq, nk, q_start, GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr,
                FROM_LENGTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ENTRIES: tl.constexpr, FOURS: tl.constexpr):
    """One row by one program, key after key, four in a thread. FOURS: single keys, K a multiple of 16: they are read at once."""
    t = tl.program_id(0) % T  # CUDA's grids are long in x alone
    line = (tl.program_id(0) // T).to(tl.int64)
    limit, start = place_of(line // G, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    if CAUSAL:
        limit = tl.minimum(limit.to(tl.int64), tl.maximum(start + t + 1, 0)).to(tl.int32)
    row = line * T + t
    count = taken(lengths, row, K)
    block = (line * nq + t // BQ) * nk
    WORDS: tl.constexpr = BK // 32
    for at in tl.range(0, count * GRANULARITY, ENTRIES):
        fours = (at + tl.arange(0, ENTRIES // 4) * 4)[:, None]
        place = fours + tl.arange(0, 4)[None, :]
        entry = tl.load(indices + row * K + place // GRANULARITY, mask=fours < K if FOURS else place // GRANULARITY < count, other=-1)
        ok = (entry >= 0) & (entry < (limit + GRANULARITY - 1) // GRANULARITY) & (place // GRANULARITY < count)  # before the product: an entry may be anything
        key = tl.where(ok, entry, 0) * GRANULARITY + place % GRANULARITY
        ok = ok & (key < limit)
        key = tl.where(ok, key.to(tl.uint32), 0xFFFFFFFF)  # a hole is in a word of its own
        a, b, c, d = _four(key)
        x = _bit(a)
        y = _bit(b) | tl.where(a // 32 == b // 32, x, 0)
        z = _bit(c) | tl.where(b // 32 == c // 32, y, 0)
        u = _bit(d) | tl.where(c // 32 == d // 32, z, 0)
        none = tl.full(a.shape, 0xFFFFFFFF, tl.uint32)
        _leave(bitmaps, kinds, a // 32, x, b // 32, block, t % BQ, BQ, WORDS)
        _leave(bitmaps, kinds, b // 32, y, c // 32, block, t % BQ, BQ, WORDS)
        _leave(bitmaps, kinds, c // 32, z, d // 32, block, t % BQ, BQ, WORDS)
        _leave(bitmaps, kinds, d // 32, u, none, block, t % BQ, BQ, WORDS)


@triton.jit(do_not_specialize=["G", "T", "S", "K", "nk", "q_start"])
def whole_words(indices, lengths, kv_length, q_starts, bitmaps, kinds, G, T, S, K, nq, nk, q_start, GRANULARITY: tl.constexpr, CAUSAL: tl.constexpr,
                FROM_LENGTH: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ENTRIES: tl.constexpr):
    """The same where entries are whole words of 32 keys."""
    t = tl.program_id(0) % T  # CUDA's grids are long in x alone
    line = (tl.program_id(0) // T).to(tl.int64)
    limit, start = place_of(line // G, T, S, q_start, q_starts, kv_length, FROM_LENGTH)
    row = line * T + t
    count = taken(lengths, row, K)
    if CAUSAL:
        limit = tl.minimum(limit.to(tl.int64), tl.maximum(start + t + 1, 0))
    block = (line * nq + t // BQ) * nk
    WORDS: tl.constexpr = GRANULARITY // 32
    for at in tl.range(0, count * WORDS, ENTRIES):
        place = at + tl.arange(0, ENTRIES)
        entry = tl.load(indices + row * K + place // WORDS, mask=place // WORDS < count, other=-1)
        ok = (entry >= 0) & (entry <= limit // GRANULARITY)
        word = tl.where(ok, entry, 0) * WORDS + place % WORDS
        seen = tl.minimum(tl.maximum(limit - word.to(tl.int64) * 32, 0), 32).to(tl.int32)
        ok = ok & (seen > 0)
        bits = (tl.full([ENTRIES], 0xFFFFFFFF, tl.uint32) >> tl.minimum(32 - seen, 31).to(tl.uint32)).to(tl.int32, bitcast=True)
        column = block + word // (BK // 32)
        tl.store(bitmaps + (column * BQ + t % BQ) * (BK // 32) + word % (BK // 32), bits, mask=ok)
        tl.store(kinds + column, (2 * column + 1).to(tl.int32), mask=ok)


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=128, shared=4096)


def default_config(problem):
    return {"entries": 1024}


def artifacts(problem, config):
    numbers = {name: "i32" for name in ("G", "T", "S", "K", "nq", "nk", "q_start")}
    fn = whole_words if problem.granularity % 32 == 0 else single_keys
    arrays = {name: "*i32" for name in ("indices", "lengths", "kv_length", "q_starts", "bitmaps", "kinds")}
    constants = {"GRANULARITY": problem.granularity, "CAUSAL": "causal" in problem.features, "FROM_LENGTH": False, "BQ": 128, "BK": 128, "ENTRIES": config["entries"]}
    constants |= {"FOURS": problem.granularity == 1} if fn is single_keys else {}
    return [{"fn": fn, "signature": {**arrays, **numbers}, "constexprs": constants, "options": {"num_warps": 4}, "div16": tuple(arrays) + ("K",)}]


def run(indices, *, place, config, S, block_q, block_k, lengths=None, granularity=1, causal=False, kv_length=None, q_start=None):
    B, G, T, K = indices.shape
    nq, nk = -(-T // block_q), -(-S // block_k)
    bitmaps, kinds = place.zeros((B * G * nq * nk, block_q, block_k // 32), "int32"), place.full((B * G, nq, nk), "int32", -2)
    host = q_start if isinstance(q_start, int) else None
    words = granularity // 32 if granularity % 32 == 0 else granularity
    if K:
        fn, more = (whole_words, {}) if granularity % 32 == 0 else (single_keys, dict(FOURS=granularity == 1 and K % 16 == 0))
        fn[(B * G * T,)](indices, lengths, kv_length, None if host is not None else q_start, bitmaps, kinds, G, T, S, K, nq, nk, host or 0, GRANULARITY=granularity, CAUSAL=bool(causal),
                       FROM_LENGTH=q_start is None, BQ=block_q, BK=block_k, ENTRIES=min(config["entries"], max(32, 1 << (K * words - 1).bit_length())), **more, num_warps=4)
    return bitmaps, kinds
