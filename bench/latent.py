"""Latent KV on one GPU, checked, then timed: python -m sparsetile.bench.latent [--quick] [--graphs] [--budget seconds] [--only WORD ...] [--out results.jsonl]

DeepSeek's sizes (128 heads, rank 512, rotary 64, Dn = Dv = 128), bfloat16, CuPy and Triton in turn with their peers, cold L2, medians, the clock beside each row:
products     the two products of the absorbed mode, prefill of 4096 queries and decode of 128 sequences, beside cuBLAS's batched product; with the rotary tail beside product + copy
backward     of latent_decompress, beside the two cuBLAS products it contains on operands that lie ready
decode       dense, on the latents: B 1, 8, 128, S 4k, 32k, 128k, h 128 and 16, beside torch, and FlashMLA and FlashInfer where they are installed
decompress   4k, 32k, 128k tokens, beside cuBLAS's bare product and torch.compile's product + split + concat
Decode and decompression run in bench/gpu_table.py's workers. Rows are printed, and appended to --out, as they come: what the budget cuts off is said, as is what does not fit the memory.
Without a GPU: products and backward at a small size on the CPU. Leaves with 1 if an answer is wrong.
"""
import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from sparsetile.autotune import graphs, numeric, plain, timing  # noqa: E402
from sparsetile.bench import gpu_rows, gpu_table  # noqa: E402
from sparsetile.bench.spot import host, wide  # noqa: E402
from sparsetile.ops import latent  # noqa: E402

SIZES, SMALL = dict(H=128, R=512, P=64, Dn=128, Dv=128), dict(H=3, R=48, P=8, Dn=16, Dv=24)
FLUSH_MB = 8192  # two milliseconds of writing: longer than a busy host needs to launch all of a backward
LONG = ("B 128 128k", "B 8 128k", "decompress 128k")  # not with --quick


def normal(torch, device):
    generator, kind = torch.Generator(device).manual_seed(0), torch.bfloat16 if device != "cpu" else torch.float32
    return lambda *shape, scale=1.0: torch.randn(shape, generator=generator, device=device, dtype=kind) * scale


def blas(device) -> str:
    return "torch" if device == "cpu" else "cuBLAS"


def products(torch, device, backends, B, T, H, R, P, Dn, Dv):
    """(row, operations, bytes, {who: call}) of queries times W_UK, the same with its rotary tail, and the result times W_UV, whose weights are read in place from [H,R,Dv]."""
    draw, size = normal(torch, device), 2 if device != "cpu" else 4
    uk, uv = (draw(H, R, D, scale=D ** -0.5) for D in (Dn, Dv))
    x, y, tail = draw(B, H, T, Dn), draw(B, H, T, R), draw(B, H, T, P)
    place = None if device == "cpu" else 0
    rows = (("q W_UK", x, uk, None), ("q W_UK + rotary", x, uk, tail), ("o W_UV", y, uv.transpose(1, 2), None))
    for name, a, w, end in rows:
        (_, _, _, N), M, p = a.shape, w.shape[1], 0 if end is None else P
        ours = {backend: lambda backend=backend: latent.matmul(a, w, end, backend, "torch", place) for backend in backends}
        heads = a[0] if B == 1 else a[:, :, 0].transpose(0, 1)  # [H, rows, N]
        bare = lambda: torch.bmm(heads, w.transpose(1, 2))  # noqa: E731
        flat = None if end is None else end[0] if B == 1 else end[:, :, 0].transpose(0, 1)
        peer = {blas(device): bare if end is None else lambda: torch.cat((bare(), flat), -1)}
        check_products(name, {who: call() for who, call in ours.items()}, a, w, end)
        yield f"{name} B {B} T {T}", 2 * B * T * H * N * M, size * (B * T * H * (N + M + 2 * p) + H * N * M), ours | peer


