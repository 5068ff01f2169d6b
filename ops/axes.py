"""One axis of a layout cut into blocks, at the block's size and at coarser ones: contiguous positions, or positions in a given order."""
import numpy as np


class Plain:
    """Positions first_pos <= x < last_pos in blocks aligned to multiples of `block`; block i starts at (first + i) * block."""
    modulus = 0
    order = None  # positions to show as an order although they are contiguous
    tail = None

    def __init__(self, first_pos: int, last_pos: int, block: int):
        self.first_pos, self.last_pos, self.block = first_pos, last_pos, block
        self.span = first_pos, last_pos
        self.first = first_pos // block if last_pos > first_pos else 0
        self.n = -(-last_pos // block) - self.first if last_pos > first_pos else 0

    def spans(self, fan: int):
        """For groups of `fan` blocks: first position, lowest and highest existing position, lowest and highest residue (None here)."""
        size = self.block * fan
        origin = (self.first * self.block) + np.arange(-(-self.n // fan), dtype=np.int64) * size
        return origin, np.maximum(origin, self.first_pos), np.minimum(origin + size, self.last_pos) - 1, None, None

    def positions(self, i):
        """[len(i), block] positions of blocks i."""
        return ((self.first + np.asarray(i, np.int64)) * self.block)[:, None] + np.arange(self.block)

    def exists(self, i):
        x = self.positions(i)
        return (x >= self.first_pos) & (x < self.last_pos)

    def shapes(self):
        """[n] integers: blocks with equal ones hold the same distances from their first position (holes aside)."""
        return np.zeros(self.n, np.int64)


class Ordered:
    """Positions in the order given, -1 where there is none; padded with -1 to whole blocks.

    modulus   residues of it ascend along the order (0: no such)
    tail      positions that the lists hold after all blocks and that see nothing
    """

    def __init__(self, order, block: int, modulus: int = 0, tail=None):
        order = np.asarray(order, np.int64)
        self.first, self.block, self.modulus, self.tail, self.n = 0, block, modulus, tail, -(-len(order) // block)
        self.order = np.full(self.n * block, -1, np.int64)
        self.order[:len(order)] = order
        self.span = 0, int(self.order.max(initial=0)) + 1

    def spans(self, fan: int):
        """As Plain.spans; the residues are those of the modulus."""
        size = self.block * fan
        n = -(-len(self.order) // size)
        grid = np.full(n * size, -1, np.int64)
        grid[:len(self.order)] = self.order
        grid = grid.reshape(n, size)
        there = grid >= 0
        far = np.iinfo(np.int64).max
        lo, hi = np.where(there, grid, far).min(1), np.where(there, grid, -1).max(1)
        lo = np.minimum(lo, hi + 1)  # an empty block: lo = 0, hi = -1
        if not self.modulus:
            return grid[:, 0], lo, hi, None, None
        residue = grid % self.modulus
        return grid[:, 0], lo, hi, np.where(there, residue, far).min(1), np.where(there, residue, -1).max(1)

    def positions(self, i):
        return self.order.reshape(-1, self.block)[i]

    def exists(self, i):
        return self.positions(i) >= 0

    def shapes(self):
        grid = self.order.reshape(self.n, self.block)
        distance = np.where(grid >= 0, grid - grid[:, :1], -1 - self.order.max(initial=0))
        number = {}  # rows compared as bytes: sorting them costs a hundred times more
        return np.fromiter((number.setdefault(row.tobytes(), len(number)) for row in distance), np.int64, self.n)
