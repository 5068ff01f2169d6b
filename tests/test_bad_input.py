"""What bad input gets (contract, section 5): an error that names the argument, what was expected, what came and what to do. Never a crash, never a fault from inside.

Each line of a family is the argument the message must name and the arguments that replace good ones. What is odd but legal stands at the end: it must work.
"""
import re
import traceback
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
from numeric import assert_close, assert_same_bits, plain

import sparsetile as st
from sparsetile.ops import convert
from sparsetile.ops.plan import Selector

torch = pytest.importorskip("torch")
ROOT = Path(__file__).resolve().parent.parent
NAN, INF, INT_MAX, HUGE = float("nan"), float("inf"), 2 ** 31 - 1, 10 ** 400
BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
F64 = np.float64


# ----------------------------------------------------------------------------------------------------------------- the checker
def fault(error, word):
    """What is wrong with an error as the answer to a bad argument `word`, or None."""
    text = str(error)
    if type(error) not in (TypeError, ValueError, st.Unsupported):
        return f"a {type(error).__name__}"
    if not re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", text):
        return f"{word} is not named"
    if not isinstance(error, st.Unsupported) and not re.search(r"\b(expected|must|needs?|only)\b", text):
        return "nothing says what was expected"
    if not re.search(r"\b(got|has|have|is|are|given|cannot read)\b", text):
        return "nothing says what came"
    if len(re.split(r"; |\. ", text, maxsplit=1)[-1].split()) < 2 or not re.search("; |\\. ", text):
        return "no remedy"
    if "\n" in text or len(text) > 420 or len(re.findall(r"[a-z)\]'\"]\. [A-Z]", text)) > 1:
        return "longer than two sentences"
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = Path(last.filename)
    if ROOT not in where.parents or "site-packages" in where.parts or where.parent.name == "tests" or not last.line.startswith("raise "):
        return f"raised by {where.name}:{last.lineno}, not by a check of ours"
    return None


def _raised(make):
    try:
        make()
    except Exception as error:
        return error


@pytest.mark.parametrize("text, word, flaw", [
    ("q: expected 4 axes [B,Hq,T,D], got shape [3]; add axes with reshape", "q", None),
    ("q: expected 4 axes [B,Hq,T,D], got shape [3]; add axes with reshape", "k", "k is not named"),
    ("kq: expected 4 axes [B,Hq,T,D], got shape [3]; add axes with reshape", "q", "q is not named"),
    ("q: bad shape, got [3]; add axes with reshape", "q", "nothing says what was expected"),
    ("q: expected 4 axes; add axes with reshape", "q", "nothing says what came"),
    ("q: expected 4 axes [B,Hq,T,D], got shape [3]", "q", "no remedy"),
    ("q: expected 4 axes, got shape [3]; add axes. Then call again. Then stop. Then go", "q", "longer than two sentences"),
    ("q: expected 4 axes, got shape [3]; add axes\nwith reshape", "q", "longer than two sentences"),
])
def test_the_checker_knows_a_good_message(text, word, flaw):
    from sparsetile.ops import checks

    def good():
        raise ValueError(text)
    error = _raised(good)
    home = _raised(lambda: checks.width("q", 0))                                      # an error raised where the checks are
    assert fault(error.with_traceback(home.__traceback__), word) == flaw
    if flaw is None:
        assert "not by a check of ours" in fault(_raised(good), word)


def test_the_checker_knows_errors_from_inside():
    assert fault(_raised(lambda: np.zeros(3)[5]), "q") == "a IndexError"
    assert fault(_raised(lambda: {}["q"]), "q") == "a KeyError"
    assert fault(_raised(lambda: np.zeros(3).reshape(2, 2)), "array") is not None
    assert fault(None, "q") == "a NoneType"


# ------------------------------------------------------------------------------------------------------------------ good calls
def real(*shape, dtype=np.float32):
    return np.linspace(-1, 1, int(np.prod(shape, dtype=np.int64)) or 1, dtype=np.float64)[:int(np.prod(shape, dtype=np.int64))].reshape(shape).astype(dtype)


def ints(*shape, value=0, dtype=np.int32):
    return np.full(shape, value, dtype)


def tensor(x):
    return torch.from_numpy(x)


Q, K, V = real(2, 4, 6, 16), real(2, 2, 10, 16), real(2, 2, 10, 8)
IQ, IK, IW = real(2, 4, 6, 16), real(2, 10, 16), real(2, 4, 6)
LATENT, W_UK, W_UV, ROPE = real(2, 10, 32), real(3, 32, 8), real(3, 32, 12), real(2, 10, 4)
OUTS, LSES = [real(2, 4, 6, 8)] * 2, [real(2, 4, 6)] * 2


class Duck:
    """No array, for all its shape."""
    shape, ndim, dtype = (2, 4, 6, 16), 4, "float32"


def select(indices=ints(2, 1, 6, 3), **options):
    return st.sparse_attention(Q, K, V, st.Selection(indices, **options))


