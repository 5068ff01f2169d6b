"""DeepSeek sparse attention on one GPU, kernel by kernel and whole: python -m sparsetile.bench.dsa [--quick] [--no-tables | --no-calls] [--backend NAME] [--share I/N] [--out results.jsonl]

Whole calls first: dsa_latent_attention (128 heads, latent 512 + 64; indexer of 64 heads x 128 in float8; 2048 keys) beside dense latent_attention, in one run:
prefill (dense on rebuilt keys: absorbed it took 8 to 24 times as long), one chunk of 4096 queries at the end of S keys, which is what a position of a long prompt costs; decode (dense on
the latents: rebuilt keys of all heads would not fit), one query of each of many sequences, latents and the indexer's keys in caches of pages of 64, recorded in CUDA graphs.
Then attention alone over chosen tokens of a paged latent cache, in DeepSeek's 656 bytes a token and in bfloat16, the translation of tokens to rows of the pool included; and the indexer's scores over paged keys.
The chosen keys are checked by their float64 scores and the outputs by the numeric policy before anything is timed. The crossover is the S from which on sparse is faster.
Then the tables of selected keys and of indexer and top-k, by the machinery of bench/gpu_table.py: CuPy and Triton in turn with torch, and with FlashMLA, DeepGEMM and
FlashInfer where they are installed; others stand there with their stored figures (*). The clock is beside each row, which is printed as soon as it is measured; what --minutes
leave no time for says so, the whole calls have half of them. --list shows the rows, --share 1/4 takes a quarter of them (both tables and both backends are ten minutes of four GPUs), --read makes one
report of several commands' files. Last stands what came of floors, of the other backend, of torch, of goals, of few heads and of memory. Leaves with 1 if an answer is wrong.
"""
import argparse
import itertools
import sys
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from sparsetile.autotune import graphs, numeric, plain, timing  # noqa: E402
from sparsetile.backends.reference.positions import latents  # noqa: E402
from sparsetile.bench import gpu_table  # noqa: E402
from sparsetile.bench.gpu_rows import NAMED  # noqa: E402
from sparsetile.bench.spot import host, wide  # noqa: E402
from sparsetile.ops.attention import sparse_attention  # noqa: E402
from sparsetile.ops.caches.indexer import IndexerKeys  # noqa: E402
from sparsetile.ops.caches.latent import PagedLatent  # noqa: E402
from sparsetile.ops.indexer import indexer_scores  # noqa: E402
from sparsetile.ops.latent import latent_attention  # noqa: E402
from sparsetile.ops.patterns import Causal  # noqa: E402
from sparsetile.ops.selection import Selection  # noqa: E402
from sparsetile.systems.dsa import dsa_latent_attention  # noqa: E402

TABLES = {
    "Selected keys": [f"DSA h {h}{where}" for where in ("", " 128k") for h in (128, 64, 32, 16, 8) if not where or h > 32]
    + ["DSA decode h 128", "DSA decode h 64", "DSA bwd 16k", "latent decode h 128", "latent decode h 16"],
    "Indexer and top-k": ["scores 2048 x 32k", "scores 4096 x 128k", "scores decode B 128", "top-k 4096 x 128k", "top-k 4096 x 32k", "top-k 128 x 128k", "scores + top-k"]}
CACHED = {"decode of chosen tokens, fp8 pages, h 128": (0.185, 0.14, "FlashMLA* 0.194"), "decode of chosen tokens, fp8 pages, h 64": (0.105, 0.085, "FlashMLA* 0.123"),
          "decode of chosen tokens, bfloat16 pages, h 128": (None, None, "FlashInfer* 0.151"), "decode of chosen tokens, bfloat16 pages, h 64": (None, None, ""),
          "decode of scores, fp8 pages, h 64": (0.16, 0.142, "DeepGEMM* 0.149")}  # B 128, S 32k, 2048 keys of pages of 64; floor, goal and stored peers in ms
FEW = {32: (1.5, 2.5), 16: (1.5, 2.5), 8: (1.5, 2)}  # heads: floor and goal, times our own rate of 64 heads times heads / 64
SIZES = dict(H=128, R=512, P=64, Dn=128, Dv=128, Hi=64, Di=128)  # DeepSeek-V3.2
FLUSH_MB = 4096  # about 1 ms of writing: the host, which launches six kernels, is ahead when a call begins
SMALL = dict(H=4, R=32, P=8, Dn=16, Dv=16, Hi=4, Di=32)


