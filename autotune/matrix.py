"""`sparsetile doctor --matrix`: which backend runs which kernel on which element types, and every written refusal, asked of the kernels' own `supports()`.

No GPU is needed: a Problem says what would be computed and for which architecture (importing Triton's kernels takes the extra `triton`).
`python -m sparsetile.autotune.matrix README.md` writes the answer between the marks in the README; a test compares them.
"""
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from sparsetile.backends.contract import ARCHES, BACKENDS, KERNELS, Problem, Unsupported
from sparsetile.ops import attention, dispatch, indexer, latent
from sparsetile.ops.selection import Selection

MARKS = "<!-- matrix: written by python -m sparsetile.autotune.matrix README.md -->", "<!-- matrix: end -->"
ARCHES_OF = {"triton": ARCHES, "cupy": tuple(a for a in ARCHES if a.startswith("sm_")), "numba": ("cpu",), "reference": ("cpu",)}
SHORT = {"int32": "int32", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "float8_e4m3fn": "fp8", "boolean": "bool"}
FLOATS, FLOAT8, LONGEST = ("float32", "float16", "bfloat16"), "float8_e4m3fn", 2 ** 31 - 1
WIDTHS = ((128, 128, ""), (256, 256, ""), (576, 512, "shared_kv"), (576, 576, ""))  # D, Dv, what else; the first is what the table says


