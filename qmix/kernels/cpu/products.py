"""Multiply rows of x with matrices in place. A few rows take little longer than reading the matrix.

A piece of work is a group of 32 rows of the matrix, multiplied with all rows of x while it lies in a core's own
cache. Every sum runs over the columns in one order, for any number of rows of x and of threads: a token's products do
not depend on what else is computed.

half, int8   row-major [rows, columns], any number of both
nf4, fp4     the packed layout of bitsandbytes' CPU kernel, see `quantize`

The first product of a kind compiles its kernel, once for an installation.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from qmix.kernels.cpu import team
from qmix.kernels.cpu.compiled import compiled_address
from qmix.kernels.cpu.packed_tile import (
    BLOCK_TOKENS,
    PACKED_GROUPS,
    PACKED_TOKENS,
    X_ITEM,
    block_tile,
    four_bit_tile,
    widen_block,
)
from qmix.kernels.cpu.paths import current
from qmix.kernels.cpu.row_tile import BF16, BF16_WIDE, FP16, GROUP, INT8, INT8_WIDE, PAIRED, ROWS, TOKENS, dot_tile
from qmix.kernels.cpu.vectors import float_at, next_piece, put_half
from qmix.kernels.packing import BLOCK

STRIP = 2048  # columns at once: six rows of x, 24 kB, stay in the L1 cache
PACKED_STRIP = 1024  # the same for twelve rows of x


def multiply_rows(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ weight.T in x's type: x [T, columns] in bf16 or fp16, weight [rows, columns] contiguous.

    Weights are in x's type, or int8 with each row's factor in `scales`, fp32 [rows]. Sums are in fp32.
    """
    rows, columns = weight.shape
    holds = _holds(weight.dtype)
    x_as_read = x.to(torch.bfloat16 if holds in PAIRED else torch.float32).contiguous()
    out = torch.empty((len(x), rows), dtype=x.dtype)
    places = weight.data_ptr(), 0 if scales is None else scales.data_ptr(), x_as_read.data_ptr(), out.data_ptr()
    team.run(_row_major(holds), len(x), rows, columns, *places, x.dtype == torch.float16)
    return out


