"""The inner loops of block attention's backward: one panel of PANEL queries, or all of a tile, against a run of keys; float32, on addresses.

As in tiles.py lanes are queries: P and dS are [keys, queries] (row step given: all panels of a tile side by side), dQ^T [D, PANEL]. Only dK and dV
[keys, width] have features as lanes, of Q and dO as rows. c, slope and softcap come from `constants` (job.py).
A row's lse, in powers of two, is the sum of two float32 (`high`, `low`): scores of 1e4 would lose three digits of P to one.
"""
from llvmlite import ir

from sparsetile.backends.numba.ahead import ask_next
from sparsetile.backends.numba.simd import F, I1, I32, I64, LANES, VECTORS, op
from sparsetile.backends.numba.tiles import PANEL, STEP, STEPS, WIDTH, _groups, _panel, _seen, by_vectors


def _probability(masked, capped, cols=VECTORS):
    def probability(e, asks, pk, k_step, pq, D, pp, p_step, pl, pc, sixes, fours, *more):
        """P = 2 ** (c K Q^T - lse), 0 where unseen. With a softcap its slope goes to pd, where dS will be."""
        b = e.b
        c, outer, inner = (e.splat(e.load(pc, offset, F)) for offset in (0, 4, 8))
        high, low = [b.fneg(x) for x in _panel(e, pl, cols=cols)], _panel(e, pl, STEP, cols=cols)

        def group(rows, first, _):
            ask_next(e, asks, rows, cols)
            acc = e.gemm(rows, cols, e.add(pk, e.mul(first, k_step)), k_step, 4, pq, STEP, D, unroll=STEPS.get(cols, 2))
            for r in range(rows):
                at = e.mul(e.add(first, r), p_step)
                seen = _seen(e, more[0], e.add(more[1], e.add(first, r)), cols) if masked else None
                for n in range(cols):
                    x = acc[r * cols + n]
                    if capped:
                        t = e.tanh(b.fmul(x, inner))
                        e.store(b.fsub(e.f(1), b.fmul(t, t)), e.add(more[2], at), n * WIDTH)
                        x = b.fmul(t, outer)
                    x = b.fsub(e.fma(x, c, high[n]), low[n])
                    # P <= 1; a rounded lse of scores of 1e9 says otherwise
                    x = e.exp2(b.select(b.fcmp_ordered(">", x, e.f(1)), e.f(1), x))
                    e.store(b.select(seen[n], x, e.f(0)) if masked else x, e.add(pp, at), n * WIDTH)
            return []
        _groups(e, sixes, fours, [], group, cols)
    return probability


probability = op("iiiiiiiiiii", _probability(False, False))
"""(list of what to ask for, K, K's row step, Q^T, D, P, P's row step, lse, constants, sixes, fours)"""
probability_masked = op("iiiiiiiiiiiiii", by_vectors(lambda cols: _probability(True, False, cols)))
"""The same with (vectors, ..., words, first key)."""
probability_capped = op("iiiiiiiiiiiiii", _probability(True, True))
"""(list of what to ask for, ..., words, first key, dS)"""


def _score_gradient(capped, cols=VECTORS):
    def score_gradient(e, asks, pv, v_step, pg, Dv, pp, pd, p_step, px, pc, sixes, fours):
        """dS = slope P (V dO^T - delta)"""
        b, slope, delta = e.b, e.splat(e.load(pc, 12, F)), _panel(e, px, cols=cols)

        def group(rows, first, _):
            ask_next(e, asks, rows, cols)
            acc = e.gemm(rows, cols, e.add(pv, e.mul(first, v_step)), v_step, 4, pg, STEP, Dv, unroll=STEPS.get(cols, 2))
            for r in range(rows):
                at = e.mul(e.add(first, r), p_step)
                for n in range(cols):
                    x = b.fmul(b.fmul(e.load(e.add(pp, at), n * WIDTH), slope), b.fsub(acc[r * cols + n], delta[n]))
                    e.store(b.fmul(x, e.load(e.add(pd, at), n * WIDTH)) if capped else x, e.add(pd, at), n * WIDTH)
            return []
        _groups(e, sixes, fours, [], group, cols)
    return score_gradient


score_gradient, score_gradient_capped = op("iiiiiiiiiiiii", by_vectors(lambda cols: _score_gradient(False, cols))), op("iiiiiiiiiiii", _score_gradient(True))
"""([vectors,] list of what to ask for, V, V's row step, dO^T, Dv, P, dS, their row step, delta, constants, sixes, fours)"""


