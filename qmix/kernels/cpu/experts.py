"""The experts of a layer in one piece of work for the thread team: the products, the activation, and the sum.

Four stages follow one another in a call (`stages`). Each one's pieces are spread over all experts and rows of matrices:

read    the rows of x as the tiles read them
inner   silu(gate @ x) * (up @ x), for some rows of both matrices
outer   down @ inner, each row of the result in its place among the outputs
sum     the outputs of a token times the router's weights, in the router's order, summed in fp32 and rounded once;
        then added to the residual stream, if there is one

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
from numba import carray

from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import address_of, call_at, float_at, half_at, integers, next_piece, put_float, put_half
from qmix.kernels.cpu.blocks import to_bf16
from qmix.kernels.cpu.compiled import compiled_address, compiled_part
from qmix.kernels.cpu.expert_tile import gated_product
from qmix.kernels.cpu.products import holds_in
from qmix.kernels.cpu.row_tile import GROUP
from qmix.kernels.cpu.stages import finish, wait_for
from qmix.kernels.cpu.sums import blocked, groups_together, sums_of, x_item
from qmix.kernels.packing import BLOCK

SUMMED = 1024  # columns of a token in a piece of the last stage

# the kernel's block, after the counts of pieces drawn and done
EXPERTS, ROWS, TOKENS, TOP_K, HIDDEN, INNER, FP16, DIRECT = range(2, 10)
TABLE, X, READ, READ_INNER, OUT, WEIGHTS, RESIDUAL, RESULT = range(10, 18)  # addresses; 0 for what there is none of
PACKED, ITEM, GROUP_SUMS = range(18, 21)  # what the tiles take: if packed matrices, bytes of a number of x; code
FIELDS = 21
# an expert in the table: addresses, the number of its rows, and the number of the first among all
GATE, GATE_SCALES, UP, UP_SCALES, DOWN, DOWN_SCALES, PLACES, COUNT, FIRST = range(9)
EXPERT_FIELDS = 9

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
    there already; the weighted sum [T, H] is returned. `outputs` and `weights` are contiguous.
    """
    tokens, top_k, hidden = outputs.shape
    holds = holds_in(precision, x.dtype)
    fp16, alone = x.dtype == torch.float16, tokens == 1
    numbers, rows = [], 0
    for addresses, places, count in experts:
        numbers += [*addresses, places, count, rows]
        rows += count
    direct = alone and not fp16 and x_item(holds) == 2  # the tiles read x where it lies
    memory = torch.empty(x_item(holds) * rows * (hidden + inner), dtype=torch.uint8)  # x as read, and the inner numbers
    x = x.contiguous()
    result = None if weights is None else torch.empty_like(x)
    summed = (0, 0, 0) if weights is None or result is None else (weights.data_ptr(), 0, result.data_ptr())
    table = (c_int64 * len(numbers))(*numbers)
    read = x.data_ptr() if direct else memory.data_ptr()
    sizes = len(experts), rows, tokens, top_k, hidden, inner, fp16, direct
    inner_at = memory.data_ptr() + x_item(holds) * rows * hidden
    places_of = addressof(table), x.data_ptr(), read, inner_at, outputs.data_ptr(), *summed
    team.run(experts_kernel(), 0, *sizes, *places_of, isinstance(holds, str), x_item(holds), sums_of(holds))
    return result


@compiled_part
def _pieces(packed: int, table: int, experts: int, rows: int) -> int:
    """Return the number of pieces into which a matrix of each expert is cut."""
    numbers, total = carray(integers(table), experts * EXPERT_FIELDS), 0
    for expert in range(experts):
        large, small = _cut(packed, numbers[expert * EXPERT_FIELDS + COUNT], rows)
        total += large + small
    return total


@compiled_part
def _cut(packed: int, count: int, rows: int) -> tuple[int, int]:
    """Return how many pieces of several groups, and of one, a matrix is cut into for `count` rows of x.

    The small ones come last, so that all threads end at about the same time.
    """
    groups, together = (rows + GROUP - 1) // GROUP, groups_together(packed, count)
    large = groups * 3 // 4 // together if together > 1 else 0
    return large, groups - large * together


