"""All layers of one token, if every expert is in memory: a single piece of work for the thread team.

Between two layers nothing is left for Python: the kernel calls that of the half before the experts (`attention_half`),
hands the chosen experts' addresses to that of the experts (`experts`), and goes on with the next layer. Both return
when all of their pieces are done, by whichever thread. Numbers are those of a layer at a time.

A layer has a row of int64 numbers: the block of its first half, that of the choice, and for each precision of the
store's experts a block and a table of as many experts as a token has; then the addresses of all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from qmix.kernels.cpu import half_layer_pieces as half
from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import call_at, integers, next_piece
from qmix.kernels.cpu.attention_half import HalfLayer, HalfLayerSizes, half_layer_block, half_layer_kernel
from qmix.kernels.cpu.compiled import compiled_address, compiled_part
from qmix.kernels.cpu.experts import (
    COUNT,
    EXPERT_FIELDS,
    EXPERTS,
    FIRST,
    PLACES,
    RESULT,
    ROWS,
    TABLE,
    WEIGHTS,
    experts_kernel,
)
from qmix.kernels.cpu.experts import FIELDS as MIXTURE_FIELDS
from qmix.kernels.cpu.products import holds_in
from qmix.kernels.cpu.stages import finish, wait_for
from qmix.kernels.cpu.sums import sums_of, x_item

MATRICES = 6  # addresses of an expert: three matrices, each with its scales
WORD = 8

# the kernel's block: layers, bytes of a row, address of the first, and the code of both halves
LAYERS, ROW, FIRST_ROW, HALF, MIXTURE = range(1, 6)
FIELDS = 6
# the block of a choice, after the counts of pieces drawn and done: sizes, and addresses of the choice, its shares, the
# numbers 0, 1, 2, ..., the first of the mixture's blocks, and the experts, each with the number of its precision
TOP_K, PRECISIONS, CHOSEN, SHARES, ORDER, BLOCKS, KNOWN = range(2, 9)
CHOICE_FIELDS = 9

KnownExpert = tuple[str, Sequence[int]]  # its precision, and the addresses of its matrices and their scales


class ResidentLayers:
    """The layers of a model whose experts are all in memory. Memory at the addresses is the caller's to keep.

    One token at a time: its numbers lie in memory that the next one uses again.
    """

    def __init__(
        self,
        sizes: HalfLayerSizes,
        inner: int,
        layers: Sequence[HalfLayer],
        experts: Sequence[Sequence[KnownExpert]],
        constants: Sequence[tuple[float, float, float]],
    ) -> None:
        """`inner` is the number of the gates' rows; `constants` are each layer's two epsilons and the scaling of its
        scores. `sizes` are the model's; its positions do not count.
        """
        self.sizes, self.count = sizes, len(layers)
        precisions = sorted({precision for row in experts for precision, _ in row})
        self._layers, self._constants = layers, torch.tensor(constants, dtype=torch.float32)
        self._order = torch.arange(sizes.top_k)
        self._attended, self._normed = torch.empty(2, sizes.hidden, dtype=torch.bfloat16)
        self._chosen = torch.empty(len(layers), sizes.top_k, dtype=torch.int64)
        self._shares = torch.empty(sizes.top_k)
        self._outputs = torch.empty(sizes.top_k, sizes.hidden, dtype=torch.bfloat16)
        self._read = torch.empty(4 * sizes.top_k * (sizes.hidden + inner), dtype=torch.uint8)  # x and inner, as read
        self._rows = np.array([self._row(layer, inner, precisions, row) for layer, row in enumerate(experts)], np.int64)
        choice, blocks = half.FIELDS, half.FIELDS + CHOICE_FIELDS
        tables = blocks + len(precisions) * MIXTURE_FIELDS
        known = tables + len(precisions) * sizes.top_k * EXPERT_FIELDS
        starts = self._rows.ctypes.data + np.arange(len(layers)) * self._rows.strides[0]
        self._rows[:, choice + BLOCKS], self._rows[:, choice + KNOWN] = starts + blocks * WORD, starts + known * WORD
        for index in range(len(precisions)):
            table = tables + index * sizes.top_k * EXPERT_FIELDS
            self._rows[:, blocks + index * MIXTURE_FIELDS + TABLE] = starts + table * WORD
        self._fresh = self._rows.copy()

    def _row(self, layer: int, inner: int, precisions: list[str], experts: Sequence[KnownExpert]) -> list[int]:
        """Return a layer's numbers, those of a token still 0."""
        sizes, chosen = self.sizes, self._chosen[layer].data_ptr()
        inputs = 0, 0, 0, self._constants[layer].data_ptr(), 0
        results = self._attended.data_ptr(), self._normed.data_ptr(), chosen, self._shares.data_ptr()
        row = [*half_layer_block(sizes, inputs, (0, 0, 0, 0), self._layers[layer], results)]
        row += [0, 0, sizes.top_k, len(precisions), chosen, self._shares.data_ptr(), self._order.data_ptr(), 0, 0]
        for precision in precisions:
            holds = holds_in(precision, torch.bfloat16)
            item, direct = x_item(holds), x_item(holds) == 2
            read = self._normed.data_ptr() if direct else self._read.data_ptr()
            inner_at = self._read.data_ptr() + item * sizes.top_k * sizes.hidden
            row += [0, 0, 0, 0, 1, sizes.top_k, sizes.hidden, inner, 0, direct]
            row += [0, self._normed.data_ptr(), read, inner_at, self._outputs.data_ptr(), 0, self._attended.data_ptr()]
            row += [0, isinstance(holds, str), item, sums_of(holds)]
        row += [0] * (len(precisions) * sizes.top_k * EXPERT_FIELDS)
        for precision, addresses in experts:
            row += [precisions.index(precision), *addresses]
        return row

    def run(
        self,
        stream: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: Sequence[int],
        values: Sequence[int],
        strides: tuple[int, int],
        positions: int,
    ) -> list[list[int]]:
        """Take a token's residual stream, H numbers in bf16, through all layers in place.

        Returns the experts of each layer, [L][k]. `rotary` are its cosines and sines, D each. `keys` and `values` are
        the addresses of each layer's, `strides` the bytes from one group of theirs to the next; `positions` are those
        of the sequence with this token, whose place is the last.
        """
        work = torch.empty(self.sizes._replace(positions=positions).work_bytes, dtype=torch.uint8)
        rows, place = self._rows, stream.data_ptr()
        rows[:] = self._fresh
        rows[:, half.POSITIONS], rows[:, half.HIDDEN], rows[:, half.WORK] = positions, place, work.data_ptr()
        rows[:, half.COS], rows[:, half.SIN] = rotary[0].data_ptr(), rotary[1].data_ptr()
        rows[:, half.KEYS], rows[:, half.VALUES] = keys, values
        rows[:, half.KEY_GROUP], rows[:, half.VALUE_GROUP] = strides
        first = half.FIELDS + CHOICE_FIELDS
        count = int(rows[0, half.FIELDS + PRECISIONS])
        rows[:, first + RESULT : first + count * MIXTURE_FIELDS : MIXTURE_FIELDS] = place
        team.run(
            resident_step_kernel(),
            *(len(rows), rows.strides[0], rows.ctypes.data, half_layer_kernel(), experts_kernel()),
        )
        chosen: list[list[int]] = self._chosen.tolist()
        return chosen


