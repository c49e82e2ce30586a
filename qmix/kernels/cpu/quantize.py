"""Quantise on a CPU; codes and scales equal those of bitsandbytes to the bit.

`blocks` finds a block's codes; the kernels here put them in their layout.

Two layouts of a matrix [rows, cols]:

flat    bitsandbytes' default, rows joined end to end. Byte i holds weights 2i (high nibble) and 2i + 1
        (low nibble). absmax [rows * cols / 64].
packed  the layout of bitsandbytes' CPU product, 32 rows interleaved. Of the 32 bytes for two columns,
        byte j holds column j % 2 of rows j // 2 (low nibble) and 16 + j // 2 (high nibble). absmax is
        transposed, [cols / 64, rows].

    codes of column  0  1          first bytes, in hexadecimal
    row 0            1  2          flat    12 ...
    row 16           3  4          packed  31 42 ...

A kernel runs on one thread, without the GIL, in 16 kB of scratch memory; callers give each thread a chunk of rows.
Weights are float32, or bfloat16 as uint16 bit patterns, which a shift widens exactly.

Source of the arithmetic: bitsandbytes 0.50, backends/default/ops.py and functional.py.
"""

import numpy as np
from numba import njit

from qmix.kernels.cpu.blocks import (
    FP4_CODES,
    TINY,
    Array,
    Midpoints,
    Steps,
    chosen_scale,
    encode,
    largest_magnitude,
    midpoints_of,
    ratios_of,
    steps_of,
    widen,
)
from qmix.kernels.cpu.compiled import compiled
from qmix.kernels.packing import BLOCK, PACK_ROWS

# Blocks of a row to read before the next row. Rows a multiple of 4096 bytes apart share a few sets of the L1 cache:
# with one block at a time, the 32 rows evict each other's prefetched lines (twice as slow at 14336 columns).
STRIP = 8


