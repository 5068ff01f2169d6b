"""Rows of any element type to float32 and back, compiled once for all kernels that call them by name (far.py)."""
from sparsetile.backends.numba.convert import copy_row, read_row, read_rows, write_row, write_rows
from sparsetile.backends.numba.far import far


@far("iiiii")
def load_row(code, source, count, target, padded):
    """count elements of type `code` at `source` -> float32 at `target`, zeros up to `padded` elements."""
    read_row(code, source, count, target, padded)


@far("iiiiiiii")
def load_rows(code, source, step, rows, count, padded, target, target_step):
    """load_row of `rows` rows, `step` bytes apart, to `target_step` bytes apart."""
    read_rows(code, source, step, rows, count, padded, target, target_step)


@far("iiii")
def store_row(code, source, count, target):
    """count float32 at `source` -> type `code` at `target`, rounded to nearest even."""
    write_row(code, source, count, target)


@far("iiiiiii")
def store_rows(code, source, step, rows, count, target, target_step):
    """store_row of `rows` rows, `step` bytes apart, to `target_step` bytes apart."""
    write_rows(code, source, step, rows, count, target, target_step)


@far("iii")
def copy_bytes(source, count, target):
    """count bytes as they are."""
    copy_row(source, count, target)
