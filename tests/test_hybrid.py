"""Layer plans on a model: dense is the model itself, each layer attends by its own rule, and the cost is known before."""
import json
from dataclasses import replace

import numpy as np
import pytest
from numeric import EPS

import sparsetile as st
from sparsetile.autotune import cli
from sparsetile.catalogue import plans
from sparsetile.catalogue.system import SMALL
from sparsetile.ci import hybrid

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'sparsetile[torch]'")
LAYERS, T = 4, 48


@pytest.fixture(scope="module")
def model():
    """A random model of the demo's kind, small, in float64."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'sparsetile[demo]'")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=32, max_position_embeddings=T, initializer_range=0.5)
    return transformers.BertModel(config).double().eval()


def answer(model, plan=None, indexers=(None,) * LAYERS):
    """Outputs of the embedding and of every layer, [LAYERS + 1] of [2,T,32]."""
    ids = torch.arange(2 * T).reshape(2, T) % 50
    call = lambda: torch.stack(model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states)  # noqa: E731
    with torch.no_grad():
        if plan is None:
            return call()
        with hybrid.planned(model, plan, indexers):
            return call()


def far(a, b):
    """Largest difference, over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("rule", [st.Full(), st.Window(T, T), st.Selector("topk", top_k=T, causal=False), st.Call("exact_topk", top_k=T, causal=False)], ids=repr)
def test_a_plan_that_leaves_nothing_out_is_the_model_itself(model, rule):
    """Computed in float64 (scores of exact_topk only order): within float32's rounding of the model's own attention."""
    assert far(answer(model, st.LayerPlan.of([(range(LAYERS), rule)])), answer(model)) < EPS["float32"]
    assert far(answer(model), answer(model)) == 0  # the model is its own again


def test_each_layer_attends_by_its_own_rule(model):
    """A rule that sees less in layer n alone changes that layer's output and nothing before it."""
    dense = answer(model)
    generator = torch.Generator().manual_seed(0)
    indexer = [torch.randn(32, n, generator=generator, dtype=torch.float32) for n in (8, 4, 2)]
    for n, rule in enumerate([st.Window(2, 2), st.Selector("topk", top_k=3, causal=False), st.Call("performer_attention", features=8), st.Call("linear_attention")]):
        got = answer(model, st.LayerPlan.of([(layer, rule if layer == n else st.Full()) for layer in range(LAYERS)]))
        assert far(got[:n + 1], dense[:n + 1]) < EPS["float32"] < far(got[n + 1], dense[n + 1]) / 1000
    chosen = hybrid.attend(st.Selector(top_k=3, causal=False), *torch.randn(3, 2, 2, T, 16, generator=generator), torch.randn(2, T, 32, generator=generator), indexer)
    assert chosen.shape == (2, 2, T, 16) and torch.isfinite(chosen).all()


def test_a_plan_of_another_depth_is_refused(model):
    with pytest.raises(ValueError, match="plan: expected one of the model's 4 layers, got one of 2"):
        answer(model, st.LayerPlan.of([(range(2), st.Full())]))


def test_the_plans_shown_end_dense_but_one_and_run():
    shown = hybrid.plans(6)
    assert [plan[5] == st.Full() for plan in shown.values()] == [name != "windows" for name in shown] and all(len(plan) == 6 for plan in shown.values())
    q, k, v = torch.randn(3, 1, 2, 80, 16, generator=torch.Generator().manual_seed(0))
    for rule in {rule for plan in shown.values() for rule in plan if not (isinstance(rule, st.Selector) and rule.kind == "indexer_topk")}:
        assert hybrid.attend(rule, q, k, v, None, None).shape == q.shape


