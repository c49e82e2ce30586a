"""One block of weights in Numba: its largest magnitude, its weights' codes, and what these stand for.

A block of weights shares one scale, its largest magnitude ("absmax"). Its kind, nf4 or fp4, has sixteen
values between -1 and 1; a weight x takes the code of the one nearest to x / absmax. The rank of that value is
the number of midpoints between neighbours that lie strictly below. With absmax 2.0 and the midpoints of NF4:

    x               -2.0    0.0    0.5    1.0
    x / absmax      -1.0    0.0   0.25    0.5
    midpoints below    0      7     10     12     -0.85 ... -0.05 0.04 0.12 0.20 0.29 0.39 0.502 0.64 0.86

The largest magnitude is not the best scale: a little less costs the few weights beyond it, which take the end codes,
and serves all others; a little more may let many fall nearer to a value. `chosen_scale` tries a few (docs/fidelity.md).

Counting beats searching: fifteen comparisons and no branch run in vector lanes on any machine LLVM knows. The
largest magnitude is found among bit patterns: without the sign they order as integers, infinities and NaNs
above all finite numbers, so one maximum yields the absmax and tells whether every weight is finite.

Kernels compose these functions, which Numba inlines: a call would count references to its arrays, which costs more
than a block.

Source of the arithmetic: bitsandbytes 0.50, backends/default/ops.py and functional.py.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from qmix.kernels.packing import BLOCK

Array = npt.NDArray[Any]
Midpoints = tuple[np.float32, ...]
Steps = tuple[tuple[np.float32, np.uint32], ...]

# The values of each kind, ascending, to be divided by the last.
VALUES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0, 0.0625, 2, 3, 4, 6, 8, 12),
}  # fmt: skip
# By rank (NF4 codes are ranks). In this order, that of bitsandbytes' sort, 0.0 gets code 0 and 0.001 the zero 8.
FP4_CODES = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8)

TINY = np.float32(1e-38)  # bitsandbytes divides by no absmax below this
SUMS = 32  # of squared errors, side by side
CLIP = (1, 0.97, 1.03, 0.94, 1.06, 0.91, 1.09, 0.88, 1.12)  # of absmax; a block takes the first of equals


@cache
def midpoints_of(kind: str) -> Midpoints:
    """Fifteen, ascending; a tuple so that LLVM unrolls the loop over them."""
    if kind not in VALUES:
        raise ValueError(f"kind must be 'nf4' or 'fp4', not {kind!r}")
    values = np.array(VALUES[kind], np.float32)
    values /= values[-1]
    return tuple((values[:-1] + values[1:]) / np.float32(2))


@cache
def steps_of(kind: str) -> Steps:
    """Each midpoint, and what its passing adds to the bit pattern of the value that a weight takes: see `nearest`."""
    values = np.array(VALUES[kind], np.float32)
    bits = (values / values[-1]).view(np.uint32)
    return tuple(zip(midpoints_of(kind), bits[1:] - bits[:-1], strict=True))


@cache
def ratios_of(clip: bool) -> Array | None:
    """CLIP as kernels take it. With None they are compiled without a choice of scales, and as fast as without one."""
    return np.array(CLIP, np.float32) if clip else None


# Numba inlines the helpers: a call would count references to its arrays, which costs more than a block.


@njit(inline="always")
def widen(row: Array, j: int) -> np.uint32:
    """Weight j as the bit pattern of a float32."""
    shift = 16 if row.itemsize == 2 else 0  # apart: inside the call below, Numba on Python 3.10 cannot inline it
    return np.uint32(np.uint32(row[j]) << shift)


@njit(inline="always")
def largest_magnitude(row: Array, count: int) -> np.float32:
    """The largest magnitude of `count` weights; NaN or infinite if one of them is."""
    top = np.uint32(0)
    for j in range(count):
        top = max(top, np.uint32(widen(row, j) & 0x7FFFFFFF))
    return np.uint32(top).view(np.float32)


@njit(inline="always")
def narrowed(value: np.float32, half: bool) -> np.uint32:
    """The bit pattern of a finite number; with `half` of the bf16 nearest to it, halves to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint32(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16) if half else bits


@njit(inline="always")
def to_bf16(value: np.float32) -> np.float32:
    """A finite number rounded to bf16, halves to even."""
    return np.uint32(narrowed(value, True) << 16).view(np.float32)


@njit(inline="always")
def nearest(scaled: np.float32, steps: Steps) -> np.float32:
    """The value whose code a weight, divided by its block's scale, takes.

    Bit patterns are summed, not numbers: the sum is exact, and runs in vector lanes as a choice among values does not.
    """
    bits = np.uint32(0xBF800000)  # -1, which lies below all midpoints
    for midpoint, step in steps:
        bits += step * np.uint32(scaled > midpoint)
    return np.uint32(bits).view(np.float32)


@njit(inline="always")
def _squared_error(row: Array, scale: np.float32, steps: Steps, errors: Array) -> np.float32:
    """Of all weights of a block, summed in one order everywhere; `errors` is scratch memory as in `chosen_scale`."""
    inverse = np.float32(1) / max(scale, TINY)
    for j in range(row.size):
        weight = widen(row, j).view(np.float32)
        error = weight - nearest(weight * inverse, steps) * scale
        errors[j] = error * error
    for j in range(row.size, SUMS):
        errors[j] = 0
    for first in range(SUMS, row.size, SUMS):
        for j in range(min(SUMS, row.size - first)):
            errors[j] += errors[first + j]
    for j in range(16):
        errors[j] += errors[j + 16]
    for j in range(8):
        errors[j] += errors[j + 8]
    for j in range(4):
        errors[j] += errors[j + 4]
    return (errors[0] + errors[2]) + (errors[1] + errors[3])


@njit(inline="always")
def chosen_scale(row: Array, absmax: np.float32, ratios: Array, steps: Steps, errors: Array) -> np.float32:
    """The first of absmax * `ratios`, rounded to bf16, whose squared error is least; absmax where none is finite.

    `errors` is scratch memory of as many numbers as the row has, and at least 32.
    """
    found, least = absmax, np.float32(np.inf)
    for ratio in ratios:
        scale = to_bf16(absmax * ratio)
        error = _squared_error(row, scale, steps, errors)
        if error < least:
            found, least = scale, error
    return found


@njit(inline="always")
def _fp4_code(rank: int) -> int:
    """FP4_CODES[rank], in arithmetic: that runs in vector lanes, a table does not."""
    magnitude = np.uint8(rank ^ (7 if rank < 8 else 8))  # rank among the eight magnitudes
    sign = 8 if (rank < 8) == (magnitude > 0) else 0  # the two zeros have it the wrong way round
    return magnitude ^ ((magnitude & 2) << 1) | sign  # and codes 2, 3 change places with 6, 7


@njit(inline="always")
def encode(row: Array, scale: np.float32, midpoints: Midpoints, fp4: bool, codes: Array) -> None:
    """The 64 codes of a block, a byte each. No clamping to -1..1: there is no midpoint outside."""
    inverse = np.float32(1) / max(scale, TINY)
    for j in range(BLOCK):
        scaled = widen(row, j).view(np.float32) * inverse
        rank = np.uint8(0)
        for midpoint in midpoints:
            rank += np.uint8(scaled > midpoint)
        codes[j] = rank
    if fp4:
        for j in range(BLOCK):
            codes[j] = _fp4_code(codes[j])