CALLS = {
    "attention": (st.sparse_attention, dict(q=Q, k=K, v=V, pattern=st.Causal())),
    "float8": (st.sparse_attention, dict(q=Q.astype(FP8), k=K.astype(FP8), v=V.astype(FP8), q_scale=real(2, 4, 6), k_scale=real(2, 2, 1), v_scale=real(2, 2, 1), pattern=st.Causal())),
    "selection": (select, {}),
    "layout": (st.Layout.of, dict(pattern=st.Causal(), T=6, S=10)),
    "mask layout": (st.Layout.from_block_mask, dict(mask=np.ones((2, 3), bool), block_q=32, block_k=32)),
    "document layout": (st.Layout.from_documents, dict(lengths=[4, 6], block_q=32, block_k=32)),
    "token layout": (st.Layout.from_global_tokens, dict(tokens=ints(2, 3), T=6, S=10, block_q=32, block_k=32)),
    "scores": (st.indexer_scores, dict(q=IQ, k=IK, weights=IW)),
    "indexer": (st.indexer_topk, dict(q=IQ, k=IK, weights=IW, top_k=3)),
    "topk": (st.topk, dict(scores=real(2, 6, 10), top_k=3)),
    "decompress": (st.latent_decompress, dict(latent=LATENT, w_uk=W_UK, w_uv=W_UV, k_rope=ROPE)),
    "latent": (st.latent_attention, dict(q_nope=real(2, 3, 6, 8), q_rope=real(2, 3, 6, 4), latent=LATENT, k_rope=ROPE, w_uk=W_UK, w_uv=W_UV, pattern=st.Causal())),
    "merge": (st.merge_attention, dict(outs=OUTS, lses=LSES)),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_good_call_works(name):
    function, good = CALLS[name]
    assert function(**good) is not None


# ------------------------------------------------------------------------------------------------------------------- bad calls
def no_array(*names):
    """What no array argument takes."""
    wrong = [None, [[1.0, 2.0]], "q", 3, 2.5, np.float32(1), object(), Duck(), np.array("text"), np.float64, (), {}, np.zeros((), np.float32), torch.float32]
    return [(name, {name: x}) for name in names for x in wrong]


def no_floats(name, x):
    """Element types and ranks that no float argument takes."""
    kinds = (np.int32, np.int64, np.uint8, bool, np.complex64, object)
    return [(name, {name: x.astype(kind)}) for kind in kinds] + [(name, {name: y}) for y in (x[0], x[None], x.reshape(-1), x.reshape(-1)[0])]


def backends():
    return [("backend", dict(backend="numbaa")), ("backend", dict(backend="NUMBA")), ("backend", dict(backend=3)), ("backend", dict(backend=["numba"])),
            ("cupy", dict(backend="cupy"))]


def configs():
    return [("config", dict(config="fast")), ("config", dict(config=3)), ("config", dict(config={"no_such_knob": 1})), ("config", dict(config={3: 1})),
            ("config", dict(config=[("a", 1)]))]


def starts(name="q_start"):
    return [(name, {name: x}) for x in (1.5, True, "0", NAN, 2 ** 31, -2 ** 31 - 1, HUGE, ints(3), ints(2, 1), ints(2, dtype=np.int64), real(2), [0, 0], np.float32(1), tensor(ints(2)))]


ATTENTION = [
    *no_array("q", "k"), *no_array("v")[1:], *no_floats("q", Q), *no_floats("k", K), *no_floats("v", V), *backends(), *configs(), *starts(),
    ("q", dict(q=tensor(Q).to_sparse(), k=tensor(K), v=tensor(V))), ("k", dict(k=np.ma.masked_array(K, K > 0))), ("sink_logits", dict(sink_logits=np.ma.masked_array(real(4), True))),
    ("kv_length", dict(q=tensor(Q).to("meta"), k=tensor(K).to("meta"), v=tensor(V).to("meta"), kv_length=tensor(ints(2)))), ("v", dict(q=tensor(Q), k=tensor(K), v=tensor(V).to("meta"))), ("v", dict(v=None)), ("k", dict(k=K.astype(BF16))), ("v", dict(v=V.astype(np.float16))), ("k", dict(q=Q.astype(F64))), ("q", dict(q=Q.astype(FP8))),
    ("q", dict(q=Q.astype(np.longdouble), k=K.astype(np.longdouble), v=V.astype(np.longdouble))), ("q", dict(q=Q.astype(ml_dtypes.float8_e5m2))),
    ("k", dict(k=real(3, 2, 10, 16))), ("k", dict(k=real(1, 2, 10, 16))), ("k", dict(k=real(2, 2, 10, 15))), ("k", dict(k=real(2, 3, 10, 16))), ("k", dict(k=real(2, 0, 10, 16))),
    ("k", dict(k=real(2, 8, 10, 16), v=real(2, 8, 10, 8))), ("v", dict(v=real(2, 2, 9, 8))), ("v", dict(v=real(2, 1, 10, 8))), ("v", dict(v=real(1, 2, 10, 8))),
    ("v", dict(v=real(2, 2, 10, 0))), ("v", dict(v=real(2, 2, 10, 577))), ("q", dict(q=real(2, 4, 6, 0), k=real(2, 2, 10, 0))), ("q", dict(q=real(1, 1, 1, 577), k=real(1, 1, 1, 577), v=real(1, 1, 1, 8))),
    ("k", dict(k=tensor(K))), ("v", dict(v=tensor(V))), ("sink_logits", dict(sink_logits=torch.zeros(4))), ("kv_length", dict(kv_length=tensor(ints(2)))),
    *[("value_width", dict(v=None, value_width=x)) for x in (0, -1, 17, 2.5, "8", True, HUGE)], ("value_width", dict(value_width=7)), ("value_width", dict(value_width="8")),
    *[("pattern", dict(pattern=x)) for x in ("causal", 3, st.Causal, np.ones((6, 10), bool), [st.Causal()], lambda q, k: q >= k, {"window": 3})],
    *[("pattern", dict(pattern=st.PerHead([st.Causal()] * n))) for n in (1, 3, 8)], ("pattern", dict(pattern=st.Blocks(np.ones((3, 1, 1), bool)))),
    ("pattern", dict(pattern=st.Causal().layout(6, 9))), ("pattern", dict(pattern=st.Causal().layout(6, 9, q_start=4))), ("pattern", dict(pattern=st.Causal().layout(5, 10))), ("pattern", dict(pattern=st.Causal().layout(6, 10), q_start=5)),
    ("pattern", dict(pattern=st.Layout.from_block_mask(np.ones((3, 1, 1), bool)))), ("pattern", dict(pattern=st.Layout.from_block_mask(np.ones((3, 4, 1, 1), bool)))),
    *[("scale", dict(scale=x)) for x in ("1", None, NAN, INF, -INF, True, [1.0], real(2), 1j, HUGE)[:1] + (NAN, INF, -INF, True, [1.0], real(2), 1j, HUGE)],
    *[("softcap", dict(softcap=x)) for x in (0, -1.0, NAN, INF, "30", True, real(4), HUGE)],
    *[("sink_logits", dict(sink_logits=x)) for x in (0.5, [0.0] * 4, real(3), real(2), real(2, 4), real(4, dtype=F64), real(4, dtype=BF16), ints(4), real(4)[0])],
    *[("kv_length", dict(kv_length=x)) for x in (5, [5, 5], ints(3), ints(1), ints(2, 1), ints(2, dtype=np.int64), ints(2, dtype=np.uint32), real(2), np.int32(5), torch.zeros(2, dtype=torch.int64))],
    ("q_start", dict(kv_length=ints(2, value=5), q_start=ints(3))),
    *[(name, {name: x}) for name in ("return_lse", "deterministic", "allow_tf32") for x in (None, 1, "yes", np.bool_(True))],
    ("k_scale", dict(k_scale=real(2, 2, 1))), ("q_scale", dict(q_scale=1.0)), ("v_scale", dict(v_scale=real(2, 2, 1))), *[("out_dtype", dict(out_dtype=x)) for x in ("float16", "float", 3, np.float16)],
]
FLOAT8 = [
    *[(name, {name: x}) for name in ("k_scale", "v_scale") for x in (1.0, [[[1.0]]], real(2, 2), real(2, 2, 2), real(2, 4, 1), real(1, 2, 1), real(2, 2, 10), real(2, 2, 1, 1), real(2, 2, 1, dtype=F64), real(2, 2, 1, dtype=BF16), ints(2, 2, 1), tensor(real(2, 2, 1)))],
    *[("q_scale", dict(q_scale=x)) for x in (1.0, real(2, 4), real(2, 4, 1), real(2, 2, 6), real(2, 4, 6, 1), real(2, 4, 6, dtype=F64), real(2, 4, 6, dtype=BF16), tensor(real(2, 4, 6)))],
    *[("out_dtype", dict(out_dtype=x)) for x in ("float64", "float8_e4m3fn", "bf16", 3, np.float16, torch.float16)], ("q_scale", dict(q=Q.astype(BF16), q_scale=real(2, 4, 6))), ("out_dtype", dict(q=Q.astype(BF16), q_scale=None, out_dtype="float16")),
    ("k", dict(q=Q)), ("k", dict(q=Q.astype(F64))), ("q", dict(k=K)), ("q", dict(k=K.astype(BF16), v=V.astype(BF16))), ("v", dict(v=V)), ("v", dict(v=V.astype(BF16))), ("k", dict(q=Q.astype(ml_dtypes.float8_e5m2))),
    ("pattern", dict(pattern=st.Selection(ints(2, 1, 6, 3)))), *backends(),
]

SELECTIONS = [
    *[("indices", dict(indices=x)) for x in (None, 3, "1", [1, 2], [[[[1.5]]]], [[[["a"]]]], [[[[1, 2], [1]]]], [[[[2 ** 31]]]], ints(6, 3), ints(2, 6, 3), ints(2, 1, 6, 3, 1), ints(2, 1, 6, 3, dtype=np.int64),
                                            ints(2, 1, 6, 3, dtype=np.uint32), real(2, 1, 6, 3), np.ones((2, 1, 6, 3), bool), torch.zeros((2, 1, 6, 3), dtype=torch.int64), Duck(), np.zeros((), np.int32))],
    *[("pattern.indices", dict(indices=x)) for x in (ints(1, 1, 6, 3), ints(3, 1, 6, 3), ints(2, 1, 5, 3), ints(2, 3, 6, 3), ints(2, 0, 6, 3), tensor(ints(2, 1, 6, 3)))],
    *[("granularity", dict(granularity=x)) for x in (0, -1, 1.5, "16", None, True, [1], HUGE)],
    *[("lengths", dict(lengths=x)) for x in (3, "3", [3], ints(2, 1), ints(2, 1, 5), ints(2, 6), ints(1, 1, 6), ints(2, 1, 6, 1), ints(2, 1, 6, dtype=np.int64), real(2, 1, 6), [[[1, 2], [1]]])],
    ("pattern.lengths", dict(lengths=tensor(ints(2, 1, 6)))),
    *[("causal", dict(causal=x)) for x in (None, 1, "yes", [True], ints(1))],
    *[("restriction", dict(restriction=x)) for x in ("causal", 3, st.Causal, ints(3))], ("pattern.restriction", dict(restriction=st.PerHead([st.Causal()] * 3))),
]

BLOCK = [(name, {name: x}) for name in ("block_q", "block_k") for x in (0, -32, 32.0, "32", None, True, HUGE)] + [("block_k", dict(block_k=33))]
LAYOUTS = [("layout", *case) for case in [
    *[(name, {name: x}) for name in ("T", "S") for x in (-1, 2.5, "6", None, True)], *BLOCK, *[("pattern", dict(pattern=x)) for x in (None, "causal", np.ones((2, 3), bool), 3)],
    ("q_start", dict(q_start=1.5)), ("q_start", dict(q_start="0")), ("heads", dict(heads=0)), ("heads", dict(heads=-2)), ("heads", dict(heads="4")), ("heads", dict(heads=2.0)),
    ("heads", dict(pattern=st.PerHead([st.Causal()] * 2), heads=3))]] + [
    ("mask layout", *case) for case in [*BLOCK, *[("mask", dict(mask=x)) for x in (None, "mask", 3, [1, 0], ints(3), ints(1, 1, 1, 2, 3), real(2, 3), [["a"]], [[1, 0], [1]], Duck(), np.ones((2, 3), complex))],
                                        *[("T", dict(T=x)) for x in (-1, 2.5, 65, 31)], *[("S", dict(S=x)) for x in (-1, "3", 97, 63)]]] + [
    ("document layout", *case) for case in [*BLOCK, *[("lengths", dict(lengths=x)) for x in (None, "46", 3, [-1, 3], [1.5], ints(2, 2), [[1, 2]], tensor(ints(2, 2)), tensor(real(2)), [2 ** 70], ["a"], [None])],
                                            *[("total", dict(total=x)) for x in (-1, 2.5, "10")], ("lengths", dict(cu_seqlens=[0, 4, 10])), ("cu_seqlens", dict(lengths=None, cu_seqlens=[0, 4, 2])),
                                            ("cu_seqlens", dict(lengths=None, cu_seqlens=[])), ("cu_seqlens", dict(lengths=None, cu_seqlens=[1, 4])), ("cu_seqlens", dict(lengths=None, cu_seqlens=real(3))),
                                            ("total", dict(lengths=tensor(ints(2)))), ("causal", dict(causal="yes"))]] + [
    ("token layout", *case) for case in [*BLOCK, *[("tokens", dict(tokens=x)) for x in (None, "0", 3, [1, 2], ints(2, 3, 1), real(2, 3), [[1], [1, 2]], np.ones((2, 3), bool), Duck())],
                                         *[(name, {name: x}) for name in ("T", "S") for x in (-1, 2.5, "6", None)],
                                         *[("window", dict(window=x)) for x in (-1, 2.5, "3", (1, 2, 3), (1, -2), (), (1, "2"))], ("causal", dict(causal=1))]]

WINDOWS = [(name, {name: x}) for name in ("key_start", "key_end") for x in (3, [0] * 6, ints(5), ints(2, 5), ints(3, 6), ints(6, 2), ints(2, 6, 1), ints(6, dtype=np.int64), real(6), tensor(ints(6)))]
SCORES = [
    *no_array("q", "k", "weights"), *no_floats("q", IQ), *no_floats("k", IK), *no_floats("weights", IW), *backends(), *configs(), *starts(), *WINDOWS,
    ("k", dict(k=IK.astype(BF16))), ("k", dict(q=IQ.astype(FP8))), ("weights", dict(weights=IW.astype(FP8))), ("weights", dict(weights=IW.astype(F64))), ("k", dict(k=real(1, 10, 16))), ("k", dict(k=real(2, 10, 15))),
    ("k", dict(k=real(2, 1, 10, 16))), ("weights", dict(weights=real(2, 6, 4))), ("weights", dict(weights=real(2, 4, 1))), ("q", dict(q=IQ.astype(F64), k=IK.astype(F64))),
    ("q", dict(q=real(2, 4, 6, 0), k=real(2, 10, 0))), ("q", dict(q=real(2, 4, 6, 577), k=real(2, 10, 577))), ("k", dict(k=tensor(IK))), ("weights", dict(weights=tensor(IW))),
    *[("k_scale", dict(k_scale=x)) for x in (1.0, [1.0], real(10), real(2, 9), real(2, 10, 1), real(2, 10, dtype=F64), ints(2, 10))],
    *[("causal", dict(causal=x)) for x in (None, 1, "yes")], *[("activation", dict(activation=x)) for x in ("gelu", "ReLU", True, 3, np.maximum, ["relu"], ints(2))],
]
COUNTS = [(name, {name: x}) for name, least in (("top_k", 1), ("pool", 1), ("force_first", 0), ("force_last", 0)) for x in (least - 1, -5, 1.5, "3", None, True, HUGE, [3], NAN)]
INDEXER = [*SCORES[:30], *SCORES[-40:], *COUNTS, ("force_first", dict(force_first=2, force_last=2)), ("force_first", dict(force_first=4)), *[("return_scores", dict(return_scores=x)) for x in (None, 1, "yes")]]
TOPK = [
    *no_array("scores"), *no_floats("scores", real(2, 6, 10)), *backends(), *configs(), *WINDOWS, *COUNTS[:9],
    *[("scores", dict(scores=real(2, 6, 10, dtype=kind))) for kind in (np.float16, BF16, F64, FP8)], ("scores", dict(scores=real(2, 1, 6, 10))),
]

DECOMPRESS = [
    *no_array("latent", "w_uk", "w_uv"), *no_array("k_rope")[1:], *no_floats("latent", LATENT), *no_floats("w_uk", W_UK), *no_floats("w_uv", W_UV), *no_floats("k_rope", ROPE), *backends(), *configs(),
    ("w_uk", dict(w_uk=real(3, 8, 32))), ("w_uv", dict(w_uv=real(3, 12, 32))), ("w_uv", dict(w_uv=real(2, 32, 12))), ("w_uv", dict(w_uv=W_UV.astype(BF16))), ("latent", dict(latent=LATENT.astype(BF16))),
    ("latent", dict(latent=real(2, 10, 0), w_uk=real(3, 0, 8), w_uv=real(3, 0, 12))), ("w_uk", dict(w_uk=real(3, 32, 577))), ("w_uk", dict(w_uk=real(3, 32, 573))), ("w_uv", dict(w_uv=real(3, 32, 0))),
    ("w_uv", dict(w_uv=real(3, 32, 577))), ("w_uk", dict(w_uk=real(3, 32, 0), k_rope=None)), ("k_rope", dict(k_rope=real(1, 10, 4))), ("k_rope", dict(k_rope=real(2, 9, 4))), ("k_rope", dict(k_rope=real(2, 1, 10, 4))),
    ("k_rope", dict(k_rope=tensor(ROPE))), ("w_uk", dict(w_uk=tensor(W_UK))), ("latent_scale", dict(latent=LATENT.astype(FP8))), ("k_rope", dict(k_rope=ROPE.astype(FP8))), ("w_uk", dict(w_uk=W_UK.astype(FP8))),
    *[("latent_scale", dict(latent_scale=x)) for x in (1.0, [1.0], real(2, 10), real(2, 10, 2), real(2, 9, 1), real(2, 10, 1, dtype=F64), ints(2, 10, 1), tensor(real(2, 10, 1)))],
]
LATENTS = [
    *no_array("q_nope", "latent", "w_uk", "w_uv"), *no_array("q_rope", "k_rope"), *backends(), *configs(), *starts(), *DECOMPRESS[-20:],
    ("q_nope", dict(q_nope=real(2, 3, 6, 9))), ("q_nope", dict(q_nope=real(2, 2, 6, 8))), ("q_nope", dict(q_nope=real(1, 3, 6, 8))), ("w_uk", dict(q_nope=real(2, 3, 6, 8, dtype=BF16))), ("q_rope", dict(q_rope=real(2, 3, 6, 5))),
    ("q_rope", dict(q_rope=real(2, 3, 5, 4))), ("q_rope", dict(q_rope=real(2, 3, 6, 4, dtype=BF16))), ("w_uk", dict(w_uk=np.swapaxes(W_UK, 1, 2))), ("q_nope", dict(q_nope=ints(2, 3, 6, 8))),
    *[("mode", dict(mode=x)) for x in ("absorb", "Auto", None, True, 3, ["auto"], ints(2))], *[("scale", dict(scale=x)) for x in ("1", NAN, INF, True)], *[("softcap", dict(softcap=x)) for x in (0, -1, NAN, "a")],
    ("mode", dict(mode="absorbed", latent_scale=real(2, 10, 1))), ("sink_logits", dict(sink_logits=real(4))), ("sink_logits", dict(sink_logits=0.5)), ("kv_length", dict(kv_length=ints(3))), ("kv_length", dict(kv_length=7)),
    ("pattern", dict(pattern="causal")), ("pattern", dict(pattern=st.PerHead([st.Causal()] * 2))), ("return_lse", dict(return_lse=1)), ("deterministic", dict(deterministic=None)), ("q_nope", dict(q_nope=tensor(real(2, 3, 6, 8)))),
    ("mode", dict(mode="absorbed", latent=real(2, 10, 600), w_uk=real(3, 600, 8), w_uv=real(3, 600, 12))),
]

MERGE = [
    *[("outs", dict(outs=x)) for x in (None, 3, [], (), OUTS[:1], OUTS * 2, {})], *[("lses", dict(lses=x)) for x in (None, 3)], ("outs", dict(lses=[])), ("outs", dict(lses=LSES[:1])),
    *[("outs[1]", dict(outs=[OUTS[0], x])) for x in (None, "out", 3, [[1.0]], Duck(), real(2, 4, 6), real(2, 4, 5, 8), real(2, 4, 6, 9), real(1, 4, 6, 8), ints(2, 4, 6, 8), real(2, 4, 6, 8, dtype=BF16), real(2, 4, 6, 8, dtype=F64),
                                                    tensor(OUTS[0]), real(2, 4, 6, 8).astype(np.complex64))],
    *[("outs[0]", dict(outs=[x, OUTS[0]])) for x in (None, "out", 3, np.zeros(()), real(2, 4, 6), ints(2, 4, 6, 8), real(2, 4, 6, 8, dtype=FP8))],
    *[("lses[1]", dict(lses=[LSES[0], x])) for x in (None, 1.0, real(2, 4, 6, 1), real(2, 4), real(2, 4, 5), real(4, 2, 6), real(2, 4, 6, dtype=F64), real(2, 4, 6, dtype=BF16), ints(2, 4, 6), tensor(LSES[0]))],
    ("outs[0]", dict(outs=[real(2, 4, 6, 0)] * 2)), ("outs[0]", dict(outs=[real(2, 4, 6, 577)] * 2)), ("outs", dict(outs=OUTS[0])), ("outs", dict(outs="ab")), ("lses", dict(lses="ab")),
    *[("sink_logits", dict(sink_logits=x)) for x in (0.5, [0.0] * 4, real(3), real(2, 4), real(4, dtype=F64), ints(4), torch.zeros(4))], *backends(), *configs(),
]

PATTERNS = [
    *[("left", lambda x=x: st.Window(x)) for x in (-1, 1.5, "3", True, [3], NAN)], *[("right", lambda x=x: st.Window(3, x)) for x in (-1, 1.5, "3", False)], *[("block", lambda x=x: st.Window(3, 3, block=x)) for x in (0, -1, None, 1.5)],
    *[("step", lambda x=x: st.Dilated(4, 4, x)) for x in (0, -1, None, 2.5, "2")], ("left", lambda: st.Dilated(-1, 0, 2)), ("right", lambda: st.Dilated(1, 0.5, 2)),
    *[("stride", lambda x=x: st.Strided(x)) for x in (0, -3, None, 2.0, "8", ints(1, dtype=np.float32))], *[("stride", lambda x=x: st.Fixed(x, 1)) for x in (0, -1, None, 1.5)],
    *[("summary", lambda x=x: st.Fixed(8, x)) for x in (-1, 9, None, 1.5)], *[("tokens", lambda x=x: st.Global(x)) for x in (None, -1, [-1], [1.5], "0", ["0"], 1.5, [[1]], [True], range(-2, 3), range(10 ** 30), range(3, -3, -1), [2 ** 31], [NAN], real(3))],
    *[("symmetric", lambda x=x: st.Global([0], x)) for x in (None, 1, "yes", ints(2))],
    *[("n", lambda x=x: st.Sink(x)) for x in (-1, None, 1.5, "4", True)], *[("count", lambda x=x: st.RandomBlocks(x, 64)) for x in (-1, None, 1.5)], *[("block", lambda x=x: st.RandomBlocks(1, x)) for x in (0, -64, None, 1.5)],
    *[("seed", lambda x=x: st.RandomBlocks(1, 64, seed=x)) for x in (-1, 2 ** 63, HUGE, 1.5, None)], *[("exclude", lambda x=x: st.RandomBlocks(1, 64, exclude=x)) for x in (None, 3, "causal", [3], [st.Causal], st.PerHead([st.Causal()]))],
    *[("causal", lambda x=x: st.RandomBlocks(1, 64, causal=x)) for x in (None, 1, "yes")], *[("parts", lambda x=x: st.Layout(x, 6, 10)) for x in ((), None, [], (3,), st.Causal())],
    *[("mask", lambda x=x: st.Blocks(x)) for x in (None, "m", 3, [1, 0], np.ones(3, bool), np.ones((1, 1, 1, 1), bool), np.ones((0, 2, 2), bool), real(2, 2), ints(2, 2, value=2), [["a"]], [[1, 0], [1]], np.ones((2, 2), complex))],
    *[("block_q", lambda x=x: st.Blocks(np.ones((2, 2), bool), x)) for x in (0, -1, None, 1.5)], *[("block_k", lambda x=x: st.Blocks(np.ones((2, 2), bool), 32, x)) for x in (0, None, "32")],
    *[("lengths", lambda x=x: st.Documents(x)) for x in (None, 3, "34", [-1], [1.5], [[1, 2], [3, 4]], ["a"], [None], [2 ** 70], [[1], [1, 2]], real(3))], *[("patterns", lambda x=x: st.PerHead(x)) for x in (None, 3, [], "ab", st.Causal())],
    ("PerHead", lambda: st.PerHead([st.Causal(), 3])), ("PerHead", lambda: st.PerHead([st.PerHead([st.Causal()])])), ("heads", lambda: st.PerHead([st.Causal()] * 2) & st.PerHead([st.Full()] * 3)),
    *[(name, lambda name=name, x=x: st.Causal().mask(**{"T": 3, "S": 3, name: x})) for name in ("T", "S") for x in (-1, 1.5, "3", None)], ("q_start", lambda: st.Causal().mask(3, 3, q_start=0.5)),
    ("T", lambda: st.Causal().pairs(-1, 3)), ("T", lambda: st.Causal().hops(0)), ("Hq", lambda: st.PerHead([st.Causal()] * 2).flops(4, 4, Hq=3)), ("D", lambda: st.Causal().flops(4, 4, D=0)), ("Dv", lambda: st.Causal().flops(4, 4, Dv="8")),
    ("T", lambda: st.Causal().plot(-1)), ("width", lambda: st.Causal().plot(8, width=0)), ("T", lambda: st.Causal().plot("8")),
    *[("pattern", lambda x=x: st.Pattern.parse(x)) for x in ("Causal(", "Windo(3)", "__import__('os')", "", 3, None, "Causal() + Full()", "Window(1)[0]", "1", "Causal", "Window(3, wide=2)", "~3", "(" * 500 + ")" * 500)],
    *[("pattern", lambda x=x: st.Pattern.from_data(x)) for x in (3, None, [], {}, {"windo": 3}, {"window": {"wide": 3}}, {"window": 3, "causal": {}}, [{"window": 3}])],
    *[("pattern", lambda x=x: st.Pattern.from_yaml(x)) for x in ("a: [", "&a [*a]", "!!python/object/apply:os.system [ls]", "3", "", 3)],
]

PRESETS = [
    *[("window", lambda x=x: st.longformer(x)) for x in (-2, 3, None, 1.5, "512", True)], *[("dilation", lambda x=x: st.longformer(4, dilation=x)) for x in (0, -1, None, 1.5, [0], [], "2")], ("tokens", lambda: st.longformer(4, globals=[-1])),
    *[("block", lambda x=x: st.bigbird(x)) for x in (0, -1, None, 1.5)], *[("window", lambda x=x: st.bigbird(window=x)) for x in (2, -1, None, 1.5)], *[("globals", lambda x=x: st.bigbird(globals=x)) for x in (-1, None, 1.5)],
    *[("random", lambda x=x: st.bigbird(random=x)) for x in (-1, None, 1.5)], *[("seed", lambda x=x: st.bigbird(seed=x)) for x in (-1, 2 ** 63, None)], *[("layer", lambda x=x: st.bigbird(layer=x)) for x in (-1, None, HUGE)],
    *[("mode", lambda x=x: st.bigbird(mode=x)) for x in ("ITC", None, 3, ["itc"])], *[("window", lambda x=x: st.mistral(x)) for x in (0, -1, None, 1.5, "4096")], *[("window", lambda x=x: st.streaming_llm(window=x)) for x in (0, None)],
    ("sinks", lambda: st.streaming_llm(-1)), ("sinks", lambda: st.streaming_llm(None)), *[("stride", lambda x=x: st.sparse_transformer_strided(x)) for x in (0, None, 1.5)], ("stride", lambda: st.sparse_transformer_fixed(0, 1)), ("summary", lambda: st.sparse_transformer_fixed(8, 9)),
    ("causal", lambda: st.dense("yes")), *[("local_window_size", lambda x=x: convert.from_jax(x)) for x in ((1, 2, 3), "3", 1.5, -2)], ("left", lambda: convert.from_flash_attention(-2)), ("sliding_window", lambda: convert.from_huggingface(0)),
    ("attention_window", lambda: convert.from_huggingface_longformer(3)), ("attention_window", lambda: convert.from_longformer_code(-1)), ("dilation", lambda: convert.from_longformer_code(4, 0)), ("local", lambda: convert.from_sparse_transformer(-1)),
    *[("kind", lambda x=x: Selector(x)) for x in ("top", None, 3, [])], *[("top_k", lambda x=x: Selector(top_k=x)) for x in (0, None, 1.5)], ("causal", lambda: Selector(causal=1)), ("pool", lambda: Selector(pool=0)),
    *[("LayerPlan", lambda x=x: st.LayerPlan.of(x)) for x in (None, 3, [3], [(0, "causal")], [(0, st.Full()), (0, st.Full())], [(1, st.Full())], [(-1, st.Full())], [("0", st.Full())], [(1.5, st.Full())], [(0,)])],
    *[("plan", lambda x=x: st.LayerPlan.from_yaml(x)) for x in ("3", "a: [", "- {layers: 0}", "- 3")], *[("plan[0].layers", lambda x=x: st.LayerPlan.from_data([{"layers": x, "pattern": "Full()"}])) for x in ("a", [1], [2, 1], [0, 2 ** 30], None)],
    ("op", lambda: st.explain("attend", Q, K, V)), ("op", lambda: st.explain(3)), ("op", lambda: st.explain("Window", 3)), ("op", lambda: st.explain(print, "x")), ("op", lambda: st.explain(None)), ("q", lambda: st.explain("sparse_attention", None, K, V)),
]

FAMILIES = {"attention": ATTENTION, "float8": FLOAT8, "selection": SELECTIONS, "scores": SCORES, "indexer": INDEXER, "topk": TOPK, "decompress": DECOMPRESS, "latent": LATENTS, "merge": MERGE}
CASES = [(family, word, lambda function=CALLS[family][0], good=CALLS[family][1], changes=changes: function(**{**good, **changes}), changes) for family, cases in FAMILIES.items() for word, changes in cases]
CASES += [("layouts", word, lambda function=CALLS[family][0], good=CALLS[family][1], changes=changes: function(**{**good, **changes}), (family, changes)) for family, word, changes in LAYOUTS]
CASES += [(family, word, call, "") for family, cases in (("patterns", PATTERNS), ("presets", PRESETS)) for word, call in cases]
NAMES = list(dict.fromkeys(case[0] for case in CASES))


def shown(changes):
    return re.sub(r"\s+", " ", repr(changes))[:160]


@pytest.mark.parametrize("family", NAMES)
def test_bad_calls(family):
    """All faults of a family are told at once."""
    faults = []
    for n, (_, word, call, changes) in enumerate(case for case in CASES if case[0] == family):
        error = _raised(call)
        flaw = "no error" if error is None else fault(error, word)
        if flaw:
            faults.append(f"{n} {word}: {flaw}: {shown(changes)}: {str(error)[:200]!r}")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults])


