"""Write 4-bit weights as numbers, in vectors and on all threads: where no product takes codes, or torch's is faster.

The first use of a kernel compiles it, once for an installation.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from numba import carray

from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import next_piece
from qmix.kernels.cpu.compiled import compiled_address
from qmix.kernels.cpu.dequantize_tile import flat_block, half_block
from qmix.kernels.packing import BLOCK, PACK_ROWS

PIECE = 512  # blocks of the flat layout that a thread takes at once


def flat_blocks(kind: str, codes: int, absmax: int, blocks: int, out: torch.Tensor) -> None:
    """Write whole blocks of the flat layout into fp32 `out` [blocks * 64 or more]; `codes`, `absmax` are addresses."""
    team.run(_flat(kind), blocks, codes, absmax, out.data_ptr())


def packed_rows(kind: str, codes: int, absmax: int, rows: int, columns: int, first: int, out: torch.Tensor) -> None:
    """Write rows [first, first + n) of a packed [rows, columns] matrix into `out` [columns, n], bf16 or fp16.

    `first` and n are multiples of 32. A value is rounded to bf16 as in the products, then its product with absmax.
    """
    groups = out.shape[1] // PACK_ROWS
    team.run(_packed(kind), groups, rows, columns, codes, absmax, first, out.data_ptr(), out.dtype == torch.float16)


def prepare(kind: str) -> None:
    """Load both kernels, compiled now if they are not on disk yet."""
    _flat(kind)
    _packed(kind)


# Numba treats the variables of an enclosing function as constants, which the tiles need.


@cache
def _flat(kind: str) -> int:
    def kernel(block: Any) -> None:
        blocks, codes, absmax, out = carray(block, 5)[1:]
        first = next_piece(block) * PIECE
        while first < blocks:
            for number in range(first, min(first + PIECE, blocks)):
                flat_block(kind, codes + number * BLOCK // 2, absmax + number * 2, out + number * BLOCK * 4)
            first = next_piece(block) * PIECE

    return compiled_address(kernel)


@cache
def _packed(kind: str) -> int:
    def kernel(block: Any) -> None:
        groups, rows, columns, codes, absmax, start, out, fp16 = carray(block, 9)[1:]
        step = groups * PACK_ROWS * 2
        group = next_piece(block)
        while group < groups:
            row = start + group * PACK_ROWS
            for column in range(0, columns, BLOCK):
                half_block(
                    kind,
                    codes + (row * columns + column * PACK_ROWS) // 2,
                    absmax + (column // BLOCK * rows + row) * 2,
                    out + column * step + group * PACK_ROWS * 2,
                    step,
                    fp16,
                )
            group = next_piece(block)

    return compiled_address(kernel)
