"""The CuPy backend's append, run on the CPU as it is written (cuda_on_cpu.py): byte for byte what the reference writes, which the golden file and the formats judge."""
import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import CXX, CpuPlace

from sparsetile.backends.contract import Problem
from sparsetile.backends.cupy import append
from sparsetile.backends.reference import append as reference

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ compiles the kernels for the CPU, and is not there")
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TABLE = np.array([[4, 0, 2, -1], [1, 2 ** 31 - 1, 3, -2 ** 31], [-7, 99, 5, 6]], np.int32)  # three sequences, garbage among their pages


def both(form, rows, shapes, kind, **options):
    """Bytes of the pools after the kernel, and after the reference."""
    place, found = CpuPlace(), []
    for run, put, where in ((append.run, place.put, place), (reference.run, lambda x: x, None)):
        pools = [np.full(shape, 0x11, np.uint8).view(TYPES[kind]) if form == "copy" else np.full(shape, 0x11, np.uint8) for shape in shapes]
        given = {name: put(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        run(tuple(map(put, rows)), tuple(map(put, pools)), put(TABLE), put(np.array([3, 0, 5], np.int32)), place=where, config={}, form=form, **given)
        found.append([pool.tobytes() for pool in pools])
    return found


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("widths, ring", [((16, 8), None), ((5, 3), None), ((16, 8), (1, 3)), ((7, 16), (0, 4))])
def test_copies(kind, widths, ring, rng):
    assert append.supports(Problem.of("append", dict(B=3, T=7, D=widths[0]), dict(rows=kind, pool=kind), "sm_80", ["copy"])) is None
    size = np.dtype(TYPES[kind]).itemsize
    rows = [rng.standard_normal((3, 2, 7, width)).astype(TYPES[kind]).transpose(0, 2, 1, 3) for width in widths]
    got, want = both("copy", rows, [(7, 4, 2, width * size) for width in widths], kind, page_size=4, ring=ring, counts=np.array([7, 2, 5], np.int32))
    assert got == want and any(byte != 0x11 for byte in got[0])


@pytest.mark.parametrize("kind, power_of_two", [("float32", True), ("bfloat16", False), ("float16", False)])
def test_float8(kind, power_of_two, rng):
    """Magnitudes from denormal to huge, zeros, NaN and inf."""
    latent = rng.standard_normal((3, 6, 256)) * np.exp2(rng.integers(*((-12, 12) if kind == "float16" else (-150, 120)), (3, 6, 256 // 32)).repeat(32, -1))
    with np.errstate(over="ignore"):
        latent, rotary = latent.astype(np.float32).astype(TYPES[kind]), rng.standard_normal((3, 6, 10)).astype(TYPES[kind])
    latent[0, 0], latent[0, 1, 3], latent[1, 0, 200] = 0, np.nan, np.inf
    for form, rows, shape, page_size in (("latent_fp8", (latent, rotary), (7, 4, 256 + 8 + 20), 4), ("latent_fp8", (latent,), (7, 2, 256 + 8), 2), ("indexer_fp8", (latent[..., :96],), (7, 4 * 100), 4)):
        got, want = both(form, rows, [shape], kind, page_size=page_size, power_of_two=power_of_two)
        assert got == want and any(byte != 0x11 for byte in got[0])