def cases(kernel: str):
    """(element type, what is special, dims, dtypes, features) of the problems that a kernel is asked about."""
    if kernel in ("block_attention", "block_attention_backward", "gather_attention", "gather_attention_backward"):
        for kind in (*FLOATS, "float64"):
            for D, Dv, more in WIDTHS:
                special = f"D {D}, Dv {Dv}" if D > 128 else ""
                yield kind, special, dict(B=1, Hq=8, Hk=1, T=4096, S=4096, D=D, Dv=Dv, K=512), dict(q=kind, k=kind, v=kind), [more] * bool(more)
            if kernel == "block_attention":
                yield kind, "keys in pages", dict(B=1, Hq=8, Hk=1, T=4096, S=4096, D=128, Dv=128), dict(q=kind, k=kind, v=kind), ["paged", "kv_length"]
            if not kernel.endswith("_backward") and kind != "float64":
                pages = ["paged", "kv_length"] * (kernel == "block_attention")
                yield kind, f"fp8 latents, queries of {SHORT[kind]}", dict(B=1, Hq=8, Hk=1, T=4096, S=4096, D=576, Dv=512, K=512), dict(q=kind, k="latent_fp8", v="latent_fp8"), ["shared_kv", *pages]
        for kind in (FLOAT8, "bfloat16", "float16") * (kernel == "block_attention"):
            for D, Dv, more in WIDTHS:
                special = ", ".join([f"fp8 keys, queries of {SHORT[kind]}"] * (kind != FLOAT8) + [f"fp8 D {D}, Dv {Dv}"] * (D > 128))
                yield FLOAT8, special, dict(B=1, Hq=8, Hk=1, T=4096, S=4096, D=D, Dv=Dv), dict(q=kind, k=FLOAT8, v=FLOAT8), ["scale", *[more] * bool(more)]
    elif kernel == "attention_delta":
        for kind in (*FLOATS, "float64"):
            yield kind, "", dict(B=1, Hq=8, T=4096, Dv=128), dict(out=kind), []
    elif kernel == "merge_attention":
        for kind in (*FLOATS, "float64"):
            for parts in (2, 1024):
                yield kind, f"{parts} parts" if parts > 2 else "", dict(B=1, Hq=8, T=4096, Dv=128, N=parts), dict(out=kind), []
    elif kernel in ("indexer_scores", "indexer_scores_backward", "indexer_topk"):
        for kind in (*FLOATS, *[FLOAT8] * (not kernel.endswith("_backward"))):
            for D, S in ((128, 32768), (576, 32768), (128, LONGEST)):
                special = f"{S} keys" if S == LONGEST else f"D {D}" if D > 128 else ""
                yield kind, special, dict(B=1, H=64, T=64, S=S, D=D, K=2048), dict(q=kind, k=kind), ["causal"]
        for words, special in ((["pool"], ""), (["pool", "force_first", "force_last"], ", forced blocks"))[:0 if kernel.endswith("_backward") else 1 + (kernel == "indexer_topk")]:
            yield FLOAT8, f"keys in pages{special}", dict(B=1, H=64, T=1, S=32768, D=128, K=2048), dict(q=FLOAT8, k=FLOAT8), ["causal", "scale", "window", "paged", *words * (kernel == "indexer_topk")]
    elif kernel == "importance_topk":
        for kind in (*FLOATS, "float64"):
            for D in (128, 576):
                yield kind, f"D {D}" if D > 128 else "", dict(B=1, Hq=64, Hk=4, T=4096, S=4096, C=255, D=D, K=16), dict(q=kind, k=kind), ["force_first", "force_last"]
    elif kernel == "topk":
        for S in (32768, LONGEST):
            yield "float32", f"{S} scores a row" if S == LONGEST else "", dict(B=1, T=1, S=S, K=2048), dict(scores="float32"), []
    elif kernel == "latent_decompress":
        for kind in (*FLOATS, "float64"):
            yield kind, "", dict(B=1, S=4096, H=16, R=512, Dn=128, Dv=128, P=64), dict(latent=kind, w_uk=kind), []
        yield FLOAT8, "", dict(B=1, S=4096, H=16, R=512, Dn=128, Dv=128, P=64), dict(latent=FLOAT8, w_uk="bfloat16"), ["scale"]
    elif kernel == "grouped_matmul":
        for kind in (*FLOATS, "float64"):
            yield kind, "", dict(B=1, H=16, T=4096, N=128, M=512, P=64), dict(x=kind, w=kind), ["tail"]
    elif kernel == "append":
        for kind in (*FLOATS, "float64"):
            yield kind, "", dict(B=1, T=4096, D=128), dict(rows=kind, pool=kind), ["copy"]
        for kind in FLOATS:
            for form, width in (("latent_fp8", 512), ("indexer_fp8", 128)):
                yield kind, form, dict(B=1, T=4096, D=width), dict(rows=kind, pool="uint8"), [form]
    elif kernel == "page_rows":
        yield "int32", "", dict(B=128, Hk=1, T=1, K=2048), dict(indices="int32"), []
    elif kernel == "selection_bitmaps":
        yield "int32", "", dict(B=1, Hq=8, Hk=8, T=4096, S=4096, K=2048), dict(indices="int32"), []
    else:
        assert kernel == "layout", f"{kernel}: say here what it is asked about"
        yield "boolean", "", dict(B=1, Hq=8, Hk=8, T=4096, S=4096, D=128, Dv=128), dict(mask="uint8"), []


def ask(kernel: str, backend: str) -> tuple[list, list] | None:
    """Element types that run on every architecture, and (sentence, case, architecture) of each refusal; None where the backend has no such kernel."""
    if not dispatch.has_kernel(backend, kernel):
        return None
    supports, kinds, refused = dispatch.kernel(backend, kernel).supports, {}, []
    for kind, special, dims, dtypes, features in cases(kernel):
        for arch in ARCHES_OF[backend]:
            if special and arch in kinds[kind]:
                continue  # the element type itself is refused there, and that was said
            sentence = supports(Problem.of(kernel, dims, dtypes, arch, features))
            if not special:
                kinds.setdefault(kind, set()).update([arch] if sentence else [])
            if sentence is not None:
                refused.append((sentence, special or SHORT[kind], arch))
    return [kind for kind, without in kinds.items() if not without], refused


