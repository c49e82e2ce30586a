"""Write blocks of 4-bit weights as numbers, in vectors: of the flat layout in fp32, of the packed one as halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.blocks import FP4_CODES, VALUES
from qmix.kernels.cpu.packed_codes import PARTS, in_order, wide_columns
from qmix.kernels.cpu.vectors import (
    FLOAT,
    HALVES,
    I8,
    I16,
    I32,
    I64,
    LANES,
    NUMBERS,
    SUMS,
    Builder,
    Value,
    at,
    bf16_to_float,
    call,
    equal,
    fill,
    finite_to_bf16,
    float_to_fp16,
    load,
    spread,
    times,
)
from qmix.kernels.packing import BLOCK, PACK_ROWS


def _exact(kind: str) -> list[float]:
    """Return the 16 values by code in fp32, the largest 1."""
    values = np.array(VALUES[kind], np.float32)
    values = values / values[-1]
    return (values[np.argsort(FP4_CODES)] if kind == "fp4" else values).tolist()


def _look_up(b: Builder, kind: str, codes: Value) -> Value:
    """Return the values of LANES codes."""
    values = _exact(kind)
    if LANES == 16:
        return call(b, "llvm.x86.avx512.permvar.sf.512", SUMS, ir.Constant(SUMS, values), codes)
    if LANES == 8:
        low, high = (
            call(b, "llvm.x86.avx2.permps", SUMS, ir.Constant(SUMS, values[first : first + 8]), codes)
            for first in (0, 8)
        )
        return b.select(b.icmp_unsigned(">", codes, fill(NUMBERS, 7)), high, low)
    table = cgutils.global_constant(b.module, f"{kind}_exact", ir.Constant(ir.ArrayType(FLOAT, 16), values))
    table.linkage = "private"
    found = ir.Constant(SUMS, ir.Undefined)
    for lane in range(LANES):
        number = ir.Constant(I32, lane)
        value = b.load(b.gep(table, [ir.Constant(I32, 0), b.extract_element(codes, number)]))
        found = b.insert_element(found, value, number)
    return found


@intrinsic(prefer_literal=True)
def flat_block(context: object, kind: Any, codes: Any, absmax: Any, out: Any) -> tuple[Any, Callable[..., Any]]:
    """Write the 64 weights of a block of the flat layout, whose first weight has the high half of a byte, in fp32.

    `codes` is the address of its 32 bytes, `absmax` that of its bf16.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        _, codes, absmax, out = arguments
        bits = b.shl(b.zext(load(b, absmax, 0, I16), I32), ir.Constant(I32, 16))
        scale = b.bitcast(spread(b, bits), SUMS)
        few = ir.VectorType(I32, LANES // 2)
        order = [place for i in range(LANES // 2) for place in (i, LANES // 2 + i)]
        with cgutils.for_range(b, ir.Constant(I64, BLOCK // LANES)) as loop:
            raw = load(b, codes, times(b, loop.index, LANES // 2), ir.VectorType(I8, LANES // 2))
            pairs = b.zext(raw, few)
            high, low = b.lshr(pairs, fill(few, 4)), b.and_(pairs, fill(few, 15))
            values = _look_up(b, kind.literal_value, b.shuffle_vector(high, low, ir.Constant(NUMBERS, order)))
            b.store(b.fmul(values, scale), at(b, out, times(b, loop.index, 4 * LANES), SUMS), align=4)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 3), emit


@intrinsic(prefer_literal=True)
def half_block(
    context: object, kind: Any, codes: Any, absmax: Any, out: Any, out_stride: Any, fp16: Any
) -> tuple[Any, Callable[..., Any]]:
    """Write 64 columns of a group of 32 packed rows in half precision, as [64, 32] with `out_stride` bytes a column.

    A value is rounded to bf16 as the products have it, multiplied by its absmax, and rounded to fp16 or bf16.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        _, codes, absmax, out, out_stride, fp16 = arguments
        bits = [load(b, absmax, 2 * LANES * part, HALVES) for part in range(PARTS)]
        largest = fill(SUMS, 1 / VALUES[kind.literal_value][-1])
        scales = [b.fmul(bf16_to_float(b, vector), largest) for vector in bits]

        def write(fp16: bool) -> None:
            with cgutils.for_range(b, ir.Constant(I64, BLOCK // 2)) as pair:
                place = b.add(codes, times(b, pair.index, PACK_ROWS))
                both = wide_columns(b, kind.literal_value, place)
                for column in range(2):
                    index = b.add(times(b, pair.index, 2), ir.Constant(I64, column))
                    to = b.add(out, b.mul(index, out_stride))
                    vectors = in_order(b, [columns[column] for columns in both])
                    for part, (vector, scale) in enumerate(zip(vectors, scales, strict=True)):
                        half = (float_to_fp16 if fp16 else finite_to_bf16)(b, b.fmul(vector, scale))
                        b.store(half, at(b, to, 2 * LANES * part, HALVES), align=2)

        with b.if_else(equal(b, fp16, 0)) as (bf16, other):
            with bf16:
                write(False)
            with other:
                write(True)
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 5), emit
