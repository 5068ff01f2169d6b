"""DeepSeek-V3's attention over a paged latent cache, against Hugging Face's eager code with random weights and against float64."""
from functools import lru_cache

import cache_format
import ml_dtypes
import numpy as np
import oracle
import pytest
from numeric import assert_close, assert_same_bits, plain, to_numpy

import sparsetile as st
from sparsetile.ops import latent, latent_mode

H, R, DN, DV, P, HIDDEN, TOKENS, B = 4, 128, 16, 12, 8, 64, 33, 2
CPU = pytest.mark.parametrize("backend", ["reference", "numba"])


@lru_cache(None)
def full_pass(tokens):
    """Captured from one full causal pass in float64 (truth) and float32 (the plain formula): queries, latents, rotary parts, weights, attention's output before o_proj."""
    torch = pytest.importorskip("torch")
    model = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = model.DeepseekV3Config(hidden_size=HIDDEN, num_attention_heads=H, num_key_value_heads=H, kv_lora_rank=R, q_lora_rank=48, qk_rope_head_dim=P, qk_nope_head_dim=DN,
                                    v_head_dim=DV, attn_implementation="eager", num_hidden_layers=1, intermediate_size=8, vocab_size=8, rope_interleave=True)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    attention = model.DeepseekV3Attention(config, 0).eval().double()
    hidden = torch.randn(B, tokens, HIDDEN, dtype=torch.float64)
    angle = torch.arange(tokens)[:, None] / 10000.0 ** (torch.arange(0, P, 2) / P)
    cos, sin = (f(torch.cat([angle, angle], -1)).double()[None].expand(B, -1, -1) for f in (torch.cos, torch.sin))
    mask = torch.full((tokens, tokens), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    seen = {}
    attention.q_b_proj.register_forward_hook(lambda m, i, out: seen.update(q=out))
    attention.kv_a_layernorm.register_forward_hook(lambda m, i, out: seen.update(latent=out))
    attention.kv_a_proj_with_mqa.register_forward_hook(lambda m, i, out: seen.update(rope=out[..., R:]))
    attention.o_proj.register_forward_pre_hook(lambda m, i: seen.update(out=i[0]))
    found = []
    with torch.no_grad():
        for kind in (torch.float32, torch.float64):
            attention.to(kind)(hidden.to(kind), (cos.to(kind), sin.to(kind)), mask.to(kind))
            found.append(seen["out"].view(B, tokens, H, DV).transpose(1, 2).double().numpy())
        q, rope = seen["q"].view(B, tokens, H, DN + P).transpose(1, 2), seen["rope"][:, None]
        q_rope, rope = model.apply_rotary_pos_emb_interleave(q[..., DN:], rope, cos, sin)
        w = attention.kv_b_proj.weight.view(H, DN + DV, R).transpose(1, 2)
    wide = [x.detach().double().numpy() for x in (q[..., :DN], q_rope, seen["latent"].reshape(B, tokens, R), rope[:, 0], w[..., :DN], w[..., DN:])]
    return (*found, float(attention.scaling), *wide)


@pytest.fixture(scope="module")
def deepseek():
    return full_pass(TOKENS)


def steps():
    """A prefill of 17 tokens, a chunk of 9, then one by one."""
    ends = [17, 26, *range(27, TOKENS + 1)]
    return list(zip([0, *ends], ends))


@CPU
@pytest.mark.parametrize("page_size, mode", [(4, "absorbed"), (16, "auto"), (4, "decompressed")])
def test_prefill_and_steps_are_hugging_faces_full_pass(deepseek, backend, page_size, mode):
    measure, truth, scale, *wide = deepseek
    q_nope, q_rope, latent, rope, w_uk, w_uv = (x.astype(np.float32) for x in wide)
    cache = st.PagedLatent.empty(np.zeros(1, np.float32), sequences=B, pages=30, page_size=page_size, rank=R, rotary=P)
    for first, end in steps():
        part = slice(first, end)
        cache.append(latent[:, part], rope[:, part], backend=backend)
        got = st.latent_attention(q_nope[:, :, part], q_rope[:, :, part], cache, None, w_uk, w_uv, st.Causal(), scale=scale, mode=mode, backend=backend)
        assert_close(f"tokens {first} to {end}", got, truth[:, :, part], measure[:, :, part].astype(np.float32), reduction=R + P + end)


@CPU
@pytest.mark.parametrize("mode", ["absorbed", "decompressed"])
def test_either_mode_is_hugging_faces_full_pass(deepseek, backend, mode):
    measure, truth, scale, *wide = deepseek
    got = st.latent_attention(*(x.astype(np.float32) for x in wide), st.Causal(), scale=scale, mode=mode, backend=backend)
    assert_close("out", got, truth, measure.astype(np.float32), reduction=R + P + TOKENS)


@CPU
def test_torch_tensors_too(deepseek, backend):
    torch = pytest.importorskip("torch")
    measure, truth, scale, *wide = deepseek
    q_nope, q_rope, latent, rope, w_uk, w_uv = (torch.from_numpy(x.astype(np.float32)) for x in wide)
    cache = st.PagedLatent.empty(torch.zeros(1), sequences=B, pages=30, page_size=8, rank=R, rotary=P)
    cache.append(latent, rope, backend=backend)
    with torch.no_grad():
        got = st.latent_attention(q_nope, q_rope, cache, None, w_uk, w_uv, st.Causal(), scale=scale, backend=backend)
    assert_close("out", to_numpy(got), truth, measure.astype(np.float32), reduction=R + P + TOKENS)


@CPU
def test_the_float8_cache_is_a_full_pass_over_the_same_quantised_latents(deepseek, backend):
    """Keys and values rebuilt from the quantised latents, which an independent quantiser made; step by step."""
    _, _, scale, *wide = deepseek
    q_nope, q_rope, latent, rope, w_uk, w_uv = (x.astype(np.float32) for x in wide)
    row = np.array([[np.frombuffer(cache_format.latent_token(latent[b, s], rope[b, s], False), np.uint8) for s in range(TOKENS)] for b in range(B)])
    stored = row[..., :R].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * row[..., R:R + 4].copy().view(np.float32)
    keys = np.concatenate([np.einsum("bsr,hrd->bhsd", stored, w_uk.astype(np.float64)),
                           np.broadcast_to(row[..., R + 4:].copy().view(ml_dtypes.bfloat16).astype(np.float64)[:, None], (B, H, TOKENS, P))], -1)
    values, queries, seen = np.einsum("bsr,hrd->bhsd", stored, w_uv.astype(np.float64)), np.concatenate([q_nope, q_rope], -1), np.tril(np.ones((TOKENS, TOKENS), bool))
    truth, _ = oracle.attention(queries, keys, values, seen, scale=scale)
    measure, _ = plain.attention(queries, keys.astype(np.float32), values.astype(np.float32), seen, scale=scale)
    cache = st.PagedLatent.empty(np.zeros(1, np.float32), sequences=B, pages=30, page_size=4, rank=R, rotary=P, dtype="float8")
    for first, end in steps():
        part = slice(first, end)
        cache.append(latent[:, part], rope[:, part], backend=backend)
        c, r, s = cache.gather(quantised=True)
        got = st.latent_attention(q_nope[:, :, part], q_rope[:, :, part], c, r.astype(np.float32), w_uk, w_uv, st.Causal(), latent_scale=s, scale=scale, mode="decompressed", backend=backend)
        assert_close(f"tokens {first} to {end}", got, truth[:, :, part], measure[:, :, part], reduction=R + DN + P + end)
        whole = st.latent_attention(q_nope[:, :, part], q_rope[:, :, part], cache, None, w_uk, w_uv, st.Causal(), scale=scale, mode="decompressed", backend=backend)
        assert_same_bits("the cache itself", whole, got)


@pytest.mark.parametrize("kind", ["float32", "float8"])
def test_a_cache_of_ragged_lengths_is_rebuilt(kind, rng):
    """Keys and values of each sequence, 0 behind them; attention over them sees what the absorbed mode sees, windows and selections too."""
    put = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    cache, lengths = st.PagedLatent.empty(np.zeros(1, np.float32), sequences=3, pages=20, page_size=4, rank=R, rotary=P, dtype=kind), [9, 5, 0]
    cache.append(put(3, 9, R), put(3, 9, P), lengths)
    w_uk, w_uv, q_nope, q_rope = put(H, R, DN), put(H, R, DV), put(3, H, 3, DN), put(3, H, 3, P)
    k, v = st.latent_decompress(cache, w_uk, w_uv)
    c, rope, *scale = cache.gather(quantised=kind == "float8")
    assert_same_bits("k and v", np.concatenate([k, v], -1), np.concatenate(st.latent_decompress(c, w_uk, w_uv, k_rope=rope.astype(np.float32), latent_scale=scale[0] if scale else None), -1))
    assert k.shape == (3, H, 9, DN + P) and all(not x[b, :, n:].any() and (n == 0 or x[b, :, :n].any()) for x in (k, v) for b, n in enumerate(lengths))
    chosen = st.Selection(rng.integers(-1, 9, (3, 1, 3, 6)).astype(np.int32), causal=True)
    for rule in (None, st.Causal(), st.Window(2), chosen):
        given = (q_nope, q_rope, cache, None, w_uk, w_uv, rule)
        found = [st.latent_attention(*given, mode=mode, return_lse=True, backend="reference") for mode in ("absorbed", "decompressed")]
        queries, seen = np.concatenate([q_nope, q_rope], -1), oracle.selection_count(chosen.indices, 9, H, causal=True, lengths=None, granularity=1, kv_length=lengths) if rule is chosen else \
            oracle.visible(3, 3, 9, rule={"None": lambda p, s: s < 99, "Causal()": lambda p, s: s <= p, "Window(2, 0)": lambda p, s: (s <= p) & (s >= p - 2)}[repr(rule)], kv_length=lengths)
        truth, measure = (f.attention(queries, k.astype(kind_), v.astype(kind_), seen, scale=(DN + P) ** -0.5) for f, kind_ in ((oracle, np.float64), (plain, np.float32)))
        for out, lse in found:
            assert_close("out", out, truth[0], measure[0], reduction=R + DN + P + 9)
            assert_close("lse", lse, truth[1], measure[1], reduction=R + DN + P + 9)


@pytest.mark.parametrize("T, S, rule, kernel", [(1, 512, None, "block_attention"), (64, 64, None, "block_attention"), (65, 64, None, "latent_decompress"), (512, 512, st.Causal(), "latent_decompress"),
                                                (512, 512, st.RandomBlocks(1, 64, 0), "block_attention")], ids=repr)
def test_the_mode_over_a_cache_is_the_cheaper(T, S, rule, kernel, monkeypatch):
    """By the tokens that it holds, not by its room; steps that graphs record, rules that depend on all its room and what would be large read it where it lies."""
    cache = st.PagedLatent.empty(np.zeros(1, np.float32), sequences=1, pages=64, page_size=64)
    cache.append(np.zeros((1, S, 512), np.float32), np.zeros((1, S, 64), np.float32))
    given = [np.zeros(s, np.float32) for s in ((1, 2, T, 128), (1, 2, T, 64))], [np.zeros((2, 512, 128), np.float32)] * 2
    ask = lambda: st.explain("latent_attention", *given[0], cache, None, *given[1], rule)  # noqa: E731
    found = ask()
    assert found.kernel == kernel and (kernel == "block_attention" or dict(found.problem.dims)["S"] == S)
    monkeypatch.setattr(latent_mode, "MOST_REBUILT", 2 * S * 320 * 4 - 1)  # a byte less than its keys and values
    assert ask().kernel == "block_attention"
    if rule is not None and rule.needs_exact_S:
        with pytest.raises(st.Unsupported, match="pattern: mode='decompressed' rebuilds"):
            st.latent_attention(*given[0], cache, None, *given[1], rule, mode="decompressed")


# The last T of `held` tokens, on both sides of each boundary: of a step that graphs record, of the cheaper mode for 256 keys and for 512, of a cache that holds 256 and then one more.
SIDES = [(64, 200, "absorbed", "numpy"), (67, 200, "absorbed", "torch"), (68, 200, "decompressed", "torch"), (200, 200, "decompressed", "numpy"), (77, 300, "absorbed", "numpy"),
         (78, 300, "decompressed", "numpy"), (70, 256, "decompressed", "numpy"), (70, 257, "absorbed", "numpy")]


@CPU
@pytest.mark.parametrize("T, held, mode, caller", SIDES)
def test_auto_over_a_cache_on_both_sides_of_its_boundaries(backend, T, held, mode, caller, monkeypatch):
    """Which mode it took, by what it called, counted by hand in operations and bytes; and what Hugging Face's full pass gives these tokens either way."""
    measure, truth, scale, *wide = full_pass(300)
    S = 256 if held <= 256 else 512
    pairs = T * (S - T) + T * (T + 1) // 2
    absorbed = max(2 * H * (T * R * (DN + DV) + pairs * (2 * R + P)) / 790e12, (2 * S * (R + P) + 4 * T * H * (R + P)) / 4.3e12)
    rebuilt = max(2 * H * (S * R * (DN + DV) + pairs * (DN + P + DV)) / 790e12, (2 * S * (R + P) + 4 * S * H * (DN + P + DV)) / 4.3e12)
    assert ("decompressed" if T > 64 and rebuilt < absorbed else "absorbed") == mode
    give = pytest.importorskip("torch").from_numpy if caller == "torch" else lambda x: x
    q_nope, q_rope, c, rope, w_uk, w_uv = (give(x.astype(np.float32)) for x in wide)
    cache = st.PagedLatent.empty(c[:, :0], sequences=B, pages=40, page_size=16, rank=R, rotary=P)
    cache.append(c[:, :held], rope[:, :held], backend=backend)
    taken, absorb, rebuild = [], latent.absorb, latent.latent_decompress
    monkeypatch.setattr(latent, "absorb", lambda *a, **k: taken.append("absorbed") or absorb(*a, **k))
    monkeypatch.setattr(latent, "latent_decompress", lambda *a, **k: taken.append("decompressed") or rebuild(*a, **k))
    part = slice(held - T, held)
    got = st.latent_attention(q_nope[:, :, part], q_rope[:, :, part], cache, None, w_uk, w_uv, st.Causal(), scale=scale, backend=backend)
    assert set(taken) == {mode}
    assert_close("out", to_numpy(got), truth[:, :, part], measure[:, :, part].astype(np.float32), reduction=R + P + held)


def test_the_float8_cache_is_read_where_it_lies(deepseek):
    """Absorbed, step by step: what the full pass over the same quantised latents gives, which stand in an array of their own."""
    _, _, scale, *wide = deepseek
    q_nope, q_rope, latent, rope, w_uk, w_uv = (x.astype(np.float32) for x in wide)
    cache = st.PagedLatent.empty(np.zeros(1, np.float32), sequences=B, pages=30, page_size=4, rank=R, rotary=P, dtype="float8")
    for first, end in steps():
        part = slice(first, end)
        cache.append(latent[:, part], rope[:, part], backend="reference")
        got = st.latent_attention(q_nope[:, :, part], q_rope[:, :, part], cache, None, w_uk, w_uv, st.Causal(), scale=scale, mode="absorbed", backend="reference")
        c, r = (x.astype(np.float64) for x in cache.gather("float32"))
        keys = np.concatenate([np.einsum("bsr,hrd->bhsd", c, w_uk.astype(np.float64)), np.broadcast_to(r[:, None], (B, H, end, P))], -1)
        values, queries, seen = np.einsum("bsr,hrd->bhsd", c, w_uv.astype(np.float64)), np.concatenate([q_nope, q_rope], -1)[:, :, part], np.tril(np.ones((end, end), bool))[part]
        truth, measure = (f.attention(queries, *x, seen, scale=scale)[0] for f, x in ((oracle, (keys, values)), (plain, (keys.astype(np.float32), values.astype(np.float32)))))
        assert_close(f"tokens {first} to {end}", got, truth, measure, reduction=R + DN + P + end)


@pytest.mark.parametrize("call, error, words", [
    (lambda q, c, w: st.latent_attention(q, None, c, q[:, 0], w, w), ValueError, "k_rope: expected None"),
    (lambda q, c, w: st.latent_decompress(c, w, w, k_rope=q[:, 0]), ValueError, "k_rope: expected None"),
    (lambda q, c, w: st.latent_decompress(st.IndexerKeys.empty(q, sequences=1, pages=1), w, w), st.Unsupported, "IndexerKeys holds no latents"),
    (lambda q, c, w: st.latent_attention(q[:, :, :, :3], None, c, None, w, w), ValueError, "q_nope: expected shape"),
    (lambda q, c, w: st.latent_attention(q, None, st.IndexerKeys.empty(q, sequences=1, pages=1), None, w, w), st.Unsupported, "IndexerKeys holds no latents"),
])
def test_misuse_is_named(call, error, words):
    q, w = np.zeros((1, 1, 1, 4), np.float32), np.zeros((1, 8, 4), np.float32)
    with pytest.raises(error, match=words):
        call(q, st.PagedLatent.empty(q, sequences=1, pages=1, rank=8, rotary=0), w)
