"""Weights of the packed 4-bit layout, looked up in vectors: two columns of a group of 32 interleaved rows at a time.

32 bytes hold two columns; byte j has column j % 2 of row j // 2 in its low half, and of row 16 + j // 2 in its high
half. After the look-up each row has a pair of bf16 weights in 32 bits, the operand of vdpbf16ps. Without that
instruction a shift makes the first weight fp32, and a mask the second.

avx512     bytes widen to words, whose lowest five bits choose from a table of 32 words with equal halves
avx2       low and high bytes of the 16 bf16 values are looked up apart, then interleaved
portable   each code is looked up in a table in memory
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from qmix.kernels.cpu.blocks import FP4_CODES, VALUES
from qmix.kernels.cpu.paths import current
from qmix.kernels.cpu.vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    LANES,
    NUMBERS,
    SUMS,
    WORDS,
    Builder,
    Value,
    at,
    call,
    fill,
    load,
    prefetch,
)
from qmix.kernels.packing import PACK_ROWS

PARTS = PACK_ROWS // LANES  # vectors of a group's column
AHEAD = 1024  # bytes of each group's codes fetched ahead: one row of x takes 1.7 ms an expert; 2.4 at 3072, 1.8 at 6144


def wide_columns(b: Builder, kind: str, place: Value) -> list[tuple[Value, Value]]:
    """Return two columns of 32 rows in fp32, as PARTS vectors; `in_order` restores the order of rows."""
    if current().name == "portable":
        return _looked_up(b, kind, place)
    columns = []
    for words in column_pairs(b, kind, place):
        pairs = b.bitcast(words, NUMBERS)
        first, second = b.shl(pairs, fill(NUMBERS, 16)), b.and_(pairs, fill(NUMBERS, 0xFFFF0000))
        columns.append((b.bitcast(first, SUMS), b.bitcast(second, SUMS)))
    return columns


def column_pairs(b: Builder, kind: str, place: Value) -> list[Value]:
    """Return two columns of 32 rows as pairs of bf16 bit patterns, LANES rows a vector."""
    prefetch(b, at(b, place, AHEAD, I8))
    codes = load(b, place, 0, ir.VectorType(I8, PACK_ROWS))
    if LANES == 16:
        table, words = ir.Constant(WORDS, _table(kind) * 2), b.zext(codes, WORDS)
        indices = (words, b.lshr(words, fill(WORDS, 4)))
        return [call(b, "llvm.x86.avx512.permvar.hi.512", WORDS, table, index) for index in indices]
    return [half for index in _nibbles(b, codes) for half in _two_look_ups(b, kind, index)]


def _nibbles(b: Builder, codes: Value) -> tuple[Value, Value]:
    """Return the low and the high half of each byte. Words are shifted: the processor cannot shift bytes."""
    words = b.lshr(b.bitcast(codes, ir.VectorType(I16, PACK_ROWS // 2)), fill(ir.VectorType(I16, PACK_ROWS // 2), 4))
    mask = fill(codes.type, 15)
    return b.and_(codes, mask), b.and_(b.bitcast(words, codes.type), mask)


def _two_look_ups(b: Builder, kind: str, index: Value) -> list[Value]:
    """Return the bf16 bit patterns of 32 codes: low and high bytes are looked up apart, then interleaved.

    They interleave only within 16 bytes: rows 0-3 and 8-11 are in the first vector, 4-7 and 12-15 in the second.
    """
    table = _table(kind)
    low, high = (
        call(
            b,
            "llvm.x86.avx2.pshuf.b",
            index.type,
            ir.Constant(index.type, [word >> shift & 255 for word in table] * 2),
            index,
        )
        for shift in (0, 8)
    )
    halves = ([*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)])
    orders = [[place for i in half for place in (i, PACK_ROWS + i)] for half in halves]
    return [
        b.bitcast(b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, PACK_ROWS), order)), WORDS)
        for order in orders
    ]


def _looked_up(b: Builder, kind: str, place: Value) -> list[tuple[Value, Value]]:
    """Return two columns of 32 rows, looked up in a table of 16 numbers in memory; runs on any processor."""
    table = cgutils.global_constant(b.module, f"{kind}_values", ir.Constant(ir.ArrayType(FLOAT, 16), _numbers(kind)))
    table.linkage = "private"
    columns = []
    for first in range(0, PACK_ROWS, LANES):
        pair = []
        for column in range(2):
            vector = ir.Constant(SUMS, ir.Undefined)
            for lane in range(LANES):
                row = first + lane
                byte = load(b, place, 2 * (row % 16) + column, I8)
                code = b.and_(b.lshr(byte, ir.Constant(I8, 4 * (row // 16))), ir.Constant(I8, 15))
                number = b.load(b.gep(table, [ir.Constant(I32, 0), b.zext(code, I32)]))
                vector = b.insert_element(vector, number, ir.Constant(I32, lane))
            pair.append(vector)
        columns.append((pair[0], pair[1]))
    return columns


def in_order(b: Builder, vectors: list[Value]) -> list[Value]:
    """Return a group's vectors with the rows in order again after `wide_columns`."""
    if LANES != 8:
        return vectors
    ordered = []
    for first, second in zip(vectors[::2], vectors[1::2], strict=True):
        for half in (0, 4):
            taken = [*range(half, half + 4), *range(8 + half, 12 + half)]
            ordered.append(b.shuffle_vector(first, second, ir.Constant(NUMBERS, taken)))
    return ordered


def _table(kind: str) -> list[int]:
    """Return the 16 values by code as bf16 bit patterns: nf4's rounded, fp4's (up to 12) exact."""
    values = np.array(VALUES[kind], np.float32)
    bits = (values[np.argsort(FP4_CODES)] if kind == "fp4" else values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).tolist()


def _numbers(kind: str) -> list[float]:
    """Return the 16 values by code as numbers."""
    return (np.array(_table(kind), np.uint32) << 16).view(np.float32).tolist()