@pytest.mark.parametrize("family", NAMES)
def test_there_are_forty_of_each(family):
    assert sum(case[0] == family for case in CASES) >= 40


# --------------------------------------------------------------------------------------------------------- odd, and legal
CPU = ["numba", "reference"]
cpu = pytest.mark.parametrize("backend", CPU)


def same(got, expected):
    for a, b in zip(got, expected):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert_same_bits("odd", a, b)


def twisted(x, way):
    """The same values in memory of another shape."""
    if way == "reversed":
        return np.flip(np.ascontiguousarray(np.flip(x)))
    if way == "backwards":
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    if way == "every other":
        return np.repeat(x, 2, -1)[..., ::2]
    if way == "fortran":
        return np.asfortranarray(x)
    if way == "read only":
        x = x.copy()
        x.setflags(write=False)
        return x
    if way == "big endian":
        return x.astype(x.dtype.newbyteorder(">"))
    held = np.zeros(x.shape, np.dtype([("pad", "u1"), ("x", x.dtype)]))                # misaligned, and no whole number of elements apart
    held["x"] = x
    return held["x"]


WAYS = ["reversed", "backwards", "every other", "fortran", "read only", "big endian", "misaligned"]


@cpu
@pytest.mark.parametrize("way", WAYS)
def test_memory_of_any_shape(backend, way):
    turn, options = lambda x: twisted(x, way), dict(backend=backend)
    lengths, entries = np.array([3, 9], np.int32), np.arange(2 * 6 * 5, dtype=np.int32).reshape(2, 1, 6, 5) % 11 - 1
    sinks, scale = real(4), real(2, 10) + 2
    for pattern, other in ((st.Causal(), st.Causal()), (st.Selection(entries), st.Selection(turn(entries)))):
        expected = st.sparse_attention(Q, K, V, pattern, kv_length=lengths, sink_logits=sinks, return_lse=True, **options)
        same(st.sparse_attention(turn(Q), turn(K), turn(V), other, kv_length=turn(lengths[:, None])[:, 0], sink_logits=turn(sinks[:, None])[:, 0], return_lse=True, **options), expected)
    same([st.indexer_scores(turn(IQ), turn(IK), turn(IW), k_scale=turn(scale), **options)], [st.indexer_scores(IQ, IK, IW, k_scale=scale, **options)])
    window = np.array([[0, 1, 2, 3, 4, 5]] * 2, np.int32)
    scores = real(2, 6, 10)
    for a, b in ((st.topk(turn(scores), 3, key_start=turn(window), **options), st.topk(scores, 3, key_start=window, **options)), (st.indexer_topk(turn(IQ), turn(IK), turn(IW), 3, **options), st.indexer_topk(IQ, IK, IW, 3, **options))):
        same([a.indices, a.lengths], [b.indices, b.lengths])
    same(st.latent_decompress(turn(LATENT), turn(W_UK), turn(W_UV), k_rope=turn(ROPE), **options), st.latent_decompress(LATENT, W_UK, W_UV, k_rope=ROPE, **options))
    same(st.merge_attention([turn(x) for x in OUTS], [turn(x) for x in LSES], **options), st.merge_attention(OUTS, LSES, **options))


