"""The experts of a layer in one piece of work for the thread team: the products, the activation, and the sum.

Four stages follow one another in a call (`stages`). Each one's pieces are spread over all experts and rows of matrices:

read    the rows of x as the tiles read them
inner   silu(gate @ x) * (up @ x), for some rows of both matrices
outer   down @ inner, each row of the result in its place among the outputs
sum     the outputs of a token times the router's weights, in the router's order, summed in fp32 and rounded once

Every number is rounded where separate products round it: gate, up, activation, product and output to x's type. Every
sum has one order, so a token's numbers do not depend on the other tokens, the other experts of a call, or the threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_int64
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from qmix.kernels.cpu import team
from qmix.kernels.cpu.attention_tile import integers
from qmix.kernels.cpu.blocks import to_bf16
from qmix.kernels.cpu.compiled import compiled_address
from qmix.kernels.cpu.expert_tile import gated_product, half_at, put_float
from qmix.kernels.cpu.products import holds_of
from qmix.kernels.cpu.row_tile import GROUP, INT8, INT8_WIDE
from qmix.kernels.cpu.stages import finish, wait_for
from qmix.kernels.cpu.sums import Holds, blocked, group_sums, groups_together, x_item
from qmix.kernels.cpu.vectors import float_at, next_piece, put_half
from qmix.kernels.packing import BLOCK

SUMMED = 1024  # columns of a token in a piece of the last stage
FIELDS = 9  # of an expert in the kernel's table

Rows = tuple[Sequence[int], int, int]  # addresses of the three matrices and their scales; address and number of places


def multiply_experts(
    precision: str,
    experts: Sequence[Rows],
    x: torch.Tensor,
    outputs: torch.Tensor,
    inner: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Put the results of some experts, all in one precision, into their places of `outputs`.

    x is [T, H] in bf16 or fp16, `outputs` [T, k, H] in the same type. Each expert has the addresses of its gate, up and
    down with their scales (0 for none), and the address of its places: int64 numbers t * k + i, ascending, for the i-th
    output of token t. `inner` is the number of the gate's rows. With `weights`, fp32 [T, k], all other outputs are
    there already; the weighted sum [T, H] is returned.
    """
    tokens, top_k, hidden = outputs.shape
    holds: Holds = precision
    if precision in ("half", "int8"):
        holds = holds_of(torch.int8 if precision == "int8" else x.dtype)
    fp16, alone = x.dtype == torch.float16, tokens == 1
    numbers, rows = [], 0
    for addresses, places, count in experts:
        numbers += [*addresses, places, count, rows]
        rows += count
    direct = alone and not fp16 and x_item(holds) == 2  # the tiles read x where it lies
    memory = torch.empty(x_item(holds) * rows * (hidden + inner), dtype=torch.uint8)  # x as read, and the inner numbers
    x = x.contiguous()
    result = None if weights is None else torch.empty_like(x)
    summed = (0, 0) if weights is None or result is None else (weights.contiguous().data_ptr(), result.data_ptr())
    table = (c_int64 * len(numbers))(*numbers)
    read = x.data_ptr() if direct else memory.data_ptr()
    sizes = len(experts), rows, tokens, top_k, hidden, inner, fp16, direct
    inner_at = memory.data_ptr() + x_item(holds) * rows * hidden
    places_of = addressof(table), x.data_ptr(), read, inner_at, outputs.data_ptr(), *summed
    team.run(_experts(holds), 0, *sizes, *places_of)
    return result


def prepare(precision: str, dtype: torch.dtype) -> None:
    """Load the kernel for experts in this precision; compile it if it is not on disk yet."""
    half = holds_of(torch.int8 if precision == "int8" else dtype)
    _experts(half if precision in ("half", "int8") else precision)


@njit
def _pieces(packed: bool, table: int, experts: int, rows: int) -> int:
    """Return the number of pieces into which a matrix of each expert is cut."""
    total = 0
    for expert in range(experts):
        large, small = _cut(packed, carray(integers(table), experts * FIELDS)[expert * FIELDS + 7], rows)
        total += large + small
    return total


@njit
def _cut(packed: bool, count: int, rows: int) -> tuple[int, int]:
    """Return how many pieces of several groups, and of one, a matrix is cut into for `count` rows of x.

    The small ones come last, so that all threads end at about the same time.
    """
    groups, together = (rows + GROUP - 1) // GROUP, groups_together(packed, count)
    large = groups * 3 // 4 // together if together > 1 else 0
    return large, groups - large * together


@njit
def _piece(packed: bool, table: int, experts: int, rows: int, piece: int) -> tuple[int, int, int]:
    """Return a piece's expert, its first group of rows and its number of groups."""
    numbers = carray(integers(table), experts * FIELDS)
    for expert in range(experts):
        count = numbers[expert * FIELDS + 7]
        large, _ = _cut(packed, count, rows)
        if piece < large:
            together = groups_together(packed, count)
            return expert, piece * together, together
        piece -= large
    for expert in range(experts):
        count = numbers[expert * FIELDS + 7]
        large, small = _cut(packed, count, rows)
        if piece < small:
            return expert, large * groups_together(packed, count) + piece, 1
        piece -= small
    return 0, 0, 0


