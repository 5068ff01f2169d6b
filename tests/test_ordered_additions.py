"""The order in which dQ is summed by the CuPy backend's Hopper path: lists, sequence and walks as the kernels make them, on random layouts.

Blocks of threads take items by ticket and wait for their turn at each sum. Nobody may wait for an item that cannot start, however few blocks of threads run at once.
"""
import dataclasses

import numpy as np
import pytest
from cuda_on_cpu import CXX
from hopper_on_cpu import HopperPlace

from sparsetile.backends.contract import Problem
from sparsetile.backends.cupy import block_attention_backward
from sparsetile.ops import device_lists

pytestmark = pytest.mark.skipif(CXX is None, reason="g++ compiles the kernels for the CPU, and is not there")


class Lists(HopperPlace):
    """Makes the lists and nothing else, and keeps what was allocated."""
    device = 1  # compiled functions are kept by device: other tests' whole backward would run here, for seconds, and theirs must not be these

    def __init__(self):
        super().__init__()
        self.made = []

    def compile(self, source, name, fields, defines):
        return super().compile(source, name, fields, defines) if name in ("classify", "order") else lambda *a: None

    def empty(self, shape, dtype):
        self.made.append(super().empty(shape, dtype))
        return self.made[-1]


def grids(rng, L, nq, nk, globals_):
    """Kinds [L, nq, nk]: rows of any length, empty ones too, and key blocks and query tiles that all others meet."""
    kinds = np.where(rng.random((L, nq, nk)) < rng.random((L, nq, 1)) ** 4 * 0.3, -1, -2).astype(np.int32)
    kinds[rng.random(kinds.shape) < 0.02] = 0
    kinds[:, rng.random(nq) < 0.1] = -2
    for l in range(L):
        kinds[l, :, rng.choice(nk, globals_, replace=False)] = rng.choice([-1, 0])
        kinds[l, rng.choice(nq, globals_, replace=False)] = -1
    return kinds


