"""How wrong a kernel may be: the one numeric policy. Tests and the tuner judge by it, nobody states a tolerance of his own.

assert_close   First, where NaN, +inf and -inf stand must agree. Then both the largest and the root-mean-square error against a float64 answer may be
               at most TWICE those of the plain formula in the same types (autotune/plain.py), plus
               eps(accumulator) * sqrt(reduction length) * largest value of the answer's row. A row is the last axis.
assert_topk    Chosen indices of given scores: exactly those of a stable sort.
assert_chosen  Chosen indices whose scores a backend computed itself: range, order, duplicates, counts, and the exact set outside the band that
               assert_close would allow the scores around the cut.

Answers of the wrong shape or element type fail. Everything raises AssertionError with the numbers; assert_close returns them.
"""
import ml_dtypes
import numpy as np

FACTOR = 2.0
# float8: products of tensor cores on float8 values add up in fewer bits than float32 (contract, section 6).
EPS = {"float32": 2.0 ** -23, "float8": 2.0 ** -13, "float64": 2.0 ** -52}


def to_numpy(x):
    """Any framework's array as NumPy, on the host; bfloat16 and float8 as ml_dtypes."""
    if isinstance(x, np.ndarray) or np.isscalar(x):
        return np.asarray(x)
    if hasattr(x, "detach"):
        x = x.detach().cpu().contiguous()
        name = str(x.dtype).removeprefix("torch.")
        if hasattr(ml_dtypes, name):
            import torch
            return x.view(torch.int16 if x.element_size() == 2 else torch.uint8).numpy().view(getattr(ml_dtypes, name))
        return x.numpy()
    if hasattr(x, "get"):
        return x.get()
    return np.asarray(x)


def _accumulator(plain, accumulator):
    if accumulator not in EPS:
        raise ValueError(f"accumulator: expected one of {sorted(EPS)}, got {accumulator!r}; the policy knows no other")
    return "float64" if plain.dtype == np.float64 and accumulator == "float32" else accumulator


def slack(truth, reduction, accumulator):
    """eps * sqrt(reduction) * the row's largest finite value, [..., 1]."""
    finite = np.where(np.isfinite(truth), np.abs(truth), 0)
    return EPS[accumulator] * np.sqrt(max(1, reduction)) * finite.max(axis=-1, keepdims=True, initial=0)


def _same_places(name, what, got, truth):
    wrong = got != truth
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(f"{name}: {what} stands at {int(got.sum())} places, the truth has it at {int(truth.sum())}; first difference at {where}")


def assert_close(name, got, truth, plain, *, reduction, accumulator="float32"):
    """got and plain: the same type; truth: float64 (or wider for float64 answers). Returns the errors and what was allowed."""
    got, truth, plain = to_numpy(got), np.asarray(truth), to_numpy(plain)
    assert got.shape == truth.shape == plain.shape, f"{name}: shape {got.shape}, the truth has {truth.shape}, the plain formula {plain.shape}"
    assert got.dtype == plain.dtype, f"{name}: element type {got.dtype}, the plain formula's is {plain.dtype}"
    kind, wide = _accumulator(plain, accumulator), truth.dtype
    with np.errstate(all="ignore"):
        rounded = truth.astype(np.float32 if got.dtype.itemsize < 4 else got.dtype).astype(got.dtype).astype(wide)  # what overflows the type is inf there
        value, plain_value = got.astype(wide), plain.astype(wide)
        _same_places(name, "NaN", np.isnan(value), np.isnan(rounded))
        _same_places(name, "+inf", np.isposinf(value), np.isposinf(rounded))
        _same_places(name, "-inf", np.isneginf(value), np.isneginf(rounded))
        counted = np.isfinite(rounded)
        if not counted.any():
            return {"max": 0.0, "max_allowed": 0.0, "rms": 0.0, "rms_allowed": 0.0}
        error = np.where(counted, np.abs(value - truth), 0)
        plain_error = np.where(counted & np.isfinite(plain_value), np.abs(plain_value - truth), 0)
        room = np.broadcast_to(slack(truth, reduction, kind), truth.shape)
        allowed = FACTOR * plain_error.max() + room
        rms = lambda x: float(np.sqrt(np.mean(np.square(x[counted]))))
        report = {"max": float(error.max()), "max_allowed": float(allowed.max()), "rms": rms(error), "rms_allowed": FACTOR * rms(plain_error) + rms(room)}
    excess = np.where(counted, error - allowed, -1)
    if excess.max() > 0:
        at = np.unravel_index(int(excess.argmax()), excess.shape)
        raise AssertionError(f"{name}: error {float(error[at]):.3e} at {tuple(int(i) for i in at)} (got {value[at]}, truth {truth[at]}), "
                             f"allowed {float(allowed[at]):.3e}; plain formula's largest {float(plain_error.max()):.3e}")
    if report["rms"] > report["rms_allowed"]:
        raise AssertionError(f"{name}: root-mean-square error {report['rms']:.3e}, allowed {report['rms_allowed']:.3e}")
    return report


def assert_same_bits(name, first, second):
    """Twice the same call gives twice the same bits."""
    first, second = to_numpy(first), to_numpy(second)
    assert first.shape == second.shape and first.dtype == second.dtype, f"{name}: {first.dtype} {first.shape} against {second.dtype} {second.shape}"
    bits = f"u{first.dtype.itemsize}"
    differ = np.ascontiguousarray(first).view(bits) != np.ascontiguousarray(second).view(bits)
    assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.size} elements differ in their bits"


