"""The half of a decoder layer before its experts, for a few tokens: a single piece of work for the thread team.

Its stages (`stages`) follow transformers' Mixtral, with the same roundings to bf16: norm, projections to query, key and
value, rotary embedding, attention over the KV cache, projection to the output and the residual, norm, and the router's
product with the choice of experts. Each is a few microseconds of work on its own, less than torch and Python need
around it.

Each token is a row with its own place in the cache. A row's numbers do not depend on the other rows: what it sees, and
every order of additions, follows from its own position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from numba import carray

from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import address_of, next_piece
from qmix.kernels.cpu.attention import BLOCK, block_of
from qmix.kernels.cpu.compiled import compiled_address
from qmix.kernels.cpu.half_layer_pieces import (
    BEFORE,
    BLOCKS,
    FIELDS,
    add_output,
    attend,
    combine,
    first_norm,
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
    """Sizes of a half layer's work: those of its model, and the rows."""

    hidden: int
    heads: int
    groups: int
    width: int
    rows: int
    experts: int
    top_k: int

    def work_bytes(self, blocks: int) -> int:
        """Return the bytes of work memory for rows that see `blocks` blocks of positions together."""
        item = _tiles()[0]
        projected = 4 * (self.heads + 2 * self.groups) * self.width
        parts = 4 * blocks * self.heads * (self.width + 2)
        return parts + self.rows * (projected + item * (self.hidden + 2 * self.heads * self.width))


class Seen(NamedTuple):
    """Positions of the cache that rows attend to, for the kernel.

    `table`, int64 [T, 3], has for each row the first position, the number of positions, of which the last is the row's
    own place, and the number of blocks of the rows before it. `blocks` is the number of blocks of all rows.
    """

    table: torch.Tensor
    blocks: int

    @classmethod
    def alone(cls, positions: int) -> Seen:
        """Return the table of a single row that attends to all positions."""
        return cls(torch.tensor([[0, positions, 0]]), -(-positions // BLOCK))

    @classmethod
    def of(cls, first: torch.Tensor, positions: torch.Tensor) -> Seen:
        """Return the table of rows with these first positions and numbers of positions, int64 [T] each."""
        ends = ((positions + BLOCK - 1) // BLOCK).cumsum(0)
        table = torch.stack((first, positions, ends.roll(1)), dim=1)
        table[0, BEFORE] = 0
        return cls(table, int(ends[-1]))


def half_layer_block(
    sizes: HalfLayerSizes,
    inputs: Sequence[int],
    kept: Sequence[int],
    layer: HalfLayer,
    results: Sequence[int],
    seen: Sequence[int],
) -> tuple[int, ...]:
    """Return the kernel's block for a layer, in the order of `half_layer_pieces`.

    `inputs` are the addresses of the residual stream, cosines, sines, constants and work memory, `results` those of the
    residual stream after attention, its norm, and the experts chosen with their shares; `kept` those of keys and
    values, with the bytes from one group to the next; `seen` is the address of a table of `Seen`, and its blocks.
    """
    return 0, 0, *sizes, *inputs, *kept, *layer.places, *results, *_tiles(), *seen


@cache
def _tiles() -> tuple[int, int, int]:
    """Return the bytes of a number as the tiles read it, and the addresses of the code of products and attention."""
    holds = holds_of(torch.bfloat16)
    return x_item(holds), sums_of(holds), block_of(holds)


def attend_and_route(
    layer: HalfLayer,
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    values: torch.Tensor,
    seen: Seen,
    epsilons: tuple[float, float],
    scaling: float,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the residual stream after attention [T, H] and its norm [T, H] in bf16, the experts that the router
    chooses [T, k] in int64, and their shares [T, k] in fp32.

    `hidden` are the tokens' residual streams, T times H numbers in bf16; `rotary` their cosines and sines, T times D
    each. `keys` and `values` [G, N, D] are the cache, with contiguous rows; each token's are written to its place.
    """
    groups, _, width = keys.shape
    rows = len(seen.table)
    sizes = HalfLayerSizes(len(layer.norm), len(layer.query) // width, groups, width, rows, len(layer.router), top_k)
    attended, normed = hidden.new_empty(rows, sizes.hidden), hidden.new_empty(rows, sizes.hidden)
    chosen, shares = torch.empty(rows, top_k, dtype=torch.int64), torch.empty(rows, top_k)
    numbers = torch.tensor([*epsilons, scaling], dtype=torch.float32)
    work = torch.empty(sizes.work_bytes(seen.blocks), dtype=torch.uint8)
    cos, sin = rotary
    inputs = hidden.data_ptr(), cos.data_ptr(), sin.data_ptr(), numbers.data_ptr(), work.data_ptr()
    cache_places = keys.data_ptr(), values.data_ptr(), 2 * keys.stride(0), 2 * values.stride(0)
    results = attended.data_ptr(), normed.data_ptr(), chosen.data_ptr(), shares.data_ptr()
    block = half_layer_block(sizes, inputs, cache_places, layer, results, (seen.table.data_ptr(), seen.blocks))
    team.run(half_layer_kernel(), *block[1:])
    return attended, normed, chosen, shares


@cache
def half_layer_kernel() -> int:
    """Return the address of the kernel of half a layer; `sums_of` and `block_of` give it its tiles."""

    def kernel(block: Any) -> None:
        numbers = carray(block, FIELDS)
        size, heads, groups, width, rows = sizes_of(numbers)
        together, done = heads + 2 * groups, address_of(numbers) + 8
        alone = rows == 1  # then each head is a piece, else each row
        to_place = rows + row_groups(heads * width) + 2 * row_groups(groups * width)
        to_attend = to_place + (together if alone else rows)
        to_combine = to_attend + groups * numbers[BLOCKS]
        to_add = to_combine + (heads if alone else rows)
        to_route = to_add + row_groups(size)
        end = to_route + rows
        piece = next_piece(block)
        while piece < end:
            if piece < rows:
                first_norm(numbers, piece)
                finish(done, rows)
            elif piece < to_place:
                wait_for(done, rows)
                project(numbers, piece - rows)
                finish(done, to_place)
            elif piece < to_attend:
                wait_for(done, to_place)
                for head in range(1 if alone else together):
                    place_head(numbers, 0 if alone else piece - to_place, piece - to_place if alone else head)
                finish(done, to_attend)
            elif piece < to_combine:
                wait_for(done, to_attend)
                attend(numbers, piece - to_attend)
                finish(done, to_combine)
            elif piece < to_add:
                wait_for(done, to_combine)
                for head in range(1 if alone else heads):
                    combine(numbers, 0 if alone else piece - to_combine, piece - to_combine if alone else head)
                finish(done, to_add)
            elif piece < to_route:
                wait_for(done, to_add)
                add_output(numbers, piece - to_add)
                finish(done, to_route)
            else:
                wait_for(done, to_route)
                route(numbers, piece - to_route)
                finish(done, end)
            piece = next_piece(block)
        wait_for(done, end)

    return compiled_address(kernel)