CASES = {  # lists, nq, nk, global blocks, first, queries from position, queries, keys, sums, static
    "square": (1, 60, 60, 2, 0, 0, 60 * 128, 60 * 128, 1, True),
    "two sums": (1, 40, 40, 0, 0, 0, 40 * 128, 40 * 128, 2, True),
    "heads": (3, 40, 50, 1, 0, 0, 40 * 128, 50 * 128 - 7, 1, True),
    "chunk of a cache": (1, 30, 90, 3, 60, 62 * 128 + 5, 20 * 128, 85 * 128, 1, True),
    "before the first key": (1, 40, 20, 1, -20, -20 * 128, 40 * 128, 20 * 128, 1, True),
    "longer than the lists": (1, 40, 40, 1, 0, 0, 40 * 128, 45 * 128, 1, True),
    "from the device": (2, 50, 50, 2, 0, 0, 50 * 128, 50 * 128, 1, False),
    "too many to split": (1, 50, 50, 12, 0, 0, 50 * 128, 50 * 128, 1, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("section, walk", [(0, "descending"), (8, "descending"), (0, "ascending"), (8, "ascending"), (0, "freest"), (8, "freest"), (0, "turning"), (8, "turning")])
def test_every_sum_is_added_to_in_the_order_of_tickets(case, section, walk, rng):
    L, nq, nk, globals_, first, start, T, S, sums, static = CASES[case]
    kinds, place = grids(rng, L, nq, nk, globals_), Lists()
    if sums == 2:
        kinds[:] = np.where(rng.random(kinds.shape) < 0.8, -1, -2)
    made = device_lists.lists(kinds, 128, 128, (1, L), intervals=np.zeros((1, 128, 2), np.int32), first=first)
    arrays = {f.name: place.put(getattr(made, f.name)) for f in dataclasses.fields(made) if isinstance(getattr(made, f.name), np.ndarray)}
    lists = dataclasses.replace(made, **arrays, extras={name: getattr(made, name) for name in ("by_key_offsets", "by_key_rows")} if static else {})
    q, k, row = place.put(np.zeros((1, L, T, 8), np.float16)), place.put(np.zeros((1, L, S, 8), np.float16)), place.put(np.zeros((1, L, T), np.float32))
    config = dict(path="hopper", block_q=128, block_k=128, tile_k=64, tile_q=32, stages=1, heads=8, sums=sums, section=section, walk=walk)
    block_attention_backward.run(q, k, k, lists, row, row, q, place=place, config=config, scale=1.0, q_start=start)
    backwards, turning = -1 if walk == "ascending" else 1, walk == "turning"  # ascending: the sequence is taken from its end
    walk = next(x.owner for x in place.made if x.owner.shape == (len(made.by_key_rows), 4))
    sequence = next(x.owner for x in place.made if x.owner.ndim == 3 and x.owner.shape[2] == 2)
    long = [[j for j in range(min(nk, -(-S // 128))) if (n := (kinds[l, :, j] > -2).sum()) > 16 and n * nk > 4 * (kinds[l] > -2).sum()] for l in range(L)]
    for l in range(L):
        items = [tuple(x) for x in sequence[l, ::backwards].tolist() if x[0] >= 0]
        split = {j for j, g in items if g >= 0}
        if section and case != "too many to split":
            assert split == set(long[l]) and (split or not globals_)
        height = -(-nq // len([g for j, g in items if j == min(split)])) if split else 1  # of a section: longer than asked for where many are split
        whole = [(j, -1) for j in range(-(-S // 128)) if j not in split]
        assert sorted(items) == sorted(whole + [(j, g) for j in split for g in range(-(-nq // height))]) and (not split or height >= section > 0)
        turns, queues = {}, []  # of each sum: ranks in the order of tickets; of each item: what it adds to, in the order of its walk
        for j, g in items:
            found = walk[made.by_key_offsets[2 * (l * nk + j)]:made.by_key_offsets[2 * (l * nk + j) + 2]].tolist() if j < nk else []
            assert sorted((i, kind) for i, kind, *_ in found) == [(i, kinds[l, i, j]) for i in range(nq) if j < nk and kinds[l, i, j] > -2]
            queues.append([(i, s, rank) for i, _, rank, s in found if g < 0 or i // height == g])
            for i, s, rank in queues[-1]:
                turns.setdefault((i, s), []).append(rank)
        assert all(ranks == list(range(len(ranks))) for ranks in turns.values())
        assert {s for _, s in turns} <= set(range(sums)) and (sums == 1 or len({s for _, s in turns}) == 2)
        for blocks in (1, 2, 7, 132):
            assert finishes([queue[::-1] if turning and n // blocks % 2 else queue for n, queue in enumerate(queues)], blocks)


def finishes(queues, blocks: int) -> bool:
    """Whether `blocks` blocks of threads get to the end of all items: each takes the next when it is done, and waits for its turn at each sum."""
    done, ticket, at = {}, 0, [[] for _ in range(blocks)]
    while ticket < len(queues) or any(at):
        moved = False
        for n in range(blocks):
            if not at[n] and ticket < len(queues):
                at[n], ticket, moved = list(queues[ticket]), ticket + 1, True
            elif at[n] and done.get(at[n][0][:2], 0) == at[n][0][2]:
                i, s, rank = at[n].pop(0)
                done[i, s], moved = rank + 1, True
        if not moved:
            return False
    return True


@pytest.mark.parametrize("sizes, features, expected", [
    (dict(B=1, Hk=8, T=8192, S=8192), ["static", "causal"], ("turning", 8, 2)),
    (dict(B=1, Hk=8, T=32768, S=32768), ["static", "causal"], ("turning", 8, 1)),
    (dict(B=3, Hk=8, T=8192, S=8192), ["static", "causal"], ("turning", 32, 1)),
    (dict(B=16, Hk=8, T=4096, S=4096), ["static", "causal"], ("abreast", 8, 1)),  # teams of heads follow each other: rounds would cross
    (dict(B=1, Hk=8, T=2048, S=8192), ["static", "causal"], ("abreast", 8, 1)),
    (dict(B=1, Hk=8, T=32768, S=32768), ["static", "causal+documents"], ("abreast", 8, 1)),
    (dict(B=1, Hk=8, T=32768, S=32768), ["static", "window"], ("descending", 8, 1)),
    (dict(B=1, Hk=8, T=8192, S=8192), ["static", "causal", "per_head"], ("descending", 8, 1)),  # heads of a group go by lists of their own
    (dict(B=1, Hk=32, T=8192, S=8192), ["static", "causal"], ("descending", 8, 2))])
def test_walks_of_groups_of_heads(sizes, features, expected):
    problem = Problem.of("block_attention_backward", dict(Hq=32, D=128, Dv=128, **sizes), dict.fromkeys("qkv", "bfloat16"), "sm_90a", [*features, "gradient"])
    config = block_attention_backward.default_config(problem)
    assert tuple(config[name] for name in ("walk", "heads", "sums")) == expected and not isinstance(block_attention_backward.resources(problem, config), str)
    alone = Problem.of("block_attention_backward", dict(Hq=32, D=128, Dv=128, **{**sizes, "Hk": 32}), dict.fromkeys("qkv", "bfloat16"), "sm_90a", [*features, "gradient"])
    assert isinstance(block_attention_backward.resources(alone, {**config, "walk": "turning"}), str)
