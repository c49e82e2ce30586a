"""Quantisation on a CPU: codes and scales equal, bit for bit, to those of bitsandbytes.

A block of 64 weights shares one scale, its largest magnitude ("absmax"). Its kind, nf4 or fp4, has sixteen
values between -1 and 1; a weight x takes the code of the one nearest to x / absmax. The rank of that value is
the number of midpoints between neighbours that lie strictly below. With absmax 2.0 and the midpoints of NF4:

    x               -2.0    0.0    0.5    1.0
    x / absmax      -1.0    0.0   0.25    0.5
    midpoints below    0      7     10     12     -0.85 ... -0.05 0.04 0.12 0.20 0.29 0.39 0.502 0.64 0.86

Counting beats searching: fifteen comparisons and no branch run in vector lanes on any machine LLVM knows. The
largest magnitude is found among bit patterns: without the sign they order as integers, infinities and NaNs
above all finite numbers, so one maximum yields the absmax and tells whether every weight is finite.

Two layouts of a matrix [rows, cols]:

flat    bitsandbytes' ordinary one, rows joined end to end. Byte i holds weights 2i (high nibble) and 2i + 1
        (low nibble). absmax [rows * cols / 64].
packed  what bitsandbytes' CPU matrix product reads, 32 rows interleaved. Of the 32 bytes for two columns,
        byte j holds column j % 2 of rows j // 2 (low nibble) and 16 + j // 2 (high nibble). absmax is
        transposed, [cols / 64, rows].

    codes of column  0  1          first bytes, in hexadecimal
    row 0            1  2          flat    12 ...
    row 16           3  4          packed  31 42 ...

The kernels run on one thread, without the GIL, in 16 kB of scratch memory: callers give each thread a chunk of
rows. Weights are float32, or bfloat16 as uint16 bit patterns, which a shift widens exactly.

Source of the arithmetic: bitsandbytes 0.50, backends/default/ops.py and functional.py.
"""

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from qmix.compiled import compiled
from qmix.precision.formats import BLOCK, PACK_ROWS

# Blocks of a row read before going to the next. Rows a multiple of 4096 bytes apart share a few sets of the first
# cache: one block at a time, the 32 rows evict each other's prefetched lines (twice as slow at 14336 columns).
STRIP = 8

Array = npt.NDArray[Any]
Midpoints = tuple[np.float32, ...]

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


@cache
def _midpoints(kind: str) -> Midpoints:
    """Fifteen, ascending; a tuple so that LLVM unrolls the loop over them."""
    if kind not in VALUES:
        raise ValueError(f"kind must be 'nf4' or 'fp4', not {kind!r}")
    values = np.array(VALUES[kind], np.float32)
    values /= values[-1]
    return tuple((values[:-1] + values[1:]) / np.float32(2))


# Numba inlines the helpers: a call would count references to its arrays, which costs more than a block.


@njit(inline="always")
def _widen(row: Array, j: int) -> np.uint32:
    """Weight j as the bit pattern of a float32."""
    shift = 16 if row.itemsize == 2 else 0  # apart: inside the call below, Numba on Python 3.10 cannot inline it
    return np.uint32(np.uint32(row[j]) << shift)


@njit(inline="always")
def _absmax(row: Array, count: int) -> np.float32:
    """The largest magnitude of `count` weights; NaN or infinite if one of them is."""
    top = np.uint32(0)
    for j in range(count):
        top = max(top, np.uint32(_widen(row, j) & 0x7FFFFFFF))
    return np.uint32(top).view(np.float32)


@njit(inline="always")
def _fp4_code(rank: int) -> int:
    """FP4_CODES[rank], in arithmetic: that runs in vector lanes, a table does not."""
    magnitude = np.uint8(rank ^ (7 if rank < 8 else 8))  # rank among the eight magnitudes
    sign = 8 if (rank < 8) == (magnitude > 0) else 0  # the two zeros have it the wrong way round
    return magnitude ^ ((magnitude & 2) << 1) | sign  # and codes 2, 3 change places with 6, 7


@njit(inline="always")
def _encode(row: Array, absmax: np.float32, midpoints: Midpoints, fp4: bool, codes: Array) -> None:
    """The 64 codes of a block, a byte each. No clamping to -1..1: there is no midpoint outside."""
    inverse = np.float32(1) / max(absmax, TINY)
    for j in range(BLOCK):
        scaled = _widen(row, j).view(np.float32) * inverse
        rank = np.uint8(0)
        for midpoint in midpoints:
            rank += np.uint8(scaled > midpoint)
        codes[j] = rank
    if fp4:
        for j in range(BLOCK):
            codes[j] = _fp4_code(codes[j])


