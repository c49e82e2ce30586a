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
SIZE, HEADS, GROUPS, WIDTH, ROWS, EXPERTS, TOP_K = range(2, 9)
HIDDEN, COS, SIN, CONSTANTS, WORK = range(9, 14)  # addresses, as are the following
KEYS, VALUES, KEY_GROUP, VALUE_GROUP = range(14, 18)  # the last two are strides in bytes
NORM, QUERY, KEY, VALUE, OUT, SECOND_NORM, ROUTER = range(18, 25)
ATTENDED, NORMED, CHOSEN, SHARES = range(25, 29)
ITEM, GROUP_SUMS, ATTEND_BLOCK = range(29, 32)  # bytes of a number as the tiles read it; code
SEEN, BLOCKS = range(32, 34)  # the address of what each row sees; the blocks of all rows
FIELDS = 34
# a row of the table of `Seen`: its first position, the number of positions, and the blocks of the rows before
FIRST, POSITIONS, BEFORE = range(3)
SEEN_FIELDS = 3


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
    """Return the hidden size, heads, groups of heads, a head's width, and rows."""
    return numbers[SIZE], numbers[HEADS], numbers[GROUPS], numbers[WIDTH], numbers[ROWS]


@compiled_part
def layout(numbers: Any) -> tuple[int, int, int, int, int]:
    """Return addresses in the work memory: what is projected, parts of attention, x, queries and results as read."""
    size, heads, groups, width, rows = sizes_of(numbers)
    projected, item = numbers[WORK], numbers[ITEM]
    parts = projected + 4 * rows * (heads + 2 * groups) * width
    read = parts + 4 * numbers[BLOCKS] * heads * (width + 2)
    queries = read + item * rows * size
    return projected, parts, read, queries, queries + item * rows * heads * width


@compiled_part
def seen(numbers: Any, row: int) -> Any:
    """Return a row's entry in the table of `Seen`."""
    return carray(integers(numbers[SEEN] + row * SEEN_FIELDS * 8), SEEN_FIELDS)


@compiled_part
def first_norm(numbers: Any, row: int) -> None:
    """Norm a row of the residual stream."""
    size, item = numbers[SIZE], numbers[ITEM]
    to = layout(numbers)[2] + row * size * item
    norm(item, numbers[HIDDEN] + row * size * 2, numbers[NORM], float_at(numbers[CONSTANTS]), size, to, 0)


@compiled_part
def project(numbers: Any, piece: int) -> None:
    """Compute 32 rows of query, key or value for all rows of x."""
    size, width, tokens = numbers[SIZE], numbers[WIDTH], numbers[ROWS]
    to, _, read, _, _ = layout(numbers)
    row, rows, weight = piece, numbers[HEADS] * width, numbers[QUERY]
    for following in (numbers[KEY], numbers[VALUE]):
        if row >= row_groups(rows):
            row, to = row - row_groups(rows), to + 4 * rows
            rows, weight = numbers[GROUPS] * width, following
        else:
            break
    row *= GROUP
    sums = np.empty((tokens, GROUP), np.float32)
    call_at(numbers[GROUP_SUMS], address_of(sums), tokens, row, 1, rows, size, weight, 0, read)
    step = 4 * (numbers[HEADS] + 2 * numbers[GROUPS]) * width
    for t in range(tokens):
        for r in range(min(GROUP, rows - row)):
            put_float(to_bf16(sums[t, r]), to + t * step + (row + r) * 4)


@compiled_part
def place_head(numbers: Any, row: int, head: int) -> None:
    """Turn a head of queries or keys by its position's angles; put keys and values into the cache."""
    heads, groups, width, item = numbers[HEADS], numbers[GROUPS], numbers[WIDTH], numbers[ITEM]
    cos, sin = numbers[COS] + row * width * 2, numbers[SIN] + row * width * 2
    projected, _, _, queries, _ = layout(numbers)
    place = projected + (row * (heads + 2 * groups) + head) * width * 4
    last = (seen(numbers, row)[FIRST] + seen(numbers, row)[POSITIONS] - 1) * width * 2
    if head < heads:
        _rotate(item, place, width, cos, sin, queries + (row * heads + head) * width * item)
    elif head < heads + groups:
        _rotate(2, place, width, cos, sin, numbers[KEYS] + (head - heads) * numbers[KEY_GROUP] + last)
    else:
        to = numbers[VALUES] + (head - heads - groups) * numbers[VALUE_GROUP] + last
        for i in range(width):
            put_half(float_at(place + i * 4), to + i * 2, 0)


