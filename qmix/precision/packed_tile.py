"""A few rows of x times groups of 32 interleaved rows of the packed 4-bit layout, with every sum in a register.

The 32 bytes of two columns widen to 32 words. Their lowest five bits choose from a table of 32 whose halves are
equal, which leaves out the fifth bit: that is the low nibbles, and four bits further the high ones. Sixteen rows'
pairs of weights then lie side by side, as vdpbf16ps takes them. A block's sums are scaled by its absmax.

Numba caches what calls this under the calling file's date: after a change here, touch products.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.precision.blocks import FP4_CODES, VALUES
from qmix.precision.formats import BLOCK, PACK_ROWS
from qmix.precision.vectors import (
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
    times,
)

PACKED_TOKENS = 12  # rows of x in a tile, times two vectors of 16 rows: 24 registers of 32
# Groups side by side, so that few rows of x make as many independent sums: each waits for its own last addition.
PACKED_GROUPS = {1: 4, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2}
AHEAD = 1024  # bytes of each group's codes fetched ahead: one row of x takes 1.7 ms an expert; 2.4 at 3072, 1.8 at 6144


def _packed_by_tokens(b: Builder, kind: str, tokens: int, groups: int, arguments: Sequence[Value]) -> None:
    """The code of one four_bit_tile; `tokens` and `groups` are Python's."""
    codes, group_stride, absmax, stride, x, x_stride, blocks, sums = arguments
    table = ir.Constant(WORDS, _table(kind) * 2)
    totals = [[[cgutils.alloca_once(b, SUMS) for _ in range(2)] for _ in range(groups)] for _ in range(tokens)]
    with cgutils.for_range(b, blocks) as block:
        for lines in totals:
            clear(b, lines)
        block_codes = b.add(codes, times(b, block.index, BLOCK * PACK_ROWS // 2))
        block_x = b.add(x, times(b, block.index, 2 * BLOCK))
        with cgutils.for_range(b, ir.Constant(I64, BLOCK // 2)) as pair:
            place = b.add(block_codes, times(b, pair.index, PACK_ROWS))
            weights = [_weights(b, b.add(place, times(b, group_stride, group)), table) for group in range(groups)]
            for t, lines in enumerate(totals):
                both = load(b, b.add(block_x, times(b, pair.index, 4)), times(b, x_stride, t), I32)
                part = b.bitcast(_spread(b, both), PAIRS)
                for line, vectors in zip(lines, weights, strict=True):
                    for total, vector in zip(line, vectors, strict=True):
                        b.store(add_pairs(b, b.load(total), part, vector), total)
        _add_scaled(b, kind, totals, b.add(absmax, b.mul(block.index, stride)), stride, sums)


def _weights(b: Builder, place: Value, table: Value) -> list[Value]:
    """Two columns of 32 rows as pairs, sixteen rows a vector."""
    prefetch(b, at(b, place, AHEAD, I8))
    words = b.zext(load(b, place, 0, ir.VectorType(I8, PACK_ROWS)), WORDS)
    return [
        b.bitcast(call(b, "llvm.x86.avx512.permvar.hi.512", WORDS, table, index), PAIRS)
        for index in (words, b.lshr(words, fill(WORDS, 4)))
    ]


def _add_scaled(
    b: Builder, kind: str, totals: list[list[list[Value]]], absmax: Value, stride: Value, sums: Value
) -> None:
    """Adds a block's sums, times its absmax, to those of the tile."""
    groups = len(totals[0])
    prefetch(b, at(b, absmax, times(b, stride, 3), I8))
    for part in range(2 * groups):
        bits = load(b, absmax, 2 * LANES * part, ir.VectorType(I16, LANES))
        scale = b.fmul(bf16_to_float(b, bits), fill(SUMS, 1 / VALUES[kind][-1]))
        for t, lines in enumerate(totals):
            to = at(b, sums, 4 * LANES * (2 * groups * t + part), SUMS)
            total = b.load(lines[part // 2][part % 2])
            b.store(add_wide(b, b.load(to, align=4), total, scale), to, align=4)


def _table(kind: str) -> list[int]:
    """The 16 values by code as bf16 bit patterns: nf4's rounded, fp4's (up to 12) exact."""
    values = np.array(VALUES[kind], np.float32)
    bits = (values[np.argsort(FP4_CODES)] if kind == "fp4" else values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).tolist()


def _spread(b: Builder, number: Value) -> Value:
    """A 32-bit number in all sixteen lanes."""
    one = b.insert_element(ir.Constant(NUMBERS, ir.Undefined), number, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, fill(NUMBERS, 0))


@intrinsic(prefer_literal=True)
def four_bit_tile(
    context: object, kind: Any, tokens: Any, groups: Any, codes: Any, group_stride: Any, absmax: Any, stride: Any,
    x: Any, x_stride: Any, blocks: Any, sums: Any,
) -> tuple[Any, Callable[..., Any]]:  # fmt: skip
    """Adds, to fp32 sums [tokens, groups * 32], the products of groups of 32 interleaved rows of the packed layout with
    1 to 12 rows of x in bf16, over `blocks` blocks of 64 columns. `kind`, "nf4" or "fp4", is a literal; strides are
    bytes a row, and a group. There is one group, or as many as PACKED_GROUPS has for so few rows of x.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        _, tokens, groups, *rest = arguments
        for t in range(1, PACKED_TOKENS + 1):
            for g in {1, PACKED_GROUPS.get(t, 1)}:
                with b.if_then(b.and_(equal(b, tokens, t), equal(b, groups, g))):
                    _packed_by_tokens(b, kind.literal_value, t, g, rest)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 10), emit
