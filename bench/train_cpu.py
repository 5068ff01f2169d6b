"""A small transformer learns a real text on the CPU, with the window + sink pattern through PyTorch autograd: python -m sparsetile.bench.train_cpu --out train_cpu.

Three models of a few million parameters, byte by byte on ci/alice.txt: ours; masked SDPA from the same start on the same batches; and SDPA from another start,
which says how large noise is. Then one step of each at a long context, in turn, minima of the rounds. Writes OUT/train_cpu.png (needs matplotlib) and OUT/train_cpu.json.
"""
import argparse
import json
import sys
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numba  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy, scaled_dot_product_attention  # noqa: E402

import sparsetile as st  # noqa: E402
from sparsetile import ci  # noqa: E402

PATTERN = st.Causal() & (st.Window(255) | st.Sink(4))
WIDTH, LAYERS, HEADS = 256, 4, 4


def ours(q, k, v):
    return st.sparse_attention(q, k, v, PATTERN, backend="numba")


class Masked:
    """SDPA with the pattern as a mask, made once for each length."""

    def __init__(self):
        self.masks = {}

    def __call__(self, q, k, v):
        N = q.shape[2]
        if N not in self.masks:
            self.masks[N] = torch.from_numpy(np.ascontiguousarray(PATTERN.mask(N, N).reshape(N, N)))
        return scaled_dot_product_attention(q, k, v, attn_mask=self.masks[N])


class Layer(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend, self.before, self.between = attend, nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.project, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        B, N, _ = x.shape
        q, k, v = self.project(self.before(x)).view(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).reshape(B, N, WIDTH))
        return x + self.wide(self.between(x))


class Model(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, attend, longest, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.byte, self.place = nn.Embedding(256, WIDTH), nn.Embedding(longest, WIDTH)
        self.layers = nn.Sequential(*(Layer(attend) for _ in range(LAYERS)), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, x):
        return self.layers(self.byte(x) + self.place.weight[:x.shape[1]])


class Trainer:
    def __init__(self, attend, longest, seed=0):
        self.model = Model(attend, longest, seed)
        self.adam = torch.optim.AdamW(self.model.parameters(), 1e-3)

    def step(self, x) -> float:
        """x [B, N + 1] bytes."""
        loss = cross_entropy(self.model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.item()


def batches(text, count, batch, N, seed=0):
    """The same runs of the text for every model."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        yield torch.stack([text[at:at + N + 1] for at in generator.integers(0, len(text) - N - 1, batch)])


def train(trainers, text, steps, batch, N) -> dict:
    curves = {name: [] for name in trainers}
    for n, x in enumerate(batches(text, steps, batch, N)):
        for name, trainer in trainers.items():
            curves[name].append(trainer.step(x))
        if n % max(1, steps // 10) == 0 or n == steps - 1:
            print(f"step {n:4}  " + "  ".join(f"{name} {curve[-1]:.4f}" for name, curve in curves.items()), flush=True)
    return curves


def step_times(trainers, text, N, rounds) -> dict:
    """Seconds of a step of one sequence of N bytes, minima of the rounds; after a first one that is not counted."""
    best, x = dict.fromkeys(trainers, float("inf")), next(batches(text, 1, 1, N))
    for turn in range(rounds + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step(x)
            best[name] = min(best[name], time.perf_counter() - start) if turn else best[name]
    return best


def plot(found, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1))
    for (name, curve), style in zip(found["loss"].items(), ("-", "--", ":")):
        left.plot(curve, style, label=name)
    left.set(xlabel="step", ylabel="loss (nats a byte)", title=f"{found['parameters'] / 1e6:.1f} million parameters, context {found['context']}")
    left.legend()
    right.bar(list(found["step_seconds"]), list(found["step_seconds"].values()))
    right.set(ylabel="seconds", title=f"one step at N {found['long_context']}, {found['threads']} threads")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("train_cpu"), help="folder of the plot and the figures")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--long", type=int, default=4096, help="context of the timed steps")
    parser.add_argument("--rounds", type=int, default=5, help="of the timed steps")
    args = parser.parse_args(arguments)
    torch.set_num_threads(numba.get_num_threads())
    text = torch.from_numpy(np.frombuffer((Path(ci.__file__).parent / "alice.txt").read_bytes(), np.uint8).astype(np.int64))
    masked, longest = Masked(), max(args.context, args.long)
    trainers = {"sparsetile": Trainer(ours, longest), "masked SDPA": Trainer(masked, longest), "masked SDPA, another start": Trainer(masked, longest, seed=1)}
    curves = train(trainers, text, args.steps, args.batch, args.context)
    a, b, c = (np.array(curve) for curve in curves.values())
    seconds = step_times({name: trainers[name] for name in list(trainers)[:2]}, text, args.long, args.rounds)
    found = dict(pattern=repr(PATTERN), parameters=sum(p.numel() for p in trainers["sparsetile"].model.parameters()), context=args.context, batch=args.batch, long_context=args.long,
                 threads=numba.get_num_threads(), loss=curves, difference=float(np.abs(a - b).mean()), noise=float(np.abs(b - c).mean()), step_seconds=seconds)
    print(f"{found['parameters'] / 1e6:.2f} million parameters; mean difference of the losses {found['difference']:.5f}, between two starts {found['noise']:.5f}")
    print(f"step at N {args.long}: " + ", ".join(f"{name} {s:.3f} s" for name, s in seconds.items()) + f": {seconds['masked SDPA'] / seconds['sparsetile']:.2f} x faster")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train_cpu.json").write_text(json.dumps(found, indent=1))
    plot(found, args.out / "train_cpu.png")
    if found["difference"] > found["noise"]:
        raise SystemExit("the two curves differ by more than two starts do")


if __name__ == "__main__":
    main()
