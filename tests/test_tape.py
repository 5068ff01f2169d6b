"""Runs repeated from their notes (backends/tape.py): what a Recorder lets onto a tape, and CuPy's kernels, run on the CPU as they are written, repeated by ready calls."""
import ctypes
import threading
from types import SimpleNamespace

import oracle
import pytest
from cuda_on_cpu import CXX, CpuPlace
from numeric import assert_close, plain

torch = pytest.importorskip("torch")

import sparsetile as st  # noqa: E402
from sparsetile.backends import arrays, contract, cupy, devices, places, tape  # noqa: E402
from sparsetile.ops import dispatch, ready  # noqa: E402


class Place(places.Place):
    device, stream, address = 0, 77, staticmethod(torch.Tensor.data_ptr)

    def native(self, x):
        return x

    def empty(self, shape, dtype):
        return torch.empty(shape, dtype=getattr(torch, dtype))

    def full(self, shape, dtype, value):
        return torch.full(shape, value, dtype=getattr(torch, dtype))


LISTS = contract.Lists(*[1] * 5, *[torch.zeros(4) for _ in range(9)])
launches, held = [], []  # held: what the noted runs allocated, so that a tape cannot be given the same memory


def copy(stream, x, out, size, *more):
    """A kernel: notes its arguments and copies."""
    launches.append((stream, x, out, size, *more))
    ctypes.memmove(out, x, size)


def record(run, *tensors):
    """The tape of run(place, *tensors), a kernel that answers one array."""
    launches.clear(), held.clear()
    tensors = (*tensors, *[None] * (5 - len(tensors)))
    natives = [None if x is None else x.detach() for x in tensors]
    recorder = tape.Recorder(Place(), LISTS, natives, tensors)
    return recorder.tape(run(recorder, *natives[:3]), None)


def copied(place, q, k, v, *more, move=lambda place, x: place.address(x)):
    out = place.empty(q.shape, "float32")
    held.append(out)
    place.noted(copy)(place.stream, move(place, v), place.address(out), 4 * v.numel(), *more)
    return out


def three(seed=0):
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)).unbind()


def test_a_tape_has_the_launches_of_the_run_with_new_addresses_and_stream():
    made = record(lambda *a: copied(*a, LISTS.cols.data_ptr(), 2.5, None), *three())
    q, k, v = three(1)
    out, = made(5, q, k, v, None, None)
    assert torch.equal(out, v)
    assert [launch[:2] + launch[3:] for launch in launches[1:]] == [(5, v.data_ptr(), 64, LISTS.cols.data_ptr(), 2.5, None)] and launches[1][2] == out.data_ptr() != launches[0][2]


def test_one_tensor_in_three_places_is_told_apart():
    x = torch.randn(16)
    made = record(copied, x, x.clone(), x)
    q, k, v = three()
    assert torch.equal(made(0, q, k, v, None, None)[0], v)


def kept(place, q, k, v):
    out = copied(place, q, k, v)
    return out if place.full((1,), "float32", 0) is not None else None


def through_scratch(place, q, k, v):
    """v by two allocations that are not answers around the one that is."""
    one, out, two = place.empty((5,), "float32"), place.empty(q.shape, "float32"), place.empty(q.shape, "float32")
    for x, y, size in ((q, one, 20), (v, two, 64), (two, out, 64)):
        place.noted(copy)(place.stream, place.address(x), place.address(y), size)
    return out


def test_what_is_allocated_besides_the_answer_is_one_piece_of_memory():
    made = record(through_scratch, *three())
    q, k, v = three(1)
    assert torch.equal(made(0, q, k, v, None, None)[0], v)
    first, second, third = launches[3:]
    assert second[2] == third[1] == first[2] + 256 and made.size == 512


