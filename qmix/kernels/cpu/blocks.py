"""Numba helpers for one block of weights: its largest magnitude, its codes, and the values that codes stand for.

A block of weights shares one scale, its largest magnitude ("absmax"). Its kind, nf4 or fp4, has sixteen
values between -1 and 1; a weight x takes the code of the value nearest to x / absmax. The rank of that value is
the number of midpoints between neighbours that are strictly below x / absmax. With absmax 2.0 and NF4's midpoints:

    x               -2.0    0.0    0.5    1.0
    x / absmax      -1.0    0.0   0.25    0.5
    midpoints below    0      7     10     12     -0.85 ... -0.05 0.04 0.12 0.20 0.29 0.39 0.502 0.64 0.86

The largest magnitude is not always the best scale. A slightly smaller one gives the few largest weights a larger
error and all others a smaller one; a slightly larger one may move many weights nearer to a value. `chosen_scale` tries
a few (docs/fidelity.md).

Counting is faster than searching: fifteen comparisons without a branch run in vector lanes on every processor. The
largest magnitude is found among bit patterns: without the sign they order as integers, infinities and NaNs
above all finite numbers, so one maximum yields the absmax and shows whether every weight is finite.

Numba inlines these functions into the kernels: a call would count references to its arrays, which takes longer than a
block.

Source of the arithmetic: bitsandbytes 0.50, backends/default/ops.py and functional.py.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from qmix.kernels.packing import BLOCK, NF4_VALUES

Array = npt.NDArray[Any]
Midpoints = tuple[np.float32, ...]
Steps = tuple[tuple[np.float32, np.uint32], ...]

# The values of each kind, ascending; the last one divides them.
VALUES = {
    "nf4": NF4_VALUES,
    "fp4": (-12, -8, -6, -4, -3, -2, -0.0625, 0, 0, 0.0625, 2, 3, 4, 6, 8, 12),
}
# Codes by rank (NF4 codes are ranks), in the order of bitsandbytes' sort: 0.0 gets code 0, and 0.001 the zero 8.
FP4_CODES = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8)

TINY = np.float32(1e-38)  # bitsandbytes' smallest divisor
SUMS = 32  # partial sums of squared errors, side by side
CLIP = (1, 0.97, 1.03, 0.94, 1.06, 0.91, 1.09, 0.88, 1.12)  # factors of absmax; of equals a block takes the first


@cache
def midpoints_of(kind: str) -> Midpoints:
    """Return the fifteen midpoints, ascending; a tuple, so that LLVM unrolls the loop over them."""
    if kind not in VALUES:
        raise ValueError(f"kind must be 'nf4' or 'fp4', not {kind!r}")
    values = np.array(VALUES[kind], np.float32)
    values /= values[-1]
    return tuple((values[:-1] + values[1:]) / np.float32(2))


@cache
def steps_of(kind: str) -> Steps:
    """Return each midpoint with the difference of the bit patterns of the values above and below it: see `nearest`."""
    values = np.array(VALUES[kind], np.float32)
    bits = (values / values[-1]).view(np.uint32)
    return tuple(zip(midpoints_of(kind), bits[1:] - bits[:-1], strict=True))


@cache
def ratios_of(clip: bool) -> Array | None:
    """Return CLIP for the kernels, or None, for which they are compiled without the search for a scale."""
    return np.array(CLIP, np.float32) if clip else None


@njit(inline="always")
def widen(row: Array, j: int) -> np.uint32:
    """Return weight j as the bit pattern of a float32."""
    shift = 16 if row.itemsize == 2 else 0  # apart: inside the call below, Numba on Python 3.10 cannot inline it
    return np.uint32(np.uint32(row[j]) << shift)


@njit(inline="always")
def largest_magnitude(row: Array, count: int) -> np.float32:
    """Return the largest magnitude of `count` weights; NaN or infinite if one of them is."""
    top = np.uint32(0)
    for j in range(count):
        top = max(top, np.uint32(widen(row, j) & 0x7FFFFFFF))
    return np.uint32(top).view(np.float32)


@njit(inline="always")
def narrowed(value: np.float32, half: bool) -> np.uint32:
    """Return the bit pattern of a finite number; with `half` that of the nearest bf16, halves to even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint32(np.uint32(bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16) if half else bits


@njit(inline="always")
def to_bf16(value: np.float32) -> np.float32:
    """Return a finite number rounded to bf16, half to even."""
    return np.uint32(narrowed(value, True) << 16).view(np.float32)


@njit(inline="always")
def nearest(scaled: np.float32, steps: Steps) -> np.float32:
    """Return the value nearest to a weight that is divided by its block's scale.

    It sums bit patterns, not numbers: that is exact, and runs in vector lanes, which a choice among values does not.
    """
    bits = np.uint32(0xBF800000)  # -1, below all midpoints
    for midpoint, step in steps:
        bits += step * np.uint32(scaled > midpoint)
    return np.uint32(bits).view(np.float32)


@njit(inline="always")
def _squared_error(row: Array, scale: np.float32, steps: Steps, errors: Array) -> np.float32:
    """Return the squared error of a block, summed in a fixed order; `errors` is scratch memory as in `chosen_scale`."""
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
    """Return the scale with the least squared error among absmax * `ratios`, each rounded to bf16.

    Of equals it is the first; absmax if no error is finite. `errors` is scratch memory for as many numbers as the row
    has, at least 32.
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
    """Return FP4_CODES[rank] by arithmetic, which runs in vector lanes; a table does not."""
    magnitude = np.uint8(rank ^ (7 if rank < 8 else 8))  # rank among the eight magnitudes
    sign = 8 if (rank < 8) == (magnitude > 0) else 0  # the two zeros have the opposite sign
    return magnitude ^ ((magnitude & 2) << 1) | sign  # codes 2, 3 swap with 6, 7


@njit(inline="always")
def encode(row: Array, scale: np.float32, midpoints: Midpoints, fp4: bool, codes: Array) -> None:
    """Write the 64 codes of a block, a byte each. Clamping to -1..1 is not needed: no midpoint lies outside."""
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
