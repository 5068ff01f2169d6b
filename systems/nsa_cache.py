"""What Native Sparse Attention keeps while it generates: keys and values, and their compressed rows, each made once its block is complete."""
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.systems.compression import pair, rows_of
from sparsetile.systems.nsa import attend, branches


class NativeSparseCache:
    """Room for `capacity` positions of every sequence of a batch.

        cache = NativeSparseCache(k, v, capacity)      # k, v as of native_sparse_attention: one array or a triple, for their types, heads and widths; nothing of them is kept
        cache.append(k, v)                             # prefill, then token by token
        out = cache.attend(q, gates, window=512)       # queries at the end of what was appended

    compression, block, stride   as in native_sparse_attention; compressed rows are made when their last key arrives, and not again
    lengths   [B] int32, beside the keys: how many positions each sequence holds. append and attend read and write device memory only, so both may stand in a CUDA graph; the
              host counts what it was given (`filled`, at least the longest sequence), and a replay is not counted: what it brings past the capacity is dropped.
    NumPy, PyTorch and CuPy. Not differentiable: decoding only. Bytes per token and key head: (D + Dv) * itemsize * (1 + 1 / stride), of separate branches * (3 + 1 / stride).
    """

    def __init__(self, k, v, capacity: int, *, compression="mean", block=32, stride=16):
        ks, vs = branches("k", k), branches("v", v)
        self.capacity = checks.integer("capacity", capacity, 1, 2 ** 31 - 1)
        self.block, self.stride = checks.integer("block", block, 1, 2 ** 30), checks.integer("stride", stride, 1, 2 ** 30)
        if xp.kind(ks[0]) == "jax":
            raise TypeError("k: expected a NumPy, PyTorch or CuPy array, got a JAX array, which cannot be written in place; keep k and v yourself and call native_sparse_attention")
        self.compression = pair(compression)
        rows = max(0, (self.capacity - self.block) // self.stride + 1)
        self.k, self.v = ([_zeros(x, self.capacity + 1) for x in (parts if isinstance(given, (tuple, list)) else parts[:1])] for given, parts in ((k, ks), (v, vs)))
        self.compressed_k, self.compressed_v = _zeros(ks[0], rows), _zeros(vs[0], rows)
        self.lengths, self.filled = xp.full(ks[0], (int(ks[0].shape[0]),), 0), 0

    def append(self, k, v, lengths=None) -> None:
        """k, v [B,Hk,T,D], as the constructor's: the next T positions of each sequence, or of those the first lengths [B] int32 (0..T). Past the capacity: ValueError, nothing changes."""
        given = self._given("k", k, self.k), self._given("v", v, self.v)
        B, T = int(self.lengths.shape[0]), int(given[0][0].shape[2])
        checks.same("v", "number of positions of k", T, int(given[1][0].shape[2]), "one value for each key")
        if self.filled + T > self.capacity:
            raise ValueError(f"k: expected at most {self.capacity - self.filled} more positions, got {T}; make a larger cache (capacity {self.capacity}) and append to it what this one holds")
        lib = xp.module(self.lengths)
        checks.lengths("lengths", lengths, (B,), "[B]")
        rows, batch = self.lengths[:, None] + xp.arange(self.lengths, T), xp.arange(self.lengths, B)[:, None]      # [B,T], [B,1]
        rows = lib.clip(rows, 0, self.capacity)                                                                    # row `capacity` takes what a replay brings past it
        for parts, new in zip((self.k, self.v), given):
            for held, x in zip(parts, new):
                held[batch, :, rows] = _plain(x).swapaxes(1, 2)                                                    # [B,T,Hk,D]
        self.lengths[:] = lib.clip(self.lengths + (T if lengths is None else lib.clip(lengths, 0, T)), 0, self.capacity)
        self.filled += T
        if self.compressed_k.shape[2]:
            self._compress(batch, T)

    def _given(self, name, x, held):
        """The arrays of a branch each, or of all branches, checked against those held: nothing is broadcast or cast."""
        parts = branches(name, x)
        given = parts if isinstance(x, (tuple, list)) else parts[:1]
        checks.same(name, "number of arrays", len(held), len(given), "one array or a triple, as the cache was made with")
        for part, keys in zip(given, held):
            checks.same(name, "shape [B,Hk,T,D]", [*keys.shape[:2], part.shape[2], keys.shape[3]], list(part.shape), "one row for each new position of every sequence")
            checks.same(name, "element type", str(keys.dtype), str(part.dtype), "convert it to the cache's type")
        return given

    def _compress(self, batch, T):
        """The last compressed rows that T new positions may have completed, and one more: made again from the same keys a row stays as it is. One that is not complete
        yet is written to row 0, which no query sees before it is complete."""
        last = (self.lengths - self.block) // self.stride
        which = xp.module(last).clip(last[:, None] - xp.arange(last, min(T // self.stride + 1, int(self.compressed_k.shape[2]))), 0, None)   # [B,n]
        rows = which[..., None] * self.stride + xp.arange(last, self.block)                                        # [B,n,block]
        for name, held, source, how in (("k", self.compressed_k, self.k[0], self.compression[0]), ("v", self.compressed_v, self.v[0], self.compression[1])):
            blocks = source[batch[..., None], :, rows].swapaxes(2, 3).swapaxes(1, 2)                               # [B,Hk,n,block,D]
            held[batch, :, which] = _plain(rows_of(name, blocks, how)).swapaxes(1, 2)

    def attend(self, q, gates, **options):
        """native_sparse_attention of q [B,Hq,T,D], the last T positions appended, with its knobs but for those of compression, kv_length and q_start."""
        ks, vs = ([x[:, :, :self.capacity] for x in parts] * (3 // len(parts)) for parts in (self.k, self.v))
        return attend(q, ks, vs, self.compressed_k, self.compressed_v, gates, block=self.block, stride=self.stride, kv_length=self.lengths, **options)


def _zeros(like, rows):
    """[B,Hk,rows,D] of zeros beside `like` [B,Hk,S,D]."""
    shape = *like.shape[:2], rows, like.shape[3]
    return like.new_zeros(shape) if xp.kind(like) == "torch" else xp.module(like).zeros(shape, like.dtype)


def _plain(x):
    return x.detach() if xp.kind(x) == "torch" else x
