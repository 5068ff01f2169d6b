"""The tuner's timing on a GPU: a call recorded in a graph takes the time that events give it, what refuses to be recorded is timed by events and says so."""
import pytest

from sparsetile.autotune import graphs, tasks, timing, trial
from sparsetile.ops import dispatch

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def watch():
    return timing.Stopwatch(0, flush_mb=trial.FLUSH_MB)


def test_gpu_a_recorded_call_takes_the_time_that_events_give_it(watch):
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    call = lambda: a @ a
    call()
    (graph,), how = graphs.record([call], 0)
    eager, recorded = (min(watch.samples(one, 40)) for one in (call, graph))  # the suite's other processes are on the chip too
    assert how == "graph" and 0.8 < recorded / eager < 1.2, (recorded, eager)


def test_gpu_a_short_call_is_not_timed_with_the_host(watch):
    x = torch.zeros(16, device="cuda")
    (graph,), _ = graphs.record([x.zero_], 0)
    assert min(watch.samples(graph, 40)) < 20


def test_gpu_what_cannot_be_recorded_is_timed_by_events_and_the_device_lives(watch):
    x = torch.ones(8, device="cuda")
    made, how = graphs.record([lambda: x.sum().item()], 0)
    assert made is None and how.startswith("events: ") and float(x.sum()) == 8


@pytest.mark.parametrize("backend", ["triton", "cupy"])
@pytest.mark.parametrize("name", ["gpu/merge-1024", "gpu/absorb-1024", "gpu/topk-128x131072", "gpu/blocks-64"])
def test_gpu_finals_of_real_kernels(name, backend):
    bench = trial.Bench(0)
    bench.open(tasks.find(name), 0)
    facts = bench.facts()
    if facts["refused"][backend]:
        pytest.skip(facts["refused"][backend])
    module = dispatch.kernel(backend, tasks.find(name).kernel)
    default = module.default_config(facts["problem"])
    why = getattr(module, "captures", lambda config: None)(default)
    for recorded in (True, False):
        (samples,), about = bench.finals([(backend, default)], 0.2, (0,), recorded)
        assert len(samples) >= 5 and about["launch"] == ("events: as asked" if not recorded else f"events: {why}" if why else "graph"), about
    assert facts["unit"]