@compiled_part
def _piece(packed: int, table: int, experts: int, rows: int, piece: int) -> tuple[int, int, int]:
    """Return a piece's expert, its first group of rows and its number of groups."""
    numbers = carray(integers(table), experts * EXPERT_FIELDS)
    for expert in range(experts):
        count = numbers[expert * EXPERT_FIELDS + COUNT]
        large, _ = _cut(packed, count, rows)
        if piece < large:
            together = groups_together(packed, count)
            return expert, piece * together, together
        piece -= large
    for expert in range(experts):
        count = numbers[expert * EXPERT_FIELDS + COUNT]
        large, small = _cut(packed, count, rows)
        if piece < small:
            return expert, large * groups_together(packed, count) + piece, 1
        piece -= small
    return 0, 0, 0


@compiled_part
def _scale(sums: Any, row_max: int, first: int, last: int) -> None:
    """Multiply the columns of sums by the scales of int8 rows."""
    for t in range(len(sums)):
        for r in range(last - first):
            sums[t, r] *= float_at(row_max + (first + r) * 4) / np.float32(127)


@compiled_part
def put_as_read(item: int, value: np.float32, place: int) -> None:
    """Store a number as the tiles read it: in bf16, which it is already rounded to, or in fp32."""
    if item == 2:
        put_half(value, place, 0)
    else:
        put_float(value, place)


@compiled_part
def _row(packed: int, item: int, at: int, count: int, t: int, columns: int) -> tuple[int, int]:
    """Return the address of the first 64 columns of the t-th of `count` rows as read, and the step to the next 64."""
    if blocked(packed, count):
        return at + t * BLOCK * item, count * BLOCK * item
    return at + t * columns * item, BLOCK * item


@compiled_part
def _expert_of(numbers: Any, expert: int) -> Any:
    """Return an expert's fields in the kernel's table."""
    return carray(integers(numbers[TABLE]), (expert + 1) * EXPERT_FIELDS)[expert * EXPERT_FIELDS :]


@compiled_part
def _read_row(numbers: Any, piece: int) -> None:
    """Put a row of x where the tiles read it."""
    experts, top_k, hidden, fp16, x, read, packed, item = (
        numbers[EXPERTS],
        numbers[TOP_K],
        numbers[HIDDEN],
        numbers[FP16],
        numbers[X],
        numbers[READ],
        numbers[PACKED],
        numbers[ITEM],
    )
    expert = 0
    while expert + 1 < experts and _expert_of(numbers, expert + 1)[FIRST] <= piece:
        expert += 1
    mine = _expert_of(numbers, expert)
    count, first = mine[COUNT], mine[FIRST]
    token = carray(integers(mine[PLACES]), count)[piece - first] // top_k
    to, step = _row(packed, item, read + first * hidden * item, count, piece - first, hidden)
    for column in range(0, hidden, BLOCK):
        for c in range(min(BLOCK, hidden - column)):
            number = half_at(x + (token * hidden + column + c) * 2, fp16)
            place = to + column // BLOCK * step + c * item
            put_as_read(item, to_bf16(number) if packed and fp16 else number, place)