@njit(inline="always")
def _interleave(pairs: Array, words: Array) -> None:
    """The packed bytes [32, 16] of a group's block, two to a word, from its codes [32, 32], two columns to a pair."""
    for p in range(BLOCK // 2):
        for r in range(PACK_ROWS // 2):
            words[p, r] = pairs[r, p] | (pairs[r + PACK_ROWS // 2, p] << 4)


@compiled
def _packed(weights: Array, midpoints: Midpoints, fp4: bool, codes: Array, absmax: Array) -> bool:
    """weights [R, C/64, 64], codes [R/32, C/64, 32, 16] of two bytes, absmax [C/64, R]"""
    scratch = np.empty((STRIP, PACK_ROWS, BLOCK), np.uint8)
    pairs = scratch.view(np.uint16)  # [8, 32, 32]
    for group in range(codes.shape[0]):
        for first in range(0, codes.shape[1], STRIP):
            strip = range(first, min(first + STRIP, codes.shape[1]))
            for r in range(PACK_ROWS):
                for block in strip:
                    row = weights[group * PACK_ROWS + r, block]
                    largest = _absmax(row, BLOCK)
                    if not np.isfinite(largest):
                        return False
                    absmax[block, group * PACK_ROWS + r] = largest
                    _encode(row, largest, midpoints, fp4, scratch[block - first, r])
            for block in strip:
                _interleave(pairs[block - first], codes[group, block])
    return True


@compiled
def _flat(weights: Array, midpoints: Midpoints, fp4: bool, codes: Array, absmax: Array) -> bool:
    """weights [B, 64], codes [B, 32], absmax [B]"""
    scratch = np.empty(BLOCK, np.uint8)
    pairs = scratch.view(np.uint16)  # [32]
    for block in range(weights.shape[0]):
        row = weights[block]
        absmax[block] = _absmax(row, BLOCK)
        if not np.isfinite(absmax[block]):
            return False
        _encode(row, absmax[block], midpoints, fp4, scratch)
        for p in range(BLOCK // 2):
            codes[block, p] = (pairs[p] << 4) | (pairs[p] >> 8)
    return True


@compiled
def _int8_rows(weights: Array, codes: Array, row_max: Array) -> bool:
    """weights [R, C], codes [R, C], row_max [R]"""
    for r in range(weights.shape[0]):
        row = weights[r]
        row_max[r] = _absmax(row, row.size)
        if not np.isfinite(row_max[r]):
            return False
        scale = np.float32(127) * (np.float32(1) / row_max[r])  # torch's rounding of 127.0 / row_max
        if np.isinf(scale):
            codes[r] = 0
        else:
            for j in range(row.size):
                codes[r, j] = np.int8(np.rint(_widen(row, j).view(np.float32) * scale))
    return True


def quantize_4bit_packed(weights: Array, kind: str, codes: Array, absmax: Array) -> bool:
    """Quantise rows into the packed layout.

    weights uint16 or float32 [rows, cols], rows a multiple of 32, cols of 64; codes uint8 [rows * cols / 2];
    absmax float32 [cols / 64, rows], which may be some columns of a wider array. All else C-contiguous.
    Returns False if a weight is NaN or infinite; codes and absmax then hold nothing of use.
    Raises ValueError for any other shape, dtype or order.
    """
    rows, cols = weights.shape
    _require(rows % PACK_ROWS == 0 and cols % BLOCK == 0, f"[{rows}, {cols}] does not divide into [32, 64]")
    _require_output(codes, np.uint8, (rows * cols // 2,))
    _require_output(absmax, np.float32, (cols // BLOCK, rows), contiguous=False)
    blocks = _bits(weights).reshape(rows, cols // BLOCK, BLOCK)
    words = codes.view(np.uint16).reshape(rows // PACK_ROWS, cols // BLOCK, BLOCK // 2, PACK_ROWS // 2)
    return _packed(blocks, _midpoints(kind), kind == "fp4", words, absmax)


def quantize_4bit_flat(weights: Array, kind: str, codes: Array, absmax: Array, last: bool) -> bool:
    """Quantise consecutive weights into the flat layout.

    weights uint16 or float32 [n], codes uint8 [(n + 1) // 2], absmax float32 [ceil(n / 64)]; n is a multiple
    of 64 unless these are the `last` weights of their tensor. All C-contiguous.
    Returns False if a weight is NaN or infinite; codes and absmax then hold nothing of use.
    Raises ValueError for any other shape, dtype or order.
    """
    (n,) = weights.shape
    blocks = n // BLOCK
    full = blocks * BLOCK
    _require(last or n == full, f"{n} weights, not the last, do not divide into blocks of {BLOCK}")
    _require_output(codes, np.uint8, ((n + 1) // 2,))
    _require_output(absmax, np.float32, (-(-n // BLOCK),))
    bits, words = _bits(weights), codes[: full // 2].reshape(blocks, BLOCK // 2)
    finite = _flat(bits[:full].reshape(blocks, BLOCK), _midpoints(kind), kind == "fp4", words, absmax)
    if not finite or n == full:
        return finite
    return _short_block(bits[full:], kind, codes[full // 2 :], absmax[blocks:])


def _short_block(bits: Array, kind: str, codes: Array, absmax: Array) -> bool:
    """As bitsandbytes has it: divided by the clamped absmax, which is stored; an odd weight paired with 0."""
    weights = (bits.astype(np.uint32) << (16 if bits.itemsize == 2 else 0)).view(np.float32)
    if not np.isfinite(weights).all():
        return False
    absmax[0] = max(np.abs(weights).max(), TINY)
    scaled = np.zeros(2 * codes.size, np.float32)
    scaled[: weights.size] = weights / absmax[0]
    ranks = np.searchsorted(np.array(_midpoints(kind)), scaled).astype(np.uint8)
    wide = FP4_CODES[ranks] if kind == "fp4" else ranks
    codes[:] = wide[::2] << 4 | wide[1::2]
    return True


def quantize_int8_rows(weights: Array, codes: Array, row_max: Array) -> bool:
    """Quantise rows as `int8_vectorwise_quant` does: x * (127 / row_max), rounded, halves to even.

    weights uint16 or float32 [rows, cols], codes int8 [rows, cols], row_max float32 [rows], all C-contiguous.
    A row of zeros gets zeros, and so does one so small (below 3.8e-37) that 127 / row_max overflows.
    Returns False if a weight is NaN or infinite; codes and row_max then hold nothing of use.
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
    """The kernels check no bounds: whatever does not fit must be refused before."""
    if not condition:
        raise ValueError(message)