def _queries(cols):
    def queries(e, asks, pk, k_step, pd, p_step, keys, po, sixes, fours):
        """dQ^T += K^T dS"""
        def group(rows, first, _):
            ask_next(e, asks, rows, cols)
            acc = e.gemm(rows, cols, e.add(pk, e.mul(first, 4)), 4, k_step, pd, p_step, keys, unroll=STEPS.get(cols, 2))
            out = e.add(po, e.mul(first, STEP))
            for i, x in enumerate(acc):
                at = i // cols * STEP + i % cols * WIDTH
                e.store(e.b.fadd(x, e.load(out, at)), out, at)
            return []
        _groups(e, sixes, fours, [], group, cols)
    return queries


add_queries = op("iiiiiiiiii", by_vectors(_queries))
"""(vectors, list of what to ask for, K, K's row step, dS, dS's row step, keys, dQ^T, sixes, fours)"""


def _reach(e, words, words_step, panels, first_key, count, bounds):
    """Of `count` keys: the first query of the tile that sees it and the one behind the last (0, 0: none), as int32 pairs; those that see it lie between."""
    b = e.b

    def key(j, _):
        def panel(p, held):
            bits = e.i(0)
            for n, seen in enumerate(_seen(e, e.add(words, e.mul(p, words_step)), e.add(first_key, j))):
                bits = b.or_(bits, b.shl(b.zext(b.bitcast(seen, ir.IntType(LANES)), I64), e.i(n * LANES)))
            there, base = b.icmp_signed("!=", bits, e.i(0)), e.mul(p, PANEL)
            first = b.select(b.icmp_signed("!=", held[1], e.i(0)), held[0], b.add(base, b.cttz(bits, ir.Constant(I1, 0))))
            return [b.select(there, first, held[0]), b.select(there, b.add(base, b.sub(e.i(64), b.ctlz(bits, ir.Constant(I1, 0)))), held[1])]
        for n, x in enumerate(e.loop(panels, [e.i(0), e.i(0)], panel)):
            e.store(b.trunc(x, I32), e.add(bounds, e.mul(j, 8)), 4 * n)
        return []
    e.loop(count, [], key)


reach = op("iiiiii", _reach)
"""(words, their step from panel to panel, panels, first key, keys, bounds)"""


def _add_keys(e, pp, p_step, bounds, px, x_step, width, po, sixes, fours):
    """C [keys, width] += P X, X [queries, width] with a row step of its own, over the queries within a register tile's bounds: as many vectors of features
    at a time as registers hold, then one by one."""
    b, step = e.b, e.mul(width, 4)

    def between(rows, first):
        """Queries that some of these keys is seen by, in whole steps of the product's loop."""
        low, high = e.i(1 << 30), e.i(0)
        for r in range(rows):
            at = e.add(bounds, e.mul(e.add(first, r), 8))
            begin, end = (b.sext(e.load(at, offset, I32), I64) for offset in (0, 4))
            low = b.select(b.and_(b.icmp_signed("<", begin, low), b.icmp_signed(">", end, e.i(0))), begin, low)
            high = b.select(b.icmp_signed(">", end, high), end, high)
        low = b.and_(low, e.i(-4))
        return low, b.and_(b.add(b.sub(high, low), e.i(3)), e.i(-4))

    def features(cols):
        def columns(f, _):
            f = e.mul(f, 4)

            def group(rows, first, _):
                low, count = between(rows, first)
                out = [e.add(e.add(po, f), e.mul(e.add(first, r), step)) for r in range(rows)]
                for r in range(rows):  # sums of keys are far from the nearest cache, and the products take longer than they need to come
                    for n in range(0, cols * WIDTH, 64):
                        e.ask(e.add(out[r], n))
                acc = e.gemm(rows, cols, e.add(e.add(pp, e.mul(first, p_step)), e.mul(low, 4)), p_step, 4, e.add(e.add(px, f), e.mul(low, x_step)), x_step, count)
                for r in range(rows):
                    for n in range(cols):
                        e.store(b.fadd(acc[r * cols + n], e.load(out[r], n * WIDTH)), out[r], n * WIDTH)
                return []
            _groups(e, sixes, fours, [], group)
            return []
        return columns
    main = e.b.sub(width, e.b.urem(width, e.i(LANES * VECTORS)))
    e.loop(main, [], features(VECTORS), LANES * VECTORS)
    rest = features(1)
    e.loop(e.b.sub(width, main), [], lambda f, s: rest(e.add(f, main), s), LANES)


add_keys = op("iiiiiiiii", _add_keys)
"""(P, P's row step, bounds of its keys as `reach` makes them, X, X's row step, width, C, sixes, fours)"""


def _add_row(e, source, target, count):
    e.loop(count, [], lambda k, _: (e.store(e.b.fadd(e.load(e.add(target, e.mul(k, 4))), e.load(e.add(source, e.mul(k, 4)))), e.add(target, e.mul(k, 4))), [])[1], LANES)


add_row = op("iii", _add_row)
"""target += source; whole vectors."""