@compiled_part
def _inner_rows(numbers: Any, piece: int) -> None:
    """Compute silu(gate @ x) * (up @ x) for some rows of an expert's gate and up."""
    tokens, hidden, inner, fp16, read, inner_at, packed, item = (
        numbers[TOKENS],
        numbers[HIDDEN],
        numbers[INNER],
        numbers[FP16],
        numbers[READ],
        numbers[READ_INNER],
        numbers[PACKED],
        numbers[ITEM],
    )
    expert, group, groups = _piece(packed, numbers[TABLE], numbers[EXPERTS], inner, piece)
    mine = _expert_of(numbers, expert)
    count, first, row = mine[COUNT], mine[FIRST], group * GROUP
    x = read if tokens == 1 else read + first * hidden * item
    both = np.empty((2, count, groups * GROUP), np.float32)  # one array: `gate`, used to the end, keeps that of `up`
    gate, up = both[0], both[1]
    code = numbers[GROUP_SUMS]
    call_at(code, address_of(gate), count, row, groups, inner, hidden, mine[GATE], mine[GATE_SCALES], x)
    call_at(code, address_of(up), count, row, groups, inner, hidden, mine[UP], mine[UP_SCALES], x)
    last = min(row + groups * GROUP, inner)
    if not packed and mine[GATE_SCALES]:
        _scale(gate, mine[GATE_SCALES], row, last)
        _scale(up, mine[UP_SCALES], row, last)
    gated_product(address_of(gate), address_of(up), gate.size, fp16, packed != 0 or item == 2)
    for t in range(count):
        to, step = _row(packed, item, inner_at + first * inner * item, count, t, inner)
        if item == 2:  # apart from the other, so that LLVM uses vectors
            for r in range(row, last):
                put_half(gate[t, r - row], to + r // BLOCK * step + r % BLOCK * 2, 0)
        else:
            for r in range(row, last):
                put_float(gate[t, r - row], to + r // BLOCK * step + r % BLOCK * 4)


@compiled_part
def _outer_rows(numbers: Any, piece: int) -> None:
    """Compute some rows of down @ inner, and put them into their places of the outputs."""
    hidden, inner, fp16, inner_at, out, packed, item = (
        numbers[HIDDEN],
        numbers[INNER],
        numbers[FP16],
        numbers[READ_INNER],
        numbers[OUT],
        numbers[PACKED],
        numbers[ITEM],
    )
    expert, group, groups = _piece(packed, numbers[TABLE], numbers[EXPERTS], hidden, piece)
    mine = _expert_of(numbers, expert)
    count, first, row = mine[COUNT], mine[FIRST], group * GROUP
    sums = np.empty((count, groups * GROUP), np.float32)
    x, code = inner_at + first * inner * item, numbers[GROUP_SUMS]
    call_at(code, address_of(sums), count, row, groups, hidden, inner, mine[DOWN], mine[DOWN_SCALES], x)
    last = min(row + groups * GROUP, hidden)
    if not packed and mine[DOWN_SCALES]:
        _scale(sums, mine[DOWN_SCALES], row, last)
    places = carray(integers(mine[PLACES]), count)
    for t in range(count):
        for r in range(row, last):
            put_half(sums[t, r - row], out + (places[t] * hidden + r) * 2, fp16)


@compiled_part
def _sum_columns(numbers: Any, piece: int) -> None:
    """Sum some columns of a token's outputs times the router's weights."""
    top_k, hidden, fp16, out, weights, residual, result = (
        numbers[TOP_K],
        numbers[HIDDEN],
        numbers[FP16],
        numbers[OUT],
        numbers[WEIGHTS],
        numbers[RESIDUAL],
        numbers[RESULT],
    )
    parts = (hidden + SUMMED - 1) // SUMMED
    token, column = piece // parts, piece % parts * SUMMED
    for c in range(column, min(column + SUMMED, hidden)):
        total = np.float32(0)
        for i in range(top_k):
            number = half_at(out + ((token * top_k + i) * hidden + c) * 2, fp16)
            weighted = number * float_at(weights + (token * top_k + i) * 4)
            total = weighted if i == 0 else total + weighted
        place = (token * hidden + c) * 2
        put_half(total, result + place, fp16)
        if residual:
            put_half(half_at(residual + place, fp16) + half_at(result + place, fp16), result + place, fp16)


@cache
def experts_kernel() -> int:
    """Return the address of the kernel of experts; `sums_of` gives it its tiles."""

    def kernel(block: Any) -> None:
        numbers = carray(block, FIELDS)
        experts, rows, tokens, hidden, inner, direct = (
            numbers[EXPERTS], numbers[ROWS], numbers[TOKENS], numbers[HIDDEN], numbers[INNER], numbers[DIRECT]
        )  # fmt: skip
        packed, table, done = numbers[PACKED], numbers[TABLE], address_of(numbers) + 8
        to_inner = 0 if direct else 1 if tokens == 1 else rows
        to_outer = to_inner + _pieces(packed, table, experts, inner)
        to_sum = to_outer + _pieces(packed, table, experts, hidden)
        end = to_sum + (tokens * ((hidden + SUMMED - 1) // SUMMED) if numbers[WEIGHTS] else 0)
        piece = next_piece(block)
        while piece < end:
            if piece < to_inner:
                _read_row(numbers, piece)
                finish(done, to_inner)
            elif piece < to_outer:
                wait_for(done, to_inner)
                _inner_rows(numbers, piece - to_inner)
                finish(done, to_outer)
            elif piece < to_sum:
                wait_for(done, to_outer)
                _outer_rows(numbers, piece - to_outer)
                finish(done, to_sum)
            else:
                wait_for(done, to_sum)
                _sum_columns(numbers, piece - to_sum)
                finish(done, end)
            piece = next_piece(block)
        wait_for(done, end)

    return compiled_address(kernel)
