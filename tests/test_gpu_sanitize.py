"""The calls that ci/gpu.sh sanitize runs under compute-sanitizer come to the kernels that they are for."""
import pytest

torch = pytest.importorskip("torch")

from sparsetile.ci import sanitize_paths  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
both = pytest.mark.parametrize("backend", ["triton", "cupy"])
NAMES, PORTABLE = (list(cases(sanitize_paths.Make(torch, "cpu"), "cupy")) for cases in (sanitize_paths.paths, sanitize_paths.portable))


@both
@pytest.mark.parametrize("name", NAMES)
def test_calls_take_the_paths_that_they_are_for(backend, name):
    cases = sanitize_paths.paths(sanitize_paths.Make(torch), backend)
    sanitize_paths.take(backend, name, cases[name], torch.cuda.get_device_capability() == (9, 0))
    torch.cuda.synchronize()


@both
@pytest.mark.parametrize("name", PORTABLE)
def test_calls_for_racecheck_take_no_path_of_hopper(backend, name):
    cases = sanitize_paths.portable(sanitize_paths.Make(torch), backend)
    sanitize_paths.take(backend, name, cases[name], torch.cuda.get_device_capability() == (9, 0), only_portable=True)
    torch.cuda.synchronize()