# ------------------------------------------------------------------------------------------------------------- before it runs
def test_cost_and_reach_before_running(monkeypatch):
    N = 300
    plan = st.LayerPlan.of([(range(2), st.mistral(9)), (2, st.Selector(top_k=20)), (3, st.Call("performer_attention", features=8, causal=True)), (4, st.Selector("topk", top_k=20)), (5, st.Causal())])
    report = plans.report(plan, N, SMALL)
    triangle, chosen = N * (N + 1) // 2, 20 * 21 // 2 + (N - 20) * 20
    pairs = lambda n: 4 * n * SMALL.Hq * SMALL.D  # noqa: E731
    wanted = [pairs(int(st.mistral(9).mask(N, N).sum())), 2 * triangle * SMALL.Hi * SMALL.Di + pairs(chosen), 4 * N * 8 * SMALL.D * (SMALL.Hq + SMALL.Hk), 2 * triangle * SMALL.Hq * SMALL.D + pairs(chosen), pairs(triangle)]
    assert [row["operations"] for row in report["layers"]] == wanted and report["operations"] == wanted[0] + sum(wanted)
    assert report["of_dense"] == report["operations"] / (6 * pairs(triangle))
    key = 2 * SMALL.Hk * SMALL.D * 4
    reads = [9 * key, 20 * key + N * (SMALL.Di + 4), 4 * SMALL.Hk * 8 * (SMALL.D + 1), 20 * key + N * key // 2, N * key]
    assert [row["reads"] for row in report["layers"]] == reads and report["reads"] == reads[0] + sum(reads)
    assert plans.reads(st.Selector(top_k=3, pool=8), N, SMALL) == 24 * key + N * (SMALL.Di + 4)  # blocks of keys
    assert report["reach"] == {"positions": N, "surely": 6, "at_best": 3}
    monkeypatch.setattr(plans, "FARTHEST", 64)
    assert plans.report(plan, N, SMALL)["reach"] == {"positions": 64, "surely": 6, "at_best": 3}


@pytest.mark.parametrize("call, scored, most", [
    (st.Call("moba", block=8, top_k=3), 192 * 24 // 2, 24), (st.Call("moba"), 192 * 192 // 512 / 2, 1536), (st.Call("infllm_v2", block=8, stride=4, select_block=4, top_k=5, force_last=1), 192 * 48 // 2, 20),
    (st.Call("vertical_slash", vertical=3, slash=9, last_q=8), 8 * 192, 12), (st.Call("pooled_blocks", block=32, top_k=2), 6 * 6 // 2, 64), (st.Call("exact_topk", top_k=11), 192 * 193 // 2, 11),
    (st.Call("exact_topk", top_k=11, causal=False), 192 * 192, 11)], ids=repr)
def test_a_call_is_counted_by_its_own_arguments(call, scored, most, rng):
    """What it scores, and attention over as many keys as it truly keeps: lines that cross and blocks seen in part count in full."""
    N, shape = 192, replace(SMALL, Hk=1, Hq=1)
    q, k = (rng.standard_normal((1, 1, N, shape.D)).astype(np.float32) for _ in range(2))
    kept = int((call.run(q, k, np.eye(N, dtype=np.float32)[None, None]) > 0).sum())
    pairs = N * most if dict(call.arguments).get("causal") is False else int(np.minimum(np.arange(1, N + 1), most).sum())
    assert plans.operations(call, N, shape) == 2 * scored * shape.D + 4 * pairs * shape.D and kept <= pairs <= 1.5 * kept


def test_a_call_without_an_entry_has_no_known_cost():
    with pytest.raises(ValueError, match="catalogue has an entry for, got 'topk'"):
        plans.report(st.LayerPlan.of([(0, st.Call("topk"))]), 8)


def test_command(capsys, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(st.LayerPlan.of([(range(3), st.Window(7)), (3, st.Causal())]).to_yaml())
    assert cli.main(["plan", str(path), "--tokens", "64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reach"]["surely"] == 4 and [row["last"] for row in report["layers"]] == [2, 3]
    assert cli.main(["plan", str(path), "--tokens", "20"]) == 0 and "surely after 3 layers, at best after 3 layers" in capsys.readouterr().out
    path.write_text("- {layers: 0, pattern: {windw: {}}}")
    assert cli.main(["plan", str(path)]) == 1 and "plan[0].pattern" in capsys.readouterr().err
