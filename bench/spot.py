"""Correct before timed, at full size: a few rows of a large answer against the float64 formula, by the one numeric policy (autotune/numeric.py).

A row of an answer depends on its own query alone (or its own key, for dk and dv), so a few of them cost little; every value of the whole answer must be finite.
"""
import numpy as np

from sparsetile.autotune import numeric, plain
from sparsetile.autotune.tasks import outputs
from sparsetile.backends import arrays
from sparsetile.ops.selected_blocks import BLOCK

ROWS = 32


class Judge:
    """The truth of some rows of one task, made once. `wrong(result)` says what is wrong with an answer, or None."""

    def __init__(self, task):
        self.task, self.w = task, task.workload
        self.rng = np.random.default_rng(task.seed)
        self.kernel = self.w.kernel
        self.parts = getattr(self, "_" + self.kernel)()  # (output, how to take the rows out of it, truth, plain formula, reduction)

    def wrong(self, result) -> str | None:
        got = outputs(result)
        try:
            for x in got:
                x = arrays.as_torch(x)
                assert not x.is_floating_point() or bool(x.isfinite().all()), f"{self.kernel}: the answer is not finite everywhere"
            for n, take, truth, formula, reduction in self.parts:
                name, x = f"{self.kernel}[{n}]", take(got[n])
                if self.kernel in ("topk", "indexer_topk", "importance_topk"):
                    self._chosen(name, x, truth, formula, reduction)
                elif self.kernel == "selection_bitmaps":
                    assert np.array_equal(x, truth), f"{name}: bits of other keys than the selection's"
                else:
                    numeric.assert_close(name, x, truth, formula, reduction=reduction, accumulator=self._accumulator)
        except AssertionError as error:
            return str(error)
        return None

    @property
    def _accumulator(self):
        return "float8" if "float8" in self.w.dtype else "float32"

    def _chosen(self, name, indices, truth, formula, reduction):
        lengths = (indices >= 0).sum(-1).astype(np.int32)
        if self.kernel == "importance_topk":
            forced, seen = plain.forced_blocks(self.w, self.rows)
            numeric.assert_chosen(name, indices, lengths, truth, formula, self.w["K"], visible=seen, forced=forced, reduction=reduction)
        elif self.kernel == "topk":
            numeric.assert_topk(name, indices, lengths, formula, self.w["K"])
        else:
            numeric.assert_chosen(name, indices, lengths, truth, formula, self.w["K"], visible=np.isfinite(truth), reduction=reduction, accumulator=self._accumulator)

    def _some(self, size: int, count: int = ROWS):
        """The first, the last and some between, ascending."""
        if size <= count:
            return np.arange(size)
        return np.unique(np.concatenate(([0, size - 1], self.rng.choice(size, count - 2, replace=False))))

    # ------------------------------------------------------------------------------------------------------------ attention
    def _head(self, h, rows):
        """q [1,1,n,D] of the last batch entry on the host, k, v [1,1,..] of the keys that these rows see, and how often each row sees each."""
        w, (q, k, v, rule) = self.w, self.task.inputs[:4]
        hk = h * w["Hk"] // w["Hq"]
        keys = host(k[-1, hk])
        values = keys[:, :w["Dv"]] if v is None else host(v[-1, hk])
        count = self._count(rule, h, rows)
        seen = (count > 0).any(0)
        return host(q[-1, h][rows])[None, None], keys[seen][None, None], values[seen][None, None], count[:, seen]

    def _count(self, rule, h, rows):
        T, S = self.w["T"], self.w["S"]
        p = S - T + rows[:, None]
        if not hasattr(rule, "indices"):
            return rule.visible(p, np.arange(S), S).astype(int)
        G, g = rule.indices.shape[1], rule.granularity
        entries = host(rule.indices[-1, h * G // self.w["Hq"]][rows])
        keys = (entries[..., None] * g + np.arange(g)).reshape(len(rows), -1)
        seen = (np.repeat(entries, g, -1) >= 0) & (keys < (np.minimum(S, p + 1) if rule.causal else S))
        count = np.zeros((len(rows), S + 1), int)
        np.add.at(count, (np.arange(len(rows))[:, None], np.where(seen, keys, S)), 1)
        return count[:, :S]

    def _block_attention(self):
        scale, parts = self.w["D"] ** -0.5, []
        for h in sorted({0, self.w["Hq"] - 1}):
            rows = self._some(self.w["T"], ROWS if self.kernel == "block_attention" else ROWS // 4)
            q, k, v, count = self._head(h, rows)
            truth, formula = plain.attention(*wide(q, k, v), count, scale=scale)[0], plain.attention(q, k, v, count, scale=scale)[0]
            parts.append((0, lambda x, h=h, rows=rows: host(x[-1, h][rows]), truth[0, 0], formula[0, 0], self.w["S"]))
        return parts

    _gather_attention = _block_attention

    def _block_attention_backward(self):
        w, h, scale = self.w, self.w["Hq"] - 1, self.w["D"] ** -0.5
        rows = self._some(w["T"], ROWS if w["Hq"] == w["Hk"] else ROWS // 4)
        q, k, v, count = self._head(h, rows)
        dout = host(self.task.inputs[6][-1, h][rows])[None, None]
        truth = plain.attention_gradients(*wide(q, k, v), count, *wide(dout), scale=scale)[0]
        formula = plain.attention_gradients(q, k, v, count, dout, scale=scale)[0]
        parts = [(0, lambda x: host(x[-1, h][rows]), truth[0, 0], formula[0, 0], w["S"])]
        return parts + (self._of_keys(h, scale) if w["Hq"] == w["Hk"] else [])

    _gather_attention_backward = _block_attention_backward

    def _of_keys(self, h, scale):
        """dk and dv of a few keys, from every query's lse and delta."""
        q, k, v, rule, out, lse, dout = self.task.inputs
        T, S = self.w["T"], self.w["S"]
        keys = self._some(S)
        see = rule.visible(S - T + np.arange(T)[:, None], keys, S)
        held = [host(x) for x in (q[-1, h], k[-1, h][keys], v[-1, h][keys], dout[-1, h], out[-1, h], lse[-1, h])]
        truth = gradients_of_keys(*wide(*held), see, scale, None)
        formula = gradients_of_keys(*(x.astype(np.float32) for x in held), see, scale, held[0].dtype)
        return [(1 + n, lambda x: host(x[-1, h][keys]), t, f.astype(held[0].dtype), T) for n, (t, f) in enumerate(zip(truth, formula))]

    # -------------------------------------------------------------------------------------------------------------- indexer
    def _scores(self, queries: int, keys: np.ndarray):
        """Scores of a few queries with some keys: [1,n,keys] in float64 and by the plain formula; the queries."""
        q, k, weights, k_scale = self.task.inputs
        rows = self._some(self.w["T"], queries)
        q, weights, k = host(q[-1:])[:, :, rows], host(weights[-1:])[:, :, rows], host(k[-1:])[:, keys]  # float8 is picked from on the host
        k_scale = None if k_scale is None else host(k_scale[-1:])[:, keys]
        x = np.maximum(q.astype(float) @ k.astype(float)[:, None].swapaxes(-1, -2), 0)
        truth = (x * weights.astype(float)[..., None]).sum(1)
        return truth if k_scale is None else truth * k_scale[:, None].astype(float), plain.indexer_scores(q, k, weights, k_scale=k_scale), rows

    def _indexer_scores(self):
        assert not self.w.option("causal", True)
        keys = self._some(self.w["S"], 2048)
        truth, formula, rows = self._scores(8, keys)
        return [(0, lambda x: host(x[-1:, rows])[..., keys], truth, formula, self.w["D"] * self.w["H"])]

    def _indexer_topk(self):
        assert not self.w.option("causal", True)
        truth, formula, rows = self._scores(2, np.arange(self.w["S"]))
        return [(0, lambda x: host(x[-1:, 0][:, rows]), truth, formula, self.w["D"] * self.w["H"])]

    def _importance_topk(self):
        q, k, lse = self.task.inputs
        self.rows = rows = self._some(self.w["T"], 6)
        held = [host(x) for x in (q[-1:][:, :, rows], k[-1:], lse[-1:][:, :, rows])]
        return [(0, lambda x: host(x[-1:][:, :, rows]), plain.importances(self.w, *wide(*held), rows), plain.importances(self.w, *held, rows), self.w["D"] * self.w["Hq"] // self.w["Hk"])]

    def _selection_bitmaps(self):
        """Words of the last list's blocks that show anything, and kinds of all, of a few blocks of rows."""
        (chosen,), (T, S), parts = self.task.inputs, (self.w["T"], self.w["S"]), []
        nq, nk = -(-T // BLOCK), -(-S // BLOCK)
        for i in self._some(nq, 4):
            rows, seen = np.arange(i * BLOCK, min(T, (i + 1) * BLOCK)), np.zeros((BLOCK, nk * BLOCK), bool)
            seen[:len(rows), :S] = self._count(chosen, self.w["Hq"] - 1, rows) > 0
            blocks = seen.reshape(BLOCK, nk, BLOCK).swapaxes(0, 1)
            some, first = blocks.any((1, 2)), ((self.w["B"] * chosen.indices.shape[1] - 1) * nq + i) * nk
            words = np.packbits(blocks[some], axis=-1, bitorder="little").view(np.int32)
            parts += [(0, lambda x, at=first + np.flatnonzero(some): host(x[at]), words, None, 0),
                      (1, lambda x, i=i: host(x[-1, i]), np.where(some, 2 * (first + np.arange(nk)) + 1, -2), None, 0)]
        return parts

    def _topk(self):
        rows = self._some(self.w["T"], 6)
        return [(0, lambda x: host(x[-1:, 0][:, rows]), None, host(self.task.inputs[0][-1:, rows]), 0)]

    # ------------------------------------------------------------------------------------------------------ latent and merge
    def _latent_decompress(self):
        latent, w_uk, w_uv, rope = self.task.inputs
        rows = self._some(self.w["S"])
        held = [host(x) for x in (latent[-1:, rows], w_uk, w_uv, rope[-1:, rows])]
        c, uk, uv, tail = wide(*held)
        truth, formula = plain.latent_decompress(c, uk, uv, k_rope=tail), plain.latent_decompress(*held[:3], k_rope=held[3])
        return [(n, lambda x: host(x[-1:, :, rows]), t, f, self.w["R"]) for n, (t, f) in enumerate(zip(truth, formula))]

    def _grouped_matmul(self):
        x, weights, tail = self.task.inputs
        rows = self._some(self.w["T"])
        held = [host(x[-1:, :, rows]), host(weights), host(tail[-1:, :, rows])]
        a, b, t = wide(*held)
        return [(0, lambda y: host(y[-1:, :, rows]), plain.grouped_matmul(a, b, tail=t), plain.grouped_matmul(*held[:2], tail=held[2]), self.w["N"])]

    def _merge_attention(self):
        rows = self._some(self.w["T"])
        outs, lses = ([host(x[-1:, :, rows]) for x in group] for group in self.task.inputs)
        return [(0, lambda x: host(x[-1:, :, rows]), plain.merge_attention(wide(*outs), wide(*lses))[0], plain.merge_attention(outs, lses)[0], self.w["N"])]


def host(x) -> np.ndarray:
    return numeric.to_numpy(x)


def wide(*found) -> list:
    return [x.astype(np.float64) for x in found]


def gradients_of_keys(q, k, v, dout, out, lse, see, scale, kind):
    """q, out, dout [T,..], k, v [n,..], lse [T], see [T,n] -> dk [n,D], dv [n,Dv]; p and ds go through `kind` where the op must round (None: nowhere)."""
    delta = (dout * out).sum(-1)
    p = np.where(see, np.exp(np.minimum(scale * (q @ k.T) - lse[:, None], 0)), 0).astype(q.dtype)
    ds = p * (dout @ v.T - delta[:, None])
    if kind is not None:
        p, ds = plain.rounded(p, kind), plain.rounded(ds, kind)
    return (ds.T @ q) * q.dtype.type(scale), p.T @ dout