def test_views_and_tuples_of_addresses_are_told_anew():
    """A view that begins where one known array alone does is that array's; pointers may come as a tuple."""
    both = lambda stream, pair, x, size: (launches.append((stream, pair, x, size)), ctypes.memmove(pair[1], pair[0], size))  # noqa: E731

    def run(place, q, k, v):
        out, own = place.empty(q.shape, "float32"), place.empty((2, 8), "float32")
        held.extend((out, own))
        place.noted(copy)(place.stream, place.address(v.view(4, 4)[:2]), place.address(own.view(16)), 64)
        place.noted(both)(place.stream, (place.address(own), place.address(out)), place.address(q.view(4, 4)), 64)
        return out
    made = record(run, *three())
    q, k, v = three(1)
    assert torch.equal(made(5, q, k, v, None, None)[0], v) and launches[-1][2] == q.data_ptr()
    x = torch.randn(16)
    assert record(run, x, x.clone(), x) is None  # q's or v's?


HIDDEN = {
    "counted on": lambda *a: copied(*a, move=lambda place, x: place.address(x) + 4), "behind the place's back": lambda *a: copied(*a, move=lambda place, x: x.data_ptr()),
    "of another tensor": lambda *a: copied(*a, move=lambda place, x: place.address(x.clone())), "bytes": lambda *a: copied(*a, b"a tensor map"), "a tensor": lambda *a: copied(*a, torch.zeros(1)),
    "inside a view": lambda *a: copied(*a, move=lambda place, x: place.address(x[4:])), "inside a tuple": lambda *a: copied(*a, (1, a[1].data_ptr())), "other work of the place": kept, "another result": lambda *a: copied(*a).clone(), "nothing": lambda place, q, k, v: place.empty(q.shape, "float32"),
}


@pytest.mark.parametrize("run", HIDDEN.values(), ids=HIDDEN.keys())
def test_what_is_not_known_is_not_repeated(run):
    assert record(copied, *three()) is not None
    assert record(run, *three()) is None


def test_tensors_that_are_not_alike_are_turned_away():
    q, k, v = three()
    odd = torch.randn(17)[1:]
    made = record(copied, q, k, odd)
    assert made(0, q, k, v, None, None) is None and torch.equal(made(0, k, q, torch.arange(17.0)[1:], None, None)[0], torch.arange(17.0)[1:])
    made = record(copied, q, k, v)
    assert made(0, q, k, odd, None, None) is None and made(0, q, v, v, None, None) is None and made(0, q, k, v, odd, None) is None and len(launches) == 1
    assert made(0, q, q, v, None, None) is not None  # q and k may be one


def test_a_tape_stays_as_it_is():
    """Threads play it at once."""
    made = record(copied, *three())
    before = [list(args) for _, args, _ in made.steps]
    made(5, *three(1), None, None)
    assert [args for _, args, _ in made.steps] == before


# ------------------------------------------------------------------------------------------------------------------ a ready call
class OnCpu(places.ViewPlace):
    """What a torch caller on CUDA device 0 has, with tensors and kernels of the CPU."""
    compile = CpuPlace().compile

    def __init__(self, caller, device, stream):
        self.caller, self.device, self.stream, self.arch, self.sms, self.torch, self.target = caller, device, stream, "sm_80", 4, torch, torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """CuPy on "device 0"; and how often its kernels ran from a tape."""
    if CXX is None:
        pytest.skip("g++ compiles the kernels for the CPU, and is not there")
    info = devices.DeviceInfo("a GPU", "sm_80", 4, 80, 163 << 10, 40, "nvidia")
    monkeypatch.setattr(arrays, "device_of", lambda x: 0 if isinstance(x, torch.Tensor) else None)
    for module, changed in ((devices, dict(device_info=lambda device: info, _torch_stream=lambda: lambda device: 0, _torch_device=lambda: lambda: 0)), (places, dict(ViewPlace=OnCpu, _PLACES={}))):
        for name, value in changed.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(cupy, "unavailable", lambda: None)
    monkeypatch.setattr(devices._THREAD, "devices", (0,), raising=False)
    repeated, play = [], tape.Tape.__call__
    monkeypatch.setattr(tape.Tape, "__call__", lambda self, *a: repeated.append(play(self, *a)) or repeated[-1])
    dispatch.clear_plans()
    yield lambda: sum(found is not None for found in repeated)
    dispatch.clear_plans()


RULE = st.Window(20)


def tensors(seed, T=9, S=70):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).bfloat16() for shape in ((2, 4, T, 32), (2, 2, S, 32), (2, 2, S, 24))]


