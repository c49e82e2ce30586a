"""The sums of a product: groups of 32 rows of a matrix times all rows of x, in one order for every kernel.

The tiles keep a few sums in registers; here they are put together for any number of columns and of rows of x. A sum
does not depend on the number of groups, of rows of x, or of threads.

For many rows of x a packed matrix looks up each block once (`blocked`). They are laid out as [columns / 64, T, 64] for
that.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numba import types

from qmix.kernels.cpu.addresses import address_of, fill_floats
from qmix.kernels.cpu.compiled import compiled_address, compiled_part
from qmix.kernels.cpu.packed_tile import (
    BLOCK_TOKENS,
    PACKED_GROUPS,
    PACKED_TOKENS,
    X_ITEM,
    block_tile,
    four_bit_tile,
    widen_block,
)
from qmix.kernels.cpu.row_tile import BF16, GROUP, INT8, INT8_WIDE, PAIRED, ROWS, TOKENS, dot_tile, widen_row
from qmix.kernels.packing import BLOCK

STRIP = 2048  # columns at once: six rows of x, 24 kB, stay in the L1 cache
PACKED_STRIP = 1024  # the same for twelve rows of x

SUMS_SIGNATURE = (types.int64,) * 9, types.void

Holds = int | str  # a row-major matrix's type and step (`row_tile`), or the kind of a packed one

_FEW = tuple(PACKED_GROUPS.get(tokens, 1) for tokens in range(PACKED_TOKENS + 1))


def x_item(holds: Holds) -> int:
    """Return the bytes of a number of x as the tiles read it: 2 for bf16, 4 for fp32."""
    if isinstance(holds, str):
        return X_ITEM
    return 2 if holds in PAIRED else 4


@compiled_part
def blocked(packed: Any, tokens: int) -> bool:
    """Return True if x is laid out by blocks of 64 columns."""
    return packed != 0 and tokens > PACKED_TOKENS


@compiled_part
def groups_together(packed: Any, tokens: int) -> int:
    """Return how many groups of a matrix one call of `sums_of` takes best; it takes so many, or one."""
    return _FEW[tokens] if packed and tokens <= PACKED_TOKENS else 1


def sums_of(holds: Holds) -> int:
    """Return the address of the code that sums products of a matrix; `call_at` calls it.

    Compiled once for what a matrix holds, apart from the kernels: the tiles are most of their code. Its arguments:

    sums       fp32 [T, groups * 32], to set to the products of T rows of x with the matrix's rows from `first` on
    tokens     T
    first, groups, rows, columns   of the matrix [rows, columns]; a row-major one takes one group
    weights    of the matrix
    scales     a packed matrix's absmax; a row-major one's own scales are left to the caller
    x          T rows as `x_item` says, [columns / 64, T, 64] if `blocked`
    """
    return _packed_sums(holds) if isinstance(holds, str) else _row_sums(holds)


# Numba treats the variables of an enclosing function as constants, which the tiles need.


@cache
def _packed_sums(kind: str) -> int:
    def packed_sums(
        sums: Any, tokens: Any, first: Any, groups: Any, rows: Any, columns: Any, weights: Any, scales: Any, x: Any
    ) -> None:
        fill_floats(sums, tokens * groups * GROUP, 0)
        row_bytes = groups * GROUP * 4
        if tokens <= PACKED_TOKENS:
            for column in range(0, columns, PACKED_STRIP):
                four_bit_tile(
                    kind,
                    tokens,
                    groups,
                    weights + (first * columns + column * GROUP) // 2,
                    columns * GROUP // 2,
                    scales + (column // BLOCK * rows + first) * 2,
                    rows * 2,
                    x + column * X_ITEM,
                    columns * X_ITEM,
                    min(PACKED_STRIP, columns - column) // BLOCK,
                    sums,
                )
            return
        widened = np.empty(BLOCK * GROUP * X_ITEM, np.uint8)
        for column in range(0, columns, BLOCK):
            widen_block(kind, weights + (first * columns + column * GROUP) // 2, address_of(widened))
            for token in range(0, tokens, BLOCK_TOKENS):
                block_tile(
                    kind,
                    min(BLOCK_TOKENS, tokens - token),
                    address_of(widened),
                    scales + (column // BLOCK * rows + first) * 2,
                    rows * 2,
                    x + (column * tokens + token * BLOCK) * X_ITEM,
                    sums + token * row_bytes,
                )

    return compiled_address(packed_sums, SUMS_SIGNATURE)


@cache
def _row_sums(holds: int) -> int:
    item, number = 1 if holds in (INT8, INT8_WIDE) else 2, x_item(holds)

    def row_sums(
        sums: Any, tokens: Any, first: Any, groups: Any, rows: Any, columns: Any, weights: Any, scales: Any, x: Any
    ) -> None:
        last = min(first + GROUP, rows)
        fill_floats(sums, tokens * GROUP, 0)
        if holds == INT8 and tokens > 2 * TOKENS:
            strip = np.empty(GROUP * STRIP * number, np.uint8)
            for column in range(0, columns, STRIP):
                count = min(STRIP, columns - column)
                for row in range(first, last):
                    place = address_of(strip) + (row - first) * STRIP * number
                    widen_row(holds, weights + (row * columns + column) * item, count, place)
                for token in range(0, tokens, TOKENS):
                    for row in range(0, last - first, ROWS):
                        dot_tile(
                            BF16,
                            ROWS,
                            min(TOKENS, tokens - token),
                            address_of(strip) + row * STRIP * number,
                            STRIP * number,
                            x + (token * columns + column) * number,
                            columns * number,
                            count,
                            sums + (token * GROUP + row) * 4,
                        )
            return
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
                        x + (token * columns + column) * number,
                        columns * number,
                        min(STRIP, columns - column),
                        sums + (token * GROUP + row - first) * 4,
                    )
                    row += taken

    return compiled_address(row_sums, SUMS_SIGNATURE)
