"""Every op of the Numba backend under 1, 2 and 4 threads: the same bits, forward and backward; in Python's threads and in forked children too."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import hashlib, sys
import numpy as np, numba, torch
import sparsetile as st

generator = torch.Generator().manual_seed(0)
make = lambda *shape: torch.randn(shape, generator=generator)
q, k, v = make(2, 6, 200, 40), make(2, 2, 900, 40), make(2, 2, 900, 24)
iq, ik, iw = make(2, 5, 60, 24), make(2, 700, 24), make(2, 5, 60)
latent = make(1, 4, 90, 16), make(1, 4, 90, 8), make(1, 300, 64), make(1, 300, 8), make(4, 64, 16), make(4, 64, 20)
chosen = st.Selection(torch.randint(-3, 900, (2, 2, 200, 30), generator=generator, dtype=torch.int32))


def trained(function, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = [x for x in function(*leaves) if x.is_floating_point()]
    return [*out, *torch.autograd.grad(sum(torch.where(torch.isfinite(x), x, 0).square().sum() for x in out), leaves)]


OPS = {
    "window": lambda: trained(lambda *x: st.sparse_attention(*x, st.Window(300) | st.Sink(4), return_lse=True, backend="numba"), q, k, v),
    "strided": lambda: trained(lambda *x: st.sparse_attention(*x, st.Causal() & (st.Window(16) | st.Strided(32)), return_lse=True, backend="numba"), q, k, v),
    "bfloat16": lambda: trained(lambda *x: st.sparse_attention(*x, st.Causal(), return_lse=True, backend="numba"), *(x.bfloat16() for x in (q, k, v))),
    "selection": lambda: trained(lambda *x: st.sparse_attention(*x, chosen, return_lse=True, backend="numba"), q, k, v),
    "decode": lambda: st.sparse_attention(q[:, :, :1], k.repeat(1, 1, 20, 1), v.repeat(1, 1, 20, 1), st.Causal(), return_lse=True, backend="numba"),
    "indexer": lambda: trained(lambda *x: (st.indexer_scores(*x, backend="numba"),), iq, ik, iw),
    "chosen scores": lambda: trained(lambda *x: (st.indexer_topk(*x, 30, return_scores=True, backend="numba")[1],), iq, ik, iw),
    "top-k": lambda: [st.topk(st.indexer_scores(iq, ik, iw, causal=False, backend="numba"), 50, backend="numba").indices],
    "absorbed": lambda: trained(lambda *x: (st.latent_attention(*x, st.Causal(), mode="absorbed", backend="numba"),), *latent),
    "decompressed": lambda: trained(lambda *x: (st.latent_attention(*x, st.Causal(), mode="decompressed", backend="numba"),), *latent),
    "merge": lambda: st.merge_attention([q, q + 1], [q[..., 0], q[..., 1]], backend="numba"),
}
bits = lambda found: hashlib.sha256(b"".join(x.detach().contiguous().view(torch.uint8).numpy().tobytes() for x in found)).hexdigest()
"""
EQUAL = """
for name, op in OPS.items():
    found = []
    for count in (1, 2, 4, 1):
        numba.set_num_threads(count)
        found.append(bits(op()))
        assert numba.get_num_threads() == count
    print(name, "ok" if len(set(found)) == 1 else "DIFFERS")
"""
CALLERS = """
from concurrent.futures import ThreadPoolExecutor
names = list(OPS) * 3
alone = {name: bits(op()) for name, op in OPS.items()}
with ThreadPoolExecutor(6) as pool:
    together = list(pool.map(lambda name: bits(OPS[name]()), names))
print(*(f"{name} {'ok' if alone[name] == got else 'DIFFERS'}" for name, got in zip(names, together)), sep="\\n")
"""
FORKED = """
import multiprocessing

def child():
    torch.set_num_threads(1)
    return bits(OPS["selection"]())
alone = bits(OPS["selection"]())
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(*(f"child {'ok' if got == alone else 'DIFFERS'}" for got in pool.starmap(child, [()] * 4)), sep="\\n")
"""


@pytest.mark.parametrize("body", [EQUAL, CALLERS, pytest.param(FORKED, marks=pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"))], ids=["counts", "callers", "forked"])
def test_same_bits(body):
    environment = {**os.environ, "NUMBA_NUM_THREADS": "4", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", PROGRAM + body], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert len(lines) >= 4 and all(line.endswith("ok") for line in lines), run.stdout
