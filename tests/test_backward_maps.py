"""Triton's portable backward with tiles by the copy engine (block_backward_maps.py): that it is taken, and its gradients."""
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from judge import gradients, normal

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import sparsetile as st  # noqa: E402
from sparsetile.backends.triton import block_attention_backward, block_backward_maps, interpreted  # noqa: E402
from sparsetile.backends.triton.maps import can_map  # noqa: E402
from sparsetile.ops import dispatch  # noqa: E402

pytestmark = [pytest.mark.interp, pytest.mark.skipif(not interpreted() and not torch.cuda.is_available(), reason="neither a GPU nor TRITON_INTERPRET=1")]
CASES = {  # pattern, what it means, Hq, Hk, T, S, D, options of two batches
    "causal": (st.Causal(), lambda p, s: s <= p, 4, 2, 130, 130, 64, {}),
    "window": (st.Window(40), lambda p, s: (s <= p) & (s >= p - 40), 2, 1, 70, 200, 64, {}),  # keys that nobody sees, within blocks that are seen
    "lengths": (st.Window(50, 3) | st.Sink(4), lambda p, s: (s <= p + 3) & (s >= p - 50) | (s < 4), 2, 2, 90, 260, 64, dict(kv_length=np.array([77, 0], np.int32))),
    "positions": (st.Causal(), lambda p, s: s <= p, 2, 1, 100, 230, 128, dict(q_start=np.array([5, 150], np.int32))),
    "full": (st.Full(), lambda p, s: s == s, 2, 1, 70, 70, 128, {}),
    "softcap": (st.Full(), lambda p, s: s == s, 1, 1, 70, 65, 64, dict(softcap=5.0)),
}


@pytest.fixture
def by_maps(monkeypatch):
    """Calls that took the path; every call's config is that of the portable path meanwhile."""
    if not interpreted() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("tiles by the copy engine are for sm_90a")
    taken, launch = [], block_backward_maps.launch
    monkeypatch.setattr(block_backward_maps, "launch", lambda *given: (taken.append(1), launch(*given)))
    monkeypatch.setattr(block_backward_maps, "ARCHS", ("cpu", "sm_90a"))
    monkeypatch.setattr(block_attention_backward, "default_config", block_attention_backward.portable_config)
    monkeypatch.setenv("SPARSETILE_TUNE", "off")
    dispatch.clear_plans()
    yield taken
    dispatch.clear_plans()


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_by_maps(on, backend, name, by_maps, rng):
    rule, meaning, Hq, Hk, T, S, D, options = CASES[name]
    q, k, v = (normal(rng, (2, heads, n, D), np.float16) for heads, n in ((Hq, T), (Hk, S), (Hk, S)))
    placed = {key: value for key, value in options.items() if key != "softcap"}
    count = np.broadcast_to(oracle.visible(2, T, S, rule=meaning, **placed), (2, Hq, T, S))
    unseen = ~count.any((1, 2))

    def poison(x):
        x = x.copy()
        x.transpose(0, 2, 1, 3)[unseen] = np.nan
        return x
    gradients(on, q, k, v, rule, count, rng, poison=poison, **options)
    assert by_maps


def test_widths_that_the_copy_engine_writes():
    """Gradients lie without gaps, whatever stands between the rows of keys: their widths have to be multiples of 16 bytes."""
    lists = SimpleNamespace(q_order=None, k_order=None)
    for D, taken in ((40, True), (36, False)):
        x = torch.empty(1, 1, 64, 48, dtype=torch.float16)[..., :D]
        made = block_attention_backward.constants(D, D, dict(block_q=64, block_k=64, chunk=0), D)
        made |= dict(D1=0, V1=0)
        assert can_map(x) and block_backward_maps.takes(x, x, x, x, lists, made, "sm_90a") is taken


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("size", [12, 120])
def test_large_scores(on, backend, size, by_maps, rng):
    """Logits of about 1e3 and 1e5, of which a row's two hardly differ: what the forward rounded has to cancel."""
    q = normal(rng, (1, 1, 70, 64), np.float16, size)
    k, v = q.copy(), normal(rng, (1, 1, 70, 64), np.float16)
    gradients(on, q, k, v, st.Window(1), np.broadcast_to(oracle.visible(1, 70, 70, rule=lambda p, s: (s == p) | (s == p - 1)), (1, 1, 70, 70)), rng)
    assert by_maps