def judged(q, k, v, lengths=None, sink=None, shared=None):
    out, lse = st.sparse_attention(q, k, v, RULE, backend="cupy", return_lse=True, kv_length=lengths, sink_logits=sink, value_width=shared)
    T, S = q.shape[2], k.shape[2]
    s, ends = torch.arange(S), torch.full((2, 1, 1), S) if lengths is None else lengths[:, None, None]
    p = ends - T + torch.arange(T)[:, None]
    count = ((s <= p) & (s >= p - 20) & (s < ends))[:, None].numpy()
    x = [arrays.as_numpy(y) for y in (q, k, k[..., :shared] if v is None else v)]
    how = dict(scale=32 ** -0.5, sink_logits=None if sink is None else sink.numpy())
    for name, got, truth, formula in zip(("out", "lse"), (out, lse), oracle.attention(*x, count, **how), plain.attention(*x, count, **how)):
        assert_close(name, arrays.as_numpy(got).reshape(2, -1), truth.reshape(2, -1), formula.reshape(2, -1), reduction=S + 32)
    return out, lse


@pytest.mark.parametrize("S", [70, 200])  # one launch; keys split over the chip and merged
def test_ready_calls_are_repeated_from_the_third_on(gpu, S):
    lengths, sink = torch.tensor([S, 33], dtype=torch.int32), torch.tensor([0.5, -1, 3, 2.0])
    for n in range(4):
        judged(*tensors(n, S=S), lengths, sink)
        assert gpu() == max(0, n - 1)
        lengths, sink = lengths.flip(0), sink.roll(1)  # other memory each time


def test_what_changed_is_noticed(gpu, monkeypatch):
    q, k, v = tensors(0)
    for _ in range(3):
        judged(q, k, v)
    assert gpu() == 1
    turned = k.transpose(1, 2).contiguous().transpose(1, 2)
    for one in ((q[:, :, 2:], k, v), (q, turned, v), (q, k[:, :, 5:], v[:, :, 5:])):  # shape, strides
        judged(*one)
        judged(*one)
    odd = torch.empty(v.numel() + 1, dtype=v.dtype)[1:].view(v.shape).copy_(v)  # at an odd address
    judged(q, k, odd)
    assert gpu() == 1
    judged(q, k, v)
    assert gpu() == 2
    monkeypatch.setattr(devices, "_torch_device", lambda: lambda: 1)  # another device is current: the guard's business
    monkeypatch.setattr(torch.cuda, "device", lambda device: places._NOTHING)
    judged(q, k, v)
    assert gpu() == 2
    monkeypatch.setenv("SPARSETILE_TUNE", "off")
    judged(q, k, v)
    assert gpu() == 2 and len(ready._calls) == 5


def test_profiles_and_plans_that_are_forgotten_take_the_tapes_along(gpu):
    for n in range(3):
        judged(*tensors(n))
    dispatch.clear_plans()
    judged(*tensors(3))
    judged(*tensors(3))
    assert gpu() == 1


def test_values_inside_the_keys(gpu):
    for n in range(4):
        q, k, _ = tensors(n)
        judged(q, k, None, shared=24)
    assert gpu() == 2


@pytest.mark.parametrize("device, stream, known, stays", [(0, 7, (0,), True), (1, 7, (0,), False), (0, 8, (0,), False), (0, 7, (1,), False)])
def test_cupy_is_switched_only_where_device_stream_or_thread_are_others(device, stream, known, stays, monkeypatch):
    place = places.ViewPlace.__new__(places.ViewPlace)
    place.caller, place.device, place.stream = "cupy", 0, 7
    place.cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDevice=lambda: device), get_current_stream=lambda: SimpleNamespace(ptr=stream)))
    monkeypatch.setattr(devices._THREAD, "devices", known, raising=False)
    assert (place.guard() is places._NOTHING) == stays


def test_another_thread_has_to_get_its_context(gpu, monkeypatch):
    for n in range(3):
        judged(*tensors(n))
    entered = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", entered.append)
    thread = threading.Thread(target=lambda: [judged(*tensors(9)) for _ in range(2)])
    thread.start(), thread.join()
    assert entered == [0] and gpu() == 2
