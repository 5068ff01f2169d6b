"""A small transformer learns dense, then with DeepSeek sparse attention on an eighth of the keys: python -m sparsetile.bench.train_dsa [--device 0 --length 8192] [--task text].

The phases of the paper (arXiv 2512.02556, section 2.1): the model learns with dense attention; a warm-up teaches its indexers what dense attention looks at, the model
frozen; then both learn on the keys selected, the model by its own loss, the indexers by their divergence. Beside it the dense model goes on from the same weights on the same
batches. Two tasks: facts (each token names one of thousands of names and its value; the last quarter asks for values by name), and the bytes of ci/alice.txt, the last tenth held out.
Prints the accuracy of the dense model, of the sparse one, and of the dense weights on keys picked by an indexer that learned nothing; leaves with 1 if sparse is over a point below dense.
"""
import argparse
import copy
import sys
import time
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import sparsetile as st  # noqa: E402
from sparsetile import ci  # noqa: E402

SYMBOLS, VALUES = 128, 16  # a name is two symbols


class Attention(nn.Module):
    """mode: "dense", "warmup", "training" or "sparse" (for use); divergence: the indexer's, mean of the last call."""

    def __init__(self, width, heads, top_k):
        super().__init__()
        self.heads, self.top_k, self.mode, self.divergence = heads, top_k, "dense", 0.0
        self.project, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.indexer = nn.ModuleDict(dict(q=nn.Linear(width, 4 * 32, bias=False), k=nn.Linear(width, 32, bias=False), norm=nn.LayerNorm(32), weights=nn.Linear(width, 4)))

    def forward(self, x):
        B, N, width = x.shape
        kind = torch.bfloat16 if x.is_cuda else torch.float32
        q, k, v = self.project(x).to(kind).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v, x.detach(), kind).transpose(1, 2).reshape(B, N, width).to(x.dtype))

    def attend(self, q, k, v, x, kind):
        if self.mode == "dense":
            return st.sparse_attention(q, k, v, st.Causal())
        part = self.indexer
        index = dict(index_q=part.q(x).to(kind).unflatten(-1, (4, 32)).transpose(1, 2), index_k=part.norm(part.k(x)).to(kind), index_weights=part.weights(x).transpose(1, 2) / 4)
        if self.mode == "sparse":
            return st.dsa_attention(q, k, v, top_k=self.top_k, **index)
        out, divergence = st.dsa_warmup(q, k, v, **index) if self.mode == "warmup" else st.dsa_training(q, k, v, top_k=self.top_k, **index)
        self.divergence = divergence.mean()
        return out


class Layer(nn.Module):
    def __init__(self, width, heads, top_k):
        super().__init__()
        self.before, self.attention, self.between = nn.LayerNorm(width), Attention(width, heads, top_k), nn.LayerNorm(width)
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attention(self.before(x))
        return x + self.wide(self.between(x))


class Model(nn.Module):
    """Tokens [B,N,3] of a fact, or bytes [B,N], to logits. Without positions: causality tells near from far, and any length can be learned first."""

    def __init__(self, task, width, heads, layers, top_k):
        super().__init__()
        sizes = (SYMBOLS, SYMBOLS, VALUES + 1) if task == "facts" else (256,)
        self.parts = nn.ModuleList(nn.Embedding(n, width) for n in sizes)
        self.layers = nn.Sequential(*(Layer(width, heads, top_k) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VALUES if task == "facts" else 256))

    def forward(self, x):
        x = x[..., None] if x.ndim == 2 else x
        return self.head(self.layers(sum(part(x[..., n]) for n, part in enumerate(self.parts))))

    def attentions(self):
        return [layer.attention for layer in self.layers]

    def set(self, mode):
        for attention in self.attentions():
            attention.mode = mode
        return self


