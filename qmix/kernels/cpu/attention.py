"""Attention of single query tokens over long KV caches, at about the speed of reading the cache.

A piece of work is a block of 512 positions of one token and key head, for all query heads that share it: scores,
their softmax relative to the block's own maximum, and the weighted sum of values, all in fp32. A second stage combines
the blocks of each query head in order. Blocks and results are the same for any number of threads.

The first call compiles the kernel, once for an installation.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, types

from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import address_of, call_at, fill_floats, float_at, integers, next_piece, put_half
from qmix.kernels.cpu.attention_tile import AHEAD, WIDTH, fetch, softmax, value_tile
from qmix.kernels.cpu.compiled import compiled_address, compiled_part
from qmix.kernels.cpu.paths import current
from qmix.kernels.cpu.row_tile import BF16, BF16_WIDE, FP16, GROUP, ROWS, TOKENS, dot_tile
from qmix.kernels.cpu.stages import finish, wait_for
from qmix.kernels.cpu.sums import x_item
from qmix.kernels.cpu.vectors import LANES

BLOCK = 512  # positions in a piece of work
BLOCK_SIGNATURE = (types.int64,) * 9, types.void
STRIP = 64  # positions whose values, 16 kB, stay in the L1 cache while all columns are summed


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Return the attention [B, G, R, D] of query [B, G, R, D] to key and value [B, G, S, D].

    All are bf16 or all fp16; D is a multiple of 16, and the rows of key and value are contiguous, one after another.
    `bias`, fp32 [B or 1, S] or None, is added to the scaled scores; a sequence without a visible position gets zeros.
    """
    positions = key.shape[2]
    bias_at = bias_step = 0
    if bias is not None:
        bias = bias.contiguous()
        bias_at, bias_step = bias.data_ptr(), 4 * positions if len(bias) > 1 else 0
    key_at, value_at, key_step, value_step = key.data_ptr(), value.data_ptr(), 2 * key.stride(0), 2 * value.stride(0)
    rows = [
        (key_at + b * key_step, value_at + b * value_step, positions, bias_at + b * bias_step)
        for b in range(len(query))
    ]
    return attend_rows(query, torch.tensor(rows), (2 * key.stride(1), 2 * value.stride(1)), positions, scaling)