@cpu
@pytest.mark.parametrize("B, T, S", [(0, 6, 10), (2, 0, 10), (2, 6, 0), (0, 0, 0)])
def test_nothing_to_do(backend, B, T, S):
    options = dict(backend=backend)
    q, k, v = real(B, 4, T, 16), real(B, 2, S, 16), real(B, 2, S, 8)
    for rule in (None, st.Causal(), st.PerHead([st.Causal(), st.Full()] * 2), st.RandomBlocks(1, 64), st.Selection(ints(B, 2, T, 3)), st.Selection(ints(B, 1, T, 0)), st.Selection(ints(B, 1, T, 3)) & st.Window(3)):
        out, lse = st.sparse_attention(q, k, v, rule, return_lse=True, kv_length=ints(B), sink_logits=real(4), **options)
        assert out.shape == (B, 4, T, 8) and lse.shape == (B, 4, T) and (out == 0).all() and np.isneginf(lse).all() and out.dtype == q.dtype and lse.dtype == np.float32
        grads = [torch.from_numpy(x).requires_grad_() for x in (q, k, v)]
        if not isinstance(rule, st.Selection):
            st.sparse_attention(*grads, rule, **options).sum().backward()
            assert all(x.grad.shape == x.shape and (x.grad == 0).all() for x in grads)
    iq, ik, iw = real(B, 4, T, 16), real(B, S, 16), real(B, 4, T)
    assert st.indexer_scores(iq, ik, iw, **options).shape == (B, T, S)
    for chosen, best in ((st.topk(real(B, T, S), 3, **options), None), st.indexer_topk(iq, ik, iw, 3, return_scores=True, **options), (st.indexer_topk(iq, ik, iw, 3, pool=4, force_last=1, **options), None)):
        assert chosen.indices.shape == (B, 1, T, 3) and chosen.lengths.shape == (B, 1, T) and (chosen.indices == -1).all() and (chosen.lengths == 0).all()
        assert best is None or best.shape == (B, 1, T, 3) and np.isneginf(best).all()
    k, v = st.latent_decompress(real(B, S, 32), W_UK, W_UV, k_rope=real(B, S, 4), **options)
    assert k.shape == (B, 3, S, 12) and v.shape == (B, 3, S, 12)
    for mode in ("auto", "absorbed", "decompressed"):
        out = st.latent_attention(real(B, 3, T, 8), real(B, 3, T, 4), real(B, S, 32), real(B, S, 4), W_UK, W_UV, st.Causal(), mode=mode, **options)
        assert out.shape == (B, 3, T, 12) and (out == 0).all()
    out, lse = st.merge_attention([real(B, 4, T, 8)], [real(B, 4, T)], **options)
    assert out.shape == (B, 4, T, 8) and lse.shape == (B, 4, T)


