"""Layouts made on the device inside a CUDA graph, attention and its gradients on them in the same graph: replayed with other masks, lengths, tokens and inputs, against float64 and an eager call."""
import numpy as np
import oracle
import pytest
from numeric import assert_close, assert_same_bits, plain, to_numpy

torch = pytest.importorskip("torch")

from test_gpu import Make, both, hoppers, refill  # noqa: E402

import sparsetile as st  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
T, BLOCKS = 600, 5


def block_mask(rng):
    """[2,1,5,5], of every sample its own; a row of blocks and a column of them that are empty."""
    mask = rng.random((2, 1, BLOCKS, BLOCKS)) < 0.5
    mask[:, :, rng.integers(BLOCKS)], mask[..., rng.integers(BLOCKS)] = False, False
    return mask


def tokens_seen(tokens):
    """[2,1,T,T]: a window of 100 to both sides, and the global tokens of each sample."""
    return np.stack([(st.Window(100, 100) | st.Global([int(x) for x in row if x >= 0])).mask(T, T) for row in tokens])[:, None]


CASES = {  # what is drawn on the host; the layout from its tensor; who sees whom, from what was drawn
    "from_block_mask": (block_mask, lambda x: st.Layout.from_block_mask(x, T=T, S=T), lambda x: np.repeat(np.repeat(x, 128, -2), 128, -1)[..., :T, :T]),
    "from_documents": (lambda rng: rng.multinomial(T - 30, [0.5, 0.0, 0.3, 0.2]).astype(np.int32), lambda x: st.Layout.from_documents(x, T, causal=True),  # 30 tokens of no document
                       lambda x: np.pad((st.Documents(x.tolist()) & st.Causal()).mask(T - 30, T - 30), (0, 30))),
    "from_global_tokens": (lambda rng: rng.integers(-1, T, (2, 3)).astype(np.int32), lambda x: st.Layout.from_global_tokens(x, T, T, window=100), tokens_seen),
}
FORWARD = dict(cupy="cupy.block_attention.run_hopper", triton="triton.block_attention_gluon.launch")
BACKWARD = dict(cupy="cupy.block_attention_backward.run_hopper", triton="triton.block_attention_backward_gluon.launch_ordered")


def judge(results, q, k, v, dout, count):
    """out, lse, dq, dk, dv against float64."""
    (Hq, D), Hk = (q.shape[1], q.shape[3]), k.shape[1]
    count, rows = np.broadcast_to(count, (2, Hq, T, T)).astype(np.int64), T * Hq // Hk
    truth, formula = (f.attention(q, k, v, count, scale=D ** -0.5)[:2] + f.attention_gradients(q, k, v, count, dout, scale=D ** -0.5)[:3] for f in (oracle, plain))
    for name, got, true, one, reduction in zip(("out", "lse", "dq", "dk", "dv"), results, truth, formula, (T + D, T + D, T + 2 * D, rows + 2 * D, rows + D)):
        assert_close(name, got, true, one, reduction=reduction)


@both
@pytest.mark.parametrize("name", CASES)
def test_layout_attention_and_gradients_in_one_graph(backend, name, rng):
    draw, layout, seen = CASES[name]
    make = Make(rng)
    makers = [make.normal(2, heads, T, 128, gradient=gradient) for heads, gradient in ((4, True), (2, True), (2, True), (4, False))]
    given, inputs = torch.from_numpy(draw(rng)).cuda(), [one() for one in makers]

    def call():
        out, lse = st.sparse_attention(*inputs[:3], layout(given), return_lse=True, backend=backend)
        return [x.detach() for x in (out, lse, *torch.autograd.grad(out, inputs[:3], inputs[3]))]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), hoppers(FORWARD[backend]), hoppers(BACKWARD[backend]):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        drawn = draw(rng)
        given.copy_(torch.from_numpy(drawn))
        refill(inputs, makers)
        graph.replay()
        torch.cuda.synchronize()
        for what, got, eager in zip(("out", "lse", "dq", "dk", "dv"), captured, call(), strict=True):
            assert_same_bits(what, got, eager)
        judge([to_numpy(x) for x in captured], *(to_numpy(x) for x in inputs), seen(drawn))