def attend_rows(
    query: torch.Tensor, rows: torch.Tensor, group_strides: tuple[int, int], longest: int, scaling: float
) -> torch.Tensor:
    """Return the attention [T, G, R, D] of query [T, G, R, D], where each row has a cache of its own.

    `rows`, int64 [T, 4], has for each row: the address of its first key in the first group, that of its first value,
    its number of positions, at most `longest`, and the address of that many fp32 numbers to add to its scaled scores,
    or 0. Groups are `group_strides` bytes apart, and positions follow one another. A row's result does not depend on
    the other rows.
    """
    tokens, groups, heads, width = query.shape
    blocks = -(-longest // BLOCK)
    holds = FP16 if query.dtype == torch.float16 else BF16 if current().pairs else BF16_WIDE
    as_read = query.to(torch.bfloat16 if x_item(holds) == 2 else torch.float32).contiguous()
    parts = torch.empty(tokens * groups, blocks, heads, width + 2)  # sums of values, their weights' sum, the maximum
    out = torch.empty(tokens, groups, heads, width, dtype=query.dtype)
    scale = torch.tensor([scaling], dtype=torch.float32)
    shape = tokens, groups, heads, width, blocks
    places = as_read.data_ptr(), rows.data_ptr(), parts.data_ptr(), scale.data_ptr()
    kinds = holds == FP16, x_item(holds), block_of(holds)
    team.run(attention_kernel(), 0, *shape, *places, *group_strides, out.data_ptr(), *kinds)
    return out


@cache
def block_of(holds: int) -> int:
    """Return the address of the code that attends from the query heads of a group to `count` positions, at most BLOCK.

    `call_at` calls it. `keys`, `values` and `bias` are addresses of the first position's, `bias` may be 0; `scale` is
    that of an fp32. For each head the `part` [heads, width + 2] gets the weighted sum of values, the sum of weights,
    and the maximum.
    """
    query_item = x_item(holds)

    def attend_block(
        heads: Any, keys: Any, values: Any, queries: Any, bias: Any, count: Any, width: Any, scale: Any, part: Any
    ) -> None:
        used = (count + GROUP - 1) // GROUP
        scores, added = np.empty(used * heads * GROUP, np.float32), np.empty(used * GROUP, np.float32)
        fill_floats(address_of(scores), scores.size, 0)
        fill_floats(address_of(added), count, 0)
        fill_floats(address_of(added) + count * 4, used * GROUP - count, -np.inf)
        if bias:
            for i in range(count):
                added[i] = float_at(bias + i * 4)
        position = 0
        while position < count:
            taken = ROWS if position + ROWS <= count else 1
            for line in range(0, taken * width * 2, 64):
                fetch(keys + position * width * 2 + AHEAD + line)
            for head in range(0, heads, TOKENS):
                dot_tile(
                    holds,
                    taken,
                    min(TOKENS, heads - head),
                    keys + position * width * 2,
                    width * 2,
                    queries + head * width * query_item,
                    width * query_item,
                    width,
                    address_of(scores) + ((position // GROUP * heads + head) * GROUP + position % GROUP) * 4,
                )
            position += taken
        fill_floats(part, heads * (width + 2), 0)
        for head in range(heads):
            place = part + (head * (width + 2) + width) * 4
            of_head, step = address_of(scores) + head * GROUP * 4, heads * GROUP * 4
            softmax(of_head, step, used, float_at(scale), address_of(added), place)
        for strip in range(0, count, STRIP):
            column = 0
            while column < width:
                vectors = WIDTH if column + WIDTH * LANES <= width else 1
                for group in range(strip, min(strip + STRIP, count), GROUP):
                    for head in range(0, heads, TOKENS):
                        value_tile(
                            holds,
                            min(TOKENS, heads - head),
                            vectors,
                            address_of(scores) + (group // GROUP * heads + head) * GROUP * 4,
                            values + (group * width + column) * 2,
                            width * 2,
                            min(GROUP, count - group),
                            part + (head * (width + 2) + column) * 4,
                            (width + 2) * 4,
                        )
                column += vectors * LANES

    return compiled_address(attend_block, BLOCK_SIGNATURE)


@compiled_part
def combine_blocks(first: int, blocks: int, step: int, width: int, sums: Any) -> None:
    """Set `sums` [width] to a head's attention, from the parts of its blocks, `step` bytes apart from `first` on."""
    maximum = np.float32(-np.inf)
    for block in range(blocks):
        maximum = max(maximum, float_at(first + block * step + (width + 1) * 4))
    if maximum == -np.inf:
        maximum = np.float32(0)
    fill_floats(address_of(sums), width, 0)
    total = np.float32(0)
    for block in range(blocks):
        part = first + block * step
        factor = np.exp(float_at(part + (width + 1) * 4) - maximum)
        total += factor * float_at(part + width * 4)
        for column in range(width):
            sums[column] += factor * float_at(part + column * 4)
    share = np.float32(1) / total if total != 0 else np.float32(0)
    for column in range(width):
        sums[column] *= share


@cache
def attention_kernel() -> int:
    """Return the address of the kernel of attention; `block_of` gives it its tiles."""

    def kernel(block: Any) -> None:
        numbers = carray(block, 17)
        tokens, groups, heads, width, blocks = numbers[2:7]
        query, table, parts, scale_at, key_group, value_group, out = numbers[7:14]
        fp16, query_item, attend_block = numbers[14:17]
        done, to_combine = address_of(numbers) + 8, tokens * groups * blocks
        sums = np.empty(width, np.float32)
        piece = next_piece(block)
        while piece < to_combine + tokens * groups * heads:
            if piece < to_combine:
                pair, first = piece // blocks, piece % blocks * BLOCK
                token, g = pair // groups, pair % groups
                key, value, positions, bias = carray(integers(table + token * 32), 4)
                if first < positions:
                    keys = key + g * key_group + first * width * 2
                    values = value + g * value_group + first * width * 2
                    queries = query + pair * heads * width * query_item
                    part = parts + piece * heads * (width + 2) * 4
                    bias = bias + first * 4 if bias else 0
                    count = min(BLOCK, positions - first)
                    call_at(attend_block, heads, keys, values, queries, bias, count, width, scale_at, part)
            else:
                wait_for(done, to_combine)
                row = piece - to_combine
                positions = carray(integers(table + row // (groups * heads) * 32), 4)[2]
                used = (positions + BLOCK - 1) // BLOCK
                of_head = parts + (row // heads * blocks * heads + row % heads) * (width + 2) * 4
                combine_blocks(of_head, used, heads * (width + 2) * 4, width, sums)
                for column in range(width):
                    put_half(sums[column], out + (row * width + column) * 2, fp16)
            finish(done, to_combine)
            piece = next_piece(block)

    return compiled_address(kernel)