@cpu
def test_numbers_of_every_kind(backend):
    options = dict(backend=backend)
    expected = st.sparse_attention(Q, K, V, st.Causal(), scale=0.25, softcap=3.0, q_start=4, **options)
    for number, whole in ((np.float32, np.int32), (np.float64, np.int64), (lambda x: np.array(x), lambda x: np.array(x)), (torch.tensor, torch.tensor)):
        got = st.sparse_attention(Q, K, V, st.Causal(), scale=number(0.25), softcap=number(3.0), q_start=whole(4), **options)
        same([got], [expected])
    assert (st.topk(real(2, 6, 10), np.int64(3), **options).indices == st.topk(real(2, 6, 10), 3, **options).indices).all()
    huge = 2 ** 31 - 1
    same([st.sparse_attention(Q, K, V, st.Window(2 ** 62, 0) | st.Dilated(2 ** 62, 0, huge) | st.Sink(2 ** 62), **options)], [st.sparse_attention(Q, K, V, st.Full(), **options)])
    same([st.sparse_attention(Q, K, V, st.Window(0) | st.Strided(huge) | st.Global([huge]) | (st.Fixed(huge, 1) & st.Window(0)), **options)], [st.sparse_attention(Q, K, V, st.Window(0), **options)])
    for start in (2 ** 31 - 1, -2 ** 31):
        for rule in (st.Causal(), st.Window(3, 3), ~st.Causal(), st.Selection(ints(2, 1, 6, 3), causal=True)):
            count = rule.mask(6, 10, q_start=start) if not isinstance(rule, st.Selection) else np.full((6, 10), start > 0)
            out, lse = st.sparse_attention(Q, K, V, rule, q_start=start, return_lse=True, **options)
            assert (np.isneginf(lse) == ~count.any(-1)).all() and np.isfinite(out).all()