@compiled_part
def attend(numbers: Any, piece: int) -> None:
    """Attend from a row's group of query heads to a block of positions."""
    heads, groups, width = numbers[HEADS], numbers[GROUPS], numbers[WIDTH]
    shared, row = heads // groups, numbers[ROWS] - 1
    _, parts, _, queries, _ = layout(numbers)
    block, g = piece // groups, piece % groups
    while seen(numbers, row)[BEFORE] > block:
        row -= 1
    mine = seen(numbers, row)
    first = (block - mine[BEFORE]) * BLOCK
    keys = numbers[KEYS] + g * numbers[KEY_GROUP] + (mine[FIRST] + first) * width * 2
    values = numbers[VALUES] + g * numbers[VALUE_GROUP] + (mine[FIRST] + first) * width * 2
    query = queries + (row * groups + g) * shared * width * numbers[ITEM]
    part = parts + piece * shared * (width + 2) * 4
    count, scale = min(BLOCK, mine[POSITIONS] - first), numbers[CONSTANTS] + 8
    call_at(numbers[ATTEND_BLOCK], shared, keys, values, query, 0, count, width, scale, part)


@compiled_part
def combine(numbers: Any, row: int, head: int) -> None:
    """Combine the blocks of a row's head."""
    heads, width = numbers[HEADS], numbers[WIDTH]
    _, parts, _, _, found = layout(numbers)
    before, blocks = seen(numbers, row)[BEFORE], (seen(numbers, row)[POSITIONS] + BLOCK - 1) // BLOCK
    columns, step = np.empty(width, np.float32), heads * (width + 2) * 4
    combine_blocks(parts + before * step + head * (width + 2) * 4, blocks, step, width, columns)
    to = found + (row * heads + head) * width * numbers[ITEM]
    for i in range(width):
        put_as_read(numbers[ITEM], to_bf16(columns[i]), to + i * numbers[ITEM])


@compiled_part
def add_output(numbers: Any, piece: int) -> None:
    """Compute 32 rows of the output's projection for all rows of x, and add them to the residual stream."""
    size, tokens = numbers[SIZE], numbers[ROWS]
    _, _, _, _, found = layout(numbers)
    sums, row, width = np.empty((tokens, GROUP), np.float32), piece * GROUP, numbers[HEADS] * numbers[WIDTH]
    call_at(numbers[GROUP_SUMS], address_of(sums), tokens, row, 1, size, width, numbers[OUT], 0, found)
    for t in range(tokens):
        hidden, attended = numbers[HIDDEN] + t * size * 2, numbers[ATTENDED] + t * size * 2
        for r in range(row, min(row + GROUP, size)):
            put_half(half_at(hidden + r * 2, 0) + to_bf16(sums[t, r - row]), attended + r * 2, 0)


@compiled_part
def route(numbers: Any, row: int) -> None:
    """Norm a row of the residual stream, and choose its experts by the router's logits, which are rounded to bf16."""
    size, experts, top_k = numbers[SIZE], numbers[EXPERTS], numbers[TOP_K]
    attended, normed = numbers[ATTENDED] + row * size * 2, numbers[NORMED] + row * size * 2
    read = layout(numbers)[2] + row * size * numbers[ITEM]
    norm(numbers[ITEM], attended, numbers[SECOND_NORM], float_at(numbers[CONSTANTS] + 4), size, read, normed)
    logits = np.empty((experts + GROUP - 1) // GROUP * GROUP, np.float32)
    for first in range(0, experts, GROUP):
        sums = address_of(logits) + first * 4
        call_at(numbers[GROUP_SUMS], sums, 1, first, 1, experts, size, numbers[ROUTER], 0, read)
    for expert in range(experts):
        logits[expert] = to_bf16(logits[expert])
    choose(logits[:experts], top_k, numbers[CHOSEN] + row * top_k * 8, numbers[SHARES] + row * top_k * 4)


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
