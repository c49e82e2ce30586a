"""The pieces of `attention_half`'s stages, each computed by one thread."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from qmix.kernels.cpu.addresses import (
    address_of,
    call_at,
    fill_floats,
    float_at,
    half_at,
    integers,
    put_float,
    put_half,
)
from qmix.kernels.cpu.attention import BLOCK, combine_blocks
from qmix.kernels.cpu.blocks import to_bf16
from qmix.kernels.cpu.compiled import compiled_part
from qmix.kernels.cpu.experts import put_as_read
from qmix.kernels.cpu.row_tile import GROUP

PARTIAL = 16  # sums of squares side by side

# the kernel's block, after the counts of pieces drawn and done
SIZE, HEADS, GROUPS, WIDTH, POSITIONS, EXPERTS, TOP_K = range(2, 9)
HIDDEN, COS, SIN, CONSTANTS, WORK = range(9, 14)  # addresses, as are the following
KEYS, VALUES, KEY_GROUP, VALUE_GROUP = range(14, 18)  # the last two are strides in bytes
NORM, QUERY, KEY, VALUE, OUT, SECOND_NORM, ROUTER = range(18, 25)
ATTENDED, NORMED, CHOSEN, SHARES = range(25, 29)
ITEM, GROUP_SUMS, ATTEND_BLOCK = range(29, 32)  # bytes of a number as the tiles read it; code
FIELDS = 32


@compiled_part
def norm(item: int, x: int, weight: int, epsilon: np.float32, size: int, to: int, copy: int) -> None:
    """Norm bf16 numbers as transformers' RMSNorm does, and put them at `to` as the tiles read them.

    They are put in bf16 at `copy` as well, unless that is 0.
    """
    partial, total = np.empty(PARTIAL, np.float32), np.float32(0)
    fill_floats(address_of(partial), PARTIAL, 0)
    for start in range(0, size, PARTIAL):
        for i in range(min(PARTIAL, size - start)):
            number = half_at(x + (start + i) * 2, 0)
            partial[i] += number * number
    for i in range(PARTIAL):
        total += partial[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(size) + epsilon)
    for i in range(size):
        number = half_at(weight + i * 2, 0) * to_bf16(half_at(x + i * 2, 0) * scale)
        put_as_read(item, to_bf16(number), to + i * item)
        if copy:
            put_half(number, copy + i * 2, 0)


@compiled_part
def _rotate(item: int, head: int, width: int, cos: int, sin: int, to: int) -> None:
    """Turn a head of fp32 numbers, rounded to bf16, by its position's angles, as transformers does."""
    half = width // 2
    for i in range(width):
        other = -float_at(head + (i + half) * 4) if i < half else float_at(head + (i - half) * 4)
        turned = to_bf16(float_at(head + i * 4) * half_at(cos + i * 2, 0)) + to_bf16(other * half_at(sin + i * 2, 0))
        put_as_read(item, to_bf16(turned), to + i * item)


@compiled_part
def row_groups(rows: int) -> int:
    """Return the number of groups of a matrix's rows."""
    return (rows + GROUP - 1) // GROUP


@compiled_part
def sizes_of(numbers: Any) -> tuple[int, int, int, int, int]:
    """Return the hidden size, heads, groups of heads, a head's width, and positions."""
    return numbers[SIZE], numbers[HEADS], numbers[GROUPS], numbers[WIDTH], numbers[POSITIONS]


