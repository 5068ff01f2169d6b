"""What a call costs the host: python -m sparsetile.bench.host

An eager call of sparse_attention on a tiny input, and of one query on 4096 keys, of every backend that runs here, beside torch's scaled_dot_product_attention on the same tensors in the
same run; the call's own stages; a profile's lookup; `import sparsetile` in a fresh interpreter. On a GPU the launches run behind: only the host's time counts. Each figure is the least
of the rounds and their median: the least is the code's, the median also the machine's.
Aims: a GPU call on tiny input under 25 us, a lookup (a call's cached choice) 1 us, the import 0.3 s.
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

import sparsetile as st  # noqa: E402
from sparsetile.autotune import store  # noqa: E402
from sparsetile.backends import devices  # noqa: E402
from sparsetile.backends.contract import BACKENDS  # noqa: E402
from sparsetile.ops import attention, dispatch  # noqa: E402
from sparsetile.profiles import lookup  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHAPE, QUERY, KEYS = (1, 2, 16, 64), (1, 32, 1, 128), (1, 8, 4096, 128)


def host_us(calls: dict, wait=lambda: None, rounds: int = 15, count: int = 100) -> dict:
    """Microseconds of the host for each call: (least, median) of rounds in turn, `count` calls a round (fewer of one that takes a millisecond); `wait` empties the device's queue between
    rounds."""
    def each_us(call, count):
        wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count * 1e6

    counts = {name: max(1, min(count, int(5e4 / min(each_us(call, 1) for _ in range(3))))) for name, call in calls.items()}  # and warms up
    found = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(each_us(call, counts[name]))
    wait()
    return {name: (round(min(times), 2), round(statistics.median(times), 2)) for name, times in found.items()}


def calls_on(device: str) -> tuple[dict, object]:
    """name -> call for every backend that runs there, and torch's own; how to wait for them."""
    import torch
    cuda = device != "cpu"
    make = lambda *shapes: [torch.randn(shape, device=device, dtype=torch.bfloat16 if cuda else torch.float32) for shape in shapes]  # noqa: E731
    (q, k, v), one = make(SHAPE, SHAPE, SHAPE), make(QUERY, KEYS, KEYS)
    rule, found = st.Causal(), {}
    for name in BACKENDS[:-1]:
        try:
            st.sparse_attention(q, k, v, rule, backend=name)
        except st.Unsupported:
            continue
        found[f"{name}, torch tensors"] = lambda name=name: st.sparse_attention(q, k, v, rule, backend=name)
        if cuda:
            found[f"{name}, one query"] = lambda name=name: st.sparse_attention(*one, rule, backend=name)
        if name == "cupy":
            import cupy
            x = [cupy.from_dlpack(y) for y in (q, k, v)]
            found["cupy, CuPy arrays"] = lambda: st.sparse_attention(*x, rule, backend="cupy")
    found["auto, torch tensors"] = lambda: st.sparse_attention(q, k, v, rule)
    found["auto, torch tensors, gradients enabled"] = torch.enable_grad()(lambda: st.sparse_attention(q, k, v, rule))
    if not cuda:
        host = [y.numpy() for y in (q, k, v)]
        found["numba, NumPy arrays"] = lambda: st.sparse_attention(*host, rule, backend="numba")
    found["torch SDPA"] = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    if cuda:
        found["torch SDPA, one query"] = lambda: torch.nn.functional.scaled_dot_product_attention(*one, enable_gqa=True)
    call = attention.check(q, k, v, rule, *[None] * 6, True, None, None)
    found["stage: checks"] = lambda: attention.check(q, k, v, rule, *[None] * 6, True, None, None)
    found["stage: cached choice"] = lambda: attention.choose(call, "block_attention")
    return found, torch.cuda.synchronize if cuda else lambda: None


def lookup_us() -> dict:
    """A profile's entry found again, and a miss again; the first time reads the files and goes through the neighbouring buckets."""
    x = np.zeros(SHAPE, np.float32)
    problem = attention.problem_of(attention.check(x, x, x, st.Causal(), *[None] * 6, True, None, None), "block_attention")
    name = devices.device_info(None).name
    module = dispatch.kernel("numba", "block_attention")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SPARSETILE_PROFILE_DIR"] = folder
        entry = {"key": lookup.key_of(problem), "backend": "numba", "config": module.default_config(problem), "status": "manual", "time_us": 1.0}
        store.add(Path(folder), "block_attention", {"name": name, "arch": "cpu"}, entry, {}, {})
        assert lookup.find(problem, name) is not None
        return host_us({"lookup that finds": lambda: lookup.find(problem, name), "lookup that misses": lambda: lookup.find(problem, name, "cupy")})


def import_s(first_use: str = "pass") -> float:
    """The best of seven fresh interpreters, the later ones from bytecode, as an installed package is run."""
    code = f"import time; t = time.perf_counter(); import sparsetile; {first_use}; print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as folder:
        run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder})
        return round(min(float(run().stdout) for _ in range(7)), 3)


def main() -> int:
    import torch
    print(json.dumps({"import_s": {"sparsetile": import_s(), "and sparse_attention": import_s("sparsetile.sparse_attention")}}), flush=True)
    print(json.dumps({"host_us": lookup_us()}), flush=True)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        with torch.no_grad():
            where = devices.device_info(None if device == "cpu" else 0).name
            print(json.dumps({"device": where, "torch": torch.__version__, "host_us": host_us(*calls_on(device))}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