def everywhere() -> list[str]:
    """What the ops themselves refuse, whatever the backend: the sentence of each call that ends in Unsupported."""
    import ml_dtypes
    x, w, one = np.zeros((1, 1, 4, 8), np.float32), np.zeros((1, 8, 8), np.float32), np.ones((1, 1, 1), np.float32)
    low = x.astype(ml_dtypes.float8_e4m3fn)
    calls = [lambda: attention.sparse_attention(low, low, low, Selection(np.zeros((1, 1, 4, 1), np.int32)), k_scale=one), lambda: _gradient("float8"),
             lambda: latent.latent_attention(x, None, x[0].astype(low.dtype), None, w, w, latent_scale=np.ones((1, 4, 1), np.float32), mode="absorbed"),
             lambda: latent.latent_attention(x, None, np.zeros((1, 4, 600), np.float32), None, *[np.zeros((1, 600, 8), np.float32)] * 2, mode="absorbed"),
             *(lambda op=op: _gradient(op) for op in ("indexer_scores", "indexer_topk", "latent_decompress", "latent_attention"))]
    return list(dict.fromkeys(filter(None, map(_refusal, calls))))


def _refusal(call) -> str | None:
    try:
        call()
    except Unsupported as sentence:
        return str(sentence)


def _gradient(op):
    import torch
    x, w = torch.zeros(1, 1, 4, 8, requires_grad=True), torch.zeros(1, 8, 8, requires_grad=True)
    if op == "float8":
        return attention.sparse_attention(x.bfloat16(), *[x.detach().to(torch.float8_e4m3fn)] * 2)
    if op.startswith("indexer"):
        arguments = (x, x[0], torch.ones(1, 1, 4))
        got = indexer.indexer_scores(*arguments) if op == "indexer_scores" else indexer.indexer_topk(*arguments, 2, return_scores=True)[1]
    else:
        got = latent.latent_decompress(x[0], w, w)[0] if op == "latent_decompress" else latent.latent_attention(x, None, x[0], None, w, w)
    got.nan_to_num(0, 0, 0).sum().backward()


def markdown() -> str:
    """The table, and the refusals it points to; sentences that differ in numbers only are told once, with the first one's."""
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        raise ImportError(f"the matrix asks every kernel, and misses {' and '.join(missing)}: pip install 'sparsetile[triton]'")
    lines = ["| kernel | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    told = {}  # (backend, sentence without its numbers) -> [the first sentence, kernels, cases, architectures]
    for kernel in KERNELS:
        cells = []
        for backend in BACKENDS:
            answer = ask(kernel, backend)
            if answer is None:
                cells.append("-")
                continue
            marks = {}
            for sentence, case, arch in answer[1]:
                key = backend, re.sub(r"\bsm_\w+|\d+", "", sentence)
                entry = told.setdefault(key, [sentence, {}, {}, {}])
                entry[1][kernel], entry[2][case], entry[3][arch] = None, None, None
                marks[list(told).index(key) + 1] = None
            cells.append(" ".join(SHORT[kind] for kind in answer[0]) + (f" [{', '.join(map(str, marks))}]" if marks else ""))
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    lines += ["", "Refused, in the kernels' own words (the case asked about, and the architectures where not all, in brackets):", ""]
    for number, ((backend, _), (sentence, kernels, cases_, arches)) in enumerate(told.items(), 1):
        places = "" if len(arches) == len(ARCHES_OF[backend]) else f", on {', '.join(arches)}"
        lines.append(f"{number}. {backend}: {sentence}. [{', '.join(kernels)}: {'; '.join(cases_)}{places}]")
    return "\n".join(lines + ["", "Refused by the ops themselves, on every backend:", "", *(f"* {sentence}" for sentence in everywhere())])


def section(readme: str) -> tuple[str, str, str]:
    """The README before, between and after the marks."""
    before, mark, rest = readme.partition(MARKS[0])
    between, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise ValueError(f"readme: expected the marks {MARKS[0]} and {MARKS[1]}, got a file without them; add them where the matrix belongs")
    return before, between.strip(), after


if __name__ == "__main__":
    path = Path(sys.argv[1])
    start, _, finish = section(path.read_text())
    path.write_text(f"{start}{MARKS[0]}\n{markdown()}\n{MARKS[1]}{finish}")
