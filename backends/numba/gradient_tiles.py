"""The inner loops of block attention's backward: one panel of PANEL queries, or all of a tile, against a run of keys; float32, on addresses.

As in tiles.py lanes are queries: P and dS are [keys, queries] (row step given: all panels of a tile side by side), dQ^T [D, PANEL]. Only dK and dV
[keys, width] have features as lanes, of Q and dO as rows. c, slope and softcap come from `constants` (job.py).
A row's lse, in powers of two, is the sum of two float32 (`high`, `low`): scores of 1e4 would lose three digits of P to one.
"""
from sparsetile.backends.numba.simd import F, LANES, VECTORS, op
from sparsetile.backends.numba.tiles import STEP, WIDTH, _groups, _panel, _seen


def _probability(masked, capped):
    def probability(e, pk, k_step, pq, D, pp, p_step, pl, pc, sixes, fours, *more):
        """P = 2 ** (c K Q^T - lse), 0 where unseen. With a softcap its slope goes to pd, where dS will be."""
        b = e.b
        c, outer, inner = (e.splat(e.load(pc, offset, F)) for offset in (0, 4, 8))
        high, low = [b.fneg(x) for x in _panel(e, pl)], _panel(e, e.add(pl, STEP))

        def group(rows, first, _):
            acc = e.gemm(rows, VECTORS, e.add(pk, e.mul(first, k_step)), k_step, 4, pq, STEP, D)
            for r in range(rows):
                at = e.mul(e.add(first, r), p_step)
                seen = _seen(e, more[0], e.add(more[1], e.add(first, r))) if masked else None
                for n in range(VECTORS):
                    x = acc[r * VECTORS + n]
                    if capped:
                        t = e.tanh(b.fmul(x, inner))
                        e.store(b.fsub(e.f(1), b.fmul(t, t)), e.add(more[2], at), n * WIDTH)
                        x = b.fmul(t, outer)
                    x = b.fsub(e.fma(x, c, high[n]), low[n])
                    # P <= 1; a rounded lse of scores of 1e9 says otherwise
                    x = e.exp2(b.select(b.fcmp_ordered(">", x, e.f(1)), e.f(1), x))
                    e.store(b.select(seen[n], x, e.f(0)) if masked else x, e.add(pp, at), n * WIDTH)
            return []
        _groups(e, sixes, fours, [], group)
    return probability


probability = op("iiiiiiiiii", _probability(False, False))
"""(K, K's row step, Q^T, D, P, P's row step, lse, constants, sixes, fours)"""
probability_masked = op("iiiiiiiiiiii", _probability(True, False))
"""The same with (..., words, first key)."""
probability_capped = op("iiiiiiiiiiiii", _probability(True, True))
"""The same with (..., words, first key, dS)."""


def _score_gradient(capped):
    def score_gradient(e, pv, v_step, pg, Dv, pp, pd, p_step, px, pc, sixes, fours):
        """dS = slope P (V dO^T - delta)"""
        b, slope, delta = e.b, e.splat(e.load(pc, 12, F)), _panel(e, px)

        def group(rows, first, _):
            acc = e.gemm(rows, VECTORS, e.add(pv, e.mul(first, v_step)), v_step, 4, pg, STEP, Dv)
            for r in range(rows):
                at = e.mul(e.add(first, r), p_step)
                for n in range(VECTORS):
                    x = b.fmul(b.fmul(e.load(e.add(pp, at), n * WIDTH), slope), b.fsub(acc[r * VECTORS + n], delta[n]))
                    e.store(b.fmul(x, e.load(e.add(pd, at), n * WIDTH)) if capped else x, e.add(pd, at), n * WIDTH)
            return []
        _groups(e, sixes, fours, [], group)
    return score_gradient


score_gradient = op("iiiiiiiiiii", _score_gradient(False))
"""(V, V's row step, dO^T, Dv, P, dS, their row step, delta, constants, sixes, fours)"""
score_gradient_capped = op("iiiiiiiiiii", _score_gradient(True))


def _add_queries(e, pk, k_step, pd, p_step, keys, po, sixes, fours):
    """dQ^T += K^T dS"""
    def group(rows, first, _):
        acc = e.gemm(rows, VECTORS, e.add(pk, e.mul(first, 4)), 4, k_step, pd, p_step, keys)
        out = e.add(po, e.mul(first, STEP))
        for i, x in enumerate(acc):
            e.store(e.b.fadd(x, e.load(out, i * WIDTH)), out, i * WIDTH)
        return []
    _groups(e, sixes, fours, [], group)


add_queries = op("iiiiiiii", _add_queries)
"""(K, K's row step, dS, dS's row step, keys, dQ^T, sixes, fours)"""


def _add_keys(e, pp, p_step, queries, px, x_step, width, po, sixes, fours):
    """C [keys, width] += P X, X [queries, width] with a row step of its own: as many vectors of features at a time as registers hold, then one by one."""
    step = e.mul(width, 4)

    def features(cols):
        def columns(f, _):
            f = e.mul(f, 4)

            def group(rows, first, _):
                acc = e.gemm(rows, cols, e.add(pp, e.mul(first, p_step)), p_step, 4, e.add(px, f), x_step, queries)
                for r in range(rows):
                    out = e.add(e.add(po, f), e.mul(e.add(first, r), step))
                    for n in range(cols):
                        e.store(e.b.fadd(acc[r * cols + n], e.load(out, n * WIDTH)), out, n * WIDTH)
                return []
            _groups(e, sixes, fours, [], group)
            return []
        return columns
    main = e.b.sub(width, e.b.urem(width, e.i(LANES * VECTORS)))
    e.loop(main, [], features(VECTORS), LANES * VECTORS)
    rest = features(1)
    e.loop(e.b.sub(width, main), [], lambda f, s: rest(e.add(f, main), s), LANES)


add_keys = op("iiiiiiiii", _add_keys)
"""(P, P's row step, queries, X, X's row step, width, C, sixes, fours)"""


def _add_row(e, source, target, count):
    e.loop(count, [], lambda k, _: (e.store(e.b.fadd(e.load(e.add(target, e.mul(k, 4))), e.load(e.add(source, e.mul(k, 4)))), e.add(target, e.mul(k, 4))), [])[1], LANES)


add_row = op("iii", _add_row)
"""target += source; whole vectors."""