def multiply_packed(x: torch.Tensor, kind: str, codes: int, absmax: int, rows: int, columns: int) -> torch.Tensor:
    """Return x [T, columns] times a packed matrix, [T, rows] in x's type; `codes` and `absmax` are addresses."""
    out = torch.empty((len(x), rows), dtype=x.dtype)
    half = x.to(torch.bfloat16)  # on every path: paths differ only in the order of their sums
    kernel, as_read = _packed, half if current().pairs else half.float()
    if len(x) > PACKED_TOKENS:
        kernel, as_read = _packed_blocks, as_read.view(len(x), columns // BLOCK, BLOCK).transpose(0, 1)
    as_read = as_read.contiguous()
    places = codes, absmax, as_read.data_ptr(), out.data_ptr()
    team.run(kernel(kind), len(x), rows, columns, *places, x.dtype == torch.float16)
    return out


def prepare(precisions: Iterable[str], dtype: torch.dtype) -> None:
    """Load the kernels for experts in these precisions and for dense weights of this type.

    Compiles those that are not on disk yet. That takes two seconds a kernel and up to 80 MB more than later runs need,
    so a process with a memory budget lets another one do it first.
    """
    _row_major(_holds(dtype))
    for precision in precisions:
        if precision == "int8":
            _row_major(_holds(torch.int8))
        elif precision != "half":
            _packed(precision)
            _packed_blocks(precision)


def _holds(dtype: torch.dtype) -> int:
    if dtype == torch.float16:
        return FP16
    if dtype == torch.int8:
        return INT8 if current().pairs else INT8_WIDE
    return BF16 if current().pairs else BF16_WIDE


@njit(inline="always")
def _put_sums(sums: Any, rows: int, first: int, last: int, out: int, fp16: int) -> None:
    """Round fp32 sums [T, last - first or more] into columns [first, last) of `out`, [T, rows] in half precision."""
    for t in range(len(sums)):
        for r in range(last - first):
            put_half(sums[t, r], out + (t * rows + first + r) * 2, fp16)


# Numba treats the variables of an enclosing function as constants, which the tiles need.


@cache
def _row_major(holds: int) -> int:
    item, x_item = (1 if holds in (INT8, INT8_WIDE) else 2), (2 if holds in PAIRED else 4)

    def kernel(block: Any) -> None:
        numbers = carray(block, 9)
        tokens, rows, columns, weights, scales, x, out, fp16 = numbers[1:]
        sums = np.empty((tokens, GROUP), np.float32)
        first = next_piece(block) * GROUP
        while first < rows:
            last = min(first + GROUP, rows)
            sums[:] = 0
            for column in range(0, columns, STRIP):
                for token in range(0, tokens, TOKENS):
                    row = first
                    while row < last:
                        taken = ROWS if row + ROWS <= last else 1
                        dot_tile(
                            holds,
                            taken,
                            min(TOKENS, tokens - token),
                            weights + (row * columns + column) * item,
                            columns * item,
                            x + (token * columns + column) * x_item,
                            columns * x_item,
                            min(STRIP, columns - column),
                            sums[token:, row - first :].ctypes.data,
                        )
                        row += taken
            if scales:
                for r in range(last - first):
                    sums[:, r] *= float_at(scales + (first + r) * 4)
            _put_sums(sums, rows, first, last, out, fp16)
            first = next_piece(block) * GROUP

    return compiled_address(kernel)


@cache
def _packed(kind: str) -> int:
    few = tuple(PACKED_GROUPS.get(tokens, 1) for tokens in range(PACKED_TOKENS + 1))

    def kernel(block: Any) -> None:
        numbers = carray(block, 9)
        tokens, rows, columns, codes, absmax, x, out, fp16 = numbers[1:]
        wide = few[tokens] if tokens <= PACKED_TOKENS else 1
        piece = next_piece(block) * wide * GROUP
        while piece < rows:
            first, end = piece, min(piece + wide * GROUP, rows)
            while first < end:
                groups = wide if first + wide * GROUP <= rows else 1
                sums = np.zeros((tokens, groups * GROUP), np.float32)
                for column in range(0, columns, PACKED_STRIP):
                    for token in range(0, tokens, PACKED_TOKENS):
                        four_bit_tile(
                            kind,
                            min(PACKED_TOKENS, tokens - token),
                            groups,
                            codes + (first * columns + column * GROUP) // 2,
                            columns * GROUP // 2,
                            absmax + (column // BLOCK * rows + first) * 2,
                            rows * 2,
                            x + (token * columns + column) * X_ITEM,
                            columns * X_ITEM,
                            min(PACKED_STRIP, columns - column) // BLOCK,
                            sums[token:].ctypes.data,
                        )
                _put_sums(sums, rows, first, first + groups * GROUP, out, fp16)
                first += groups * GROUP
            piece = next_piece(block) * wide * GROUP

    return compiled_address(kernel)


@cache
def _packed_blocks(kind: str) -> int:
    """Return the kernel for many rows of x, laid out as [columns / 64, T, 64].

    Each block of weights is looked up once.
    """

    def kernel(block: Any) -> None:
        tokens, rows, columns, codes, absmax, x, out, fp16 = carray(block, 9)[1:]
        weights = np.empty((BLOCK, GROUP * X_ITEM), np.uint8)
        sums = np.empty((tokens, GROUP), np.float32)
        first = next_piece(block) * GROUP
        while first < rows:
            sums[:] = 0
            for column in range(0, columns, BLOCK):
                widen_block(kind, codes + (first * columns + column * GROUP) // 2, weights.ctypes.data)
                for token in range(0, tokens, BLOCK_TOKENS):
                    block_tile(
                        kind,
                        min(BLOCK_TOKENS, tokens - token),
                        weights.ctypes.data,
                        absmax + (column // BLOCK * rows + first) * 2,
                        rows * 2,
                        x + (column * tokens + token * BLOCK) * X_ITEM,
                        sums[token:].ctypes.data,
                    )
            _put_sums(sums, rows, first, first + GROUP, out, fp16)
            first = next_piece(block) * GROUP

    return compiled_address(kernel)
