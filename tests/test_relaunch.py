"""Launching a Triton kernel again (backends/triton/relaunch.py): what goes to the compiled kernel, and what makes a launch another one. The kernel stands in."""
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402

from sparsetile.autotune import tasks  # noqa: E402
from sparsetile.backends import places  # noqa: E402
from sparsetile.backends.contract import TUNED  # noqa: E402
from sparsetile.backends.triton import relaunch  # noqa: E402
from sparsetile.ops import dispatch  # noqa: E402

pytestmark = pytest.mark.skipif(not relaunch._KNOWN, reason="another Triton: every launch takes Triton's own way")


class Place(places.Place):
    device, stream, address = 0, 77, staticmethod(torch.Tensor.data_ptr)


class Fn:
    """A jitted function that counts how often Triton's own way was taken, and a compiled kernel that notes its arguments."""
    arg_names = ["x", "y", "n", "W", "num"]

    def __init__(self):
        self.bound, self.calls, self.function, self.packed_metadata = 0, [], "function", "metadata"

    def __getitem__(self, grid):
        def bind(*args, **constants):
            self.bound += 1
            return self
        return bind

    def run(self, *args):
        self.calls.append(args)


@pytest.fixture
def fn(monkeypatch):
    monkeypatch.setattr(relaunch, "_compiled", {})
    return Fn()


def test_the_same_again_goes_to_the_compiled_kernel_with_its_own_pointers(fn):
    constants = relaunch.Constants(W=4, num=2)
    x, y = torch.zeros(64), torch.zeros(64)
    relaunch.launch(fn, (3,), Place(), (x, None), (5,), constants)
    relaunch.launch(fn, (6, 2), Place(), (y, None), (5,), constants)
    assert fn.bound == 1
    assert fn.calls == [(6, 2, 1, 77, "function", "metadata", None, None, None, y.data_ptr(), None, 5, 4, 2)]


@pytest.mark.parametrize("what", ["number", "alignment", "absence", "constants", "kinds", "function"])
def test_what_triton_would_specialise_makes_another_launch(fn, what):
    constants = relaunch.Constants(W=4, num=2)
    x = torch.zeros(64)
    relaunch.launch(fn, (3,), Place(), (x, x), (5,), constants, ("a",))
    other = dict(number=((x, x), (1,), constants, ("a",)), alignment=((x[1:], x), (5,), constants, ("a",)), absence=((x, None), (5,), constants, ("a",)),
                 constants=((x, x), (5,), relaunch.Constants(constants), ("a",)), kinds=((x, x), (5,), constants, ("b",)), function=((x, x), (5,), constants, ("a",)))[what]
    second = Fn() if what == "function" else fn
    relaunch.launch(second, (3,), Place(), *other)
    assert not fn.calls and (fn.bound, second.bound) == ((1, 1) if what == "function" else (2, 2))


def test_a_choice_of_blocks_is_noted_and_repeated(monkeypatch):
    """importance_topk, path row, from the op's own ends on: after one run every launch can stand on a tape, which tells it the new addresses."""
    from sparsetile.backends import tape
    from sparsetile.backends.triton import importance_topk
    from sparsetile.ops import importance, ready
    kernel = Fn()
    monkeypatch.setattr(relaunch, "_compiled", {})
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, grid, warmup, **constants: kernel)

    class Chip(Place):
        arch, sms = "sm_90a", 132

        def empty(self, shape, dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype))

    def drawn():
        q, k, lse = torch.zeros(1, 32, 700, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 42, 64, dtype=torch.bfloat16), torch.zeros(1, 32, 700)
        call = importance.check(q, k, lse, 5, 32, 16, 64, 700, None, None, None, 1, 2, False, None, None)
        return q, k, lse, *importance.ends_of(call)

    def run(place, q, k, lse, key_end, block_end):
        return importance_topk.run(q, k, lse, 5, place=place, config=dict(path="row", queries=1, stages=2, scratch_mb=64), key_end=key_end, block_end=block_end, blocks=11, reach=2, step=4,
                                   scale=0.1, force_first=1, force_last=2)
    first, later = drawn(), drawn()
    assert all(x.is_contiguous() for x in first)
    run(Chip(), *first)
    recorder = tape.Recorder(Chip(), ready.NO_LISTS, natives := [x.detach() for x in first], first)
    made = recorder.tape(*run(recorder, *natives))
    assert made is not None and len(made.steps) == 2
    before = len(kernel.calls)
    indices, lengths = made(5, *later)
    score, choose = (call[9:] for call in kernel.calls[before:])
    q, k, lse, key_end, block_end = (x.data_ptr() for x in later)
    assert score[:3] == (q, k, lse) and score[5] == key_end and choose[1:5] == (key_end, block_end, indices.data_ptr(), lengths.data_ptr()) and choose[0] == score[7]


def test_profilers_see_every_launch(fn):
    constants, x, seen = relaunch.Constants(W=4, num=2), torch.zeros(64), []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        for _ in range(3):
            relaunch.launch(fn, (3,), Place(), (x, x), (5,), constants)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert fn.bound == 3 and not fn.calls


def test_another_triton_has_no_gluon(monkeypatch):
    """Gluon's names change from version to version: with another Triton every path that is written in it is refused in a sentence, and no default is one of them."""
    gluon, asked = ("gluon", "gluon_ordered", "latent", "tokens"), {}
    kernels = {name: dispatch.kernel("triton", name) for name in TUNED if dispatch.has_kernel("triton", name)}
    kernels = {name: kernel for name, kernel in kernels.items() if kernel.TUNABLES[0].name == "path" and "gluon" in kernel.TUNABLES[0].values}
    problems = [replace(tasks.Task(w, None, hollow=True).problem, arch="sm_90a") for w in tasks.workloads() if w.kernel in kernels]
    assert {p.op for p in problems if kernels[p.op].default_config(p)["path"] in gluon} == {*kernels} and len(kernels) >= 5
    monkeypatch.setattr(triton, "__version__", "3.7.0")
    for p in problems:
        default = kernels[p.op].default_config(p)
        assert default["path"] not in gluon
        for path in {*gluon} & {*kernels[p.op].TUNABLES[0].values}:
            asked.setdefault((p.op, path), []).append(kernels[p.op].resources(p, {**default, "path": path, "block_q": 128, "block_k": 128}))
    assert all(isinstance(x, str) for refused in asked.values() for x in refused)
    assert {key for key, refused in asked.items() if not any("is written for Triton 3.6, not 3.7.0" in x for x in refused)} == set()
