"""Quantise and dequantise a matrix in one step, without codes in between. Calibration measures errors with it.

The results equal the values of a store's records, at any block size: a scale is the block's absmax rounded to bf16, as
in records. Source of the arithmetic: bitsandbytes 0.50, see `qmix.kernels.cpu.blocks`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from qmix.kernels.cpu.blocks import ratios_of, steps_of
from qmix.kernels.cpu.round_trip import round_trip_blocks, round_trip_rows
from qmix.kernels.packing import BLOCK
from qmix.precision.formats import check_precision
from qmix.precision.quantizer import LARGEST_SCALE, not_finite, too_large

BLOCKS = tuple(2**power for power in range(5, 13))  # weights that may share a scale
PIECE = 2**18  # weights that a thread takes at once: they fit its own cache even as fp32


def round_trip(
    weights: torch.Tensor, precision: str, block: int = BLOCK, clip: bool = False, name: str = "weights"
) -> torch.Tensor:
    """Return the values of `weights` [R, C], bf16, fp16 or fp32, in `precision`, rounded to their own type.

    nf4 and fp4 have a scale for `block` consecutive weights of the flattened matrix, a power of two from 32 to 4096;
    int8 has one for each row; half returns `weights` itself. With `clip`, 4-bit blocks take the scale with the least
    squared error. The work runs on as many threads as torch has.
    Raises CheckpointError, naming `name`, if a weight is NaN or infinite, or an absmax is too large for bf16.
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
    """Convert whole units of consecutive weights, the last perhaps short; return the largest magnitude."""
    if source.dtype == torch.float16:
        wide = torch.empty(source.shape)
        largest = _piece(source.float(), wide, precision, unit, clip)
        found.copy_(wide)
        return largest
    pattern = torch.uint16 if source.dtype == torch.bfloat16 else torch.uint32
    bits, out = source.view(pattern).numpy(), found.view(pattern).numpy()
    if precision == "int8":
        return float(round_trip_rows(bits.reshape(-1, unit), out.reshape(-1, unit)))
    return float(round_trip_blocks(bits, unit, steps_of(precision), ratios_of(clip), out))
