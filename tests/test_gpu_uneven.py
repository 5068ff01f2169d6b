"""The ordered backward on layouts of very uneven rows, also while 16 multiprocessors are taken (ci/gpu.sh uneven runs a thousand of them)."""
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cupy")

from drivers import through  # noqa: E402

from sparsetile.ci import uneven  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ORDERED = dict(cupy="cupy.block_attention_backward.run_hopper", triton="triton.block_attention_backward_gluon.launch_ordered")


@pytest.mark.parametrize("backend", ORDERED)
def test_forty_layouts_of_very_uneven_rows(backend):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the ordered backward is Hopper's")
    with through(ORDERED[backend]):
        uneven.run(torch, backend, range(40), judged=13)
