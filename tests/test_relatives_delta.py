"""Gated DeltaNet and Kimi Delta Attention: refused in words where flash-linear-attention is missing or does not fit, and called by its conventions where it stands."""
import sys
import types

import numpy as np
import pytest
from judge import normal
from numeric import assert_close

import sparsetile as st
from sparsetile.relatives import delta

CALLS = {"gated_delta_rule": (st.gated_delta_net, "chunk_gated_delta_rule", 3), "kda": (st.kimi_delta_attention, "chunk_kda", 4)}


def inputs(rng, axes, dtype=np.float32):
    q, k, v = (normal(rng, (2, 3, 7, n), dtype) for n in (4, 4, 5))
    return q, k, v, -np.abs(normal(rng, (2, 3, 7, 4)[:axes], dtype)), rng.random((2, 3, 7)).astype(dtype)


def recurrence(q, k, v, decay, beta, scale):
    """The papers' equations, one token after the other, arrays [B,H,T,...] in their own type."""
    out, state = np.zeros((*q.shape[:3], v.shape[-1]), q.dtype), np.zeros((*q.shape[:2], q.shape[-1], v.shape[-1]), q.dtype)
    for t in range(q.shape[2]):
        key, forget = k[:, :, t, :, None], np.exp(decay[:, :, t])
        state = state * (forget[..., None] if decay.ndim == 4 else forget[..., None, None])
        b = beta[:, :, t, None, None]
        state = state - b * key @ (key.swapaxes(-1, -2) @ state) + b * key @ v[:, :, t, None, :]
        out[:, :, t] = scale * (q[:, :, t, None, :] @ state)[..., 0, :]
    return out


@pytest.mark.parametrize("folder", CALLS)
def test_called_as_the_package_wants_it(folder, rng, monkeypatch):
    """A stand-in of the package's signature, [B,T,H,...], that computes the papers' recurrence: what comes back is in our order."""
    torch = pytest.importorskip("torch")
    call, name, axes = CALLS[folder]
    seen = {}

    def kernel(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False, **more):
        assert not more
        seen.update(normalized=use_qk_l2norm_in_kernel, shapes=[tuple(x.shape) for x in (q, k, v, g, beta)])
        first = lambda x: np.moveaxis(x.numpy().astype(np.float64), 1, 2)  # noqa: E731
        return torch.from_numpy(np.moveaxis(recurrence(*map(first, (q, k, v, g, beta)), scale), 2, 1)), None
    module = types.ModuleType(f"fla.ops.{folder}")
    setattr(module, name, kernel)
    for path, what in (("fla", types.ModuleType("fla")), ("fla.ops", types.ModuleType("fla.ops")), (module.__name__, module)):
        monkeypatch.setitem(sys.modules, path, what)
    monkeypatch.setattr(delta, "refusal", lambda q, axes: None)
    arrays = inputs(rng, axes)
    got = call(*map(torch.from_numpy, arrays), scale=0.7, normalize=False)
    assert np.array_equal(got.numpy(), recurrence(*(x.astype(np.float64) for x in arrays), 0.7)) and seen["normalized"] is False
    assert seen["shapes"] == [(2, 7, 3, 4), (2, 7, 3, 4), (2, 7, 3, 5), (2, 7, 3, 4)[:axes], (2, 7, 3)]
    call(*map(torch.from_numpy, arrays))
    assert seen["normalized"] is True


@pytest.mark.parametrize("folder", CALLS)
def test_the_recurrence_is_the_published_one(folder, rng):
    """The package's own plain code, float32, says what these tests hold its kernels against."""
    torch = pytest.importorskip("torch")
    naive = pytest.importorskip(f"fla.ops.{folder}.naive", reason="flash-linear-attention's plain code is not installed (pip install fla-core)")
    q, k, v, decay, beta = inputs(rng, CALLS[folder][2])
    published = naive.naive_recurrent_kda if folder == "kda" else naive.naive_recurrent_gated_delta_rule
    first = lambda x: torch.from_numpy(x).transpose(1, 2)  # noqa: E731
    got = published(first(q), first(k), first(v), g=first(decay), beta=first(beta), scale=0.7)[0].transpose(1, 2).contiguous()
    truth, measure = (recurrence(*(x.astype(kind) for x in (q, k, v, decay, beta)), kind(0.7)) for kind in (np.float64, np.float32))
    assert_close("out", got, truth, measure, reduction=7 * 4)


