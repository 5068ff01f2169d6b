"""The named workloads of tuner and benchmarks, at their small twins' sizes, on every backend with its default config: one generator feeds all three."""
import pytest
from drivers import LARGE

from sparsetile.autotune import tasks, verify


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("name", [w.name for w in tasks.workloads()])
def test_small_twin(on, backend, name):
    import sparsetile
    verifier = verify.Verifier(tasks.find(name), None if backend in ("reference", "numba") else 0)
    try:
        assert verifier.wrong(backend, None) is None
    except sparsetile.Unsupported as refusal:
        pytest.skip(f"{backend}: {refusal}")