def facts(generator, B, N):
    """(tokens [B,N,3], answers [B,N], -100 where nothing is asked): names are told once, then a quarter of the tokens ask for some."""
    told = N - N // 4
    step, first = (torch.randint(SYMBOLS ** 2 // 2, (B, 1), generator=generator) for _ in range(2))
    names = (first + (2 * step + 1) * torch.arange(told)) % SYMBOLS ** 2  # odd steps through a power of two meet no name twice
    values = torch.randint(VALUES, (B, told), generator=generator)
    asked = torch.randint(told, (B, N - told), generator=generator)
    names, shown = torch.cat((names, names.gather(1, asked)), 1), torch.cat((values, torch.full((B, N - told), VALUES)), 1)
    return torch.stack((names // SYMBOLS, names % SYMBOLS, shown), -1), torch.cat((torch.full((B, told), -100), values.gather(1, asked)), 1)


def bytes_of(text, generator, B, N):
    at = torch.randint(len(text) - N - 1, (B,), generator=generator)
    x = torch.stack([text[n:n + N + 1] for n in at])
    return x[:, :-1], x[:, 1:]


def source(task, seed, held_out=False):
    """batch(B, N) of one task: the same ones for every model that asks in the same order."""
    generator = torch.Generator().manual_seed(seed)
    if task == "facts":
        return lambda B, N: facts(generator, B, N)
    text = torch.from_numpy(np.frombuffer((Path(ci.__file__).parent / "alice.txt").read_bytes(), np.uint8).astype(np.int64))
    cut = len(text) * 9 // 10
    return lambda B, N: bytes_of(text[cut:] if held_out else text[:cut], generator, B, N)


def train(model, mode, batch, steps, sizes, rate, place, parameters=None, say=""):
    """Steps of one phase; sizes(step) -> B, N."""
    adam = torch.optim.AdamW(list(parameters or model.parameters()), rate, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: min(1, (n + 1) / 20) * max(0.1, 1 - n / max(steps, 1)))
    model.set(mode)
    start = time.monotonic()
    for n in range(steps):
        x, y = (part.to(place) for part in batch(*sizes(n)))
        loss = divergence = 0
        logits = model(x)
        if mode != "warmup":
            loss = cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)
        if mode != "dense":
            divergence = sum(attention.divergence for attention in model.attentions())
        adam.zero_grad()
        (loss + divergence).backward()
        adam.step(), plan.step()
        if n % max(1, steps // 8) == 0 or n == steps - 1:
            print(f"{say:16} step {n:5} of {steps}, N {x.shape[1]:5}  loss {torch.as_tensor(loss).item():.4f}  divergence {torch.as_tensor(divergence).item():.4f}  {time.monotonic() - start:6.1f} s", flush=True)
    for attention in model.attentions():
        attention.divergence = 0.0


@torch.no_grad()
def accuracy(model, mode, batch, count, B, N, place) -> float:
    """Percent of what is asked."""
    right = asked = 0
    model.set(mode)
    for _ in range(count):
        x, y = (part.to(place) for part in batch(B, N))
        there = y >= 0
        right, asked = right + int((model(x).argmax(-1) == y)[there].sum()), asked + int(there.sum())
    return 100 * right / asked


def run(task, args) -> float:
    """Points that the sparse model lies below the dense one."""
    place, N = torch.device("cpu" if args.device is None else f"cuda:{args.device}"), args.length
    torch.manual_seed(0)
    model = Model(task, *((64, 2, 2) if task == "facts" else (128, 4, 3)), N // 8).to(place)
    batch, test = source(task, 1), lambda: source(task, 2, held_out=True)
    B = max(1, args.tokens // N)
    lengths = [N >> n for n in range(20) if N >> n >= min(N, 16 if task == "facts" else 128)][::-1]
    growing = lambda steps: lambda n: (min(256, max(1, args.tokens // (now := lengths[n * len(lengths) // steps]))), now)  # noqa: E731  long sequences say too little where to look: short ones first
    train(model, "dense", batch, args.steps, growing(args.steps), 3e-3 if task == "facts" else 2e-3, place, say=f"{task}: dense")
    before = {name: accuracy(model, name, test(), args.tests, B, N, place) for name in ("dense", "sparse")}
    indexers = [p for attention in model.attentions() for p in attention.indexer.parameters()]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in indexers:
        p.requires_grad_(True)
    train(model, "warmup", batch, args.warmup, growing(args.warmup), 5e-3, place, [dict(params=indexers)], f"{task}: warm-up")
    for p in model.parameters():
        p.requires_grad_(True)
    dense = copy.deepcopy(model)
    train(dense, "dense", source(task, 3), args.sparse, lambda n: (B, N), 2e-4, place, say=f"{task}: dense on")
    warm = accuracy(model, "sparse", test(), args.tests, B, N, place)
    rest = [p for p in model.parameters() if not any(p is one for one in indexers)]
    train(model, "training", source(task, 3), args.sparse, lambda n: (B, N), 2e-4, place, [dict(params=rest), dict(params=indexers, lr=1e-3)], f"{task}: sparse")
    both = accuracy(dense, "dense", test(), args.tests, B, N, place), accuracy(model, "sparse", test(), args.tests, B, N, place)
    print(f"{task}, N {N}, {N // 8} keys a query: accuracy dense {both[0]:.2f} %, sparse {both[1]:.2f} %; after the warm-up alone {warm:.2f} % (dense then {before['dense']:.2f} %), "
          f"with an indexer that learned nothing {before['sparse']:.2f} %", flush=True)
    return both[0] - both[1]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="sparsetile.bench.train_dsa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("facts", "text", "both"), default="both")
    parser.add_argument("--device", type=int, help="a GPU; without, the CPU")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence; a query sees an eighth of them")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch")
    parser.add_argument("--steps", type=int, default=400, help="of the dense phase")
    parser.add_argument("--warmup", type=int, default=100, help="steps of the warm-up")
    parser.add_argument("--sparse", type=int, default=100, help="steps on selected keys")
    parser.add_argument("--tests", type=int, default=8, help="batches of each test")
    args = parser.parse_args(arguments)
    below = {task: run(task, args) for task in (("facts", "text") if args.task == "both" else (args.task,))}
    return int(any(points > 1 for points in below.values()))


if __name__ == "__main__":
    raise SystemExit(main())
