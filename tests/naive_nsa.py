"""Native Sparse Attention from the paper's equations (arXiv 2502.11089), one query at a time, in PyTorch: the answer that ours is held against. Shares nothing with the library.

Counts blocks and compressed keys from 1, as the paper does: compressed key i stands for the tokens (i-1)d+1 .. (i-1)d+l, selection block j for (j-1)l'+1 .. jl'.
"""
import torch


def compressed(x, phi, l, d, length):
    """x [S,D] of one head -> the rows of compressed keys 1, 2, ... that are complete among the first `length` tokens."""
    rows = [phi(x[first:first + l]) for first in range(0, length - l + 1, d)]
    return torch.stack(rows) if rows else x[:0]


def softmax_over(q, keys, scale):
    """q [D], keys [n,D] -> [n] probabilities."""
    return torch.softmax(scale * (keys @ q), 0)


def importance(shares, j, l, d, l2):
    """Equation 9 for one head; shares {i: probability}. Its index runs over i = l'/d * j - m - n."""
    return sum((shares[i] for m in range(l2 // d) for n in range(l // d) if (i := l2 // d * j - m - n) in shares), start=0.0)


def chosen_blocks(group_shares, position, l, d, l2, n, first, last):
    """Blocks (from 0) that a group's query at `position` (from 1) takes, ascending. group_shares: {i: probability} for each head. Equations 9 to 11."""
    blocks = list(range(1, -(-position // l2) + 1))
    if len(blocks) <= n:
        return [j - 1 for j in blocks]
    score = {j: float(sum(importance(shares, j, l, d, l2) for shares in group_shares)) for j in blocks}
    forced = set(blocks[:first]) | set(blocks[len(blocks) - last:])
    rest = sorted((j for j in blocks if j not in forced), key=lambda j: (-score[j], j))
    return sorted(j - 1 for j in forced | set(rest[:n - len(forced)]))


def nsa(q, k, v, gates, phi_k, phi_v, *, l=32, d=16, l2=64, n=16, first=1, last=2, window=512, scale=None, start=None, lengths=None, blocks=None):
    """q [B,Hq,T,D]; k, v triples of [B,Hk,S,D]; gates [B,Hq,T,3] -> out [B,Hq,T,Dv], blocks [B][Hk][T] lists. `blocks` given: these are used instead of chosen."""
    B, Hq, T, D = q.shape
    Hk, S = k[0].shape[1:3]
    scale, group = D ** -0.5 if scale is None else scale, Hq // Hk
    out, taken = [], []
    for b in range(B):
        length = S if lengths is None else min(max(int(lengths[b]), 0), S)
        t0 = length - T if start is None else int(start if isinstance(start, int) else start[b])
        heads, taken_b = [], []
        for j in range(Hk):
            ck, cv = compressed(k[0][b, j], phi_k, l, d, length), compressed(v[0][b, j], phi_v, l, d, length)
            rows, taken_j = [[] for _ in range(group)], []
            for t in range(T):
                position = min(t0 + t + 1, length)  # the query's own, from 1; what it sees ends here
                seen = [i for i in range(1, len(ck) + 1) if (i - 1) * d + l <= position]
                probs = [softmax_over(q[b, j * group + g, t], ck[:len(seen)], scale) for g in range(group)]
                if blocks is None:
                    mine = chosen_blocks([dict(zip(seen, p.tolist())) for p in probs], position, l, d, l2, n, first, last)
                else:
                    mine = blocks[b][j][t]
                taken_j.append(mine)
                tokens = [s for block in mine for s in range(block * l2, block * l2 + l2) if s < position]
                near = [s for s in range(max(0, t0 + t + 1 - window), position)]
                for g in range(group):
                    query, gate = q[b, j * group + g, t], gates[b, j * group + g, t]
                    row = query.new_zeros(v[0].shape[-1])
                    for weight, p, values in ((gate[0], probs[g], cv[:len(seen)]), (gate[1], softmax_over(query, k[1][b, j, tokens], scale), v[1][b, j, tokens]),
                                              (gate[2], softmax_over(query, k[2][b, j, near], scale), v[2][b, j, near])):
                        if len(values):
                            row = row + weight * (p @ values)
                    rows[g].append(row)
            heads += [torch.stack(r) if r else q.new_zeros(0, v[0].shape[-1]) for r in rows]
            taken_b.append(taken_j)
        out.append(torch.stack(heads))
        taken.append(taken_b)
    return torch.stack(out), taken
