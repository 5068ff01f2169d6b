"""What Native Sparse Attention keeps while it generates: keys and values, and their compressed rows, each made once its block is complete."""
from sparsetile.ops import array_operators as xp
from sparsetile.ops import checks
from sparsetile.systems.compression import mean
from sparsetile.systems.nsa import attend, branches


class NativeSparseCache:
    """Room for `capacity` positions of every sequence of a batch.

        cache = NativeSparseCache(k, v, capacity)      # k, v as of native_sparse_attention: one array or a triple, for their types, heads and widths; nothing of them is kept
        cache.append(k, v)                             # prefill, then token by token
        out = cache.attend(q, gates, window=512)       # queries at the end of what was appended

    compression, block, stride   as in native_sparse_attention; compressed rows are made when their last key arrives, and not again
    lengths   [B] int32, beside the keys: how many positions each sequence holds. append and attend read and write device memory only, so both may stand in a CUDA graph; the
              host counts what it was given (`filled`, the longest sequence), and a replay is not counted.
    NumPy, PyTorch and CuPy. Not differentiable: decoding only. Bytes per token and key head: (D + Dv) * itemsize * (1 + 1 / stride), of separate branches * (3 + 1 / stride).
    """

    def __init__(self, k, v, capacity: int, *, compression="mean", block=32, stride=16):
        ks, vs = branches("k", k), branches("v", v)
        self.capacity = checks.integer("capacity", capacity, 1, 2 ** 31 - 1)
        self.block, self.stride = checks.integer("block", block, 1, 2 ** 30), checks.integer("stride", stride, 1, 2 ** 30)
        if xp.kind(ks[0]) == "jax":
            raise TypeError("k: expected a NumPy, PyTorch or CuPy array, got a JAX array, which cannot be written in place; keep k and v yourself and call native_sparse_attention")
        pair = compression if isinstance(compression, (tuple, list)) else (compression, compression)
        self.compression = tuple(mean if isinstance(how, str) and how == "mean" else how for how in pair)
        rows = max(0, (self.capacity - self.block) // self.stride + 1)
        self.k, self.v = ([_zeros(x, self.capacity) for x in parts] if parts[0] is not parts[1] else [_zeros(parts[0], self.capacity)] * 3 for parts in (ks, vs))
        self.compressed_k, self.compressed_v = _zeros(ks[0], rows), _zeros(vs[0], rows)
        self.lengths, self.filled = xp.full(ks[0], (int(ks[0].shape[0]),), 0), 0

    def append(self, k, v, lengths=None) -> None:
        """k, v [B,Hk,T,D], as the constructor's: the next T positions of each sequence, or of those the first lengths [B] int32 (0..T). Past the capacity: ValueError, nothing changes."""
        ks, vs = branches("k", k), branches("v", v)
        B, T = int(ks[0].shape[0]), int(ks[0].shape[2])
        if self.filled + T > self.capacity:
            raise ValueError(f"k: expected at most {self.capacity - self.filled} more positions, got {T}; make a larger cache (capacity {self.capacity}) and append to it what this one holds")
        lib = xp.module(self.lengths)
        rows, batch = self.lengths[:, None] + xp.arange(self.lengths, T), xp.arange(self.lengths, B)[:, None]      # [B,T], [B,1]
        for held, given in (*zip(self.k, ks), *zip(self.v, vs)):
            held[batch, :, rows] = _plain(given).swapaxes(1, 2)                                                    # [B,T,Hk,D]
        self.lengths[:] = self.lengths + (T if lengths is None else lib.clip(checks.lengths("lengths", lengths, (B,), "[B]"), 0, T))
        self.filled += T
        if self.compressed_k.shape[2]:
            self._compress(batch, T)

    def _compress(self, batch, T):
        """The last compressed rows that T new positions may have completed, and one more: made again from the same keys a row stays as it is. One that is not complete
        yet is written to row 0, which no query sees before it is complete."""
        last = (self.lengths - self.block) // self.stride
        which = xp.module(last).clip(last[:, None] - xp.arange(last, min(T // self.stride + 1, int(self.compressed_k.shape[2]))), 0, None)   # [B,n]
        rows = which[..., None] * self.stride + xp.arange(last, self.block)                                        # [B,n,block]
        for held, source, how in ((self.compressed_k, self.k[0], self.compression[0]), (self.compressed_v, self.v[0], self.compression[1])):
            blocks = source[batch[..., None], :, rows].swapaxes(2, 3).swapaxes(1, 2)                               # [B,Hk,n,block,D]
            held[batch, :, which] = _plain(how(blocks)).swapaxes(1, 2)

    def attend(self, q, gates, **options):
        """native_sparse_attention of q [B,Hq,T,D], the last T positions appended, with its knobs but for those of compression, kv_length and q_start."""
        return attend(q, self.k, self.v, self.compressed_k, self.compressed_v, gates, block=self.block, stride=self.stride, kv_length=self.lengths, **options)


def _zeros(like, rows):
    """[B,Hk,rows,D] of zeros beside `like` [B,Hk,S,D]."""
    shape = *like.shape[:2], rows, like.shape[3]
    return like.new_zeros(shape) if xp.kind(like) == "torch" else xp.module(like).zeros(shape, like.dtype)


def _plain(x):
    return x.detach() if xp.kind(x) == "torch" else x
