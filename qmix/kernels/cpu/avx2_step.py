"""One step of a packed 4-bit product in AVX2 instructions: 64 bytes of codes, for one row of x or for two.

Sixteen registers hold eight vectors of sums, two tables, two masks and four operands, and no more. LLVM, left to order
the same instructions, keeps too much at once and spills sums. It also turns the mask for odd columns into a blend,
which runs on the ports of the shuffles, the busiest ones.

A step takes two pairs of columns. For one row of x it takes both halves of a group (32 rows), for two rows one half:

half of a byte   -> 16 codes of each column    and; a shift before it for high halves
two look-ups     -> low and high bytes of bf16 two byte shuffles, then two unpacks
even column      -> shift left by 16           sums of even columns
odd column       -> and with 0xFFFF0000        sums of odd columns
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import binding, ir

from qmix.kernels.cpu.vectors import I64, SUMS, Builder, Value

PAIRS_IN_STEP = 2
_PAIR_BYTES = 32  # of codes
_TEMPORARIES = 4  # operands of the code, beside the sums
_CONSTANTS = 4

binding.initialize_native_asmparser()


def add_step(
    b: Builder,
    sums: Sequence[Value],
    constants: Sequence[Value],
    codes: Value,
    rows: Sequence[Value],
    halves: tuple[int, ...],
) -> list[Value]:
    """Return the eight vectors of sums after a step, in the order [row of x][half][vector][even, odd column].

    `constants` are vectors of 256 bits: the low bytes of the table, its high bytes, 15 in every byte, and 0xFFFF0000 in
    every 32 bits. `codes` and `rows`, the numbers of x in fp32, are addresses.
    """
    text = _code(len(sums), len(rows), halves)
    outputs = [*["=x"] * len(sums), *["=&x"] * _TEMPORARIES]
    inputs = [*map(str, range(len(sums))), *["x"] * len(constants), *["r"] * (1 + len(rows))]
    result = ir.LiteralStructType([SUMS] * len(outputs))
    arguments = [*sums, *constants, codes, *rows]
    function = ir.FunctionType(result, [value.type for value in arguments])
    found = b.asm(function, text, ",".join((*outputs, *inputs)), arguments, False)
    return [b.extract_value(found, index) for index in range(len(sums))]


def _code(sums: int, rows: int, halves: tuple[int, ...]) -> str:
    """Return the code of a step; operands are numbered: sums, temporaries, the sums again, constants, addresses."""
    first, second, third, number = (f"${sums + index}" for index in range(_TEMPORARIES))
    low, high, nibble, upper, codes, *x = (
        f"${2 * sums + _TEMPORARIES + index}" for index in range(_CONSTANTS + 1 + rows)
    )
    lines = []
    for pair in range(PAIRS_IN_STEP):
        for place, half in enumerate(halves):
            offset = pair * _PAIR_BYTES
            if half:
                lines += [f"vmovdqu {offset}({codes}), {first}", f"vpsrlw $$4, {first}, {first}"]
                lines += [f"vpand {first}, {nibble}, {first}"]
            else:
                lines += [f"vpand {offset}({codes}), {nibble}, {first}"]
            lines += [f"vpshufb {first}, {low}, {second}", f"vpshufb {first}, {high}, {first}"]
            lines += [f"vpunpcklbw {first}, {second}, {third}", f"vpunpckhbw {first}, {second}, {first}"]
            for column in range(2):
                for vector, words in enumerate((third, first)):
                    weights = words if column else second
                    lines += [f"vpand {words}, {upper}, {words}" if column else f"vpslld $$16, {words}, {second}"]
                    for t, row in enumerate(x):
                        if rows > 1 or vector == 0:
                            lines += [f"vbroadcastss {8 * pair + 4 * column}({row}), {number}"]
                        total = ((t * len(halves) + place) * 2 + vector) * 2 + column
                        lines += [f"vfmadd231ps {weights}, {number}, ${total}"]
    return "\n".join(lines)


def constant(b: Builder, numbers: Sequence[int], bits: int) -> Value:
    """Return a vector of 256 bits from numbers of so many bits each."""
    vector = ir.VectorType(ir.IntType(bits), 256 // bits)
    return b.bitcast(ir.Constant(vector, list(numbers) * (vector.count // len(numbers))), ir.VectorType(I64, 4))