@cpu
def test_more_random_blocks_than_there_are(backend):
    many = st.RandomBlocks(10 ** 12, 2, causal=True) & st.Causal()
    assert many.pairs(6, 10) == st.Causal().pairs(6, 10)
    same([st.sparse_attention(Q, K, V, many, backend=backend)], [st.sparse_attention(Q, K, V, st.Causal(), backend=backend)])
    knobs = {name: float(value) for name, value in st.explain("sparse_attention", Q, K, V, backend=backend).config.items()}
    chosen = st.explain("sparse_attention", Q, K, V, backend=backend, config=knobs).config
    assert chosen == knobs and not [value for value in chosen.values() if isinstance(value, float)]


@cpu
def test_far_sizes_of_the_indexer(backend):
    options = dict(backend=backend)
    everything = st.indexer_topk(IQ, IK, IW, 100, causal=False, **options)
    assert everything.indices.shape == (2, 1, 6, 100) and (everything.lengths == 10).all()
    pooled = st.indexer_topk(IQ, IK, IW, 3, pool=2 ** 31 - 1, causal=False, **options)
    assert (pooled.indices[..., 0] == 0).all() and (pooled.indices[..., 1:] == -1).all() and (pooled.lengths == 1).all()
    keys, how = IK[:, None], dict(scale=IQ.shape[-1] ** -0.5)
    assert_close("all keys", st.sparse_attention(IQ, keys, keys, pooled, **options), oracle.attention(IQ, keys, keys, 1, **how)[0], plain.attention(IQ, keys, keys, 1, **how)[0],
                 reduction=keys.shape[2] + IQ.shape[-1])
    assert (st.indexer_topk(IQ, IK, IW, 30, pool=4, force_first=10, force_last=20, causal=False, **options).lengths == 3).all()


