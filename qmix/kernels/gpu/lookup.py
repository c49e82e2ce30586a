"""The values of nf4 and fp4, and PTX that looks eight of them up without memory.

The table lies in the lanes of a warp, one value in each, twice over. A value is fetched by a shuffle whose source lane
is the code itself: the shuffle takes five bits of it and ignores the rest, so nothing is masked.

On an H100 `eight` takes 3.2 instructions a weight where byte permutations (prmt) of a table in registers take 5.0.
"""

from __future__ import annotations

import struct
from functools import cache

from qmix.kernels.packing import NF4_VALUES

VALUES = {
    "nf4": NF4_VALUES,
    "fp4": tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)),
}  # fmt: skip
OPERANDS = ",".join(["=&r"] * 8 + ["r"] * 2)  # of `eight`
WIDE_OPERANDS = ",".join(["=&r"] * 8 + ["r"])  # of `eight_wide`


def bits(value: float, dtype: str) -> int:
    """Return the bits of a number rounded to "bf16", "fp16" or "fp32"."""
    if dtype == "fp16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    wide = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return wide if dtype == "fp32" else (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16


@cache
def eight(kind: str, dtype: str) -> str:
    """Return PTX for codes of `kind`: two words to eight registers of two numbers of `dtype`, bf16 or fp16.

    Register i has nibble i of both words. All 32 lanes must take part, so no branch may stand around it.
    """
    text = _lane_table([bits(value, dtype) << 16 for value in VALUES[kind]]) + ".reg .u32 v;"
    for nibble in range(8):
        for word, found in ((8, "a"), (9, "b")):
            text += _shuffled(f"${word}", nibble, found)
        text += f"prmt.b32 ${nibble}, a, b, 0x7632;"
    return "{" + text + "}"


@cache
def eight_wide(kind: str) -> str:
    """Return PTX for codes of `kind`: one word to eight registers, each with a nibble's value in fp32."""
    text = _lane_table([bits(value, "fp32") for value in VALUES[kind]]) + ".reg .u32 v;"
    return "{" + text + "".join(_shuffled("$8", nibble, f"${nibble}") for nibble in range(8)) + "}"


def _shuffled(word: str, nibble: int, to: str) -> str:
    """PTX: the table's value for a nibble of a word."""
    if not nibble:
        return f"shfl.sync.idx.b32 {to}, t, {word}, 0x1f, 0xffffffff;"
    return f"shr.u32 v, {word}, {4 * nibble}; shfl.sync.idx.b32 {to}, t, v, 0x1f, 0xffffffff;"


def _lane_table(numbers: list[int]) -> str:
    """PTX: register t of a lane = number lane % 16 of 32 bits, put together from constants byte by byte."""
    text = ".reg .u32 l, s, a, b, t; .reg .pred p;"
    text += "mov.u32 l, %laneid; and.b32 s, l, 7; and.b32 a, l, 8; setp.ne.u32 p, a, 0; mov.u32 t, 0;"
    for shift in range(0, 32, 8):
        plane = [(number >> shift) & 255 for number in numbers]
        if not any(plane):
            continue
        text += f".reg .u32 c{shift}, d{shift}, e{shift}, f{shift};"
        for i, name in enumerate("cdef"):
            word = sum(plane[4 * i + j] << (8 * j) for j in range(4))
            text += f"mov.u32 {name}{shift}, 0x{word:08x};"
        text += f"prmt.b32 a, c{shift}, d{shift}, s; prmt.b32 b, e{shift}, f{shift}, s; selp.b32 a, b, a, p;"
        text += f"and.b32 a, a, 255; shl.b32 a, a, {shift}; or.b32 t, t, a;"
    return text
