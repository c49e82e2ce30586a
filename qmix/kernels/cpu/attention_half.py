"""The half of a decoder layer before its experts, for one token: a single piece of work for the thread team.

Its stages (`stages`) follow transformers' Mixtral, with the same roundings to bf16: norm, projections to query, key and
value, rotary embedding, attention over the KV cache, projection to the output and the residual, norm, and the router's
product. Each is a few microseconds of work on its own, less than torch and Python need around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from qmix.kernels.cpu import team
from qmix.kernels.cpu.attention import BLOCK, attend_block, combine_blocks
from qmix.kernels.cpu.attention_tile import pointer
from qmix.kernels.cpu.blocks import to_bf16
from qmix.kernels.cpu.compiled import compiled_address, constant_first
from qmix.kernels.cpu.expert_tile import half_at, put_float
from qmix.kernels.cpu.experts import put_as_read
from qmix.kernels.cpu.products import holds_of
from qmix.kernels.cpu.row_tile import GROUP
from qmix.kernels.cpu.stages import finish, wait_for
from qmix.kernels.cpu.sums import group_sums, x_item
from qmix.kernels.cpu.vectors import float_at, next_piece, put_half

PARTIAL = 16  # sums of squares side by side

# of the kernel's block, after the counts of pieces drawn and done
SIZE, HEADS, GROUPS, WIDTH, POSITIONS, EXPERTS = range(2, 8)
HIDDEN, COS, SIN, CONSTANTS, WORK = range(8, 13)  # addresses, as are the following
KEYS, VALUES, KEY_GROUP, VALUE_GROUP = range(13, 17)  # the last two are strides in bytes
NORM, QUERY, KEY, VALUE, OUT, SECOND_NORM, ROUTER = range(17, 24)
ATTENDED, NORMED, LOGITS = range(24, 27)


@dataclass(frozen=True, slots=True)
class HalfLayer:
    """The weights of a layer's first half, in bf16, contiguous: two norms, four projections, and the router's."""

    norm: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    second_norm: torch.Tensor
    router: torch.Tensor

    @property
    def places(self) -> tuple[int, ...]:
        parts = self.norm, self.query, self.key, self.value, self.out, self.second_norm, self.router
        return tuple(part.data_ptr() for part in parts)


def attend_and_route(
    layer: HalfLayer,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    epsilons: tuple[float, float],
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the residual stream after attention [1, H], its norm [1, H] and the router's logits [1, E], all in bf16.

    `hidden` is a token's residual stream, H numbers in bf16; `rotary` its cosines and sines, D each. `keys` and
    `values` [G, S, D] are those of the sequence, with contiguous rows; the last one of each group is written here.
    """
    groups, positions, width = keys.shape
    heads, experts = len(layer.query) // width, len(layer.router)
    item, size = x_item(holds_of(torch.bfloat16)), hidden.numel()
    blocks = -(-positions // BLOCK)
    attended, normed = hidden.new_empty(1, size), hidden.new_empty(1, size)
    logits = hidden.new_empty(1, experts)
    numbers = torch.tensor([*epsilons, scaling], dtype=torch.float32)
    projected = (heads + 2 * groups) * width
    lengths = 4 * projected, 4 * blocks * heads * (width + 2), item * size, 2 * item * heads * width
    work = torch.empty(sum(lengths), dtype=torch.uint8)
    sizes = size, heads, groups, width, positions, experts
    cache_places = keys.data_ptr(), values.data_ptr(), 2 * keys.stride(0), 2 * values.stride(0)
    results = attended.data_ptr(), normed.data_ptr(), logits.data_ptr()
    inputs = hidden.data_ptr(), rotary[0].data_ptr(), rotary[1].data_ptr(), numbers.data_ptr(), work.data_ptr()
    team.run(_half_layer(holds_of(torch.bfloat16)), 0, *sizes, *inputs, *cache_places, *layer.places, *results)
    return attended, normed, logits


def prepare() -> None:
    """Load the kernel; compile it if it is not on disk yet."""
    _half_layer(holds_of(torch.bfloat16))


@njit
def _norm(item: int, x: int, weight: int, epsilon: np.float32, size: int, to: int, copy: int) -> None:
    """Norm bf16 numbers as transformers' RMSNorm does; put them at `to` as the tiles read them, and in bf16 at `copy`
    unless that is 0."""
    partial = np.zeros(PARTIAL, np.float32)
    for start in range(0, size, PARTIAL):
        for i in range(min(PARTIAL, size - start)):
            number = half_at(x + (start + i) * 2, 0)
            partial[i] += number * number
    scale = np.float32(1) / np.sqrt(partial.sum() / np.float32(size) + epsilon)
    for i in range(size):
        number = half_at(weight + i * 2, 0) * to_bf16(half_at(x + i * 2, 0) * scale)
        put_as_read(item, to_bf16(number), to + i * item)
        if copy:
            put_half(number, copy + i * 2, 0)


@njit
def _rotate(item: int, head: int, width: int, cos: int, sin: int, to: int) -> None:
    """Turn a head of fp32 numbers, rounded to bf16, by its position's angles, as transformers does."""
    half = width // 2
    for i in range(width):
        other = -float_at(head + (i + half) * 4) if i < half else float_at(head + (i - half) * 4)
        turned = to_bf16(float_at(head + i * 4) * half_at(cos + i * 2, 0)) + to_bf16(other * half_at(sin + i * 2, 0))
        put_as_read(item, to_bf16(turned), to + i * item)


@njit
def _groups(rows: int) -> int:
    return (rows + GROUP - 1) // GROUP


@njit
def _layout(item: int, numbers: Any) -> tuple[int, int, int, int, int]:
    """Return addresses in the work memory: what is projected, parts of attention, x, queries and results as read."""
    size, heads, groups, width, positions = (
        numbers[SIZE],
        numbers[HEADS],
        numbers[GROUPS],
        numbers[WIDTH],
        numbers[POSITIONS],
    )
    projected = numbers[WORK]
    parts = projected + 4 * (heads + 2 * groups) * width
    read = parts + 4 * ((positions + BLOCK - 1) // BLOCK) * heads * (width + 2)
    return projected, parts, read, read + item * size, read + item * (size + heads * width)


@constant_first
def _project(holds: Any, item: Any, numbers: Any, piece: Any) -> None:
    """Compute 32 rows of query, key or value."""
    size, width = numbers[SIZE], numbers[WIDTH]
    to, _, read, _, _ = _layout(item, numbers)
    row, rows, weight = piece, numbers[HEADS] * width, numbers[QUERY]
    for following in (numbers[KEY], numbers[VALUE]):
        if row >= _groups(rows):
            row, to = row - _groups(rows), to + 4 * rows
            rows, weight = numbers[GROUPS] * width, following
        else:
            break
    row *= GROUP
    sums = np.empty((1, GROUP), np.float32)
    group_sums(holds, sums, row, 1, rows, size, weight, 0, read)
    for r in range(min(GROUP, rows - row)):
        put_float(to_bf16(sums[0, r]), to + (row + r) * 4)


@njit
def _place_head(item: int, numbers: Any, head: int) -> None:
    """Turn a head of queries or keys by its position's angles; put keys and values into the cache."""
    heads, groups, width, positions, cos, sin = (
        numbers[HEADS],
        numbers[GROUPS],
        numbers[WIDTH],
        numbers[POSITIONS],
        numbers[COS],
        numbers[SIN],
    )
    projected, _, _, queries, _ = _layout(item, numbers)
    place, last = projected + head * width * 4, (positions - 1) * width * 2
    if head < heads:
        _rotate(item, place, width, cos, sin, queries + head * width * item)
    elif head < heads + groups:
        _rotate(2, place, width, cos, sin, numbers[KEYS] + (head - heads) * numbers[KEY_GROUP] + last)
    else:
        to = numbers[VALUES] + (head - heads - groups) * numbers[VALUE_GROUP] + last
        for i in range(width):
            put_half(float_at(place + i * 4), to + i * 2, 0)


@constant_first
def _attend(holds: Any, item: Any, numbers: Any, piece: Any) -> None:
    """Attend from a group of query heads to a block of positions."""
    heads, groups, width, positions = numbers[HEADS], numbers[GROUPS], numbers[WIDTH], numbers[POSITIONS]
    shared, blocks = heads // groups, (positions + BLOCK - 1) // BLOCK
    _, parts, _, queries, _ = _layout(item, numbers)
    g, first = piece // blocks, piece % blocks * BLOCK
    scores, added = np.empty((BLOCK // GROUP, shared, GROUP), np.float32), np.empty(BLOCK, np.float32)
    keys = numbers[KEYS] + g * numbers[KEY_GROUP] + first * width * 2
    values = numbers[VALUES] + g * numbers[VALUE_GROUP] + first * width * 2
    query, part = queries + g * shared * width * item, parts + piece * shared * (width + 2) * 4
    count, scale = min(BLOCK, positions - first), float_at(numbers[CONSTANTS] + 8)
    attend_block(holds, scores, added, keys, values, query, 0, count, width, scale, part)


@njit
def _combine(item: int, numbers: Any, head: int) -> None:
    """Combine the blocks of a head."""
    heads, groups, width, positions = numbers[HEADS], numbers[GROUPS], numbers[WIDTH], numbers[POSITIONS]
    shared, blocks = heads // groups, (positions + BLOCK - 1) // BLOCK
    _, parts, _, _, found = _layout(item, numbers)
    of_group = parts + head // shared * blocks * shared * (width + 2) * 4
    columns = np.empty(width, np.float32)
    combine_blocks(carray(pointer(of_group), (blocks, shared, width + 2))[:, head % shared], columns)
    for i in range(width):
        put_as_read(item, to_bf16(columns[i]), found + (head * width + i) * item)


@constant_first
def _add_output(holds: Any, item: Any, numbers: Any, piece: Any) -> None:
    """Compute 32 rows of the output's projection, and add them to the residual stream."""
    size, hidden, attended = numbers[SIZE], numbers[HIDDEN], numbers[ATTENDED]
    _, _, _, _, found = _layout(item, numbers)
    sums, row = np.empty((1, GROUP), np.float32), piece * GROUP
    group_sums(holds, sums, row, 1, size, numbers[HEADS] * numbers[WIDTH], numbers[OUT], 0, found)
    for r in range(row, min(row + GROUP, size)):
        put_half(half_at(hidden + r * 2, 0) + to_bf16(sums[0, r - row]), attended + r * 2, 0)


@constant_first
def _route(holds: Any, item: Any, numbers: Any) -> None:
    """Norm the residual stream, and compute the router's logits."""
    size, experts, attended, normed, logits = (
        numbers[SIZE],
        numbers[EXPERTS],
        numbers[ATTENDED],
        numbers[NORMED],
        numbers[LOGITS],
    )
    _, _, read, _, _ = _layout(item, numbers)
    _norm(item, attended, numbers[SECOND_NORM], float_at(numbers[CONSTANTS] + 4), size, read, normed)
    sums = np.empty((1, GROUP), np.float32)
    for row in range(0, experts, GROUP):
        group_sums(holds, sums, row, 1, experts, size, numbers[ROUTER], 0, read)
        for r in range(row, min(row + GROUP, experts)):
            put_half(sums[0, r - row], logits + r * 2, 0)


@cache
def _half_layer(holds: int) -> int:
    item = x_item(holds)

    def kernel(block: Any) -> None:
        numbers = carray(block, 27)
        size, heads, groups, width, positions = (
            numbers[SIZE],
            numbers[HEADS],
            numbers[GROUPS],
            numbers[WIDTH],
            numbers[POSITIONS],
        )
        done = numbers[1:].ctypes.data
        to_place = 1 + _groups(heads * width) + 2 * _groups(groups * width)
        to_attend = to_place + heads + 2 * groups
        to_combine = to_attend + groups * ((positions + BLOCK - 1) // BLOCK)
        to_add = to_combine + heads
        to_route = to_add + _groups(size)
        piece = next_piece(block)
        while piece <= to_route:
            if piece < 1:
                _norm(
                    item,
                    numbers[HIDDEN],
                    numbers[NORM],
                    float_at(numbers[CONSTANTS]),
                    size,
                    _layout(item, numbers)[2],
                    0,
                )
                finish(done, 1)
            elif piece < to_place:
                wait_for(done, 1)
                _project(holds, item, numbers, piece - 1)
                finish(done, to_place)
            elif piece < to_attend:
                wait_for(done, to_place)
                _place_head(item, numbers, piece - to_place)
                finish(done, to_attend)
            elif piece < to_combine:
                wait_for(done, to_attend)
                _attend(holds, item, numbers, piece - to_attend)
                finish(done, to_combine)
            elif piece < to_add:
                wait_for(done, to_combine)
                _combine(item, numbers, piece - to_combine)
                finish(done, to_add)
            elif piece < to_route:
                wait_for(done, to_add)
                _add_output(holds, item, numbers, piece - to_add)
                finish(done, to_route)
            else:
                wait_for(done, to_route)
                _route(holds, item, numbers)
            piece = next_piece(block)

    return compiled_address(kernel)
