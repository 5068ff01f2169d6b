"""Every op on CuPy arrays in a Python that finds no torch: python without_torch.py answers.npz (tests/test_gpu.py compares them with the same kernels' on torch tensors)."""
import sys
from importlib.machinery import PathFinder

import numpy as np

import sparsetile as st


class Without(PathFinder):
    """The path, without torch on it."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else super().find_spec(name, path, target)


def answers(put, **options) -> dict:
    """name -> what the op gives for arrays that `put` has made of NumPy's."""
    rng = np.random.default_rng(7)
    x = put(rng.standard_normal((1, 2, 64, 64)).astype(np.float16))
    few, scores, weights = put(rng.integers(-2, 70, (1, 1, 64, 5)).astype(np.int32)), put(rng.standard_normal((1, 64, 90)).astype(np.float32)), put(rng.random((1, 2, 64)).astype(np.float32))
    attend = lambda rule: st.sparse_attention(x, x, x, rule, return_lse=True, **options)  # noqa: E731
    found = dict(window=attend(st.Causal() & (st.Window(9) | st.Sink(1))), strided=attend(st.Causal() & (st.Window(3) | st.Strided(8))), selection=attend(st.Selection(few)),
                 merge=st.merge_attention([x, x + x], [weights, weights], **options), scores=st.indexer_scores(x, x[:, 0], weights, **options),
                 indexer_topk=st.indexer_topk(x, x[:, 0], weights, 7, **options), topk=st.topk(scores, 7, **options), decompress=st.latent_decompress(x[0], x[0], x[0], k_rope=x[0], **options))
    found |= {mode: st.latent_attention(x, x, x[0, :1], x[0, 1:], x[0], x[0], st.Causal(), mode=mode, **options) for mode in ("absorbed", "decompressed")}
    arrays = {name: (got.indices, got.lengths) if isinstance(got, st.Selection) else got if isinstance(got, tuple) else (got,) for name, got in found.items()}
    return {f"{name}.{n}": array for name, several in arrays.items() for n, array in enumerate(several)}


if __name__ == "__main__":
    sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
    import cupy
    found = {f"{backend}.{name}": array for backend in ("cupy", "auto") for name, array in answers(cupy.asarray, backend=backend).items()}
    assert "torch" not in sys.modules and all(isinstance(array, cupy.ndarray) for array in found.values())
    np.savez(sys.argv[1], **{name: cupy.asnumpy(array) for name, array in found.items()})
