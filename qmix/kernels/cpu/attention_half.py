"""The half of a decoder layer before its experts, for one token: a single piece of work for the thread team.

Its stages (`stages`) follow transformers' Mixtral, with the same roundings to bf16: norm, projections to query, key and
value, rotary embedding, attention over the KV cache, projection to the output and the residual, norm, and the router's
product. Each is a few microseconds of work on its own, less than torch and Python need around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from numba import carray

from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import address_of, float_at, next_piece
from qmix.kernels.cpu.attention import BLOCK, block_of
from qmix.kernels.cpu.compiled import compiled_address
from qmix.kernels.cpu.half_layer_pieces import (
    CONSTANTS,
    FIELDS,
    HIDDEN,
    ITEM,
    NORM,
    add_output,
    attend,
    combine,
    layout,
    norm,
    place_head,
    project,
    route,
    row_groups,
    sizes_of,
)
from qmix.kernels.cpu.products import holds_of
from qmix.kernels.cpu.stages import finish, wait_for
from qmix.kernels.cpu.sums import sums_of, x_item


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
    holds = holds_of(torch.bfloat16)
    item, size = x_item(holds), hidden.numel()
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
    addresses = *inputs, *cache_places, *layer.places, *results
    team.run(half_layer_kernel(), 0, *sizes, *addresses, item, sums_of(holds), block_of(holds))
    return attended, normed, logits


@cache
def half_layer_kernel() -> int:
    """Return the address of the kernel of half a layer; `sums_of` and `block_of` give it its tiles."""

    def kernel(block: Any) -> None:
        numbers = carray(block, FIELDS)
        size, heads, groups, width, positions = sizes_of(numbers)
        done = address_of(numbers) + 8
        to_place = 1 + row_groups(heads * width) + 2 * row_groups(groups * width)
        to_attend = to_place + heads + 2 * groups
        to_combine = to_attend + groups * ((positions + BLOCK - 1) // BLOCK)
        to_add = to_combine + heads
        to_route = to_add + row_groups(size)
        piece = next_piece(block)
        while piece <= to_route:
            if piece < 1:
                norm(
                    numbers[ITEM],
                    numbers[HIDDEN],
                    numbers[NORM],
                    float_at(numbers[CONSTANTS]),
                    size,
                    layout(numbers)[2],
                    0,
                )
                finish(done, 1)
            elif piece < to_place:
                wait_for(done, 1)
                project(numbers, piece - 1)
                finish(done, to_place)
            elif piece < to_attend:
                wait_for(done, to_place)
                place_head(numbers, piece - to_place)
                finish(done, to_attend)
            elif piece < to_combine:
                wait_for(done, to_attend)
                attend(numbers, piece - to_attend)
                finish(done, to_combine)
            elif piece < to_add:
                wait_for(done, to_combine)
                combine(numbers, piece - to_combine)
                finish(done, to_add)
            elif piece < to_route:
                wait_for(done, to_add)
                add_output(numbers, piece - to_add)
                finish(done, to_route)
            else:
                wait_for(done, to_route)
                route(numbers)
            piece = next_piece(block)

    return compiled_address(kernel)