def check_products(name, found, a, w, end):
    """The last head of some rows, in float64."""
    rows, h = np.unique([0, a.shape[2] // 2, a.shape[2] - 1]), a.shape[1] - 1
    held = [host(x) for x in (a[-1:, h:, rows], w[h:])] + [None if end is None else host(end[-1:, h:, rows])]
    truth, formula = plain.grouped_matmul(*wide(*held[:2]), tail=held[2]), plain.grouped_matmul(*held[:2], tail=held[2])
    for who, got in found.items():
        numeric.assert_close(f"{name} of {who}", host(got[-1:, h:, rows]), truth, formula, reduction=a.shape[3])


def backward(torch, device, backends, S, H, R, P, Dn, Dv):
    """(row, operations, bytes, {who: call}) of the gradients of latent_decompress, everything that autograd does after the forward."""
    draw, size = normal(torch, device), 2 if device != "cpu" else 4
    inputs = [draw(1, S, R), draw(H, R, Dn, scale=R ** -0.5), draw(H, R, Dv, scale=R ** -0.5), draw(1, S, P)]
    douts, calls = (draw(1, H, S, Dn + P), draw(1, H, S, Dv)), {}
    for backend in backends:
        leaves = [x.detach().requires_grad_() for x in inputs]
        outs = latent.latent_decompress(*leaves[:3], k_rope=leaves[3], backend=backend)
        calls[backend] = lambda outs=outs, leaves=leaves: torch.autograd.grad(outs, leaves, douts, retain_graph=True)
        check_backward(backend, calls[backend](), douts, inputs)
    g = torch.cat((douts[0][0, :, :, :Dn], douts[1][0]), -1).transpose(0, 1).reshape(S, -1)  # [S, H*(Dn+Dv)]
    both, c = torch.cat(inputs[1:3], -1).transpose(0, 1).reshape(R, -1).contiguous(), inputs[0][0]
    calls[f"{blas(device)}, both products"] = lambda: (g @ both.t(), g.t() @ c)
    yield f"backward S {S}", 4 * S * H * R * (Dn + Dv), size * (S * H * (Dn + P + Dv) + 2 * S * (R + P) + 2 * H * R * (Dn + Dv)), calls


def check_backward(backend, found, douts, inputs):
    """dlatent and dk_rope of some tokens, dw_uk and dw_uv of the last head, in float64."""
    (dk, dv), (c, uk, uv, rope) = douts, inputs
    rows, (H, _, Dn) = np.unique([0, c.shape[1] // 3, c.shape[1] - 1]), uk.shape
    of_rows = [host(x) for x in (dk[:, :, rows], dv[:, :, rows], c[:, rows], uk, uv, rope[:, rows])]
    of_head = [host(x) for x in (dk[:, -1:], dv[:, -1:], c, uk[-1:], uv[-1:], rope)]
    made = lambda x: plain.latent_gradients(*x[:5], k_rope=x[5])  # noqa: E731
    for what, x, got, reduction in (("dlatent", of_rows, found[0][:, rows], H * (Dn + uv.shape[2])), ("dk_rope", of_rows, found[3][:, rows], H),
                                    ("dw_uk", of_head, found[1][-1:], c.shape[1]), ("dw_uv", of_head, found[2][-1:], c.shape[1])):
        n = ("dlatent", "dw_uk", "dw_uv", "dk_rope").index(what)
        numeric.assert_close(f"{what} of {backend}", host(got), made(wide(*x))[n], made(x)[n], reduction=reduction)


def here(torch, device, given, found, made, until) -> int:
    """Rows that are measured in this process; how many were wrong."""
    watch, wrong = timing.Stopwatch(0 if device != "cpu" else None, flush_mb=FLUSH_MB), 0
    clock = (lambda: None) if device == "cpu" else _clock()
    for name, rows in made:
        try:
            if time.monotonic() > until:
                raise TimeoutError("out of time")
            for row, flops, size, calls in rows():
                for call in (*calls.values(), *calls.values()):
                    call()
                recorded, how = graphs.record(list(calls.values()), 0) if given.graphs and device != "cpu" else (None, None)
                samples = timing.finals(watch, recorded or list(calls.values()), given.seconds, 8 if given.quick else 20)
                next(iter(calls.values()))()
                at = clock()
                for who, times in zip(calls, samples):
                    time_us = watch.centre(times)
                    found.take(dict(row=row, who=who, time_us=round(time_us, 1), **timing.spread(times), tflops=round(flops / time_us / 1e6, 1), gbs=round(size / time_us / 1e3), clock_mhz=at,
                                    **({"timed": how} if how else {})))
        except Exception as error:  # noqa: BLE001 (that row's: a wrong answer, no memory, no time)
            wrong += isinstance(error, AssertionError)
            found.take(dict(row=name, who="row", failed=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
        if device != "cpu":
            torch.cuda.empty_cache()
    return wrong


def _clock():
    from sparsetile.bench.gpu_worker import clock_mhz
    return clock_mhz


def lines(found, backends) -> str:
    """A line for each row and who ran it; the last column is its time beside the fastest peer's."""
    text = [f"{'row':28} {'who':24} {'ms':>9} {'TFLOP/s':>8} {'GB/s':>6} {'MHz':>5} {'of peer':>8}"]
    for row, events in found.rows.items():
        peers = [event["time_us"] for who, event in events.items() if who not in backends and "time_us" in event]
        for who, event in events.items():
            if "time_us" in event:
                beside = f"{event['time_us'] / min(peers):.3f}" if peers and who in backends else ""
                text.append(f"{row:28} {who:24} {event['time_us'] / 1e3:9.3f} {event.get('tflops', '-'):>8} {event.get('gbs', '-'):>6} {event.get('clock_mhz') or '-':>5} {beside:>8}")
            elif "failed" in event:
                text.append(f"{row:28} {who:24} {event['failed'][:110]}")
    return "\n".join(text)


def absent(modules: dict) -> list[str]:
    """A sentence for each peer that is not installed here."""
    return [f"{who}: not installed (no module {module}), so no row of latent decode has it" for who, module in modules.items() if find_spec(module) is None]


def table_rows(given) -> list[str]:
    names = [row.name for row in gpu_rows.selected(["latent decode", "decompress"]) if not (given.quick and row.name.endswith(LONG))]
    full = {"latent decode h 128": "B 128 32k", "latent decode h 16": "B 128 32k"}
    return [name for name in names if not given.only or any(word in f"{name} {full.get(name, '')}" for word in given.only)]


def main(arguments=None) -> int:
    import torch
    parser = argparse.ArgumentParser(prog="sparsetile.bench.latent", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without 128k at B 8 and 128, fewer rounds, nothing of torch.compile")
    parser.add_argument("--graphs", action="store_true", help="CUDA graphs of the calls where they can be recorded, as a decode step is; every line of --out says how it was timed")
    parser.add_argument("--budget", type=float, default=500, help="seconds after which rows that are left are said and not measured (default: 500)")
    parser.add_argument("--only", nargs="*", default=[], help="rows that contain one of these words: products, backward, decode, decompress, 'h 16', 32k ...")
    parser.add_argument("--out", help="file of JSON lines that the results are appended to")
    given = parser.parse_args(arguments)
    until, cuda = time.monotonic() + given.budget, torch.cuda.is_available()
    given.seconds = 0.0 if not cuda else 0.2 if given.quick else 0.8
    device, backends = ("cuda", gpu_table.OURS) if cuda else ("cpu", ("numba",))
    sizes = SIZES if cuda else SMALL
    found = gpu_table.Measured(open(given.out, "a") if given.out else None)
    made = [(f"products B {B} T {T}", lambda B=B, T=T: products(torch, device, backends, B, T, **sizes)) for B, T in (((1, 4096), (128, 1)) if cuda else ((1, 40), (5, 1)))]
    made += [(f"backward S {S}", lambda S=S: backward(torch, device, backends, S, **sizes)) for S in ((4096, 32768, 131072)[:2 if given.quick else 3] if cuda else (50,))]
    made = [(name, rows) for name, rows in made if not given.only or any(word in name for word in given.only)]
    print(torch.cuda.get_device_name() if cuda else "CPU", flush=True)
    wrong = here(torch, device, given, found, made, until)
    if cuda:
        from sparsetile.bench import peers
        if any("decode" in name for name in table_rows(given)):
            for who in absent(peers.OF_LATENTS):
                print(who, flush=True)
        for names, compiled in (([n for n in table_rows(given) if "decode" in n], False), ([n for n in table_rows(given) if "decompress" in n], not given.quick)):
            gpu_table.supervise(dict(rows=names, without=[], seconds=given.seconds, compiled=compiled, graph=given.graphs), found, 180 if compiled else 60, until)
    print(f"\n{lines(found, backends)}")
    return int(wrong > 0 or any("wrong answer" in event.get("failed", "") for events in found.rows.values() for event in events.values()))


if __name__ == "__main__":
    raise SystemExit(main())
