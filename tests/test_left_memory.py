"""Memory of CPU results: whole cache lines, taken again once nobody holds it, given back when shapes change."""
import pytest

from sparsetile.backends import host_memory, places

SHAPE, BYTES = (64, 1024), 64 * 1024 * 4


@pytest.fixture
def place():
    host_memory._LEFT.clear()
    yield places.NumpyPlace("numpy")
    host_memory._LEFT.clear()


def where(x):
    return x.__array_interface__["data"][0]


def test_memory_is_taken_again_after_the_last_view_is_gone(place):
    x = place.empty(SHAPE, "float32")
    part, first = x[3:, ::2], where(x)
    assert first % 64 == 0
    del x
    other = place.empty(SHAPE, "float32")
    assert where(other) != first  # a view still holds it
    del part
    assert where(place.empty(SHAPE, "float32")) == first


def test_a_tensor_holds_it_too(place):
    torch = pytest.importorskip("torch")
    x = place.empty(SHAPE, "float32")
    tensor, first = torch.from_numpy(x)[1:], where(x)
    del x
    assert where(place.empty(SHAPE, "float32")) != first
    del tensor
    assert where(place.empty(SHAPE, "float32")) == first


def test_zeros_are_zeros_in_memory_that_held_something(place):
    x = place.empty(SHAPE, "float32")
    x.fill(7)
    first = where(x)
    del x
    again = place.zeros((1024, 64), "float32")
    assert where(again) == first and not again.any()


def test_other_shapes_give_it_back(place):
    held = [place.empty(SHAPE, "float32") for _ in range(2)]
    assert host_memory._LEFT == {}
    held.clear()
    assert [len(waiting) for waiting in host_memory._LEFT.values()] == [2]
    place.empty((64, 1000), "float32")
    assert BYTES not in host_memory._LEFT


def test_no_more_than_so_much_waits(place, monkeypatch):
    monkeypatch.setattr(host_memory, "MOST_LEFT", 3 * BYTES)
    held = [place.empty(SHAPE, "float32") for _ in range(3)] + [place.empty((2, *SHAPE), "float32")]
    held.clear()
    assert sum(size * len(waiting) for size, waiting in host_memory._LEFT.items()) <= 3 * BYTES
    place.empty((4, *SHAPE), "float32")
    assert 4 * BYTES not in host_memory._LEFT  # larger than all that may wait
