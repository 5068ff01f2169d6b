"""Lists of blocks from a block mask, on the device, without a host round trip, CUDA-graph safe.

    mask [L,nq,nk] bool or uint8 (kept blocks are full), or int32 kinds (-2 absent, -1 full, else a row of a table)  ->  dict of the arrays of contract.Lists:
    offsets, cols, kinds, by_key_offsets, by_key_rows, by_key_kinds

Full blocks first, each half ascending. The arrays have the capacity of L * nq * nk entries and one more; what stands past the last entry is 0 (-1 for kinds).
"""
import triton
import triton.language as tl

from sparsetile.backends.contract import Resources, Tunable

TUNABLES = (Tunable("block", (256, 128, 512, 1024), "entries of the mask read at a time"),)


@triton.jit
def line_of(line, L, nq, nk, mask):
    """Line x < L * nq is a row of the mask, the others are its columns -> (first entry, step, length)."""
    by_key = line >= L * nq
    row = line - tl.where(by_key, L * nq, 0)
    lines = tl.where(by_key, nk, nq)
    start = (row // lines).to(tl.int64) * nq * nk + tl.where(by_key, row % lines, (row % lines).to(tl.int64) * nk)
    return mask + start, tl.where(by_key, nk, 1), tl.where(by_key, nq, nk)


@triton.jit
def look(entry, step, at, length, KINDS: tl.constexpr):
    """Kinds of entries `at` of a line; -2 past its end."""
    value = tl.load(entry + at.to(tl.int64) * step, mask=at < length, other=0).to(tl.int32)
    if KINDS:
        kinds = value
    else:
        kinds = tl.where(value != 0, -1, -2)
    return tl.where(at < length, kinds, -2)


@triton.jit
def count_lines(mask, offsets, by_key_offsets, L, nq, nk, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """How many full and how many partial blocks each line has, where the offset after them will stand."""
    line = tl.program_id(0)
    entry, step, length = line_of(line, L, nq, nk, mask)
    full = tl.zeros((BLOCK,), tl.int32)
    partial = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, length, BLOCK):
        kinds = look(entry, step, begin + tl.arange(0, BLOCK), length, KINDS)
        full += (kinds == -1).to(tl.int32)
        partial += (kinds >= 0).to(tl.int32)
    if line < L * nq:
        tl.store(offsets + 2 * line + 1, tl.sum(full, axis=0))
        tl.store(offsets + 2 * line + 2, tl.sum(partial, axis=0))
    else:
        tl.store(by_key_offsets + 2 * (line - L * nq) + 1, tl.sum(full, axis=0))
        tl.store(by_key_offsets + 2 * (line - L * nq) + 2, tl.sum(partial, axis=0))


@triton.jit
def running_sums(array, length, BLOCK: tl.constexpr):
    """In place: array[0] = 0, array[i] = the sum of what stood at 1 .. i."""
    tl.store(array, 0)
    total = tl.sum(tl.zeros((2,), tl.int32), axis=0)
    for begin in range(1, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        counts = tl.load(array + at, mask=at < length, other=0)
        tl.store(array + at, total + tl.cumsum(counts, axis=0), mask=at < length)
        total += tl.sum(counts, axis=0)


@triton.jit
def add_up(offsets, by_key_offsets, rows, columns, BLOCK: tl.constexpr):
    if tl.program_id(0) == 0:
        running_sums(offsets, rows, BLOCK)
    else:
        running_sums(by_key_offsets, columns, BLOCK)


@triton.jit
def fill_line(entry, step, length, offsets, numbers, kinds_out, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    full_at = tl.load(offsets)
    partial_at = tl.load(offsets + 1)
    for begin in range(0, length, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        kinds = look(entry, step, at, length, KINDS)
        full, partial = (kinds == -1).to(tl.int32), (kinds >= 0).to(tl.int32)
        place = tl.where(full > 0, full_at + tl.cumsum(full, axis=0), partial_at + tl.cumsum(partial, axis=0)) - 1
        tl.store(numbers + place, at, mask=kinds >= -1)
        tl.store(kinds_out + place, kinds, mask=kinds >= -1)
        full_at += tl.sum(full, axis=0)
        partial_at += tl.sum(partial, axis=0)


@triton.jit
def fill_lists(mask, offsets, cols, kinds, by_key_offsets, by_key_rows, by_key_kinds, L, nq, nk, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    line = tl.program_id(0)
    entry, step, length = line_of(line, L, nq, nk, mask)
    if line < L * nq:
        fill_line(entry, step, length, offsets + 2 * line, cols, kinds, KINDS, BLOCK)
    else:
        fill_line(entry, step, length, by_key_offsets + 2 * (line - L * nq), by_key_rows, by_key_kinds, KINDS, BLOCK)


def supports(problem):
    return None


def resources(problem, config):
    return Resources(threads=128, shared=4096)


def default_config(problem):
    return {"block": 256}


def artifacts(problem, config):
    numbers = {"L": "i32", "nq": "i32", "nk": "i32"}
    found = []
    for pointer, kinds in (("*u8", False), ("*i32", True)):
        constants = {"KINDS": kinds, "BLOCK": config["block"]}
        for fn in (count_lines, fill_lists):
            arrays = {name: "*i32" for name in fn.arg_names if name not in numbers and name not in constants} | {"mask": pointer}
            found.append({"fn": fn, "signature": {**arrays, **numbers}, "constexprs": constants, "options": {"num_warps": 4}, "div16": tuple(arrays)})
    found.append({"fn": add_up, "signature": {"offsets": "*i32", "by_key_offsets": "*i32", "rows": "i32", "columns": "i32"}, "constexprs": {"BLOCK": 1024},
                  "options": {"num_warps": 4}, "div16": ("offsets", "by_key_offsets")})
    return found


def run(mask, *, place, config):
    import torch
    L, nq, nk = mask.shape
    mask = mask.contiguous()
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    size, rows, columns = L * nq * nk + 1, 2 * L * nq + 1, 2 * L * nk + 1
    made = {"offsets": place.zeros((rows,), "int32"), "cols": place.zeros((size,), "int32"), "kinds": place.full((size,), "int32", -1),
            "by_key_offsets": place.zeros((columns,), "int32"), "by_key_rows": place.zeros((size,), "int32"), "by_key_kinds": place.full((size,), "int32", -1)}
    if size > 1:
        how = {"KINDS": mask.dtype == torch.int32, "BLOCK": config["block"], "num_warps": 4}
        lines = L * (nq + nk)
        count_lines[(lines,)](mask, made["offsets"], made["by_key_offsets"], L, nq, nk, **how)
        add_up[(2,)](made["offsets"], made["by_key_offsets"], rows, columns, BLOCK=1024, num_warps=4)
        fill_lists[(lines,)](mask, *made.values(), L, nq, nk, **how)
    return made