# -------------------------------------------------------------------------------------------------------- the command line
WORKLOAD = "cpu/window-256/4096"


@pytest.mark.parametrize("code, argv", [(1, ["pattern", text]) for text in (
    "Windo(3)", "Window(", "", "3", "Window(-1)", "Window(3, wide=2)", "Window(x)", "Window(*[1])", "Window(**{'left': 1})", "Window(1/0)", "Global(range('a'))", "Global(range(1, 2, 0))", "~3", "Causal() & 3",
    "PerHead([Causal(), 3])", "longformer(3)", "Global([__import__('os')])", "(" * 3000 + ")" * 3000)] + [
    (1, ["pattern", "Causal()", "--block", "33"]), (1, ["pattern", "Causal()", "--plot", "/nowhere/x.png"]), (1, ["explain", "nothing"]),
    (1, ["explain", WORKLOAD, "--device", "x"]), (1, ["explain", WORKLOAD, "--device", "999"]), (1, ["tune", "nothing"]), (1, ["tune", "--device", "-1"]), (1, ["bench", "nothing"])] + [
    (2, ["pattern", "Causal()", flag, value]) for flag in ("--tokens", "--keys", "--block") for value in ("0", "-3", "1.5", "x")] + [
    (2, ["tune", WORKLOAD, *more]) for more in (["--trials", "0"], ["--seconds", "-1"], ["--seconds", "nan"], ["--seconds", "inf"], ["--backend", "reference"], ["--seed", "x"], ["--sampler", "x"])] + [
    (2, ["explain", WORKLOAD, "--backend", "numbaa"]), (2, ["bench", "--seconds", "-1"]), (2, ["demo", "--tokens", "0"]), (2, ["demo", "--tune-seconds", "x"]), (2, ["nothing"]), (2, ["pattern"])], ids=lambda x: x if isinstance(x, int) else " ".join(x)[:40])
