"""The sums of a product: groups of 32 rows of a matrix times all rows of x, in one order for every kernel.

The tiles keep a few sums in registers; here they are put together for any number of columns and of rows of x. A sum
does not depend on the number of groups, of rows of x, or of threads.

For many rows of x a packed matrix looks up each block once (`blocked`). They are laid out as [columns / 64, T, 64] for
that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from qmix.kernels.cpu.compiled import constant_first
from qmix.kernels.cpu.packed_tile import (
    BLOCK_TOKENS,
    PACKED_GROUPS,
    PACKED_TOKENS,
    X_ITEM,
    block_tile,
    four_bit_tile,
    widen_block,
)
from qmix.kernels.cpu.row_tile import GROUP, INT8, INT8_WIDE, PAIRED, ROWS, TOKENS, dot_tile
from qmix.kernels.packing import BLOCK

STRIP = 2048  # columns at once: six rows of x, 24 kB, stay in the L1 cache
PACKED_STRIP = 1024  # the same for twelve rows of x

Holds = int | str  # a row-major matrix's type and step (`row_tile`), or the kind of a packed one

_FEW = tuple(PACKED_GROUPS.get(tokens, 1) for tokens in range(PACKED_TOKENS + 1))


def x_item(holds: Holds) -> int:
    """Return the bytes of a number of x as the tiles read it: 2 for bf16, 4 for fp32."""
    if isinstance(holds, str):
        return X_ITEM
    return 2 if holds in PAIRED else 4


@njit
def blocked(packed: bool, tokens: int) -> bool:
    """Return True if x is laid out by blocks of 64 columns."""
    return packed and tokens > PACKED_TOKENS


@njit
def groups_together(packed: bool, tokens: int) -> int:
    """Return how many groups of a matrix one call of `group_sums` takes best; it takes so many, or one."""
    return _FEW[tokens] if packed and tokens <= PACKED_TOKENS else 1


def group_sums(
    holds: Any, sums: Any, first: Any, groups: Any, rows: Any, columns: Any, weights: Any, scales: Any, x: Any
) -> None:
    """Set fp32 `sums` [T, groups * 32] to the products of T rows of x with the matrix's rows from `first` on.

    `holds` is a literal. The matrix is [rows, columns]; `weights`, `scales` and `x` are addresses. `scales` are a
    packed matrix's absmax. A row-major one, whose own scales are left to the caller, takes one group.
    """
    raise NotImplementedError  # one of the two below, compiled


@constant_first
def _few_packed_sums(
    holds: Any, sums: Any, first: Any, groups: Any, rows: Any, columns: Any, weights: Any, scales: Any, x: Any
) -> None:
    tokens = len(sums)
    sums[:] = 0
    for column in range(0, columns, PACKED_STRIP):
        for token in range(0, tokens, PACKED_TOKENS):
            four_bit_tile(
                holds,
                min(PACKED_TOKENS, tokens - token),
                groups,
                weights + (first * columns + column * GROUP) // 2,
                columns * GROUP // 2,
                scales + (column // BLOCK * rows + first) * 2,
                rows * 2,
                x + (token * columns + column) * X_ITEM,
                columns * X_ITEM,
                min(PACKED_STRIP, columns - column) // BLOCK,
                sums[token:].ctypes.data,
            )


def _packed_sums(
    holds: Any, sums: Any, first: Any, groups: Any, rows: Any, columns: Any, weights: Any, scales: Any, x: Any
) -> None:
    tokens = len(sums)
    if tokens <= PACKED_TOKENS:
        _few_packed_sums(holds, sums, first, groups, rows, columns, weights, scales, x)
        return
    widened = np.empty((BLOCK, GROUP * X_ITEM), np.uint8)
    sums[:] = 0
    for column in range(0, columns, BLOCK):
        widen_block(holds, weights + (first * columns + column * GROUP) // 2, widened.ctypes.data)
        for token in range(0, tokens, BLOCK_TOKENS):
            block_tile(
                holds,
                min(BLOCK_TOKENS, tokens - token),
                widened.ctypes.data,
                scales + (column // BLOCK * rows + first) * 2,
                rows * 2,
                x + (column * tokens + token * BLOCK) * X_ITEM,
                sums[token:].ctypes.data,
            )


def _row_sums(
    holds: Any, sums: Any, first: Any, groups: Any, rows: Any, columns: Any, weights: Any, scales: Any, x: Any
) -> None:
    tokens, last = len(sums), min(first + GROUP, rows)
    item = 1 if holds in (INT8, INT8_WIDE) else 2
    number = 2 if holds in PAIRED else 4
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
                    x + (token * columns + column) * number,
                    columns * number,
                    min(STRIP, columns - column),
                    sums[token:, row - first :].ctypes.data,
                )
                row += taken


@overload(group_sums, {"error_model": "numpy"}, prefer_literal=True)
def _compile(
    holds: Any, sums: Any, first: Any, groups: Any, rows: Any, columns: Any, weights: Any, scales: Any, x: Any
) -> Callable[..., None]:
    """Choose by what the matrix holds."""
    return _packed_sums if isinstance(holds.literal_value, str) else _row_sums
