"""The demo's own parts: what it says when something is missing, and that its indexer learns."""
import pytest

from sparsetile.ci import demo


def test_names_the_extra_that_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(demo.NEEDS, "no_such_module", "no-such-package")
    assert demo.main(out=str(tmp_path / "demo")) == 1
    error = capsys.readouterr().err
    assert "no-such-package" in error and "pip install 'sparsetile[demo]'" in error and not (tmp_path / "demo").exists()


def test_the_indexer_learns_where_dense_attention_looks():
    """On a layer whose tokens attend to their own topic (6 topics, input of the model's width), the fitted top-k keeps most of what the best choice would."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'sparsetile[torch]'")
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    topics, topic = normal(6, 384), torch.randint(6, (12, 96), generator=generator)
    hidden = topics[topic] + 0.5 * normal(12, 96, 384) + 1 * normal(384)  # all share a large part, as the inputs of real layers do
    q = k = torch.nn.functional.one_hot(topic, 32)[:, None].expand(-1, 2, -1, -1).float() * 32 ** 0.25 * 2  # logits: 4 to the own topic, else 0
    weights = demo.fit(q[:8], k[:8], hidden[:8])
    dense = (q[8:] @ k[8:].mT * 32 ** -0.5).softmax(-1).mean(1)  # [W,T,S]
    chosen = demo.indexer_selection(hidden[8:], weights, 16).indices[:, 0].long()
    kept, best = dense.gather(-1, chosen).sum(-1).mean(), dense.topk(16).values.sum(-1).mean()
    assert kept > 0.7 * best > 0.25, (kept, best)