def _row_entries(name, row, length, entries):
    """The chosen entries of one row, after the checks that hold for every answer: range, order, no entry twice, -1 behind."""
    assert 0 <= length <= len(row), f"{name}: length {length} with {len(row)} slots"
    chosen = row[:length].astype(np.int64)
    assert (chosen >= 0).all() and (chosen < entries).all(), f"{name}: entries outside 0..{entries - 1}: {chosen[(chosen < 0) | (chosen >= entries)][:5]}"
    assert (np.diff(chosen) > 0).all(), f"{name}: entries do not ascend, or stand twice: {chosen[:12]}"
    assert (row[length:] == -1).all(), f"{name}: behind the {length} entries stands {row[length:][:5]} where -1 was expected"
    return chosen


def _answer_arrays(name, indices, lengths, rows, top_k):
    indices, lengths = to_numpy(indices), to_numpy(lengths)
    assert indices.dtype == np.int32 and lengths.dtype == np.int32, f"{name}: indices {indices.dtype}, lengths {lengths.dtype}; int32 expected"
    assert indices.shape == (*rows, top_k) and lengths.shape == rows, f"{name}: indices {indices.shape}, lengths {lengths.shape}; expected {(*rows, top_k)}, {rows}"
    return indices.reshape(-1, top_k), lengths.reshape(-1)


def assert_topk(name, indices, lengths, scores, top_k, *, visible=None):
    """Exact: of every row of scores [..., N] the best by (larger score, smaller index), NaN and -inf never."""
    scores = to_numpy(scores)
    found, counts = _answer_arrays(name, indices, lengths, scores.shape[:-1], top_k)
    N = scores.shape[-1]
    visible = np.ones(scores.shape, bool) if visible is None else np.broadcast_to(visible, scores.shape)
    for r, (row, seen) in enumerate(zip(scores.reshape(len(counts), N), visible.reshape(len(counts), N))):
        where = f"{name}, row {r}"
        chosen = _row_entries(where, found[r], int(counts[r]), N)
        values = row.tolist()
        eligible = [s for s in np.flatnonzero(seen).tolist() if values[s] == values[s] and values[s] != -np.inf]
        expected = sorted(sorted(eligible, key=lambda s: (-values[s], s))[:top_k])
        if chosen.tolist() != expected:
            missing, extra = sorted(set(expected) - set(chosen.tolist())), sorted(set(chosen.tolist()) - set(expected))
            raise AssertionError(f"{where}: {len(missing)} wrong of {len(expected)}; missing {missing[:5]} (scores {[values[s] for s in missing[:5]]}), "
                                 f"chosen instead {extra[:5]} (scores {[values[s] for s in extra[:5]]})")


def assert_chosen(name, indices, lengths, truth, plain, top_k, *, visible, reduction, accumulator="float32", forced=None, take_all=True):
    """Indices judged by their float64 scores. truth, plain [..., N]: scores of keys or blocks; visible [..., N] booleans.

    forced [..., N]: entries that must be chosen whatever their score. take_all: a row with no more than top_k visible entries holds them all.
    Each score may be off by the policy's band; so what lies more than two bands above the cut must be chosen, and two below must not.
    """
    truth, plain = np.asarray(truth), to_numpy(plain)
    kind = _accumulator(plain, accumulator)
    found, counts = _answer_arrays(name, indices, lengths, truth.shape[:-1], top_k)
    N = truth.shape[-1]
    visible = np.broadcast_to(visible, truth.shape)
    forced = np.zeros(truth.shape, bool) if forced is None else np.broadcast_to(forced, truth.shape)
    with np.errstate(all="ignore"):
        both = np.isfinite(truth) & np.isfinite(plain.astype(truth.dtype)) & visible
        worst = np.where(both, np.abs(plain.astype(truth.dtype) - truth), 0).max(initial=0)
        bands = (FACTOR * worst + slack(np.where(visible, truth, 0), reduction, kind))[..., 0].reshape(-1)
    shaped = [x.reshape(len(counts), N) for x in (truth, visible, forced)]
    for r, (row, seen, must) in enumerate(zip(*shaped)):
        where = f"{name}, row {r}"
        chosen = np.zeros(N, bool)
        chosen[_row_entries(where, found[r], int(counts[r]), N)] = True
        assert not (chosen & ~seen).any(), f"{where}: chose {np.flatnonzero(chosen & ~seen)[:5]}, which the query does not see"
        if take_all and seen.sum() <= top_k:
            assert (chosen == seen).all(), f"{where}: {int(chosen.sum())} entries of {int(seen.sum())} visible ones, all were expected"
            continue
        must = must & seen
        assert not (must & ~chosen).any(), f"{where}: forced entries {np.flatnonzero(must & ~chosen)[:5]} are missing"
        eligible = seen & ~must & ~np.isnan(row) & (row != -np.inf)
        count = min(int(eligible.sum()), top_k - int(must.sum()))
        assert counts[r] == must.sum() + count, f"{where}: {counts[r]} entries, expected {int(must.sum()) + count}"
        free = chosen & ~must
        assert not (free & ~eligible).any(), f"{where}: chose {np.flatnonzero(free & ~eligible)[:5]}, whose score is NaN or -inf"
        if count == 0:
            continue
        cut = np.sort(row[eligible])[::-1][count - 1]
        high, low = cut + 2 * bands[r], cut - 2 * bands[r]
        lost = eligible & ~chosen & (row > high)
        assert not lost.any(), f"{where}: not chosen: {np.flatnonzero(lost)[:5]} with scores {row[lost][:5]}, cut {cut}, band {bands[r]:.3e}"
        wrong = free & (row < low)
        assert not wrong.any(), f"{where}: chosen: {np.flatnonzero(wrong)[:5]} with scores {row[wrong][:5]}, cut {cut}, band {bands[r]:.3e}"
