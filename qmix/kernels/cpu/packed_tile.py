"""Tiles of a packed 4-bit product: a few rows of x times groups of 32 interleaved rows, every sum in a register.

32 bytes hold two columns; byte j has column j % 2 of row j // 2 in its low half, and of row 16 + j // 2 in its high
half. After the look-up each row has a pair of bf16 weights in 32 bits, the operand of vdpbf16ps. Without that
instruction a shift makes the first weight fp32, and a mask the second. A block's sums are scaled by its absmax.

avx512     bytes widen to words, whose lowest five bits choose from a table of 32 words with equal halves
avx2       low and high bytes of the 16 bf16 values are looked up apart, then interleaved
portable   each code is looked up in a table in memory

For many rows of x a block is looked up once, into the L1 cache (`widen_block`), and used for all (`block_tile`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.blocks import FP4_CODES, VALUES
from qmix.kernels.cpu.paths import current
from qmix.kernels.cpu.vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    LANES,
    NUMBERS,
    PAIRS,
    SUMS,
    WORDS,
    Builder,
    Value,
    add_pairs,
    add_wide,
    at,
    bf16_to_float,
    call,
    clear,
    equal,
    fill,
    load,
    prefetch,
    spread,
    times,
)
from qmix.kernels.packing import BLOCK, PACK_ROWS

PARTS = PACK_ROWS // LANES  # vectors of sums in a group
# Rows of x in a tile, times the vectors of a group: 24 registers of 32, or 8 of 16.
PACKED_TOKENS = 12 if current().registers == 32 else max(1, 8 // PARTS)
# Groups side by side, so that few rows of x still make many independent sums: each waits for its own last addition.
# Sixteen registers hold one group's sums and its look-up tables; two groups spilled.
PACKED_GROUPS = {1: 4, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2} if current().registers == 32 else {}
BLOCK_TOKENS = 12 if current().registers == 32 else max(1, 12 // PARTS)  # rows of x in a tile over widened weights
AHEAD = 1024  # bytes of each group's codes fetched ahead: one row of x takes 1.7 ms an expert; 2.4 at 3072, 1.8 at 6144
X_ITEM = 2 if current().pairs else 4  # bytes of a number of x
TOGETHER = 4 // X_ITEM  # columns that one instruction multiplies

Sums = list[list[list[Value]]]  # places of vectors: [tokens][groups][PARTS]


def _packed_by_tokens(b: Builder, kind: str, tokens: int, groups: int, arguments: Sequence[Value]) -> None:
    """Emit the code of one four_bit_tile; `tokens` and `groups` are Python integers."""
    codes, group_stride, absmax, stride, x, x_stride, blocks, sums = arguments
    totals = _places(b, tokens, groups)
    step = _add_pairs if current().pairs else _add_columns
    with cgutils.for_range(b, blocks) as block:
        clear(b, chain.from_iterable(totals))
        block_codes = b.add(codes, times(b, block.index, BLOCK * PACK_ROWS // 2))
        block_x = b.add(x, times(b, block.index, X_ITEM * BLOCK))
        with cgutils.for_range(b, ir.Constant(I64, BLOCK // 2)) as pair:
            place = b.add(block_codes, times(b, pair.index, PACK_ROWS))
            places = [b.add(place, times(b, group_stride, group)) for group in range(groups)]
            pair_x = b.add(block_x, times(b, pair.index, 2 * X_ITEM))
            step(b, kind, places, [b.add(pair_x, times(b, x_stride, t)) for t in range(tokens)], totals)
        _add_scaled(b, kind, totals, b.add(absmax, b.mul(block.index, stride)), stride, sums)


def _places(b: Builder, tokens: int, groups: int) -> Sums:
    return [[[cgutils.alloca_once(b, SUMS) for _ in range(PARTS)] for _ in range(groups)] for _ in range(tokens)]


def _add_pairs(b: Builder, kind: str, places: list[Value], x: list[Value], totals: Sums) -> None:
    """Add the products of two columns, at `places` by group, with two numbers of each row of x, in bf16 as pairs."""
    weights = [[b.bitcast(words, PAIRS) for words in _words(b, kind, place)] for place in places]
    for row, lines in zip(x, totals, strict=True):
        part = b.bitcast(spread(b, load(b, row, 0, I32)), PAIRS)
        for total, vector in zip(chain.from_iterable(lines), chain.from_iterable(weights), strict=True):
            b.store(add_pairs(b, b.load(total), part, vector), total)


def _add_columns(b: Builder, kind: str, places: list[Value], x: list[Value], totals: Sums) -> None:
    """Add the same products one column after the other, all in fp32."""
    parts = [[spread(b, load(b, row, 4 * column, FLOAT)) for column in range(2)] for row in x]
    for group, place in enumerate(places):
        for vector, columns in enumerate(wide_columns(b, kind, place)):
            for column, weights in enumerate(columns):
                for row, lines in zip(parts, totals, strict=True):
                    total = lines[group][vector]
                    b.store(add_wide(b, b.load(total), row[column], weights), total)


def wide_columns(b: Builder, kind: str, place: Value) -> list[tuple[Value, Value]]:
    """Return two columns of 32 rows in fp32, as PARTS vectors; `in_order` restores the order of rows."""
    if current().name == "portable":
        return _looked_up(b, kind, place)
    columns = []
    for words in _words(b, kind, place):
        pairs = b.bitcast(words, NUMBERS)
        first, second = b.shl(pairs, fill(NUMBERS, 16)), b.and_(pairs, fill(NUMBERS, 0xFFFF0000))
        columns.append((b.bitcast(first, SUMS), b.bitcast(second, SUMS)))
    return columns


def _words(b: Builder, kind: str, place: Value) -> list[Value]:
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
    table = cgutils.global_constant(b.module, f"{kind}_values", ir.Constant(ir.ArrayType(FLOAT, 16), _floats(kind)))
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


def _add_scaled(b: Builder, kind: str, totals: Sums, absmax: Value, stride: Value, sums: Value) -> None:
    """Add a block's sums, times its absmax, to the sums of the tile."""
    groups = len(totals[0])
    prefetch(b, at(b, absmax, times(b, stride, 3), I8))
    bits = [load(b, absmax, 2 * LANES * part, ir.VectorType(I16, LANES)) for part in range(PARTS * groups)]
    scales = [b.fmul(bf16_to_float(b, vector), fill(SUMS, 1 / VALUES[kind][-1])) for vector in bits]
    for t, lines in enumerate(totals):
        ordered = [vector for line in lines for vector in in_order(b, [b.load(place) for place in line])]
        for part, (total, scale) in enumerate(zip(ordered, scales, strict=True)):
            to = at(b, sums, 4 * LANES * (PARTS * groups * t + part), SUMS)
            b.store(add_wide(b, b.load(to, align=4), total, scale), to, align=4)


