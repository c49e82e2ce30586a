"""Attention of single query tokens over long KV caches, at about the speed of reading the cache.

A piece of work is a block of 512 positions of one token and key head, for all query heads that share it: scores,
their softmax relative to the block's own maximum, and the weighted sum of values, all in fp32. A second pass combines
the blocks of each query head in order. Blocks and results are the same for any number of threads.

The first call compiles the kernel, once for an installation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu import team
from qmix.kernels.cpu.compiled import compiled_address
from qmix.kernels.cpu.paths import current
from qmix.kernels.cpu.row_tile import BF16, BF16_WIDE, FP16, GROUP, PAIRED, ROWS, TOKENS, dot_tile
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
    float_at,
    fp16_to_float,
    load,
    next_piece,
    prefetch,
    put_half,
    spread,
    times,
)

BLOCK = 512  # positions in a piece of work
STRIP = 64  # positions whose values, 16 kB, stay in the L1 cache while all columns are summed
AHEAD = 4096  # bytes of keys and of values to prefetch
WIDTH = 4  # vectors of columns in a tile of values: with TOKENS heads, 24 or 12 sums


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Return the attention [B, G, R, D] of query [B, G, R, D] to key and value [B, G, S, D].

    All are bf16 or all fp16; D is a multiple of 16, and the rows of key and value are contiguous, one after another.
    `bias`, fp32 [B or 1, S] or None, is added to the scaled scores; a sequence without a visible position gets zeros.
    """
    positions = key.shape[2]
    bias_at = bias_step = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at, bias_step = bias.data_ptr(), 4 * positions if len(bias) > 1 else 0
    key_at, value_at, key_step, value_step = key.data_ptr(), value.data_ptr(), 2 * key.stride(0), 2 * value.stride(0)
    rows = [
        (key_at + b * key_step, value_at + b * value_step, positions, bias_at + b * bias_step)
        for b in range(len(query))
    ]
    return attend_rows(query, torch.tensor(rows), (2 * key.stride(1), 2 * value.stride(1)), positions, scaling)


