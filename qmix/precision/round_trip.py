"""A matrix as it comes back from being quantised, without the codes in between: what calibration weighs errors by.

The numbers are those that a store's records stand for, at any size of block: a scale is the block's absmax rounded to
bf16, as records hold it. Source of the arithmetic: bitsandbytes 0.50, see `blocks`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from qmix.kernels.cpu.blocks import (
    TINY,
    Array,
    Steps,
    chosen_scale,
    largest_magnitude,
    narrowed,
    nearest,
    ratios_of,
    steps_of,
    to_bf16,
    widen,
)
from qmix.kernels.cpu.compiled import compiled
from qmix.kernels.packing import BLOCK
from qmix.precision.formats import check_precision
from qmix.precision.quantizer import LARGEST_SCALE, not_finite, too_large

BLOCKS = tuple(2**power for power in range(5, 13))  # weights that may share a scale
PIECE = 2**18  # weights that a thread takes at once: in its own cache even as fp32


def round_trip(
    weights: torch.Tensor, precision: str, block: int = BLOCK, clip: bool = False, name: str = "weights"
) -> torch.Tensor:
    """`weights` [R, C], bf16, fp16 or fp32, in the values that `precision` has for them, rounded to their own type.

    nf4 and fp4 take `block` consecutive weights of the flattened matrix together, 32 to 4096, a power of two; int8
    takes rows; half gives `weights` itself. With `clip` 4-bit blocks take their scales of least squared error. The work
    is spread over as many threads as torch has.
    Raises CheckpointError, naming `name`, where a weight is NaN, infinite, or its absmax too large for bf16.
    """
    check_precision(precision)
    if block not in BLOCKS:
        raise ValueError(f"a block is {', '.join(map(str, BLOCKS))} weights, not {block}")
    if precision == "half":
        return weights
    unit = weights.shape[1] if precision == "int8" else block
    step = max(1, PIECE // unit) * unit
    source = weights.contiguous()
    found = torch.empty_like(source)
    piece = partial(_piece, precision=precision, unit=unit, clip=clip)
    with ThreadPoolExecutor(torch.get_num_threads(), "qmix-round-trip") as pool:
        largest = list(pool.map(piece, source.view(-1).split(step), found.view(-1).split(step)))
    if not np.isfinite(largest).all():
        raise not_finite(name)
    if precision != "int8" and max(largest, default=0) > LARGEST_SCALE:
        raise too_large(name, "bf16")
    return found


def _piece(source: torch.Tensor, found: torch.Tensor, precision: str, unit: int, clip: bool) -> float:
    """Whole units of consecutive weights, the last perhaps short; returns the largest magnitude."""
    if source.dtype == torch.float16:
        wide = torch.empty(source.shape)
        largest = _piece(source.float(), wide, precision, unit, clip)
        found.copy_(wide)
        return largest
    pattern = torch.uint16 if source.dtype == torch.bfloat16 else torch.uint32
    bits, out = source.view(pattern).numpy(), found.view(pattern).numpy()
    if precision == "int8":
        return float(_rows(bits.reshape(-1, unit), out.reshape(-1, unit)))
    return float(_blocks(bits, unit, steps_of(precision), ratios_of(clip), out))


@compiled
def _blocks(weights: Array, block: int, steps: Steps, ratios: Array | None, out: Array) -> np.float32:
    """Bit patterns [n], in blocks, to those of the values that they take; returns the largest magnitude."""
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
        else:  # the last block, which bitsandbytes treats otherwise
            for j in range(row.size):
                values[j] = narrowed(nearest(widen(row, j).view(np.float32) / scale, steps) * rounded, half)
    return np.uint32(top).view(np.float32)


@compiled
def _rows(weights: Array, out: Array) -> np.float32:
    """Bit patterns [R, C] to those of the values that int8 has for them; returns the largest magnitude."""
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