@compiled_part
def _hand_over(row: int) -> None:
    """Give the chosen experts of a layer to the block of their precision; the last of these sums the outputs."""
    choice = carray(integers(row + half.FIELDS * WORD), CHOICE_FIELDS)
    top_k, known, order = choice[TOP_K], choice[KNOWN], choice[ORDER]
    chosen, last = carray(integers(choice[CHOSEN]), top_k), 0
    for i in range(top_k):
        expert = carray(integers(known + chosen[i] * (1 + MATRICES) * WORD), 1 + MATRICES)
        block = choice[BLOCKS] + expert[0] * MIXTURE_FIELDS * WORD
        numbers = carray(integers(block), MIXTURE_FIELDS)
        count = numbers[EXPERTS]
        entry = carray(integers(numbers[TABLE] + count * EXPERT_FIELDS * WORD), EXPERT_FIELDS)
        entry[:MATRICES] = expert[1:]
        entry[PLACES], entry[COUNT], entry[FIRST] = order + i * WORD, 1, count
        numbers[EXPERTS] = numbers[ROWS] = count + 1
        last = max(last, block)
    carray(integers(last), MIXTURE_FIELDS)[WEIGHTS] = choice[SHARES]


@cache
def resident_step_kernel() -> int:
    """Return the address of the kernel of all layers."""

    def kernel(block: Any) -> None:
        numbers = carray(block, FIELDS)
        for layer in range(numbers[LAYERS]):
            row = numbers[FIRST_ROW] + layer * numbers[ROW]
            call_at(numbers[HALF], row)
            at = row + half.FIELDS * WORD
            if next_piece(integers(at)) == 0:
                _hand_over(row)
                finish(at + WORD, 1)
            wait_for(at + WORD, 1)
            choice = carray(integers(at), CHOICE_FIELDS)
            for precision in range(choice[PRECISIONS]):
                mixture = choice[BLOCKS] + precision * MIXTURE_FIELDS * WORD
                if carray(integers(mixture), MIXTURE_FIELDS)[EXPERTS] > 0:
                    call_at(numbers[MIXTURE], mixture)

    return compiled_address(kernel)
