"""Numbers, arrays and code at an address, for functions that Numba compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qmix.kernels.cpu.vectors import (
    FLOAT,
    HALVES,
    I16,
    I32,
    I64,
    VOID,
    Builder,
    Value,
    at,
    bf16_above,
    bf16_to_float,
    equal,
    float_to_fp16,
    fp16_to_float,
    load,
    times,
)


@intrinsic
def address_of(context: object, array: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the address of an array's first number.

    The caller must use the array itself after the last use of the address: Numba frees it after its own last use.
    """

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        data = context.make_array(array)(context, b, arguments[0]).data
        return b.ptrtoint(data, I64)

    return types.int64(array), emit


@intrinsic
def fill_floats(context: object, address: Any, count: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Set `count` fp32 to a value."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        address, count, value = arguments
        with cgutils.for_range(b, count) as loop:
            b.store(value, at(b, address, times(b, loop.index, 4), FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), emit


@intrinsic
def integers(context: object, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Return an address as a pointer to int64."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        return at(b, arguments[0], 0, ir.IntType(64))

    return types.CPointer(types.int64)(types.int64), emit


@intrinsic
def float_at(context: object, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the fp32 at an address."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        return load(b, arguments[0], 0, FLOAT)

    return types.float32(types.int64), emit


@intrinsic
def put_float(context: object, value: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
    """Store an fp32."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        value, address = arguments
        b.store(value, at(b, address, 0, FLOAT), align=4)
        return context.get_dummy_value()

    return types.void(types.float32, types.int64), emit


@intrinsic
def half_at(context: object, address: Any, fp16: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the bf16 at an address, or with `fp16` the fp16, as fp32."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        address, fp16 = arguments
        bits = load(b, address, 0, I16)
        first = ir.Constant(I32, 0)
        lanes = b.insert_element(ir.Constant(HALVES, None), bits, first)
        wide = (b.extract_element(widen(b, lanes), first) for widen in (bf16_to_float, fp16_to_float))
        return b.select(equal(b, fp16, 0), *wide)

    return types.float32(types.int64, types.int64), emit


@intrinsic
def put_half(context: object, value: Any, address: Any, fp16: Any) -> tuple[Any, Callable[..., Any]]:
    """Round an fp32 to fp16 or bf16, half to even, and store it."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        value, address, fp16 = arguments
        rounded = b.lshr(bf16_above(b, value), ir.Constant(I32, 16))
        is_nan = b.fcmp_unordered("uno", value, value)
        bf16 = b.select(is_nan, ir.Constant(I16, 0x7FC0), b.trunc(rounded, I16))
        half = float_to_fp16(b, value)
        b.store(b.select(equal(b, fp16, 0), bf16, half), at(b, address, 0, I16), align=2)
        return context.get_dummy_value()

    return types.void(types.float32, types.int64, types.int64), emit


@intrinsic
def next_piece(context: object, counter: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the int64 that `counter` points to, and increment it atomically."""

    def emit(context: Any, b: Builder, signature: Any, arguments: Sequence[Value]) -> Value:
        return b.atomic_rmw("add", arguments[0], ir.Constant(I64, 1), "monotonic")

    return types.int64(counter), emit


@intrinsic
def call_at(context: object, function: Any, *arguments: Any) -> tuple[Any, Callable[..., Any]]:
    """Call the code at an address with int64 arguments: a C function that returns nothing."""

    def emit(context: Any, b: Builder, signature: Any, values: Sequence[Value]) -> Value:
        function, packed = values
        numbers = [
            context.cast(b, value, kind, types.int64)
            for value, kind in zip(cgutils.unpack_tuple(b, packed), signature.args[1], strict=True)
        ]
        kind = ir.FunctionType(VOID, [I64] * len(numbers))
        b.call(b.inttoptr(function, kind.as_pointer()), numbers)
        return context.get_dummy_value()

    return types.void(types.int64, types.StarArgTuple.from_types(arguments)), emit
