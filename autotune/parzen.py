"""The sampler over an enumerated pool of legal configs, of which every one that was not tried yet is scored: by turns of chance a Gaussian process's expected improvement (surface.py), tree-structured
Parzen scores, one-knob neighbours of the best, and a few at random. Two models that err in different ways: each alone is held in one place in some searches. NumPy only; search.py makes it an Optuna sampler.

With seeds (the default, winners of neighbouring buckets and GPUs) it has two arms that take turns: the warm one knows the seeds and what came of them, the cold one
only what itself found, because a winner from elsewhere can hold a search where it is. No config is tried twice, by either.
"""
import numpy as np

from sparsetile.autotune.surface import Surface

STARTUP, DRAWN = 8, 200  # an arm's first configs: of so many drawn at random the one that has most values that none before had
FAR = 0.4
SURFACE = 0.6        # the share of the surface; of the rest:
PARZEN, NEIGHBOUR = 0.65, 0.25
INCUMBENTS, TOP = 5, 24
GOOD, MOST_GOOD = 0.1, 20  # the share of an arm's results that counts as good; with 0.15 one search in ten was held by what it had seen first
SPREAD = 0.2         # how much of a kernel's weight goes to other values of a knob


class Arm:
    """What one arm knows. total [N]: the sum of the kernels around everything it was told, at every config; good: those around its best ones."""

    def __init__(self, surface: Surface):
        self.index, self.value, self.total, self.good, self.surface = [], [], 0.0, {}, surface


class Pool:
    """points [N,d]: each knob's value as its place among the sorted values; ordered [d]: whether places have a distance. Index 0 is the default."""

    def __init__(self, points, ordered, seed: int = 0, seeds=()):
        self.points, self.rng = np.asarray(points, np.int32), np.random.default_rng(seed)
        self.free = np.ones(len(self.points), bool)
        self.seeds = [n for n in dict.fromkeys((0, *seeds))]
        self.arms = [Arm(Surface(self.points, ordered)) for _ in range(2 if len(self.seeds) > 1 else 1)]
        self.tables = [_kernel(int(column.max()) + 1, bool(o)) for column, o in zip(self.points.T, ordered)]
        self.of, self.turn, self.out = {}, 0, set()  # out: asked for and not told

    def ask(self) -> int | None:
        """The place of a config that was never given before; None when there is none left."""
        if not self.free.any():
            return None
        while self.seeds:
            n = self.seeds.pop(0)
            if self.free[n]:
                return self._give(n, 0)
        arm = self.turn % len(self.arms)
        self.turn += 1
        return self._give(self._pick(self.arms[arm]), arm)

    def tell(self, n: int, value: float) -> None:
        """value: what is to be small; infinite for a failure, which counts as bad."""
        self.free[n] = False
        self.out.discard(n)
        for arm in ({self.of.get(n, 0)} | ({len(self.arms) - 1} if n == 0 else set())):  # every arm knows the default
            self.arms[arm].index.append(n)
            self.arms[arm].value.append(value)
            self.arms[arm].total = self.arms[arm].total + self._around(n)
            self.arms[arm].surface.tell(n, value)

    def give_back(self, n: int) -> None:
        self.free[n] = True
        self.out.discard(n)

    def _give(self, n, arm):
        self.free[n], self.of[n] = False, arm
        self.out.add(int(n))
        return int(n)

    def _pick(self, arm: Arm) -> int:
        left = np.flatnonzero(self.free)
        if len(arm.index) < STARTUP:
            return self._other(left)
        gain = arm.surface.gain() if self.rng.random() < SURFACE else None
        if gain is not None:
            for n in self.out:  # where an answer is awaited there is less to learn
                gain = gain * (1 - arm.surface.near(n))
            return left[np.argmax(gain[left])]
        draw = self.rng.random()
        if draw >= PARZEN + NEIGHBOUR:
            return self.rng.choice(left)
        index, value = np.array(arm.index), np.array(arm.value)
        order = np.argsort(value, kind="stable")
        order = order[np.isfinite(value[order])]
        if not len(order):
            return self.rng.choice(left)
        if draw >= PARZEN:
            near = self._neighbours(index[order[:INCUMBENTS]], left)
            if len(near):
                return near[np.argmax(self._score(arm, order)[near])]
        score = self._score(arm, order)[left]
        best = np.argsort(-score, kind="stable")[:TOP]
        weight = np.exp((score[best] - score[best[0]]).clip(-30)) + 1e-9
        return left[self.rng.choice(best, p=weight / weight.sum())]

    def _other(self, left) -> int:
        """One that is unlike all that were given: the most knobs of other values, then the largest steps up to FAR of a knob's range (without a bound it would be the corners of the space)."""
        some, span = self.rng.choice(left, min(len(left), DRAWN), replace=False), np.maximum(1, self.points.max(0))
        away = np.abs(self.points[some][:, None] - self.points[list(self.of) or [0]][None])
        return some[np.argmax(((away > 0) + 0.5 * np.minimum(away / span, FAR)).sum(-1).min(1))]

    def _score(self, arm, order):
        """[N]: log of (density of the good configs / density of the others)."""
        best = [arm.index[n] for n in order[:min(MOST_GOOD, max(2, int(np.ceil(GOOD * len(arm.index)))))]]
        arm.good = {n: arm.good[n] if n in arm.good else self._around(n) for n in best}
        good = sum(arm.good.values())
        rest = (arm.total - good).clip(0) / max(1, len(arm.index) - len(best)) if len(arm.index) > len(best) else 1.0
        return np.log(good / len(best) + 1e-12) - np.log(rest + 1e-12)

    def _around(self, n: int):
        """[N]: the kernel around config n, at every config."""
        product = np.ones(len(self.points))
        for j, table in enumerate(self.tables):
            product *= table[self.points[:, j], self.points[n, j]]
        return product

    def _neighbours(self, incumbents, left):
        """Configs not tried that differ from one of these in one knob, by one step where it is ordered."""
        away = self.points[left][:, None] != self.points[incumbents][None]
        return left[(away.sum(-1) == 1).any(-1)]


def _kernel(values: int, ordered: bool) -> np.ndarray:
    """How near two values of a knob are, [values, values]: half by being the same, half by their distance."""
    places = np.arange(values)
    same = np.eye(values)
    if values == 1:
        return same
    other = (1 - same) / (values - 1)
    by_hand = (1 - SPREAD) * same + SPREAD * other
    if not ordered:
        return by_hand
    decay = np.exp(-1.5 * np.abs(places[:, None] - places[None]))
    return (by_hand + decay / decay.sum(1, keepdims=True)) / 2


def places(tunables, pool: list[dict]) -> tuple[np.ndarray, list[bool]]:
    """(points, ordered) of a pool of configs: numbers in ascending order, words in the order of the knob's values."""
    columns, ordered = [], []
    for t in tunables:
        numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in t.values)
        ranked = sorted(t.values) if numeric else list(t.values)
        columns.append([ranked.index(config[t.name]) if config.get(t.name) in ranked else len(ranked) for config in pool])
        ordered.append(numeric)
    return np.array(columns, np.int32).reshape(len(ordered), len(pool)).T, ordered