def test_bad_commands(code, argv, capsys):
    """One line that says what was expected; usage errors are argparse's."""
    from sparsetile.autotune.cli import main
    try:
        got = main(argv)
    except SystemExit as stop:
        got = stop.code
    said = capsys.readouterr().err.strip()
    assert got == code and said
    if code == 1:
        assert "\n" not in said and said.startswith(f"sparsetile {argv[0]}: ") and re.search("expected|must|No such file", said) and len(said) < 1000


class Exchanged:
    """An array of a framework that we do not know, which can be read in place."""
    __dlpack__ = Q.__dlpack__


CACHE = st.PagedKV.empty(Q, sequences=2, pages=4, page_size=4, heads=2, width=16)


@pytest.mark.parametrize("word, remedy, call", [
    ("q", "numpy.from_dlpack", lambda: st.sparse_attention(Exchanged(), K, V)), ("q", "numpy.asarray", lambda: st.sparse_attention([[1.0]], K, V)), ("v", "gather()", lambda: st.sparse_attention(Q, K, CACHE)),
    ("w_uk", "gather()", lambda: st.latent_decompress(LATENT, CACHE, W_UV)), ("k", "gather()", lambda: st.importance_topk(Q, CACHE, real(2, 4, 6), 3)), ("scores", "gather()", lambda: st.topk(CACHE, 3))])
def test_what_is_no_array_is_told_how_to_become_one(word, remedy, call):
    error = _raised(call)
    assert fault(error, word) is None and remedy in str(error)


def test_the_variable_of_latent_attention_rules_all_its_kernels(monkeypatch):
    function, good = CALLS["latent"]
    monkeypatch.setenv("SPARSETILE_BACKEND_LATENT_ATTENTION", "reference")
    for mode in ("absorbed", "decompressed"):
        assert st.explain(function, **good, mode=mode).backend == "reference"
        assert st.explain(function, **good, mode=mode, backend="numba").backend == "numba"


def test_meta_tensors_have_shapes():
    q, k = torch.empty(2, 4, 6, 16, device="meta"), torch.empty(2, 2, 10, 16, device="meta")
    out, lse = st.sparse_attention(q, k, k, st.Causal(), return_lse=True)
    assert out.is_meta and out.shape == (2, 4, 6, 16) and lse.shape == (2, 4, 6)
