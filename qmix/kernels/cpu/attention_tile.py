"""Pieces of the attention kernel in LLVM: the softmax of a block of scores, and weighted sums of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.row_tile import FP16, GROUP, TOKENS
from qmix.kernels.cpu.vectors import (
    FLOAT,
    I8,
    I16,
    I32,
    LANES,
    NUMBERS,
    SUMS,
    Builder,
    Value,
    add_wide,
    at,
    bf16_to_float,
    call,
    clear,
    equal,
    fill,
    fp16_to_float,
    load,
    prefetch,
    spread,
    times,
)

AHEAD = 4096  # bytes of keys and of values to prefetch
WIDTH = 4  # vectors of columns in a tile of values: with TOKENS heads, 24 or 12 sums


def _lanes_to_one(b: Builder, lanes: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """Return all lanes combined into one number, halves with halves."""
    count = LANES
    while count > 1:
        count //= 2
        low, high = (ir.Constant(ir.VectorType(I32, count), [*range(k, k + count)]) for k in (0, count))
        lanes = combine(b.shuffle_vector(lanes, lanes, low), b.shuffle_vector(lanes, lanes, high))
    return b.extract_element(lanes, ir.Constant(I32, 0))


def _larger(b: Builder, left: Value, right: Value) -> Value:
    return b.select(b.fcmp_ordered(">", left, right), left, right)


def exp_of_negative(b: Builder, x: Value) -> Value:
    """Return e**x for LANES numbers up to 0, with a relative error of 2e-7; 0 below 2**-126, NaN for NaN.

    It is 2**n * 2**f, with f from -0.5 to 0.5 and the Taylor series of 2**f.
    """
    x = b.fmul(x, fill(SUMS, math.log2(math.e)))
    n = call(b, f"llvm.rint.v{LANES}f32", SUMS, x)
    f = b.fsub(x, n)
    power = fill(SUMS, 0.0)
    for k in range(7, -1, -1):
        power = add_wide(b, fill(SUMS, math.log(2) ** k / math.factorial(k)), power, f)
    small = b.fcmp_ordered("<", x, fill(SUMS, -126.0))
    exponent = b.fptosi(b.select(small, fill(SUMS, 0.0), n), NUMBERS)
    two_to_n = b.bitcast(b.shl(b.add(exponent, fill(NUMBERS, 127)), fill(NUMBERS, 23)), SUMS)
    return b.select(small, fill(SUMS, 0.0), b.fmul(power, two_to_n))


@intrinsic
def softmax(
    context: object, scores: Any, step: Any, groups: Any, scale: Any, bias: Any, result: Any
) -> tuple[Any, Callable[..., Any]]:
    """Replace the scores of one head by e**(score * scale + bias - maximum).

    Their sum and the maximum go to `result`. `scores` and `bias` are addresses of `groups` times 32 fp32 each; groups
    of scores are `step` bytes apart.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        scores, step, groups, scale, bias, result = arguments
        most, total = cgutils.alloca_once(b, SUMS), cgutils.alloca_once(b, SUMS)
        b.store(fill(SUMS, -math.inf), most)
        b.store(fill(SUMS, 0.0), total)
        factor = spread(b, scale)
        with cgutils.for_range(b, groups) as loop:
            for half in range(GROUP // LANES):
                place = at(b, b.add(scores, b.mul(loop.index, step)), 4 * LANES * half, SUMS)
                added = load(b, b.add(bias, times(b, loop.index, 4 * GROUP)), 4 * LANES * half, SUMS)
                score = b.fadd(b.fmul(b.load(place, align=4), factor), added)
                b.store(score, place, align=4)
                b.store(_larger(b, score, b.load(most)), most)
        maximum = _lanes_to_one(b, b.load(most), lambda x, y: _larger(b, x, y))
        hidden = b.fcmp_ordered("==", maximum, ir.Constant(FLOAT, -math.inf))
        taken_off = spread(b, b.select(hidden, ir.Constant(FLOAT, 0.0), maximum))
        with cgutils.for_range(b, groups) as loop:
            for half in range(GROUP // LANES):
                place = at(b, b.add(scores, b.mul(loop.index, step)), 4 * LANES * half, SUMS)
                weight = exp_of_negative(b, b.fsub(b.load(place, align=4), taken_off))
                b.store(weight, place, align=4)
                b.store(b.fadd(b.load(total), weight), total)
        b.store(_lanes_to_one(b, b.load(total), b.fadd), at(b, result, 0, FLOAT), align=4)
        b.store(maximum, at(b, result, 4, FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64, types.int64), emit


@intrinsic
def fetch(context: object, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Prefetch the 64 bytes at an address into L1, to be read."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        prefetch(b, at(b, arguments[0], 0, I8))
        return context.get_dummy_value()

    return types.void(types.int64), emit


def _heads_by_vectors(b: Builder, holds: int, heads: int, vectors: int, arguments: Sequence[Value]) -> None:
    """Emit the code of one value_tile; `heads` and `vectors` are Python integers."""
    weights, values, stride, positions, sums, sums_stride = arguments
    totals = [[cgutils.alloca_once(b, SUMS) for _ in range(vectors)] for _ in range(heads)]
    clear(b, totals)
    with cgutils.for_range(b, positions) as loop:
        row = b.add(values, b.mul(loop.index, stride))
        for offset in range(0, 2 * LANES * vectors, 64):
            prefetch(b, at(b, row, AHEAD + offset, I8))
        raw = [load(b, row, 2 * LANES * v, ir.VectorType(I16, LANES)) for v in range(vectors)]
        wide = [fp16_to_float(b, bits) if holds == FP16 else bf16_to_float(b, bits) for bits in raw]
        for head, line in enumerate(totals):
            weight = spread(b, load(b, b.add(weights, times(b, loop.index, 4)), 4 * GROUP * head, FLOAT))
            for total, vector in zip(line, wide, strict=True):
                b.store(add_wide(b, b.load(total), weight, vector), total)
    for head, line in enumerate(totals):
        for v, total in enumerate(line):
            to = at(b, b.add(sums, times(b, sums_stride, head)), 4 * LANES * v, SUMS)
            b.store(b.fadd(b.load(to, align=4), b.load(total)), to, align=4)


@intrinsic(prefer_literal=True)
def value_tile(
    context: object, holds: Any, heads: Any, vectors: Any, weights: Any, values: Any, stride: Any, positions: Any,
    sums: Any, sums_stride: Any,
) -> tuple[Any, Callable[..., Any]]:  # fmt: skip
    """Add the values of up to 32 positions, times each head's weights, to fp32 sums.

    There are 1 to TOKENS heads and 1 or WIDTH vectors of columns. Weights are fp32 [heads, 32]. `holds` is a literal;
    strides are bytes per row.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        _, heads, vectors, *rest = arguments
        for h in range(1, TOKENS + 1):
            for v in (1, WIDTH):
                with b.if_then(b.and_(equal(b, heads, h), equal(b, vectors, v))):
                    _heads_by_vectors(b, holds.literal_value, h, v, rest)
        return context.get_dummy_value()

    return types.void(holds, *[types.int64] * 8), emit
