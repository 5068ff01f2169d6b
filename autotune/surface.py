"""A Gaussian process over an enumerated pool of configs: what each one's time may be, from those that were timed, and how much each may improve on the best.

The kernel is a product over the knobs, exp(-sum_j w_j d_j(x, y)): w_j says how much knob j matters and is fitted by the marginal likelihood (Rasmussen and Williams, Gaussian Processes for Machine Learning,
equations 2.25, 2.26 and 5.8); the gain is the expected improvement (Jones, Schonlau and Welch 1998, equation 15). Knobs that do nothing under another's value are the product's to find out. NumPy only.
"""
import math

import numpy as np

NOISE = 1e-3     # of the variance: timings that are made again differ
START = 0.5      # weights before anything is known, and what a fit without evidence goes back to
STEP, LEAST, LARGEST = 2.5, 0.005, 8.0
GROWTH = 1.3     # weights are fitted again when so many times the results are there
SLOW, SHRUNK = 0.75, 0.3  # beyond this quantile distances count so much: how slow a slow config is says little
MOST = 40_000_000  # numbers of a factor, 160 MB: with more there is no surface


class Surface:
    """points [N,d]: each knob's value as its place; ordered [d]: whether places have a distance. L is the Cholesky factor of the kernel matrix of the configs that were told; L^-1 and A = L^-1 K(told, pool) grow by a row with each."""

    def __init__(self, points, ordered):
        self.points, self.apart = points, [_apart(int(column.max()) + 1, bool(o)) for column, o in zip(points.T, ordered)]
        self.weights, self.told, self.value, self.fitted, self.awaited = np.full(points.shape[1], START), [], [], 0, {}

    @property
    def full(self) -> bool:
        return (len(self.told) + 1) * len(self.points) > MOST

    def tell(self, n: int, value: float) -> None:
        """value: microseconds, infinite for a failure."""
        if not self.full:
            self.value.append(value)
            self._add(n)

    def near(self, n: int):
        """[N]: the kernel between config n and every config; kept until it is told, for it is asked for at each question while its answer is awaited."""
        if n not in self.awaited:
            self.awaited[n] = self._near(n)
        return self.awaited[n]

    def _near(self, n):
        far = np.zeros(len(self.points), np.float32)
        for column, weight, table in zip(self.points.T, self.weights, self.apart):
            far += (weight * table[column[n]]).astype(np.float32)[column]
        return np.exp(-far)

    def gain(self):
        """[N]: the expected improvement of every config, in the logarithm of its time; None while nothing was right, or the surface is too large."""
        if self.full or not np.isfinite(self.value).any():
            return None
        y = _height(np.array(self.value))
        if len(y) >= GROWTH * self.fitted:
            self._fit(y)
        m = len(y)
        rest, scale, mean = _rest(*(self.inverse[:m, :m] @ side for side in (y, np.ones(m))))
        found = (mean + rest.astype(np.float32) @ self.A[:m]).astype(float)
        error = scale * np.sqrt(self.left.clip(1e-6))
        z = (y.min() - found) / error
        return error * (z * 0.5 * (1 + np.tanh(0.79788456 * (z + 0.044715 * z ** 3))) + np.exp(-z * z / 2) / math.sqrt(2 * math.pi))  # tanh: the normal distribution within 2e-4

    def _add(self, n):
        m, new = len(self.told), self.awaited.pop(n) if n in self.awaited else self._near(n)
        if m == 0:
            self.inverse, self.A, self.left = np.zeros((16, 16)), np.empty((16, len(self.points)), np.float32), np.ones(len(self.points), np.float32)
        elif m == len(self.A):
            self.inverse, self.A = np.pad(self.inverse, (0, m)), np.concatenate([self.A, np.empty_like(self.A)])
        row = self.A[:m, n].copy()
        end = math.sqrt(max(1 + NOISE - float(row @ row), NOISE))
        self.A[m] = (new - row @ self.A[:m]) / end
        self.inverse[m, :m], self.inverse[m, m] = -row @ self.inverse[:m, :m] / end, 1 / end
        self.left -= self.A[m] ** 2
        self.told.append(n)

    def _fit(self, y):
        """One walk over the knobs: each weight larger, smaller or as it is, whichever is likelier."""
        self.fitted, at = len(y), self.points[self.told]
        far = np.stack([table[column[:, None], column[None]] for column, table in zip(at.T, self.apart)], -1)
        best = _odds(far, y, self.weights)
        for j in range(len(self.weights)):
            for factor in (1 / STEP, STEP):
                weights = self.weights.copy()
                weights[j] = min(max(weights[j] * factor, LEAST), LARGEST)
                odds = _odds(far, y, weights)
                if odds > best:
                    best, self.weights = odds, weights
        told, self.told, self.awaited = self.told, [], {}
        for n in told:
            self._add(n)


def _odds(far, y, weights) -> float:
    """The logarithm of the marginal likelihood, and of a prior that holds each weight near START."""
    L = np.linalg.cholesky(np.exp(-far @ weights) + NOISE * np.eye(len(y)))
    return -len(y) * math.log(_rest(*np.linalg.solve(L, np.stack([y, np.ones(len(y))], 1)).T)[1]) - np.log(np.diag(L)).sum() - 0.05 * float((np.log(weights / START) ** 2).sum())


def _rest(y, one):
    """Of y and ones, both times L^-1: (L^-1 (y - mean), the process's scale, its mean), scale and mean the likeliest."""
    mean = (y @ one) / (one @ one)
    rest = y - mean * one
    return rest, math.sqrt(rest @ rest / len(y) + 1e-9), mean


def _height(value):
    """Logarithms of times; a failure counts as the slowest."""
    right = np.isfinite(value)
    y = np.log(np.where(right, value, value[right].max()))
    slow = np.quantile(y[right], SLOW)
    return np.minimum(y, slow + SHRUNK * (y - slow))


def _apart(values: int, ordered: bool) -> np.ndarray:
    """How far two values of a knob are from each other, [values, values]: something for being others, the rest by their distance."""
    places = np.arange(values)
    other = (places[:, None] != places[None]).astype(float)
    return 0.4 * other + 0.9 * np.abs(places[:, None] - places[None]) / (values - 1) if ordered and values > 2 else other
