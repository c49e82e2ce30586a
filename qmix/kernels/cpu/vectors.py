"""Vector operations in LLVM code, for the tiles of the products.

A vector of sums fills one register of the path in use (`paths`); only `add_pairs` needs AVX512-BF16. Addresses are
int64, in bytes, and are not checked. Functions with a builder `b` emit code; the intrinsics are called from functions
that Numba compiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from qmix.kernels.cpu.paths import current

LANES = current().lanes  # sums in a vector

Builder = Any  # llvmlite's IRBuilder and values, which Numba passes untyped
Value = Any


class BFloat(ir.Type):
    """LLVM's bf16, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT, VOID = ir.HalfType(), ir.FloatType(), ir.VoidType()
SUMS = ir.VectorType(FLOAT, LANES)
WORDS, PAIRS = (ir.VectorType(item, 2 * LANES) for item in (I16, BFloat()))
NUMBERS, HALVES = ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
BYTES = {I8: 1, I16: 2, BFloat(): 2, FLOAT: 4}


def fill(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def at(b: Builder, address: Value, offset: Value | int, item: ir.Type) -> Value:
    """Return a pointer to an item at `address` + `offset` bytes."""
    offset = ir.Constant(I64, offset) if isinstance(offset, int) else offset
    return b.inttoptr(b.add(address, offset), item.as_pointer())


def load(b: Builder, address: Value, offset: Value | int, item: ir.Type) -> Value:
    return b.load(at(b, address, offset, item), align=1)


def times(b: Builder, value: Value, factor: int) -> Value:
    return b.mul(value, ir.Constant(I64, factor))


def call(b: Builder, name: str, result: ir.Type, *arguments: Value) -> Value:
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, function, name), arguments)


def prefetch(b: Builder, pointer: Value) -> None:
    """Prefetch a cache line into L1, to be read."""
    call(b, "llvm.prefetch.p0", VOID, pointer, *(ir.Constant(I32, flag) for flag in (0, 3, 1)))


def fence(b: Builder, sums: Sequence[Value]) -> None:
    """Keep LLVM from loading across this point, and from computing `sums` after it.

    It loads early and adds late, and then has no registers left for other sums.
    """
    kind = ir.FunctionType(VOID, [value.type for value in sums])
    b.asm(kind, "", ",".join([*["x"] * len(sums), "~{memory}"]), sums, True)


def add_pairs(b: Builder, sums: Value, x: Value, weights: Value) -> Value:
    return call(b, "llvm.x86.avx512bf16.dpbf16ps.512", SUMS, sums, x, weights)


def add_wide(b: Builder, sums: Value, x: Value, weights: Value) -> Value:
    return b.fadd(sums, b.fmul(x, weights, flags=("contract",)), flags=("contract",))


def bf16_to_float(b: Builder, bits: Value) -> Value:
    """Return LANES bf16 bit patterns as fp32."""
    return b.bitcast(b.shl(b.zext(bits, NUMBERS), fill(NUMBERS, 16)), SUMS)


def fp16_to_float(b: Builder, bits: Value) -> Value:
    """Return LANES fp16 bit patterns as fp32.

    Where the processor has no instruction for it, LLVM would call a library function that Numba's linker does not find.
    There exponent and fraction are shifted into place and multiplied by 2**112, which is exact for subnormals too;
    infinities and NaNs get fp32's largest exponent.
    """
    if current().name != "portable":
        return b.fpext(b.bitcast(bits, ir.VectorType(HALF, LANES)), SUMS)
    wide = b.zext(bits, NUMBERS)
    magnitude = b.shl(b.and_(wide, fill(NUMBERS, 0x7FFF)), fill(NUMBERS, 13))
    finite = b.bitcast(b.fmul(b.bitcast(magnitude, SUMS), fill(SUMS, 2.0**112)), NUMBERS)
    special = b.icmp_unsigned(">=", magnitude, fill(NUMBERS, 0x1F << 23))
    exact = b.select(special, b.or_(magnitude, fill(NUMBERS, 0x7F800000)), finite)
    sign = b.shl(b.and_(wide, fill(NUMBERS, 0x8000)), fill(NUMBERS, 16))
    return b.bitcast(b.or_(exact, sign), SUMS)


def float_to_fp16(b: Builder, value: Value) -> Value:
    """Return one fp32, or LANES, as fp16 bit patterns, rounded half to even; by integers without an instruction."""
    vector = isinstance(value.type, ir.VectorType)
    if current().name != "portable":
        return b.bitcast(b.fptrunc(value, ir.VectorType(HALF, LANES) if vector else HALF), HALVES if vector else I16)

    def number(value: int) -> ir.Constant:
        return fill(NUMBERS, value) if vector else ir.Constant(I32, value)

    integers = NUMBERS if vector else I32
    bits = b.bitcast(value, integers)
    magnitude = b.and_(bits, number(0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, number(13)), number(1))
    normal = b.lshr(b.add(b.add(magnitude, number(((15 - 127) << 23) + 0xFFF)), odd), number(13))
    # 0.5 and a subnormal fp16 both have 2**-24 as their last place: adding 0.5 rounds to it
    half = fill(SUMS, 0.5) if vector else ir.Constant(FLOAT, 0.5)
    subnormal = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, value.type), half), integers), number(0x3F000000))
    small = b.icmp_unsigned("<", magnitude, number(113 << 23))
    large = b.icmp_unsigned(">=", magnitude, number(0x477FF000))  # 65520, halfway from 65504 to the number after it
    is_nan = b.fcmp_unordered("uno", value, value)
    finite = b.select(small, subnormal, b.select(large, number(0x7C00), normal))
    sign = b.lshr(b.and_(bits, number(0x80000000)), number(16))
    return b.trunc(b.or_(b.select(is_nan, number(0x7E00), finite), sign), HALVES if vector else I16)


def bf16_above(b: Builder, value: Value) -> Value:
    """Return the bits of one fp32, or LANES, whose upper 16 are its bf16, rounded half to even; not for NaN."""
    vector = isinstance(value.type, ir.VectorType)

    def number(value: int) -> ir.Constant:
        return fill(NUMBERS, value) if vector else ir.Constant(I32, value)

    bits = b.bitcast(value, NUMBERS if vector else I32)
    odd = b.and_(b.lshr(bits, number(16)), number(1))
    return b.add(bits, b.add(odd, number(0x7FFF)))


def finite_to_bf16(b: Builder, value: Value) -> Value:
    """Return LANES finite fp32 as bf16 bit patterns, rounded half to even."""
    return b.trunc(b.lshr(bf16_above(b, value), fill(NUMBERS, 16)), HALVES)


def spread(b: Builder, number: Value) -> Value:
    """Return a 32-bit integer or an fp32 in all lanes."""
    one = b.insert_element(ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined), number, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, fill(NUMBERS, 0))


def clear(b: Builder, lines: Iterable[Iterable[Value]]) -> None:
    """Set every vector of sums to zero."""
    for place in chain.from_iterable(lines):
        b.store(fill(SUMS, 0.0), place)


def equal(b: Builder, value: Value, number: int) -> Value:
    return b.icmp_unsigned("==", value, ir.Constant(value.type, number))