def attend_rows(
    query: torch.Tensor, rows: torch.Tensor, group_strides: tuple[int, int], longest: int, scaling: float
) -> torch.Tensor:
    """Return the attention [T, G, R, D] of query [T, G, R, D], where each row has a cache of its own.

    `rows`, int64 [T, 4], has for each row: the address of its first key in the first group, that of its first value,
    its number of positions, at most `longest`, and the address of that many fp32 numbers to add to its scaled scores,
    or 0. Groups are `group_strides` bytes apart, and positions follow one another. A row's result does not depend on
    the other rows.
    """
    tokens, groups, heads, width = query.shape
    blocks = -(-longest // BLOCK)
    holds = FP16 if query.dtype == torch.float16 else BF16 if current().pairs else BF16_WIDE
    as_read = query.to(torch.bfloat16 if holds in PAIRED else torch.float32).contiguous()
    parts = torch.empty(tokens * groups, blocks, heads, width + 2)  # sums of values, their weights' sum, the maximum
    out = torch.empty(tokens, groups, heads, width, dtype=query.dtype)
    scale = torch.tensor([scaling], dtype=torch.float32)
    shape = tokens, groups, heads, width, blocks
    places = as_read.data_ptr(), rows.data_ptr(), parts.data_ptr(), scale.data_ptr()
    team.run(_blocks(holds), *shape, *places, *group_strides)
    team.run(_combined(), *shape, rows.data_ptr(), parts.data_ptr(), out.data_ptr(), holds == FP16)
    return out


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


def _exp(b: Builder, x: Value) -> Value:
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
def _softmax(
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
                weight = _exp(b, b.fsub(b.load(place, align=4), taken_off))
                b.store(weight, place, align=4)
                b.store(b.fadd(b.load(total), weight), total)
        b.store(_lanes_to_one(b, b.load(total), b.fadd), at(b, result, 0, FLOAT), align=4)
        b.store(maximum, at(b, result, 4, FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64, types.int64), emit


@intrinsic
def _fetch(context: object, address: Any) -> tuple[Any, Callable[..., Any]]:
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


@intrinsic
def _pointer(context: object, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Return an address as a pointer to fp32."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        return at(b, arguments[0], 0, FLOAT)

    return types.CPointer(types.float32)(types.int64), emit


@intrinsic
def _integers(context: object, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Return an address as a pointer to int64."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        return at(b, arguments[0], 0, ir.IntType(64))

    return types.CPointer(types.int64)(types.int64), emit


@cache
def _blocks(holds: int) -> int:
    query_item = 2 if holds in PAIRED else 4

    def kernel(block: Any) -> None:
        numbers = carray(block, 12)
        tokens, groups, heads, width, blocks = numbers[1:6]
        query, table, parts, scale_at, key_group, value_group = numbers[6:12]
        scale = float_at(scale_at)
        scores = np.empty((BLOCK // GROUP, heads, GROUP), np.float32)
        added = np.empty(BLOCK, np.float32)
        piece = next_piece(block)
        while piece < tokens * groups * blocks:
            pair, first = piece // blocks, piece % blocks * BLOCK
            token, g = pair // groups, pair % groups
            key, value, positions, bias = carray(_integers(table + token * 32), 4)
            if first >= positions:
                piece = next_piece(block)
                continue
            count = min(BLOCK, positions - first)
            used = (count + GROUP - 1) // GROUP
            keys = key + g * key_group + first * width * 2
            values = value + g * value_group + first * width * 2
            queries = query + pair * heads * width * query_item
            part = parts + piece * heads * (width + 2) * 4
            scores[:used] = 0
            added[:count] = 0
            added[count : used * GROUP] = -np.inf
            if bias:
                for i in range(count):
                    added[i] = float_at(bias + (first + i) * 4)
            position = 0
            while position < count:
                taken = ROWS if position + ROWS <= count else 1
                for line in range(0, taken * width * 2, 64):
                    _fetch(keys + position * width * 2 + AHEAD + line)
                for head in range(0, heads, TOKENS):
                    dot_tile(
                        holds,
                        taken,
                        min(TOKENS, heads - head),
                        keys + position * width * 2,
                        width * 2,
                        queries + head * width * query_item,
                        width * query_item,
                        width,
                        scores[position // GROUP, head, position % GROUP :].ctypes.data,
                    )
                position += taken
            carray(_pointer(part), heads * (width + 2))[:] = 0
            for head in range(heads):
                place = part + (head * (width + 2) + width) * 4
                _softmax(scores[0, head].ctypes.data, heads * GROUP * 4, used, scale, added.ctypes.data, place)
            for strip in range(0, count, STRIP):
                column = 0
                while column < width:
                    vectors = WIDTH if column + WIDTH * LANES <= width else 1
                    for group in range(strip, min(strip + STRIP, count), GROUP):
                        for head in range(0, heads, TOKENS):
                            value_tile(
                                holds,
                                min(TOKENS, heads - head),
                                vectors,
                                scores[group // GROUP, head].ctypes.data,
                                values + (group * width + column) * 2,
                                width * 2,
                                min(GROUP, count - group),
                                part + (head * (width + 2) + column) * 4,
                                (width + 2) * 4,
                            )
                    column += vectors * LANES
            piece = next_piece(block)

    return compiled_address(kernel)


@cache
def _combined() -> int:
    def kernel(block: Any) -> None:
        tokens, groups, heads, width, blocks, table, parts, out, fp16 = carray(block, 10)[1:]
        sums = np.empty(width, np.float32)
        row = next_piece(block)
        while row < tokens * groups * heads:
            positions = carray(_integers(table + row // (groups * heads) * 32), 4)[2]
            used = (positions + BLOCK - 1) // BLOCK
            of_pair = parts + row // heads * blocks * heads * (width + 2) * 4
            of_head = carray(_pointer(of_pair), (blocks, heads, width + 2))[:used, row % heads]
            maximum = of_head[:, width + 1].max()
            if maximum == -np.inf:
                maximum = np.float32(0)
            sums[:] = 0
            total = np.float32(0)
            for part in range(used):
                factor = np.exp(of_head[part, width + 1] - maximum)
                total += factor * of_head[part, width]
                for column in range(width):
                    sums[column] += factor * of_head[part, column]
            share = np.float32(1) / total if total != 0 else np.float32(0)
            for column in range(width):
                put_half(sums[column] * share, out + (row * width + column) * 2, fp16)
            row = next_piece(block)

    return compiled_address(kernel)
