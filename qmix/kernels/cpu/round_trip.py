"""Replace weights by the values that their codes stand for, in one pass: the kernels of `precision.round_trip`.

Weights are fp32 or bf16 bit patterns. Source of the arithmetic: bitsandbytes 0.50, see `blocks`.
"""

from __future__ import annotations

import numpy as np

from qmix.kernels.cpu.blocks import (
    TINY,
    Array,
    Steps,
    chosen_scale,
    largest_magnitude,
    narrowed,
    nearest,
    to_bf16,
    widen,
)
from qmix.kernels.cpu.compiled import compiled


@compiled
def round_trip_blocks(weights: Array, block: int, steps: Steps, ratios: Array | None, out: Array) -> np.float32:
    """Write the values that bit patterns [n] take in blocks, as bit patterns; return the largest magnitude."""
    half = out.itemsize == 2
    errors = np.empty(block, np.float32)
    top = np.uint32(0)  # a bit pattern, which keeps a NaN
    for start in range(0, weights.size, block):
        row, values = weights[start : start + block], out[start : start + block]
        absmax = largest_magnitude(row, row.size)
        top = max(top, np.float32(absmax).view(np.uint32))
        scale = absmax if row.size == block else max(absmax, TINY)
        if ratios is not None:
            scale = chosen_scale(row, scale, ratios, steps, errors)
        rounded = to_bf16(scale)
        if row.size == block:
            inverse = np.float32(1) / max(scale, TINY)
            for j in range(block):
                values[j] = narrowed(nearest(widen(row, j).view(np.float32) * inverse, steps) * rounded, half)
        else:  # the last block, which bitsandbytes divides instead of multiplying
            for j in range(row.size):
                values[j] = narrowed(nearest(widen(row, j).view(np.float32) / scale, steps) * rounded, half)
    return np.uint32(top).view(np.float32)


@compiled
def round_trip_rows(weights: Array, out: Array) -> np.float32:
    """Write the values that bit patterns [R, C] take in int8, as bit patterns; return the largest magnitude."""
    half = out.itemsize == 2
    top = np.uint32(0)
    for r in range(weights.shape[0]):
        row, values = weights[r], out[r]
        row_max = largest_magnitude(row, row.size)
        top = max(top, np.float32(row_max).view(np.uint32))
        scale = np.float32(127) * (np.float32(1) / row_max)
        scale = np.float32(0) if np.isinf(scale) else scale
        unit = row_max / np.float32(127)
        for j in range(row.size):
            code = np.int32(np.rint(widen(row, j).view(np.float32) * scale))  # there is no negative zero
            values[j] = narrowed(np.float32(code) * unit, half)
    return np.uint32(top).view(np.float32)