@njit(inline="always")
def _interleave(pairs: Array, words: Array) -> None:
    """Write the packed words [32, 16] of a group's block, two bytes each, from its pairs of codes [32, 32]."""
    for p in range(BLOCK // 2):
        for r in range(PACK_ROWS // 2):
            words[p, r] = pairs[r, p] | (pairs[r + PACK_ROWS // 2, p] << 4)


@compiled
def _packed(
    weights: Array, midpoints: Midpoints, steps: Steps, ratios: Array | None, fp4: bool, codes: Array, absmax: Array
) -> bool:
    """Quantise weights [R, C/64, 64] to codes [R/32, C/64, 32, 16] of two bytes and absmax [C/64, R]."""
    scratch = np.empty((STRIP, PACK_ROWS, BLOCK), np.uint8)
    pairs = scratch.view(np.uint16)  # [8, 32, 32]
    errors = np.empty(BLOCK, np.float32)
    for group in range(codes.shape[0]):
        for first in range(0, codes.shape[1], STRIP):
            strip = range(first, min(first + STRIP, codes.shape[1]))
            for r in range(PACK_ROWS):
                for block in strip:
                    row = weights[group * PACK_ROWS + r, block]
                    largest = largest_magnitude(row, BLOCK)
                    if not np.isfinite(largest):
                        return False
                    scale = largest
                    if ratios is not None:
                        scale = chosen_scale(row, largest, ratios, steps, errors)
                    absmax[block, group * PACK_ROWS + r] = scale
                    encode(row, scale, midpoints, fp4, scratch[block - first, r])
            for block in strip:
                _interleave(pairs[block - first], codes[group, block])
    return True


@compiled
def _flat(
    weights: Array, midpoints: Midpoints, steps: Steps, ratios: Array | None, fp4: bool, codes: Array, absmax: Array
) -> bool:
    """Quantise weights [B, 64] to codes [B, 32] and absmax [B]."""
    scratch = np.empty(BLOCK, np.uint8)
    pairs = scratch.view(np.uint16)  # [32]
    errors = np.empty(BLOCK, np.float32)
    for block in range(weights.shape[0]):
        row = weights[block]
        largest = largest_magnitude(row, BLOCK)
        if not np.isfinite(largest):
            return False
        scale = largest
        if ratios is not None:
            scale = chosen_scale(row, largest, ratios, steps, errors)
        absmax[block] = scale
        encode(row, scale, midpoints, fp4, scratch)
        for p in range(BLOCK // 2):
            codes[block, p] = (pairs[p] << 4) | (pairs[p] >> 8)
    return True


@compiled
def _scale_of_short_block(weights: Array, ratios: Array | None, steps: Steps) -> np.float32:
    """Return the scale of weights [1 to 63]."""
    scale = max(largest_magnitude(weights, weights.size), TINY)
    if ratios is not None:
        scale = chosen_scale(weights, scale, ratios, steps, np.empty(BLOCK, np.float32))
    return scale


@compiled
def _int8_rows(weights: Array, codes: Array, row_max: Array) -> bool:
    """Quantise weights [R, C] to codes [R, C] and row_max [R]."""
    for r in range(weights.shape[0]):
        row = weights[r]
        row_max[r] = largest_magnitude(row, row.size)
        if not np.isfinite(row_max[r]):
            return False
        scale = np.float32(127) * (np.float32(1) / row_max[r])  # torch's rounding of 127.0 / row_max
        if np.isinf(scale):
            codes[r] = 0
        else:
            for j in range(row.size):
                codes[r, j] = np.int8(np.rint(widen(row, j).view(np.float32) * scale))
    return True


def quantize_4bit_packed(weights: Array, kind: str, codes: Array, absmax: Array, clip: bool = False) -> bool:
    """Quantise rows into the packed layout; with `clip` scales have the least squared error.

    weights uint16 or float32 [rows, cols], rows a multiple of 32, cols of 64; codes uint8 [rows * cols / 2];
    absmax float32 [cols / 64, rows], which may be some columns of a wider array. The others are C-contiguous.
    Returns False if a weight is NaN or infinite; codes and absmax are then undefined.
    Raises ValueError for any other shape, dtype or order.
    """
    rows, cols = weights.shape
    _require(rows % PACK_ROWS == 0 and cols % BLOCK == 0, f"[{rows}, {cols}] does not divide into [32, 64]")
    _require_output(codes, np.uint8, (rows * cols // 2,))
    _require_output(absmax, np.float32, (cols // BLOCK, rows), contiguous=False)
    blocks = _bits(weights).reshape(rows, cols // BLOCK, BLOCK)
    words = codes.view(np.uint16).reshape(rows // PACK_ROWS, cols // BLOCK, BLOCK // 2, PACK_ROWS // 2)
    return _packed(blocks, midpoints_of(kind), steps_of(kind), ratios_of(clip), kind == "fp4", words, absmax)


def quantize_4bit_flat(weights: Array, kind: str, codes: Array, absmax: Array, last: bool, clip: bool = False) -> bool:
    """Quantise consecutive weights into the flat layout; with `clip` scales have the least squared error.

    weights uint16 or float32 [n], codes uint8 [(n + 1) // 2], absmax float32 [ceil(n / 64)]; n is a multiple
    of 64 unless these are the `last` weights of their tensor. All are C-contiguous.
    Returns False if a weight is NaN or infinite; codes and absmax are then undefined.
    Raises ValueError for any other shape, dtype or order.
    """
    (n,) = weights.shape
    blocks = n // BLOCK
    full = blocks * BLOCK
    _require(last or n == full, f"{n} weights, not the last, do not divide into blocks of {BLOCK}")
    _require_output(codes, np.uint8, ((n + 1) // 2,))
    _require_output(absmax, np.float32, (-(-n // BLOCK),))
    bits, words = _bits(weights), codes[: full // 2].reshape(blocks, BLOCK // 2)
    how = midpoints_of(kind), steps_of(kind), ratios_of(clip), kind == "fp4"
    finite = _flat(bits[:full].reshape(blocks, BLOCK), *how, words, absmax)
    if not finite or n == full:
        return finite
    return _short_block(bits[full:], kind, clip, codes[full // 2 :], absmax[blocks:])


def _short_block(bits: Array, kind: str, clip: bool, codes: Array, absmax: Array) -> bool:
    """Quantise a last block as bitsandbytes does: divide by the clamped absmax, store it, pair an odd weight with 0."""
    weights = (bits.astype(np.uint32) << (16 if bits.itemsize == 2 else 0)).view(np.float32)
    if not np.isfinite(weights).all():
        return False
    absmax[0] = _scale_of_short_block(bits, ratios_of(clip), steps_of(kind))
    scaled = np.zeros(2 * codes.size, np.float32)
    scaled[: weights.size] = weights / absmax[0]
    ranks = np.searchsorted(np.array(midpoints_of(kind)), scaled).astype(np.uint8)
    wide = FP4_CODES[ranks] if kind == "fp4" else ranks
    codes[:] = wide[::2] << 4 | wide[1::2]
    return True


def quantize_int8_rows(weights: Array, codes: Array, row_max: Array) -> bool:
    """Quantise rows as `int8_vectorwise_quant` does: x * (127 / row_max), rounded, halves to even.

    weights uint16 or float32 [rows, cols], codes int8 [rows, cols], row_max float32 [rows], all C-contiguous.
    A row of zeros gets zeros, and so does one so small (below 3.8e-37) that 127 / row_max overflows.
    Returns False if a weight is NaN or infinite; codes and row_max are then undefined.
    Raises ValueError for any other shape, dtype or order.
    """
    rows, cols = weights.shape
    _require_output(codes, np.int8, (rows, cols))
    _require_output(row_max, np.float32, (rows,))
    return _int8_rows(_bits(weights), codes, row_max)


def _bits(weights: Array) -> Array:
    _require(weights.dtype in (np.uint16, np.float32), f"weights are uint16 or float32, not {weights.dtype}")
    _require(weights.flags.c_contiguous, "weights are not C-contiguous")
    return weights.view(np.uint32) if weights.dtype == np.float32 else weights


def _require_output(array: Array, dtype: type, shape: tuple[int, ...], contiguous: bool = True) -> None:
    fits = array.dtype == dtype and array.shape == shape and (array.flags.c_contiguous or not contiguous)
    _require(fits, f"an output is {array.dtype} {array.shape}, not {dtype.__name__} {shape} in C order")


def _require(condition: bool, message: str) -> None:
    """Raise ValueError unless `condition` holds: kernels check no bounds."""
    if not condition:
        raise ValueError(message)
