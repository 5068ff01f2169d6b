"""Every value of every knob answers right: from each kernel's default config, one knob at a time, on the small twins of the tuner's workloads."""
import pytest
from drivers import LARGE

from sparsetile.autotune import tasks, verify
from sparsetile.backends.contract import TUNED
from sparsetile.ops import dispatch

# kernel -> parts that its configs are dealt into, so that several processes share what takes long to compile
PARTS = {"block_attention": 8, "block_attention_backward": 8, "gather_attention": 2, "gather_attention_backward": 2, "importance_topk": 1, "indexer_scores": 1, "indexer_scores_backward": 1, "indexer_topk": 6, "topk": 3,
           "latent_decompress": 2, "grouped_matmul": 2, "merge_attention": 1, "selection_bitmaps": 1}


def test_every_tuned_kernel_is_here():
    assert {*PARTS} == {*TUNED} == {w.kernel for w in tasks.workloads()}


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
@pytest.mark.parametrize("name, part", [(name, part) for name, parts in PARTS.items() for part in range(parts)])
def test_one_knob_at_a_time(on, backend, name, part):
    if not dispatch.has_kernel(backend, name):
        pytest.skip(f"{backend} has no {name} kernel")
    kernel = dispatch.kernel(backend, name)
    seen, tried, wrong = 0, 0, []
    for workload in twins(name):
        verifier = verify.Verifier(workload, None if backend in ("reference", "numba") else 0)
        problem = verifier.task.problem
        if kernel.supports(problem) is not None:
            continue
        for label, config in neighbours(kernel, problem):
            seen += 1
            if (seen - 1) % PARTS[name] != part:
                continue
            tried += 1
            error = verifier.wrong(backend, config)
            if error:
                wrong.append(f"{workload.name} with {label}: {error}")
    if not seen:
        pytest.skip(f"{backend}: supports none of the twins: {kernel.supports(problem)}")
    if not tried:
        pytest.skip(f"{backend}: the {seen} configs of {name} are in the parts before")
    assert not wrong, "\n".join(wrong)
