"""Every value of every knob answers right: from each kernel's default config, one knob at a time, on the small twins of the tuner's workloads."""
import pytest
from drivers import LARGE

from sparsetile.autotune import tasks, verify
from sparsetile.ops import dispatch

KERNELS = ("block_attention", "block_attention_backward", "gather_attention", "gather_attention_backward", "indexer_scores", "indexer_scores_backward", "indexer_topk", "topk",
           "latent_decompress", "grouped_matmul", "merge_attention")


def twins(kernel):
    """Of a kernel's workloads, those that differ at all once they are small."""
    found = {}
    for w in tasks.workloads():
        if w.kernel == kernel:
            found.setdefault((w.dtype, w.small().sizes, w.options), w)
    return list(found.values())


def neighbours(kernel, problem):
    """The default config, and those that differ from it in one knob; what `resources` refuses is not asked for."""
    default = dict(kernel.default_config(problem))
    yield "default", default
    for knob in kernel.TUNABLES:
        for value in knob.values:
            config = {**default, knob.name: value}
            if value != default.get(knob.name) and not isinstance(kernel.resources(problem, config), str):
                yield f"{knob.name}={value}", config


@pytest.mark.parametrize("backend", LARGE)
@pytest.mark.parametrize("name", KERNELS)
def test_one_knob_at_a_time(on, backend, name):
    if not dispatch.has_kernel(backend, name):
        pytest.skip(f"{backend} has no {name} kernel")
    kernel = dispatch.kernel(backend, name)
    tried, wrong = 0, []
    for workload in twins(name):
        verifier = verify.Verifier(workload, None if backend in ("reference", "numba") else 0)
        problem = verifier.task.problem
        if kernel.supports(problem) is not None:
            continue
        for label, config in neighbours(kernel, problem):
            tried += 1
            error = verifier.wrong(backend, config)
            if error:
                wrong.append(f"{workload.name} with {label}: {error}")
    if not tried:
        pytest.skip(f"{backend}: supports none of the twins: {kernel.supports(problem)}")
    assert not wrong, "\n".join(wrong)
