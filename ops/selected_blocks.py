"""A selection in the place of which block attention reads bitmaps: where few heads share a list, a tile of queries multiplied with all keys of a block costs less than each row's own keys.

A list of its own for each head fills one of the 16 rows that a product of gather attention has at least, and reads every key for itself: 100 ps a query, head and key on Hopper, where a pair of a
masked block takes 2. So up to 32 keys passed for one that is seen, blocks win; and up to there the bitmaps of single keys, a bit a key, are no larger than the entries, 32 bits each.
"""
from dataclasses import replace

from sparsetile.backends import arrays, devices, places
from sparsetile.backends.contract import Lists, Problem, Unsupported
from sparsetile.ops import array_operators as xp
from sparsetile.ops import device_lists, dispatch
from sparsetile.ops.layout import Layout
from sparsetile.ops.selection import Selection

OP, BLOCK, PASSED, LEAST = "sparse_attention", 128, 32, 1 << 24
MOST, CAP = 1 << 30, 1 << 32  # bytes of bitmaps beside any entries, and beside entries of as many bytes


def where_they_pay(call, problem_of):
    """A call of sparse_attention: as it is, or with a layout in place of its selection. problem_of(call, "gather" or "block"): that attention's; on gather's path "blocks" it stays."""
    if not (isinstance(call.rule, Selection) and pays(call)):
        return call
    taken = dispatch.find(OP, problem_of(call, "gather"), call.device, call.backend)
    return call if taken is not None and taken.config.get("path") == "blocks" else as_blocks(call, problem_of) or call


def pays(call) -> bool:
    """Whether a call over a selection runs as blocks."""
    rule, (B, Hq, Hk, T, S, D, Dv) = call.rule, call.sizes
    if not rule.distinct or call.device is None or call.config is not None or call.table is not None or call.latent is not None or arrays.dtype_name(call.q) not in ("bfloat16", "float16"):
        return False
    G, K = (int(n) for n in rule.indices.shape[1::2])
    shared, seen = Hq // max(G, Hk), min(K * rule.granularity, S)
    long = B * Hq * T * seen >= LEAST * shared  # else the host, which makes the lists, takes longer than the rows
    small = B * G * T * S // 8 <= min(CAP, max(MOST, 4 * B * G * T * K))
    counted = K * rule.granularity + BLOCK * BLOCK < 2 ** 31  # in int32, to a step past the last
    return min(T, S) >= BLOCK and long and shared < 16 and S * shared <= PASSED * seen and small and counted


def as_blocks(call, problem_of):
    """The call with a layout in place of its selection, made where its entries are: no host round trip, CUDA-graph safe. None where no backend that may run has the kernels, or these blocks do not fit.

    Rows of the layout are numbered from query 0: lengths, positions and causality are in its bits.
    """
    B, Hq, Hk, T, S, _, _ = call.sizes
    s = call.rule
    problem = problem_of_bits(s, Hq, Hk, S, call.device)
    G = int(s.indices.shape[1])
    nq, nk = -(-T // BLOCK), -(-S // BLOCK)
    rest = dict(q_start=0, kv_length=None)
    tiles = Layout((Lists(BLOCK, BLOCK, 0, nq, nk, *[None] * 8, list_of=None, has_bitmaps=True),), T, S, 0)
    try:
        choice = dispatch.find(OP, problem, call.device, call.backend)
        if choice is None or dispatch.find(OP, problem_of(replace(call, rule=tiles, **rest), "block"), call.device, call.backend, dict(block_q=BLOCK, block_k=BLOCK)) is None:
            return None
    except Unsupported:  # e.g. wide rows where shared memory is small: gather attention takes them
        return None
    dispatch.before(OP, problem, call.device, choice.backend)  # for an explanation
    if dispatch.is_explaining():  # the attention kernel is the one to explain: its tiles are all it needs
        device_lists.kernel_of((B * G, nq, nk), call.device, OP, call.backend)
        empty = xp.full(s.indices, (1,), 0)
        part = Lists(BLOCK, BLOCK, 0, nq, nk, *[empty] * 8, list_of=xp.full(s.indices, (1, 1), 0), has_bitmaps=True)
    else:
        bitmaps, kinds = bits(choice, s, S, call.caller, call.device, call.kv_length, call.q_start)
        part = device_lists.lists(kinds, BLOCK, BLOCK, (B, G), bitmaps=bitmaps, op=OP, backend=call.backend)
        if G not in (1, Hq):
            part = replace(part, list_of=xp.astype(xp.module(kinds).broadcast_to(part.list_of[:, :, None], (B, G, Hq // G)).reshape(B, Hq), "int32"))
    return replace(call, rule=Layout((part,), T, S, 0), **rest)


def problem_of_bits(s: Selection, Hq: int, Hk: int, S: int, device) -> Problem:
    B, _, T, K = (int(n) for n in s.indices.shape)
    return Problem.of("selection_bitmaps", dict(B=B, Hq=Hq, Hk=Hk, T=T, S=S, K=K), dict(indices="int32"), devices.device_info(device).arch, ["causal"] * s.causal, 1.0, s.granularity)


def bits(choice, s: Selection, S: int, caller: str, device, kv_length=None, q_start=None):
    """Bitmaps and kinds of a selection's blocks, by who was chosen for problem_of_bits."""
    place = places.place_for(dispatch.package(choice.backend).NATIVE, caller, device)
    with place.guard():
        indices, lengths, kv_length = (None if x is None else place.packed(place.native(x)) for x in (s.indices, s.lengths, kv_length))
        start = q_start if q_start is None or isinstance(q_start, int) else place.packed(place.native(q_start))
        return tuple(place.give(x) for x in choice.kernel.run(indices, place=place, config=choice.config, S=S, block_q=BLOCK, block_k=BLOCK, lengths=lengths, granularity=s.granularity,
                                                              causal=s.causal, kv_length=kv_length, q_start=start))