def inputs(torch, device, B, T, S, H, R, P, Dn, Dv, Hi, Di, seed=0):
    """(positional arguments of dsa_latent_attention, those of its indexer)."""
    generator = torch.Generator(device).manual_seed(seed)
    normal = lambda *shape, kind=torch.bfloat16, scale=1.0: (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * scale).to(kind)  # noqa: E731
    model = normal(B, H, T, Dn), normal(B, H, T, P), normal(B, S, R), normal(B, S, P), normal(H, R, Dn, scale=R ** -0.5), normal(H, R, Dv, scale=R ** -0.5)
    scale = torch.rand((B, S), generator=generator, device=device) * 0.1 + 0.05
    eight = torch.float8_e4m3fn
    return model, dict(index_q=normal(B, Hi, T, Di, kind=eight), index_k=normal(B, S, Di, kind=eight), index_scale=scale, index_weights=normal(B, Hi, T, kind=torch.float32))


def in_pages(torch, model, index, page=64) -> tuple:
    """The same arguments with latents and the indexer's keys in caches, whose pages lie in any order."""
    (B, S, R), P, D = model[2].shape, model[3].shape[2], index["index_k"].shape[2]
    table = torch.randperm(B * S // page, device=model[2].device)
    length = torch.full((B,), S, dtype=torch.int32, device=table.device)
    latents, keys = torch.empty((len(table), page, R + P), dtype=model[2].dtype, device=table.device), torch.empty((len(table), page * (D + 4)), dtype=torch.uint8, device=table.device)
    latents[table] = torch.cat(model[2:4], -1).view(-1, page, R + P)
    keys[table] = torch.cat((index["index_k"].view(torch.uint8).view(-1, page * D), index["index_scale"].view(torch.uint8).view(-1, page * 4)), -1)
    table = table.view(B, -1).to(torch.int32)
    cached = dict(index_q=index["index_q"], index_weights=index["index_weights"], index_k=IndexerKeys(keys, table, length, width=D))
    return (*model[:2], PagedLatent(latents, table, length, rank=R, rotary=P), None, *model[4:]), cached


def known(model, index) -> tuple:
    """The first, the last and a middle query of the last sequence; their scores in float64 and by the plain formula, and what they see, [1,rows,S]."""
    T, S = model[0].shape[2], model[2].shape[1]
    rows = np.unique([0, T // 2, T - 1])
    iq, ik, iw, scale = (host(x) for x in (index["index_q"][-1:], index["index_k"][-1:], index["index_weights"][-1:][:, :, rows], index["index_scale"][-1:]))
    iq, seen = iq[:, :, rows], (np.arange(S) <= S - T + rows[:, None])[None]
    keys = ik[0].astype(float).T
    dots = sum(np.maximum(iq[:, n].astype(float) @ keys, 0) * iw[:, n, :, None] for n in range(iq.shape[1]))
    return rows, np.where(seen, dots * scale[:, None].astype(float), -np.inf), plain.indexer_scores(iq, ik, iw, k_scale=scale, visible=seen), seen


def check(model, index, top_k, backend, truths, cached=None):
    """The choice of the `known` queries by their float64 scores; one head's output on the chosen keys by the policy. cached: what the call takes, where not these arrays."""
    given = cached or (model, index)
    out, chosen = dsa_latent_attention(*given[0], **given[1], top_k=top_k, return_selection=True, backend=backend)
    assert bool(out.isfinite().all()), "dsa_latent_attention: the answer is not finite everywhere"
    (_, heads, _, width), S, h = index["index_q"].shape, model[2].shape[1], model[0].shape[1] - 1
    rows, truth, measure, seen = truths
    found, lengths = host(chosen.indices[-1, 0][rows]), host(chosen.lengths[-1, 0][rows])
    numeric.assert_chosen("choice", found[None], lengths[None], truth, measure, top_k, visible=seen, reduction=heads * width, accumulator="float8")
    for n, t in enumerate(rows):
        keys = found[n, :lengths[n]].tolist()
        held = [host(x) for x in (model[0][-1:, h:, [t]], model[1][-1:, h:, [t]], model[2][-1:, keys], model[3][-1:, keys], model[4][h:], model[5][h:])]
        how = dict(mode="absorbed" if S > top_k or cached else "decompressed", scale=(held[0].shape[3] + held[1].shape[3]) ** -0.5)
        count = np.ones((1, 1, 1, len(keys)), int)
        first = lambda got: got[0] if isinstance(got, tuple) else got  # noqa: E731
        numeric.assert_close(f"out of query {t}", host(out[-1:, h:, [t]]), first(plain.latent_attention(*wide(*held), count, **how)), first(plain.latent_attention(*held, count, **how)),
                             reduction=len(keys) + held[2].shape[2] + held[0].shape[3])


def calls(torch, model, index, top_k, backends, mode):
    """name -> call: each backend's sparse call, and its dense one."""
    def made(function, *more, **options):
        def call():
            with torch.no_grad():
                return function(*model, *more, **options)
        return call
    found = {f"DSA {backend}": made(dsa_latent_attention, **index, top_k=top_k, backend=backend) for backend in backends}
    return found | {f"dense {backend}": made(latent_attention, Causal(), mode=mode, backend=backend) for backend in backends}


def usable(torch, given: dict, row: str, found) -> dict:
    """The calls that run; why the others do not."""
    made = {}
    for name, call in given.items():
        try:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            made[name] = call
        except Exception as error:  # noqa: BLE001 (that call's row)
            found.take(dict(row=row, who=name, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"))
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return made


def timed(torch, device, found, row, watch, ours: dict, seconds, in_graphs):
    """Every call of a row in turn, by CUDA graphs where they are asked for and can be recorded."""
    recorded, how = graphs.record(list(ours.values()), 0) if in_graphs and device != "cpu" else (None, "events")
    samples = timing.finals(watch, recorded or list(ours.values()), seconds)
    for call in list(ours.values())[:1]:
        call()
    at = clock(torch, device)  # under load
    for name, times in zip(ours, samples):
        found.take(dict(row=row, who=name, time_us=round(watch.centre(times), 1), **timing.spread(times), clock_mhz=at, timed=how[:60]))
    found.take(dict(row=row, who="row", done=True))


def whole(torch, device, given, found, kind, S, B, T, sizes, top_k, backends, watch):
    """Every call of one S, checked before it is timed."""
    model, index = inputs(torch, device, B, min(T, S), S, **sizes)
    truths, cached = known(model, index), in_pages(torch, model, index) if kind == "decode" else None
    for backend in backends:
        check(model, index, top_k, backend, truths, cached)
    if cached:
        model, index = cached
    row = f"{kind} {S}"
    ours = usable(torch, calls(torch, model, index, top_k, backends, "decompressed" if kind == "prefill" else "absorbed"), row, found)
    timed(torch, device, found, row, watch, ours, given.seconds, kind == "decode")


def lines_of(found, rows: list) -> list:
    """One line for each row measured: milliseconds of every call, how they were timed and at which clock; how much faster sparse is than the best dense one, and from which S on it is."""
    lines, ratios = [], []
    for row in rows:
        events = found.rows.get(row, {})
        times = {who: event["time_us"] / 1e3 for who, event in events.items() if "time_us" in event}
        said = [f"{who} {ms:.3f}" for who, ms in times.items()] + [f"({event['timed']}, {event['clock_mhz'] or '-'} MHz)" for event in list(events.values())[:1] if "time_us" in event]
        best = [min((ms for who, ms in times.items() if who.startswith("DSA") == sparse), default=None) for sparse in (True, False)]
        if None not in best:
            ratios.append((int(row.split()[1]), best[1] / best[0]))
            said.append(f"{ratios[-1][1]:.2f} x")
        said += _asked(*CACHED.get(row, (None, None, ""))) + [f"{who}: {event['failed']}" for who, event in events.items() if "failed" in event]
        lines.append(f"{row:16} ms: {'' if events else 'not measured '}" + " ".join(said).rstrip())
    return lines + ([f"{rows[0].split()[0]}: {crossover(ratios)}"] if ratios else [])


def _asked(floor, goal, peers: str) -> list:
    return [f"floor {floor}, goal {goal}"] * (floor is not None) + [peers] * bool(peers)


def verdicts(found, names: list) -> str:
    """One line for each thing asked of the tables: floors by the better backend, the other one near it, both ahead of torch, goals, few heads beside 64, memory of the fused call."""
    units = {name: NAMED[name].unit if name in NAMED else "ms" for name in names if name in NAMED or name in CACHED}
    seen = {name: {who: gpu_table.figure(event, unit) for who, event in found.rows.get(name, {}).items() if "time_us" in event} for name, unit in units.items()}
    ours = {name: [x[who] for who in gpu_table.OURS if who in x] for name, x in seen.items() if set(gpu_table.OURS) & x.keys()}
    best = {name: (min if units[name] == "ms" else max)(x) for name, x in ours.items()}
    worst = {name: (max if units[name] == "ms" else min)(x) for name, x in ours.items() if len(x) == 2}
    floors, goals = ({name: CACHED[name][n] if name in CACHED else (NAMED[name].floor, NAMED[name].goal)[n] for name in best} for n in range(2))
    near = lambda name: best[name] * 1.5 if units[name] == "ms" else best[name] / 1.5  # noqa: E731
    asked = {"floors reached by the better backend": {name: (best[name], floor) for name, floor in floors.items() if floor is not None},
             "the other backend within 1.5 x of its time": {name: (x, near(name)) for name, x in worst.items()},
             "ours ahead of torch": {name: (worst.get(name, best[name]), x["torch"]) for name, x in seen.items() if "torch" in x and name in best},
             "goals": {name: (best[name], goal) for name, goal in goals.items() if goal is not None}}
    lines = [gpu_table.verdict(what, {name: (*both, units[name]) for name, both in figures.items()}) for what, figures in asked.items() if figures]
    few = {f"DSA h {h}": (best[f"DSA h {h}"], [n * best["DSA h 64"] * h / 64 for n in times]) for h, times in FEW.items() if {f"DSA h {h}", "DSA h 64"} <= best.keys()}
    lines += [gpu_table.verdict(f"few heads beside 64, {what}", {name: (got, both[n], "TFLOP/s") for name, (got, both) in few.items()}) for n, what in enumerate(("floors", "goals")) if few]
    held = {f"scores + top-k, {who}": (event["scratch_mb"], 50, "ms") for who, event in found.rows.get("scores + top-k", {}).items() if who in gpu_table.OURS and "scratch_mb" in event}
    return "\n".join(lines + [gpu_table.verdict("MB beyond inputs and outputs", held)] * bool(held and "scores + top-k" in names))


def latent_cache(torch, device, B, S, fp8, page=64):
    """A PagedLatent of B full sequences whose pages lie in any order."""
    pages = B * S // page
    pool = torch.empty((pages, page, 656), dtype=torch.uint8, device=device) if fp8 else torch.empty((pages, page, 576), dtype=torch.bfloat16, device=device)
    for part in pool.split(2 ** 13):
        x = torch.randn(*part.shape[:2], 576, device=device, dtype=torch.bfloat16)
        if fp8:
            part[..., :512] = x[..., :512].to(torch.float8_e4m3fn).view(torch.uint8)
            part[..., 512:528] = (torch.rand(*part.shape[:2], 4, device=device) + 0.5).view(torch.uint8)
            part[..., 528:] = x[..., 512:].contiguous().view(torch.uint8)
        else:
            part[:] = x
    table = torch.randperm(pages, device=device).view(B, -1).to(torch.int32)
    return PagedLatent(pool, table, torch.full((B,), S, dtype=torch.int32, device=device), rank=512, rotary=64)


def check_cached(q, cache, indices, out):
    """The first and the last head of the first and the last sequence by the policy."""
    for b in (0, len(q) - 1):
        keys = indices[b, 0, 0].long()
        rows = cache.pools[0].flatten(0, 1)[cache.page_table[b, keys // cache.page_size].long() * cache.page_size + keys % cache.page_size]
        x = host(rows).astype(float) if not cache.quantised else latents(host(rows), cache.rank, cache.rotary)[0]
        query, count = host(q[b:b + 1, ::q.shape[1] - 1]), np.ones((1, 1, 1, len(keys)), int)
        truth, formula = (plain.attention(one, c[None, None], c[None, None, :, :512], count, scale=576 ** -0.5)[0] for one, c in ((query.astype(float), x), (query, x.astype(query.dtype))))
        numeric.assert_close(f"cached decode, sequence {b}", host(out[b:b + 1, ::q.shape[1] - 1]), truth, formula, reduction=len(keys) + 576)


def cached_scores(torch, given, found, row, backends, watch, device="cuda", B=128, S=32768, page=64):
    """Every backend's scores of one query of each sequence, the indexer's keys in pages, in CUDA graphs; the first and the last sequence by the policy."""
    generator, heads, width = torch.Generator(device).manual_seed(0), int(row.split()[-1]), SIZES["Di"]
    normal = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    pool = torch.empty((B * S // page, page * (width + 4)), dtype=torch.uint8, device=device)
    for part in pool.split(2 ** 13):
        part[:, :page * width] = normal(len(part), page * width).to(torch.float8_e4m3fn).view(torch.uint8)
        part[:, page * width:] = (normal(len(part), page).abs() * 0.1 + 0.05).view(torch.uint8)
    table = torch.randperm(len(pool), generator=generator, device=device).view(B, -1).to(torch.int32)
    keys = IndexerKeys(pool, table, torch.full((B,), S, dtype=torch.int32, device=device), width=width)
    q, weights = normal(B, heads, 1, width).to(torch.float8_e4m3fn), normal(B, heads, 1)
    ours = usable(torch, {name: lambda name=name: indexer_scores(q, keys, weights, backend=name) for name in backends}, row, found)
    for call in ours.values():
        got = call()
        for b in (0, B - 1):
            one = pool[table[b].long()]
            k, scale = one[:, :page * width].reshape(1, S, width).view(torch.float8_e4m3fn), one[:, page * width:].contiguous().view(torch.float32).reshape(1, S)
            x, there = [host(y) for y in (q[b:b + 1], k, weights[b:b + 1])], np.ones((1, 1, S), bool)
            truth = (np.maximum(x[0][:, :, 0].astype(float) @ x[1].astype(float).swapaxes(1, 2), 0) * x[2]).sum(1) * host(scale).astype(float)
            numeric.assert_close(f"scores of sequence {b}", host(got[b:b + 1]), truth[:, None], plain.indexer_scores(*x, k_scale=host(scale), visible=there), reduction=heads * width, accumulator="float8")
    timed(torch, device, found, row, watch, ours, given.seconds, True)


def cached(torch, given, found, row, backends, watch, B=128, S=32768, K=2048):
    """Every backend's decode of chosen tokens from one kind of cache, in CUDA graphs."""
    fp8, heads = "fp8" in row, int(row.split()[-1])
    torch.manual_seed(0)
    indices = torch.rand(B, S, device="cuda").topk(K, dim=1).indices[:, torch.randperm(K, device="cuda")].to(torch.int32)[:, None, None]
    cache, q = latent_cache(torch, "cuda", B, S, fp8), torch.randn(B, heads, 1, 576, device="cuda", dtype=torch.bfloat16)
    ours = usable(torch, {name: lambda name=name: sparse_attention(q, cache, None, Selection(indices), value_width=512, backend=name) for name in backends}, row, found)
    for call in ours.values():
        check_cached(q, cache, indices, call())
    timed(torch, "cuda", found, row, watch, ours, given.seconds, True)


def clock(torch, device) -> int | None:
    if device == "cpu":
        return None
    from sparsetile.bench.gpu_worker import clock_mhz
    return clock_mhz()


def crossover(ratios: list) -> str:
    """From which S on sparse is faster, between the lengths measured in proportion to their ratios."""
    behind = [n for n, (_, ratio) in enumerate(ratios) if ratio < 1]
    if not behind:
        return f"sparse is not slower at any length from {ratios[0][0]} keys on"
    if behind[-1] == len(ratios) - 1:
        return f"sparse is not faster at {ratios[-1][0]} keys"
    (a, low), (b, high) = ratios[behind[-1]:behind[-1] + 2]
    return f"sparse is faster from {a + (b - a) * (1 - low) / (high - low):.0f} keys on"


def plans(given, cuda: bool) -> dict:
    """Row of whole calls -> (kind, S, B, T, sizes, top_k)."""
    prefill, decode = ([2048, 8192, 32768, 131072], [8192, 32768, 131072]) if given.quick else ([2048 << n for n in range(7)], [4096 << n for n in range(6)])
    made = [("prefill", S, 1, 4096, SIZES, 2048) for S in prefill] + [("decode", S, 32 if given.quick else 128, 1, SIZES, 2048) for S in decode]
    return {f"{kind} {S}": (kind, S, *more) for kind, S, *more in (made if cuda else [("prefill", S, 1, 64, SMALL, 64) for S in (128, 512)])}


def report(found, names: list) -> str:
    """What came of these rows: whole calls, caches, both tables."""
    groups = [[name for name in names if name.split()[0] == kind and name.split()[1].isdecimal()] for kind in ("prefill", "decode")] + [[name for name in names if name in CACHED]]
    parts = ["\n".join(lines_of(found, rows)) for rows in groups]
    parts += [f"{title}\n{gpu_table.table(found, [name for name in rows if name in names])}" for title, rows in TABLES.items() if set(rows) & set(names)]
    return "\n\n".join(part for part in (*parts, verdicts(found, names)) if part)


def wrong_answers(found, names) -> bool:
    return any("wrong" in event.get("failed", "").lower() for name in names for event in found.rows.get(name, {}).values())


def main(arguments=None) -> int:
    import torch
    parser = argparse.ArgumentParser(prog="sparsetile.bench.dsa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer lengths and rounds")
    parser.add_argument("--no-tables", action="store_true", help="whole calls only")
    parser.add_argument("--no-calls", action="store_true", help="tables only")
    parser.add_argument("--backend", action="append", choices=("triton", "cupy", "numba", "reference"), help="this one (default: cupy and triton, without a GPU numba)")
    gpu_table.options(parser, minutes=10)
    given, start = parser.parse_args(arguments), time.monotonic()
    given.seconds = min(given.seconds, 0.3) if given.quick else given.seconds
    cuda = torch.cuda.is_available()
    device, backends = ("cuda", given.backend or ["cupy", "triton"]) if cuda else ("cpu", given.backend or ["numba"])
    gpu = cuda or given.list or bool(given.read)
    plan = plans(given, gpu)
    every = ([] if given.no_calls else [*plan, *(CACHED if gpu else ())]) + ([] if given.no_tables or not gpu else list(itertools.chain(*TABLES.values())))
    names = gpu_table.share([name for name in every if not given.only or any(word.lower() in name.lower() for word in given.only)], given.share)
    if given.list or not names:
        print("\n".join(names) or f"--only: no row's name contains {given.only}")
        return 0 if names else 2
    if given.read:
        found = gpu_table.read(given.read)
        print(report(found, names))
        return int(wrong_answers(found, names))
    print(torch.cuda.get_device_name() if cuda else "CPU", flush=True)
    found, until = gpu_table.writing(given), start + 60 * given.minutes
    watch = timing.Stopwatch(0 if cuda else None, flush_mb=FLUSH_MB)
    for row in (name for name in names if name not in NAMED):
        try:
            if time.monotonic() > (until if given.no_tables else (start + until) / 2):
                raise TimeoutError("not measured: out of time")
            if row in plan:
                whole(torch, device, given, found, *plan[row], backends, watch)
            elif "scores" in row:
                cached_scores(torch, given, found, row, backends, watch)
            else:
                cached(torch, given, found, row, backends, watch)
        except (AssertionError, TimeoutError, torch.OutOfMemoryError) as error:
            found.take(dict(row=row, who="row", failed=f"{'WRONG: ' * isinstance(error, AssertionError)}{str(error)[:200]}"))
        if cuda:
            torch.cuda.empty_cache()
    if cuda:
        del watch
        torch.cuda.empty_cache()
        order = dict(rows=[name for name in names if name in NAMED], without=[], seconds=given.seconds, compiled=False, backends=backends)
        gpu_table.supervise(order, found, given.limit, until)
    print("\n" + report(found, names))
    return int(wrong_answers(found, names))


if __name__ == "__main__":
    raise SystemExit(main())
