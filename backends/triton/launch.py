"""The host's side of a Triton kernel: widths cut into powers of two, limits of the chips, types of arguments. Imports no triton.

Launches go to torch's current device and stream: dispatch has made them the caller's (Place.guard).
"""
KIB = 1024
# Shared memory (LDS on AMD) that one block of threads may have.
SHARED = {"sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_89": 99 * KIB, "sm_90a": 227 * KIB, "sm_100": 227 * KIB, "gfx942": 64 * KIB}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
POINTER = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "float8_e4m3fn": "*fp8e4nv", "int32": "*i32", "int64": "*i64"}
FLOATS = ("float32", "float16", "bfloat16")
HEADS = 8  # so many heads run side by side: few enough to share what the L2 holds, enough that no head's longest list is left for the end
FAR = 2 ** 31  # offsets of elements from here on need 64 bits


def power(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())


def parts(width: int) -> tuple[int, int]:
    """A width as a power of two and a padded rest: 576 -> (512, 64), 96 -> (64, 32), 72 -> (64, 16), 100 -> (128, 0), 128 -> (128, 0)."""
    whole = power(width)
    if whole == width or whole == 16:
        return whole, 0
    half = whole // 2
    rest = power(width - half)
    return (half, rest) if rest < half else (whole, 0)


def shared_limit(arch: str) -> int:
    return SHARED.get(arch, 227 * KIB if arch == "cpu" else 99 * KIB)


def tiles(T: int, block: int, q_start: int | None) -> int:
    """Tiles of `block` positions that T queries from q_start on may touch (q_start None: known on the device only)."""
    if q_start is None:
        return (T + block - 2) // block + 1
    return (q_start + T - 1) // block - q_start // block + 1


def covered(T: int, block: int, q_start: int | None, first: int, nq: int) -> tuple[int, bool, bool]:
    """(tiles that the call may touch, whether they are exactly the layout's, whether they also hold no other queries)."""
    n = tiles(T, block, q_start)
    covers = q_start is not None and q_start // block == first and n == nq
    return n, covers, covers and q_start % block == 0 and T % block == 0


def known_start(q_start) -> tuple:
    """(position of query 0 where the host knows it, else None; the array of them, else None). Both None: it follows from the keys' length."""
    return (q_start, None) if isinstance(q_start, int) else (None, q_start)


def beside(heads: int) -> int:
    """How many heads run side by side: the most that divides them."""
    return max(n for n in range(1, HEADS + 1) if heads % n == 0)


def list_steps(lists) -> tuple[int, ...]:
    """From one batch to the next in lists.list_of, and from one head to the next; 0 where they have one list."""
    return tuple(lists.list_of.stride(i) if lists.list_of.shape[i] > 1 else 0 for i in (0, 1))


def refusal(problem, names: str = "qkv") -> str | None:
    """What the attention kernels cannot do, in one sentence; None if they can."""
    kinds = {problem.dtype(name) for name in names} - {None, "latent_fp8"}
    if not kinds <= set(FLOATS):
        return f"the triton kernel takes float32, float16 or bfloat16, not {', '.join(sorted(kinds - set(FLOATS)))}; cast q, k and v, or move them to the CPU, where numba takes float64"
    if len(kinds) > 1:
        return f"the triton kernel takes q, k and v of one type, not {', '.join(sorted(kinds))}; cast them to one type"
    if not (1 <= problem["D"] <= 576 and 1 <= problem["Dv"] <= 576):
        return f"the triton kernel holds widths of 1 to 576, not D {problem['D']} and Dv {problem['Dv']}"
    return None


def parts_alone(problem, widest: int | None = None) -> bool:
    """Whether parts of the problem's layout, as strided patterns have, run one by one, on the portable path: their path in Gluon knows no lengths, and no wider heads."""
    wide = widest is not None and max(problem["D"], problem["Dv"]) > widest
    return bool(problem.words & {"strided", "fixed", "dilated"}) and problem.density < 1 and ("kv_length" in problem.words or wide)


def scales(scale: float, softcap: float | None) -> tuple[float, float, float, bool]:
    """(scale, inner, outer, negate): the forward's running maximum wants a positive factor, so a negative one turns q over; 0 becomes the least normal number."""
    size = max(abs(scale), 1.2e-38)
    if softcap is None:
        return size, 0.0, 0.0, scale < 0
    return 1.0, (0.0 if scale == 0 else size / softcap), softcap, scale < 0


def options(config) -> dict:
    """How an attention kernel is compiled. Products that the compiler fuses with sums are rounded differently in forward and backward (tiles.py)."""
    return dict(num_warps=config["num_warps"], num_stages=config["num_stages"], enable_fp_fusion=False)


def turns(lists, covers: bool, heads: int, group: int, head_bytes: int, together: int = 8 << 20, by_key: bool = False) -> tuple:
    """(schedule or None, ahead, section) of `tiles.drawn`: tiles (by_key: key blocks) far longer than the others first, then, tile after tile, as many heads as have `together` bytes
    of what is streamed, keys and values or queries and dO, head_bytes each. Heads that are short so end together; of long ones in flight together the cache would hold none (8 MiB: causal 8k + 4 %, 32k as one head after the other)."""
    order = schedule(lists, by_key) if covers else None
    return order, 0 if order is None else lists.far_longer("by_key_offsets" if by_key else "offsets")[0], min(max(1, together // max(1, head_bytes)) * group, heads)


def schedule(lists, by_key: bool = False):
    """[L, nq] tiles of each list, or [L, nk] key blocks, longest first; kept with the lists. Any permutation is right, so an old one of lists rebuilt in place stays valid."""
    offsets, lines, name = (lists.by_key_offsets, lists.nk, "triton.schedule_by_key") if by_key else (lists.offsets, lists.nq, "triton.schedule")
    found = lists.extras.get(name)
    if found is None:
        import torch
        if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # not into a graph's memory pool
        ends = offsets[::2]
        length = (ends[1:] - ends[:-1]).view(-1, max(1, lines))
        found = lists.extras[name] = torch.sort(length, dim=1, descending=True, stable=True).indices.to(torch.int32)
    return found
