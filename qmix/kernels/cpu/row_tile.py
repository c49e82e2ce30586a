"""Tiles of a row-major product: a few rows of x times a few rows of the matrix, every sum in a register.

There are two ways to multiply ("steps"). A product uses one throughout:

pairs   32 columns at a time: x in bf16, the weights as bf16, vdpbf16ps adds two products to each sum
wide    a register of fp32 at a time: x in fp32, the weights widened to fp32

For many rows of x int8 weights become bf16 once (`widen_row`), not once a tile. The sums stay the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.paths import current
from qmix.kernels.cpu.vectors import (
    BYTES,
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    LANES,
    PAIRS,
    SUMS,
    BFloat,
    Builder,
    Value,
    add_pairs,
    add_wide,
    at,
    bf16_to_float,
    clear,
    equal,
    fence,
    fp16_to_float,
    load,
    times,
)
from qmix.kernels.packing import PACK_ROWS

BF16, BF16_WIDE, FP16, INT8, INT8_WIDE = range(5)  # a matrix's type, and its step
PAIRED = (BF16, INT8)
GROUP = PACK_ROWS  # rows whose sums lie side by side
ROWS = 4  # of a tile
TOKENS = 6 if current().registers == 32 else 3  # 24 or 12 vectors of sums leave 8 or 4 registers to load into

_ITEM = {BF16: I16, BF16_WIDE: I16, FP16: I16, INT8: I8, INT8_WIDE: I8}


def _lanes(holds: int) -> int:
    """Return the columns that one instruction multiplies."""
    return 2 * LANES if holds in PAIRED else LANES


def _weights(b: Builder, holds: int, raw: Value) -> Value:
    """Return items of a row as the operand of its step."""
    if holds == BF16:
        return b.bitcast(raw, PAIRS)
    if holds == BF16_WIDE:
        return bf16_to_float(b, raw)
    if holds == FP16:
        return fp16_to_float(b, raw)
    numbers = b.sitofp(raw, ir.VectorType(FLOAT, raw.type.count))  # to 127: exact in bf16
    return b.fptrunc(numbers, PAIRS) if holds == INT8 else numbers


def _tail(b: Builder, row: Value, offset: Value, item: ir.Type, lanes: int, count: Value) -> Value:
    """Return the last `count` items of a row, then zeros; no byte behind the row is read."""
    vector = ir.VectorType(item, lanes)
    place = cgutils.alloca_once(b, vector)
    b.store(ir.Constant(vector, None), place)
    items = b.bitcast(place, item.as_pointer())
    size = ir.Constant(I64, BYTES[item])
    with cgutils.for_range(b, count) as loop:
        value = load(b, row, b.add(offset, b.mul(loop.index, size)), item)
        b.store(value, b.gep(items, [loop.index]))
    return b.load(place)


def _sums(b: Builder, vectors: Sequence[Value]) -> Value:
    """Return the sums of the numbers of 1 or 4 vectors, side by side; each step adds halves to halves.

    Four vectors are folded together: after each step the remainders of two share one vector.
    """
    parts, lanes = list(vectors), LANES
    while lanes > 1:
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        lanes //= 2
        parts = [_fold(b, pair[0], pair[-1], lanes, len(pair)) for pair in pairs]
    return parts[0]


def _fold(b: Builder, left: Value, right: Value, lanes: int, count: int) -> Value:
    """Add the halves of each run of 2 * `lanes` numbers in 1 or 2 vectors; return one vector of runs of `lanes`."""
    places = range(0, count * left.type.count, 2 * lanes)
    low, high = ([start + half + i for start in places for i in range(lanes)] for half in (0, lanes))
    taken = (ir.Constant(ir.VectorType(I32, len(places) * lanes), half) for half in (low, high))
    return b.fadd(*(b.shuffle_vector(left, right, half) for half in taken))


def _rows_by_tokens(b: Builder, holds: int, rows: int, tokens: int, arguments: Sequence[Value]) -> None:
    """Emit the code of one dot_tile; `rows` and `tokens` are Python integers."""
    weights, stride, x, x_stride, columns, sums = arguments
    lanes, item = _lanes(holds), _ITEM[holds]
    x_item, add = (BFloat(), add_pairs) if holds in PAIRED else (FLOAT, add_wide)
    matrix_rows = [b.add(weights, times(b, stride, r)) for r in range(rows)]
    x_rows = [b.add(x, times(b, x_stride, t)) for t in range(tokens)]
    totals = [[cgutils.alloca_once(b, SUMS) for _ in range(rows)] for _ in range(tokens)]
    clear(b, totals)

    def step(first: Value, take: Callable[[Value, Value, ir.Type], Value]) -> None:
        place, x_place = times(b, first, BYTES[item]), times(b, first, BYTES[x_item])

        def weights(r: int) -> Value:
            return _weights(b, holds, take(matrix_rows[r], place, item))

        def number(t: int) -> Value:
            return take(x_rows[t], x_place, x_item)

        def add_product(t: int, r: int, part: Value, vector: Value) -> None:
            b.store(add(b, b.load(totals[t][r]), part, vector), totals[t][r])

        if rows < tokens or current().registers == 32:
            vectors = [weights(r) for r in range(rows)]
            for t in range(tokens):
                part = number(t)
                for r, vector in enumerate(vectors):
                    add_product(t, r, part, vector)
        else:  # sixteen registers hold the sums, the numbers of x and the weights of one row, and no more
            parts = [number(t) for t in range(tokens)]
            for r in range(rows):
                vector = weights(r)
                for t, part in enumerate(parts):
                    add_product(t, r, part, vector)
                fence(b, [b.load(totals[t][r]) for t in range(tokens)])

    whole = b.udiv(columns, ir.Constant(I64, lanes))
    with cgutils.for_range(b, whole) as loop:
        first = times(b, loop.index, lanes)
        step(first, lambda row, offset, item: load(b, row, offset, ir.VectorType(item, lanes)))
    done = times(b, whole, lanes)
    rest = b.sub(columns, done)
    with b.if_then(b.icmp_unsigned(">", rest, ir.Constant(I64, 0)), likely=False):
        step(done, lambda row, offset, item: _tail(b, row, offset, item, lanes, rest))
    for t, line in enumerate(totals):
        found = _sums(b, [b.load(place) for place in line])
        to = at(b, sums, 4 * t * GROUP, found.type)
        b.store(b.fadd(b.load(to, align=4), found), to, align=4)


@intrinsic(prefer_literal=True)
def dot_tile(
    context: object, holds: Any, rows: Any, tokens: Any, weights: Any, stride: Any, x: Any, x_stride: Any,
    columns: Any, sums: Any,
) -> tuple[Any, Callable[..., Any]]:  # fmt: skip
    """Add to fp32 sums [tokens, 32] the products of 1 or ROWS rows of a row-major matrix with 1 to TOKENS rows of x.

    `holds` is a literal. x is bf16 if `holds` is in PAIRED, else fp32. `stride` and `x_stride` are bytes per row. If
    `rows` is a literal too, no code is made for the other number of rows.
    """
    choices = (rows.literal_value,) if isinstance(rows, types.IntegerLiteral) else (1, ROWS)

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        _, rows, tokens, *rest = arguments
        for r, t in product(choices, range(1, TOKENS + 1)):
            with b.if_then(b.and_(equal(b, rows, r), equal(b, tokens, t))):
                _rows_by_tokens(b, holds.literal_value, r, t, rest)
        return context.get_dummy_value()

    return types.void(holds, *[types.int64] * 8), emit


@intrinsic(prefer_literal=True)
def widen_row(context: object, holds: Any, row: Any, columns: Any, out: Any) -> tuple[Any, Callable[..., Any]]:
    """Write `columns` weights of a row in bf16, and zeros up to a whole vector; `holds`, a literal, is in PAIRED."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        _, row, columns, out = arguments
        kind = holds.literal_value
        lanes, item = _lanes(kind), _ITEM[kind]

        def put(first: Value, raw: Value) -> None:
            b.store(_weights(b, kind, raw), at(b, out, times(b, first, BYTES[BFloat()]), PAIRS), align=2)

        whole = b.udiv(columns, ir.Constant(I64, lanes))
        with cgutils.for_range(b, whole) as loop:
            first = times(b, loop.index, lanes)
            put(first, load(b, row, times(b, first, BYTES[item]), ir.VectorType(item, lanes)))
        done = times(b, whole, lanes)
        rest = b.sub(columns, done)
        with b.if_then(b.icmp_unsigned(">", rest, ir.Constant(I64, 0)), likely=False):
            put(done, _tail(b, row, times(b, done, BYTES[item]), item, lanes, rest))
        return context.get_dummy_value()

    return types.void(holds, *[types.int64] * 3), emit
