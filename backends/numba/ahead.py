"""What the next tile will be the first to read, asked for a row or two at each register tile, so that it comes while products run.

All at once would hold the few lines that may be on their way to the nearest cache, and what the products read would wait behind them: that gains nothing.

A list at an address: where its next entry is, then entries of int64 (address, row step, bytes of a row, rows left); one without rows ends it.
"""
from sparsetile.backends.numba.jit import kernel
from sparsetile.backends.numba.simd import I64, VECTORS, put_i64

ENTRY = 32
ROOM = 8 + ENTRY * 9
ROWS = 2  # at each register tile: a window's tile has some 180 and more, for four to seven times its 64 rows


def ask_next(e, asks, rows, cols):
    """The next rows of a list, for emitters, at a register tile of full size: the others are few, and each would be compiled."""
    b = e.b
    for _ in range(ROWS if (rows, cols) == (6, VECTORS) else 0):
        entry = e.load(asks, 0, I64)
        left = e.load(entry, 24, I64)
        with b.if_then(b.icmp_signed(">", left, e.i(0))):
            source, step, size = (e.load(entry, at, I64) for at in (0, 8, 16))
            e.loop(size, [], lambda k, _: (e.fetch(e.add(source, k)), [])[1], 64)
            e.store(e.add(source, step), entry)
            e.store(b.sub(left, e.i(1)), entry, 24)
            e.store(b.select(b.icmp_signed("==", left, e.i(1)), e.add(entry, ENTRY), entry), asks)


@kernel
def ask_for(asks, n, source, step, size, rows):
    """Rows as the n-th entry of a list, and the last; n = 0 begins it anew. Returns how many there are then: none without rows."""
    entry = asks + 8 + ENTRY * n
    if n == 0:
        put_i64(asks, 0, entry)
    put_i64(entry, 0, source)
    put_i64(entry, 1, step)
    put_i64(entry, 2, size)
    put_i64(entry, 3, rows)
    if rows <= 0:
        return n
    put_i64(entry, 7, 0)
    return n + 1
