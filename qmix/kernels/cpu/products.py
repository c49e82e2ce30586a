"""Multiply rows of x with matrices in place. A few rows take little longer than reading the matrix.

A piece of work is a group of 32 rows of the matrix, multiplied with all rows of x while it lies in a core's own
cache. Every sum runs over the columns in one order, for any number of rows of x and of threads: a token's products do
not depend on what else is computed.

half, int8   row-major [rows, columns], any number of both
nf4, fp4     the packed layout of bitsandbytes' CPU kernel, see `quantize`

The first product of a kind compiles its kernel, once for an installation.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import address_of, call_at, float_at, next_piece, put_half
from qmix.kernels.cpu.compiled import compiled_address, compiled_part
from qmix.kernels.cpu.paths import current
from qmix.kernels.cpu.row_tile import BF16, BF16_WIDE, FP16, GROUP, INT8, INT8_WIDE
from qmix.kernels.cpu.sums import Holds, blocked, groups_together, sums_of, x_item
from qmix.kernels.packing import BLOCK


def multiply_rows(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ weight.T in x's type: x [T, columns] in bf16 or fp16, weight [rows, columns] contiguous.

    Weights are in x's type, or int8 with each row's factor in `scales`, fp32 [rows]. Sums are in fp32.
    """
    rows, columns = weight.shape
    holds = holds_of(weight.dtype)
    x_as_read = x.to(torch.bfloat16 if x_item(holds) == 2 else torch.float32).contiguous()
    out = torch.empty((len(x), rows), dtype=x.dtype)
    places = weight.data_ptr(), 0 if scales is None else scales.data_ptr(), x_as_read.data_ptr(), out.data_ptr()
    _multiply(holds, x, rows, columns, *places)
    return out


def multiply_packed(x: torch.Tensor, kind: str, codes: int, absmax: int, rows: int, columns: int) -> torch.Tensor:
    """Return x [T, columns] times a packed matrix, [T, rows] in x's type; `codes` and `absmax` are addresses."""
    out = torch.empty((len(x), rows), dtype=x.dtype)
    half = x.to(torch.bfloat16)  # on every path: paths differ only in the order of their sums
    as_read = half if x_item(kind) == 2 else half.float()
    if blocked.py_func(True, len(x)):
        as_read = as_read.view(len(x), columns // BLOCK, BLOCK).transpose(0, 1)
    as_read = as_read.contiguous()
    places = codes, absmax, as_read.data_ptr(), out.data_ptr()
    _multiply(kind, x, rows, columns, *places)
    return out


def holds_in(precision: str, dtype: torch.dtype) -> Holds:
    """Return what a matrix in a precision is to the tiles; `dtype` is that of half precision."""
    if precision in ("half", "int8"):
        return holds_of(torch.int8 if precision == "int8" else dtype)
    return precision


def holds_of(dtype: torch.dtype) -> int:
    """Return what a row-major matrix of this type is to the tiles."""
    if dtype == torch.float16:
        return FP16
    if dtype == torch.int8:
        return INT8 if current().pairs else INT8_WIDE
    return BF16 if current().pairs else BF16_WIDE


@compiled_part
def _put_sums(sums: Any, rows: int, first: int, last: int, out: int, fp16: int) -> None:
    """Round fp32 sums [T, last - first or more] into columns [first, last) of `out`, [T, rows] in half precision."""
    for t in range(len(sums)):
        for r in range(last - first):
            put_half(sums[t, r], out + (t * rows + first + r) * 2, fp16)


def _multiply(holds: Holds, x: torch.Tensor, rows: int, columns: int, *places: int) -> None:
    sizes = len(x), rows, columns
    team.run(product_kernel(), *sizes, *places, x.dtype == torch.float16, isinstance(holds, str), sums_of(holds))


@cache
def product_kernel() -> int:
    """Return the address of the kernel of single products; `sums_of` gives it its tiles."""

    def kernel(block: Any) -> None:
        tokens, rows, columns, weights, scales, x, out, fp16, packed, sums_at = carray(block, 11)[1:]
        wide = groups_together(packed, tokens)
        piece = next_piece(block) * wide * GROUP
        while piece < rows:
            first, end = piece, min(piece + wide * GROUP, rows)
            while first < end:
                groups = wide if first + wide * GROUP <= rows else 1
                sums = np.empty((tokens, groups * GROUP), np.float32)
                call_at(sums_at, address_of(sums), tokens, first, groups, rows, columns, weights, scales, x)
                last = min(first + groups * GROUP, rows)
                if scales and not packed:
                    for t in range(tokens):
                        for r in range(last - first):
                            sums[t, r] *= float_at(scales + (first + r) * 4)
                _put_sums(sums, rows, first, last, out, fp16)
                first += groups * GROUP
            piece = next_piece(block) * wide * GROUP

    return compiled_address(kernel)
