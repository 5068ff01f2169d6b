"""Launching a Triton kernel again (backends/triton/relaunch.py): what goes to the compiled kernel, and what makes a launch another one. The kernel stands in."""
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from triton import knobs  # noqa: E402

from sparsetile.backends import places  # noqa: E402
from sparsetile.backends.triton import relaunch  # noqa: E402

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


def test_profilers_see_every_launch(fn):
    constants, x, seen = relaunch.Constants(W=4, num=2), torch.zeros(64), []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        for _ in range(3):
            relaunch.launch(fn, (3,), Place(), (x, x), (5,), constants)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert fn.bound == 3 and not fn.calls
