"""The half of a decoder layer before its experts, for one token: a single piece of work for the thread team.

Its stages (`stages`) follow transformers' Mixtral, with the same roundings to bf16: norm, projections to query, key and
value, rotary embedding, attention over the KV cache, projection to the output and the residual, norm, and the router's
product with the choice of experts. Each is a few microseconds of work on its own, less than torch and Python need
around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

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
        return (
            self.norm.data_ptr(),
            *(self.query.data_ptr(), self.key.data_ptr(), self.value.data_ptr(), self.out.data_ptr()),
            self.second_norm.data_ptr(),
            self.router.data_ptr(),
        )


class HalfLayerSizes(NamedTuple):
    """Sizes of a half layer's work: those of its model, and the positions of a sequence, this token's included."""

    hidden: int
    heads: int
    groups: int
    width: int
    positions: int
    experts: int
    top_k: int

    @property
    def work_bytes(self) -> int:
        """The work memory of a token."""
        item, blocks = x_item(holds_of(torch.bfloat16)), -(-self.positions // BLOCK)
        projected = 4 * (self.heads + 2 * self.groups) * self.width
        parts = 4 * blocks * self.heads * (self.width + 2)
        return projected + parts + item * (self.hidden + 2 * self.heads * self.width)


def half_layer_block(
    sizes: HalfLayerSizes, inputs: Sequence[int], cache: Sequence[int], layer: HalfLayer, results: Sequence[int]
) -> tuple[int, ...]:
    """Return the kernel's block for a layer, in the order of `half_layer_pieces`.

    `inputs` are the addresses of the residual stream, cosines, sines, constants and work memory, `results` those of the
    residual stream after attention, its norm, and the experts chosen with their shares; `cache` those of keys and
    values, with the bytes from one group to the next.
    """
    holds = holds_of(torch.bfloat16)
    code = x_item(holds), sums_of(holds), block_of(holds)
    return 0, 0, *sizes, *inputs, *cache, *layer.places, *results, *code


def attend_and_route(
    layer: HalfLayer,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    epsilons: tuple[float, float],
    scaling: float,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the residual stream after attention [1, H] and its norm [1, H] in bf16, the experts that the router
    chooses [1, k] in int64, and their shares [1, k] in fp32.

    `hidden` is a token's residual stream, H numbers in bf16; `rotary` its cosines and sines, D each. `keys` and
    `values` [G, S, D] are those of the sequence, with contiguous rows; the last one of each group is written here.
    """
    groups, positions, width = keys.shape
    sizes = HalfLayerSizes(
        hidden.numel(), len(layer.query) // width, groups, width, positions, len(layer.router), top_k
    )
    attended, normed = hidden.new_empty(1, sizes.hidden), hidden.new_empty(1, sizes.hidden)
    chosen, shares = torch.empty(1, top_k, dtype=torch.int64), torch.empty(1, top_k)
    numbers = torch.tensor([*epsilons, scaling], dtype=torch.float32)
    work = torch.empty(sizes.work_bytes, dtype=torch.uint8)
    cos, sin = rotary
    inputs = hidden.data_ptr(), cos.data_ptr(), sin.data_ptr(), numbers.data_ptr(), work.data_ptr()
    cache_places = keys.data_ptr(), values.data_ptr(), 2 * keys.stride(0), 2 * values.stride(0)
    results = attended.data_ptr(), normed.data_ptr(), chosen.data_ptr(), shares.data_ptr()
    team.run(half_layer_kernel(), *half_layer_block(sizes, inputs, cache_places, layer, results)[1:])
    return attended, normed, chosen, shares


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
        end = to_route + 1
        piece = next_piece(block)
        while piece < end:
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
                finish(done, end)
            piece = next_piece(block)
        wait_for(done, end)

    return compiled_address(kernel)
