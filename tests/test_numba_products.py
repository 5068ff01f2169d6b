"""Products with the weights of a head where whole register tiles fit: rows read and written in place, batches that end inside a tile, weights in either order."""
import numpy as np
import oracle
import pytest
from drivers import Driver, arrays, numpy_dtype
from judge import normal
from numeric import assert_close, assert_same_bits, plain

pytest.importorskip("numba")


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("B, S, R, Dn, Dv, P", [(2, 100, 150, 64, 128, 8), (1, 96, 512, 128, 40, 0), (3, 48, 32, 64, 64, 4)])
def test_whole_tiles(rng, dtype, B, S, R, Dn, Dv, P, turned):
    kind, H = numpy_dtype(dtype), 3
    wide = normal(rng, (B, S, R + 16), kind)
    latent = wide[:, :, :R]  # rows with a step of their own
    w_uk, w_uv = (np.ascontiguousarray(normal(rng, (H, R, n), kind, R ** -0.5).swapaxes(1, 2)).swapaxes(1, 2) if turned else normal(rng, (H, R, n), kind, R ** -0.5) for n in (Dn, Dv))
    how = dict(k_rope=normal(rng, (B, S, P), kind) if P else None)
    got, truths, measures = arrays(*Driver("numba").latent_decompress(latent, w_uk, w_uv, **how)), oracle.latent_decompress(latent, w_uk, w_uv, **how), plain.latent_decompress(latent, w_uk, w_uv, **how)
    for name, g, truth, measure in zip(("k", "v"), got, truths, measures):
        assert_close(name, g, truth, measure, reduction=R)
    if P:
        assert_same_bits("rotary part", got[0][..., Dn:], np.broadcast_to(how["k_rope"][:, None], (B, H, S, P)))