def _table(kind: str) -> list[int]:
    """Return the 16 values by code as bf16 bit patterns: nf4's rounded, fp4's (up to 12) exact."""
    values = np.array(VALUES[kind], np.float32)
    bits = (values[np.argsort(FP4_CODES)] if kind == "fp4" else values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).tolist()


def _floats(kind: str) -> list[float]:
    """Return the 16 values by code as numbers."""
    return (np.array(_table(kind), np.uint32) << 16).view(np.float32).tolist()


@intrinsic(prefer_literal=True)
def four_bit_tile(
    context: object, kind: Any, tokens: Any, groups: Any, codes: Any, group_stride: Any, absmax: Any, stride: Any,
    x: Any, x_stride: Any, blocks: Any, sums: Any,
) -> tuple[Any, Callable[..., Any]]:  # fmt: skip
    """Add, to fp32 sums [tokens, groups * 32], the products of groups of 32 interleaved rows of the packed layout with
    1 to PACKED_TOKENS rows of x, over `blocks` blocks of 64 columns. x is bf16 where the path has pairs, else fp32.
    `kind`, "nf4" or "fp4", is a literal; strides are bytes per row and per group. There is one group, or as many as
    PACKED_GROUPS gives for that number of rows of x.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        _, tokens, groups, *rest = arguments
        for t in range(1, PACKED_TOKENS + 1):
            for g in {1, PACKED_GROUPS.get(t, 1)}:
                with b.if_then(b.and_(equal(b, tokens, t), equal(b, groups, g))):
                    _packed_by_tokens(b, kind.literal_value, t, g, rest)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 10), emit


@intrinsic(prefer_literal=True)
def widen_block(context: object, kind: Any, codes: Any, weights: Any) -> tuple[Any, Callable[..., Any]]:
    """Look up the weights of 64 columns of a group, unscaled, for `block_tile`.

    `weights` takes fp32 [64, 32] or, where the path has pairs, bf16 [32, 32, 2].
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        _, codes, weights = arguments
        with cgutils.for_range(b, ir.Constant(I64, BLOCK // 2)) as pair:
            place = b.add(codes, times(b, pair.index, PACK_ROWS))
            to = b.add(weights, times(b, pair.index, 2 // TOGETHER * 4 * PACK_ROWS))
            columns: list[tuple[Value, ...]]
            if current().pairs:
                columns = [(words,) for words in _words(b, kind.literal_value, place)]
            else:
                columns = [*wide_columns(b, kind.literal_value, place)]
            for part, vectors in enumerate(columns):
                for column, vector in enumerate(vectors):
                    b.store(vector, at(b, to, 4 * (PACK_ROWS * column + LANES * part), vector.type), align=4)
        return context.get_dummy_value()

    return types.void(kind, types.int64, types.int64), emit


def _block_by_tokens(b: Builder, kind: str, tokens: int, arguments: Sequence[Value]) -> None:
    """Emit the code of one block_tile; `tokens` is a Python integer."""
    weights, absmax, stride, x, sums = arguments
    totals = _places(b, tokens, 1)
    clear(b, chain.from_iterable(totals))
    with cgutils.for_range(b, ir.Constant(I64, BLOCK // TOGETHER)) as loop:
        place, numbers = b.add(weights, times(b, loop.index, 4 * PACK_ROWS)), b.add(x, times(b, loop.index, 4))
        _add_items(b, place, numbers, totals)
    _add_scaled(b, kind, totals, absmax, stride, sums)


def _add_items(b: Builder, place: Value, numbers: Value, totals: Sums) -> None:
    """Add the products of TOGETHER columns of a block with the numbers of each row of x."""
    item, add = (PAIRS, add_pairs) if current().pairs else (SUMS, add_wide)

    def vector(part: int) -> Value:
        return load(b, place, 4 * LANES * part, item)

    def number(t: int) -> Value:
        offset = X_ITEM * BLOCK * t
        return b.bitcast(spread(b, load(b, numbers, offset, I32)), item)

    # registers hold the operand with fewer vectors beside the sums; the other one is loaded vector by vector
    tokens = len(totals)
    if tokens < PARTS:
        held = [number(t) for t in range(tokens)]
        products = (
            (t, part, held[t], weight) for part in range(PARTS) for weight in [vector(part)] for t in range(tokens)
        )
    else:
        kept = [vector(part) for part in range(PARTS)]
        products = ((t, part, one, kept[part]) for t in range(tokens) for one in [number(t)] for part in range(PARTS))
    for t, part, one, weight in products:
        total = totals[t][0][part]
        b.store(add(b, b.load(total), one, weight), total)


@intrinsic(prefer_literal=True)
def block_tile(
    context: object, kind: Any, tokens: Any, weights: Any, absmax: Any, stride: Any, x: Any, sums: Any
) -> tuple[Any, Callable[..., Any]]:
    """Add, to fp32 sums [tokens, 32], the products of a block from `widen_block` with 1 to BLOCK_TOKENS rows of x.

    x is [tokens, 64], in bf16 where the path has pairs, else in fp32. Every sum has four_bit_tile's order of additions.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        _, tokens, *rest = arguments
        for t in range(1, BLOCK_TOKENS + 1):
            with b.if_then(equal(b, tokens, t)):
                _block_by_tokens(b, kind.literal_value, t, rest)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 6), emit