@compiled_part
def layout(numbers: Any) -> tuple[int, int, int, int, int]:
    """Return addresses in the work memory: what is projected, parts of attention, x, queries and results as read."""
    size, heads, groups, width, positions = sizes_of(numbers)
    projected, item = numbers[WORK], numbers[ITEM]
    parts = projected + 4 * (heads + 2 * groups) * width
    read = parts + 4 * ((positions + BLOCK - 1) // BLOCK) * heads * (width + 2)
    return projected, parts, read, read + item * size, read + item * (size + heads * width)


@compiled_part
def project(numbers: Any, piece: int) -> None:
    """Compute 32 rows of query, key or value."""
    size, width = numbers[SIZE], numbers[WIDTH]
    to, _, read, _, _ = layout(numbers)
    row, rows, weight = piece, numbers[HEADS] * width, numbers[QUERY]
    for following in (numbers[KEY], numbers[VALUE]):
        if row >= row_groups(rows):
            row, to = row - row_groups(rows), to + 4 * rows
            rows, weight = numbers[GROUPS] * width, following
        else:
            break
    row *= GROUP
    sums = np.empty((1, GROUP), np.float32)
    call_at(numbers[GROUP_SUMS], address_of(sums), 1, row, 1, rows, size, weight, 0, read)
    for r in range(min(GROUP, rows - row)):
        put_float(to_bf16(sums[0, r]), to + (row + r) * 4)


@compiled_part
def place_head(numbers: Any, head: int) -> None:
    """Turn a head of queries or keys by its position's angles; put keys and values into the cache."""
    heads, groups, width, positions, cos, sin, item = (
        numbers[HEADS],
        numbers[GROUPS],
        numbers[WIDTH],
        numbers[POSITIONS],
        numbers[COS],
        numbers[SIN],
        numbers[ITEM],
    )
    projected, _, _, queries, _ = layout(numbers)
    place, last = projected + head * width * 4, (positions - 1) * width * 2
    if head < heads:
        _rotate(item, place, width, cos, sin, queries + head * width * item)
    elif head < heads + groups:
        _rotate(2, place, width, cos, sin, numbers[KEYS] + (head - heads) * numbers[KEY_GROUP] + last)
    else:
        to = numbers[VALUES] + (head - heads - groups) * numbers[VALUE_GROUP] + last
        for i in range(width):
            put_half(float_at(place + i * 4), to + i * 2, 0)


@compiled_part
def attend(numbers: Any, piece: int) -> None:
    """Attend from a group of query heads to a block of positions."""
    heads, groups, width, positions = numbers[HEADS], numbers[GROUPS], numbers[WIDTH], numbers[POSITIONS]
    shared, blocks = heads // groups, (positions + BLOCK - 1) // BLOCK
    _, parts, _, queries, _ = layout(numbers)
    g, first = piece // blocks, piece % blocks * BLOCK
    keys = numbers[KEYS] + g * numbers[KEY_GROUP] + first * width * 2
    values = numbers[VALUES] + g * numbers[VALUE_GROUP] + first * width * 2
    query, part = queries + g * shared * width * numbers[ITEM], parts + piece * shared * (width + 2) * 4
    count, scale = min(BLOCK, positions - first), numbers[CONSTANTS] + 8
    call_at(numbers[ATTEND_BLOCK], shared, keys, values, query, 0, count, width, scale, part)


@compiled_part
def combine(numbers: Any, head: int) -> None:
    """Combine the blocks of a head."""
    heads, groups, width, positions = numbers[HEADS], numbers[GROUPS], numbers[WIDTH], numbers[POSITIONS]
    shared, blocks = heads // groups, (positions + BLOCK - 1) // BLOCK
    _, parts, _, _, found = layout(numbers)
    of_head = parts + (head // shared * blocks * shared + head % shared) * (width + 2) * 4
    columns = np.empty(width, np.float32)
    combine_blocks(of_head, blocks, shared * (width + 2) * 4, width, columns)
    for i in range(width):
        put_as_read(numbers[ITEM], to_bf16(columns[i]), found + (head * width + i) * numbers[ITEM])


@compiled_part
def add_output(numbers: Any, piece: int) -> None:
    """Compute 32 rows of the output's projection, and add them to the residual stream."""
    size, hidden, attended = numbers[SIZE], numbers[HIDDEN], numbers[ATTENDED]
    _, _, _, _, found = layout(numbers)
    sums, row = np.empty((1, GROUP), np.float32), piece * GROUP
    call_at(
        numbers[GROUP_SUMS], address_of(sums), 1, row, 1, size, numbers[HEADS] * numbers[WIDTH], numbers[OUT], 0, found
    )
    for r in range(row, min(row + GROUP, size)):
        put_half(half_at(hidden + r * 2, 0) + to_bf16(sums[0, r - row]), attended + r * 2, 0)


@compiled_part
def route(numbers: Any) -> None:
    """Norm the residual stream, and choose experts by the router's logits, which are rounded to bf16."""
    size, experts, attended, normed = numbers[SIZE], numbers[EXPERTS], numbers[ATTENDED], numbers[NORMED]
    _, _, read, _, _ = layout(numbers)
    norm(numbers[ITEM], attended, numbers[SECOND_NORM], float_at(numbers[CONSTANTS] + 4), size, read, normed)
    logits = np.empty((experts + GROUP - 1) // GROUP * GROUP, np.float32)
    for row in range(0, experts, GROUP):
        sums = address_of(logits) + row * 4
        call_at(numbers[GROUP_SUMS], sums, 1, row, 1, experts, size, numbers[ROUTER], 0, read)
    for expert in range(experts):
        logits[expert] = to_bf16(logits[expert])
    choose(logits[:experts], numbers[TOP_K], numbers[CHOSEN], numbers[SHARES])


@compiled_part
def choose(logits: Any, top_k: int, chosen: int, shares: int) -> None:
    """Put the `top_k` largest of fp32 logits at `chosen`, int64, and their parts of 1 at `shares`, fp32.

    The largest comes first, of equal ones the first. The parts are the softmax over all, scaled so that their sum is 1.
    """
    numbers = carray(integers(chosen), top_k)
    last, last_index, total = np.float32(np.inf), -1, np.float32(0)
    for i in range(top_k):
        best, best_index = np.float32(-np.inf), -1
        for expert in range(len(logits)):
            value = logits[expert] if logits[expert] == logits[expert] else np.float32(-np.inf)  # a NaN comes last
            later = value < last or (value == last and expert > last_index)
            if later and (best_index < 0 or value > best):
                best, best_index = value, expert
        numbers[i] = last_index = best_index
        last = best
    for expert in range(len(logits)):
        total += np.exp(logits[expert] - logits[numbers[0]])
    together = np.float32(0)
    for i in range(top_k):
        share = np.exp(logits[numbers[i]] - logits[numbers[0]]) / total
        put_float(share, shares + i * 4)
        together += share
    for i in range(top_k):
        put_float(float_at(shares + i * 4) / together, shares + i * 4)