@njit
def _scale(sums: Any, row_max: int, first: int, last: int) -> None:
    """Multiply the columns of sums by the scales of int8 rows."""
    for r in range(last - first):
        sums[:, r] *= float_at(row_max + (first + r) * 4) / np.float32(127)


@cache
def _experts(holds: Holds) -> int:
    packed, int8, item = isinstance(holds, str), holds in (INT8, INT8_WIDE), x_item(holds)
    narrow = packed or item == 2  # the tiles read numbers that are rounded to bf16

    def kernel(block: Any) -> None:
        numbers = carray(block, 17)
        experts, rows, tokens, top_k, hidden, inner, fp16, direct = numbers[2:10]
        table, x, read, inner_at, out, weights, result = numbers[10:17]
        fields, done = carray(integers(table), experts * FIELDS), numbers[1:].ctypes.data
        to_inner = 0 if direct else 1 if tokens == 1 else rows
        to_outer = to_inner + _pieces(packed, table, experts, inner)
        to_sum = to_outer + _pieces(packed, table, experts, hidden)
        parts = (hidden + SUMMED - 1) // SUMMED
        end = to_sum + (tokens * parts if weights else 0)
        piece = next_piece(block)
        while piece < end:
            if piece < to_inner:
                expert = 0
                while expert + 1 < experts and fields[(expert + 1) * FIELDS + 8] <= piece:
                    expert += 1
                mine = fields[expert * FIELDS : (expert + 1) * FIELDS]
                count, first = mine[7], mine[8]
                token = carray(integers(mine[6]), count)[piece - first] // top_k
                to, step = read + piece * hidden * item, BLOCK * item
                if blocked(packed, count):
                    to, step = read + (first * hidden + (piece - first) * BLOCK) * item, count * BLOCK * item
                for column in range(0, hidden, BLOCK):
                    for c in range(min(BLOCK, hidden - column)):
                        number = half_at(x + (token * hidden + column + c) * 2, fp16)
                        place = to + column // BLOCK * step + c * item
                        if item == 2:
                            put_half(number, place, 0)
                        else:
                            put_float(to_bf16(number) if narrow and fp16 else number, place)
            elif piece < to_outer:
                wait_for(done, to_inner)
                expert, group, groups = _piece(packed, table, experts, inner, piece - to_inner)
                mine = fields[expert * FIELDS : (expert + 1) * FIELDS]
                count, first, row = mine[7], mine[8], group * GROUP
                from_x = read if tokens == 1 else read + first * hidden * item
                gate = np.empty((count, groups * GROUP), np.float32)
                up = np.empty((count, groups * GROUP), np.float32)
                group_sums(holds, gate, row, groups, inner, hidden, mine[0], mine[1], from_x)
                group_sums(holds, up, row, groups, inner, hidden, mine[2], mine[3], from_x)
                last = min(row + groups * GROUP, inner)
                if int8:
                    _scale(gate, mine[1], row, last)
                    _scale(up, mine[3], row, last)
                gated_product(gate.ctypes.data, up.ctypes.data, gate.size, fp16, narrow)
                for t in range(count):
                    to, step = inner_at + (first + t) * inner * item, BLOCK * item
                    if blocked(packed, count):
                        to, step = inner_at + (first * inner + t * BLOCK) * item, count * BLOCK * item
                    for r in range(row, last):
                        place = to + r // BLOCK * step + r % BLOCK * item
                        if item == 2:
                            put_half(gate[t, r - row], place, 0)
                        else:
                            put_float(gate[t, r - row], place)
            elif piece < to_sum:
                wait_for(done, to_outer)
                expert, group, groups = _piece(packed, table, experts, hidden, piece - to_outer)
                mine = fields[expert * FIELDS : (expert + 1) * FIELDS]
                count, first, row = mine[7], mine[8], group * GROUP
                sums = np.empty((count, groups * GROUP), np.float32)
                from_inner = inner_at + first * inner * item
                group_sums(holds, sums, row, groups, hidden, inner, mine[4], mine[5], from_inner)
                last = min(row + groups * GROUP, hidden)
                if int8:
                    _scale(sums, mine[5], row, last)
                places = carray(integers(mine[6]), count)
                for t in range(count):
                    for r in range(row, last):
                        put_half(sums[t, r - row], out + (places[t] * hidden + r) * 2, fp16)
            else:
                wait_for(done, to_sum)
                token, column = (piece - to_sum) // parts, (piece - to_sum) % parts * SUMMED
                for c in range(column, min(column + SUMMED, hidden)):
                    total = np.float32(0)
                    for i in range(top_k):
                        number = half_at(out + ((token * top_k + i) * hidden + c) * 2, fp16)
                        weighted = number * float_at(weights + (token * top_k + i) * 4)
                        total = weighted if i == 0 else total + weighted
                    put_half(total, result + (token * hidden + c) * 2, fp16)
            finish(done)
            piece = next_piece(block)

    return compiled_address(kernel)