@pytest.mark.gpu
@pytest.mark.parametrize("folder", CALLS)
def test_the_packages_kernels_on_a_gpu(folder, rng):
    """Of the recurrence and what a convention mistaken would make of it, the kernel's answer is nearest to the recurrence: its rounding is the package's own business."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available() or delta.unavailable():
        pytest.skip(delta.unavailable() or "no CUDA device")
    triton = pytest.importorskip("triton")
    call, _, axes = CALLS[folder]
    shapes = [(1, 2, 70, 64)] * 3 + [(1, 2, 70, 64)[:axes], (1, 2, 70)]
    given = [rng.standard_normal(shape) / 8 for shape in shapes[:3]] + [-np.abs(rng.standard_normal(shapes[3])) / 8, rng.random(shapes[4])]
    leaves = [torch.from_numpy(x).to("cuda", torch.bfloat16).requires_grad_() for x in given]
    q, k, v, decay, beta = (x.detach().double().cpu().numpy() for x in leaves)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    answers = {"right": (q, k, v, decay, beta, 1 / 8), "no decay": (q, k, v, 0 * decay, beta, 1 / 8), "decay turned": (q, k, v, decay[:, ::-1], beta, 1 / 8), "beta of one": (q, k, v, decay, 0 * beta + 1, 1 / 8),
               "lengths of one": (unit(q), unit(k), v, decay, beta, 1 / 8), "no scale": (q, k, v, decay, beta, 1.0)}
    for normalize, right in ((False, "right"), (True, "lengths of one")):
        out = call(*leaves, normalize=normalize)
        far = {name: np.abs(out.detach().double().cpu().numpy() - recurrence(*how)).max() for name, how in answers.items()}
        assert min(far, key=far.get) == right, far
        if folder == "gated_delta_rule" and torch.cuda.get_device_capability()[0] == 9 and (3, 4) <= tuple(map(int, triton.__version__.split("+")[0].split(".")[:3])) < (3, 7, 1):
            with pytest.raises(RuntimeError, match="upgrade Triton"):  # these compile its backward wrongly on Hopper, and the package says so instead
                torch.autograd.grad(out, leaves, torch.ones_like(out))
            continue
        assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in torch.autograd.grad(out, leaves, torch.ones_like(out)))


@pytest.mark.parametrize("folder", CALLS)
def test_refused_in_words(folder, rng, monkeypatch):
    torch = pytest.importorskip("torch")
    call, _, axes = CALLS[folder]
    monkeypatch.setattr(delta, "find_spec", lambda name: None if name == "fla" else name)
    with pytest.raises(st.Unsupported, match="fla is not installed: pip install 'flash-linear-attention"):
        call(*inputs(rng, axes))
    monkeypatch.setattr(delta, "find_spec", lambda name: name)
    with pytest.raises(st.Unsupported, match="tensors on a GPU, and q is a numpy array on the CPU"):
        call(*inputs(rng, axes))
    with pytest.raises(st.Unsupported, match="tensors on a GPU, and q is a torch array on the CPU"):
        call(*map(torch.from_numpy, inputs(rng, axes)))


@pytest.mark.parametrize("place, wrong, argument", [(1, np.zeros((2, 3, 6, 4), np.float32), "k"), (3, np.zeros((2, 3, 7, 9), np.float32), "decay"), (4, np.zeros((2, 3, 6), np.float32), "beta")])
@pytest.mark.parametrize("folder", CALLS)
def test_bad_input_is_named(folder, place, wrong, argument, rng):
    call, _, axes = CALLS[folder]
    arrays = list(inputs(rng, axes))
    arrays[place] = wrong
    with pytest.raises(ValueError, match=rf"^{argument}: expected .*, got .*; "):
        call(*arrays)
