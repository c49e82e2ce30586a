"""Pieces of the experts' kernel in LLVM: the gated product in vectors, rounded as torch rounds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.attention_tile import exp_of_negative
from qmix.kernels.cpu.vectors import (
    LANES,
    NUMBERS,
    SUMS,
    Builder,
    Value,
    at,
    bf16_above,
    call,
    equal,
    fill,
    float_to_fp16,
    fp16_to_float,
    load,
    times,
)


def _to_bf16(b: Builder, value: Value) -> Value:
    """Return LANES fp32 rounded to bf16, half to even, as fp32."""
    rounded = b.and_(bf16_above(b, value), fill(NUMBERS, 0xFFFF0000))
    is_nan = b.fcmp_unordered("uno", value, value)
    return b.bitcast(b.select(is_nan, fill(NUMBERS, 0x7FC00000), rounded), SUMS)


def _to_fp16(b: Builder, value: Value) -> Value:
    """Return LANES fp32 rounded to fp16, half to even, as fp32."""
    return fp16_to_float(b, float_to_fp16(b, value))


def _silu(b: Builder, x: Value) -> Value:
    """Return x / (1 + e**-x), with e**-x from e**-|x|, which cannot overflow."""
    negative = b.fcmp_ordered("<", x, fill(SUMS, 0.0))
    small = exp_of_negative(b, b.fneg(call(b, f"llvm.fabs.v{LANES}f32", SUMS, x)))
    return b.fdiv(b.select(negative, b.fmul(x, small), x), b.fadd(fill(SUMS, 1.0), small))


@intrinsic
def gated_product(
    context: object, gate: Any, up: Any, numbers: Any, fp16: Any, narrow: Any
) -> tuple[Any, Callable[..., Any]]:
    """Replace fp32 `gate` by silu(gate) * up, where every step is rounded to bf16, or to fp16 with `fp16`.

    With `narrow` the result is rounded to bf16 besides. `gate` and `up` are addresses of `numbers` numbers, which are
    a multiple of 32.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        gate, up, numbers, fp16, narrow = arguments

        def step(round_: Callable[[Builder, Value], Value], offset: Value) -> None:
            place, other = at(b, gate, offset, SUMS), load(b, up, offset, SUMS)
            activated = round_(b, _silu(b, round_(b, b.load(place, align=4))))
            product = round_(b, b.fmul(activated, round_(b, other)))
            b.store(b.select(equal(b, narrow, 0), product, _to_bf16(b, product)), place, align=4)

        with cgutils.for_range(b, b.udiv(numbers, ir.Constant(numbers.type, LANES))) as loop:
            offset = times(b, loop.index, 4 * LANES)
            with b.if_else(equal(b, fp16, 0)) as (bf16, half):
                with bf16:
                    step(_to_bf16, offset)
                with half:
                    step(_to_fp16, offset)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), emit
