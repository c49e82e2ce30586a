"""Tiles of a packed 4-bit product: a few rows of x times groups of 32 interleaved rows, every sum in a register.

Weights are looked up in codes (`packed_codes`); a block's sums are scaled by its absmax. For many rows of x a block is
looked up once, into the L1 cache (`widen_block`), and used for all (`block_tile`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.blocks import VALUES
from qmix.kernels.cpu.packed_codes import PARTS, column_pairs, in_order, wide_columns
from qmix.kernels.cpu.paths import current
from qmix.kernels.cpu.vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    I64,
    LANES,
    PAIRS,
    SUMS,
    Builder,
    Value,
    add_pairs,
    add_wide,
    at,
    bf16_to_float,
    clear,
    equal,
    fill,
    load,
    prefetch,
    spread,
    times,
)
from qmix.kernels.packing import BLOCK, PACK_ROWS

# Rows of x in a tile, times the vectors of a group: 24 registers of 32, or 8 of 16.
PACKED_TOKENS = 12 if current().registers == 32 else max(1, 8 // PARTS)
# Groups side by side, so that few rows of x still make many independent sums: each waits for its own last addition.
# Sixteen registers hold one group's sums and its look-up tables; two groups spilled.
PACKED_GROUPS = {1: 4, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2} if current().registers == 32 else {}
BLOCK_TOKENS = 12 if current().registers == 32 else max(1, 12 // PARTS)  # rows of x in a tile over widened weights
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
    weights = [[b.bitcast(words, PAIRS) for words in column_pairs(b, kind, place)] for place in places]
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
                columns = [(words,) for words in column_pairs(b, kind.literal_value, place)]
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
