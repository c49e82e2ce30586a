"""All layers of a few tokens, if every expert is in memory: a single piece of work for the thread team.

Between two layers nothing is left for Python: the kernel calls that of the half before the experts (`attention_half`),
hands the chosen experts' addresses and their tokens to that of the experts (`experts`), and goes on with the next
layer. Both return when all of their pieces are done, by whichever thread. Numbers are those of a layer at a time.

A layer has a row of int64 numbers: the block of its first half, that of the choice, and for each precision of the
store's experts a block and a table of all experts; then the addresses of all experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from qmix.kernels.cpu import half_layer_pieces as half
from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import call_at, integers, next_piece
from qmix.kernels.cpu.attention_half import HalfLayer, HalfLayerSizes, Seen, half_layer_block, half_layer_kernel
from qmix.kernels.cpu.compiled import compiled_address, compiled_part
from qmix.kernels.cpu.experts import (
    COUNT,
    DIRECT,
    EXPERT_FIELDS,
    EXPERTS,
    FIRST,
    ITEM,
    OUT,
    PLACES,
    READ,
    READ_INNER,
    RESIDUAL,
    RESULT,
    ROWS,
    TABLE,
    TOKENS,
    WEIGHTS,
    X,
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
# the block of a choice, after the counts of pieces drawn and done: sizes, and addresses of the choice, its shares,
# memory for the places of each expert's tokens, the first of the mixture's blocks, and the experts, each with the
# number of its precision
CHOICES, COUNT_EXPERTS, PRECISIONS, CHOSEN, SHARES, ORDER, BLOCKS, KNOWN = range(2, 10)
CHOICE_FIELDS = 10

KnownExpert = tuple[str, Sequence[int]]  # its precision, and the addresses of its matrices and their scales


class ResidentLayers:
    """The layers of a model whose experts are all in memory. Memory at the addresses is the caller's to keep.

    One step at a time: its numbers lie in memory that the next one uses again.
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
        scores. `sizes` are the model's; its rows do not count.
        """
        self.sizes, self.count, self._inner = sizes, len(layers), inner
        precisions = sorted({precision for row in experts for precision, _ in row})
        self._layers, self._constants = layers, torch.tensor(constants, dtype=torch.float32)
        self._fresh = np.array([self._row(layer, precisions, row) for layer, row in enumerate(experts)], np.int64)
        self._rows = self._fresh.copy()
        choice, blocks = half.FIELDS, half.FIELDS + CHOICE_FIELDS
        tables = blocks + len(precisions) * MIXTURE_FIELDS
        known = tables + len(precisions) * sizes.experts * EXPERT_FIELDS
        starts = self._rows.ctypes.data + np.arange(len(layers)) * self._rows.strides[0]
        self._fresh[:, choice + BLOCKS], self._fresh[:, choice + KNOWN] = starts + blocks * WORD, starts + known * WORD
        for index in range(len(precisions)):
            table = tables + index * sizes.experts * EXPERT_FIELDS
            self._fresh[:, blocks + index * MIXTURE_FIELDS + TABLE] = starts + table * WORD

    def _row(self, layer: int, precisions: list[str], experts: Sequence[KnownExpert]) -> list[int]:
        """Return a layer's numbers, those of a step still 0."""
        sizes, inputs = self.sizes, (0, 0, 0, self._constants[layer].data_ptr(), 0)
        row = [*half_layer_block(sizes, inputs, (0, 0, 0, 0), self._layers[layer], (0, 0, 0, 0), (0, 0))]
        row += [0, 0, 0, sizes.experts, len(precisions), 0, 0, 0, 0, 0]
        for precision in precisions:
            holds = holds_in(precision, torch.bfloat16)
            row += [0, 0, 0, 0, 0, sizes.top_k, sizes.hidden, self._inner, 0, 0, *[0] * 8]
            row += [isinstance(holds, str), x_item(holds), sums_of(holds)]
        row += [0] * (len(precisions) * sizes.experts * EXPERT_FIELDS)
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
        seen: Seen,
    ) -> list[list[int]]:
        """Take the tokens' residual streams, T times H numbers in bf16, through all layers in place.

        Returns the experts of each layer, [L][T * k]. `rotary` are the tokens' cosines and sines, T times D each.
        `keys` and `values` are the addresses of each layer's cache, `strides` the bytes from one group of theirs to the
        next; `seen` is what each token sees of it.
        """
        tokens, (hidden, top_k) = len(seen.table), (self.sizes.hidden, self.sizes.top_k)
        work = torch.empty(self.sizes._replace(rows=tokens).work_bytes(seen.blocks), dtype=torch.uint8)
        attended, normed = torch.empty(2, tokens, hidden, dtype=torch.bfloat16)
        chosen, shares = torch.empty(self.count, tokens, top_k, dtype=torch.int64), torch.empty(tokens, top_k)
        rows, place = self._rows, stream.data_ptr()
        rows[:] = self._fresh
        rows[:, half.ROWS], rows[:, half.HIDDEN], rows[:, half.WORK] = tokens, place, work.data_ptr()
        rows[:, half.COS], rows[:, half.SIN] = rotary[0].data_ptr(), rotary[1].data_ptr()
        rows[:, half.KEYS], rows[:, half.VALUES] = keys, values
        rows[:, half.KEY_GROUP], rows[:, half.VALUE_GROUP] = strides
        rows[:, half.SEEN], rows[:, half.BLOCKS] = seen.table.data_ptr(), seen.blocks
        rows[:, half.ATTENDED], rows[:, half.NORMED] = attended.data_ptr(), normed.data_ptr()
        rows[:, half.CHOSEN] = chosen.data_ptr() + WORD * tokens * top_k * np.arange(self.count)
        rows[:, half.SHARES] = shares.data_ptr()
        choices = tokens * top_k
        order, outputs = torch.empty(choices, dtype=torch.int64), torch.empty(choices * hidden, dtype=torch.bfloat16)
        read = torch.empty(4 * choices * (hidden + self._inner), dtype=torch.uint8)  # x as read, and the inner numbers
        self._set_mixture(tokens, order, read, normed)
        self._set_sum(outputs, attended, stream)
        team.run(
            resident_step_kernel(),
            *(len(rows), rows.strides[0], rows.ctypes.data, half_layer_kernel(), experts_kernel()),
        )
        found: list[list[int]] = chosen.view(self.count, tokens * top_k).tolist()
        return found

    def _mixtures(self) -> Iterator[np.ndarray]:
        """Yield for each precision the blocks of all layers, [L, numbers from the block on]."""
        for index in range(int(self._rows[0, half.FIELDS + PRECISIONS])):
            yield self._rows[:, half.FIELDS + CHOICE_FIELDS + index * MIXTURE_FIELDS :]

    def _set_mixture(self, tokens: int, order: torch.Tensor, read: torch.Tensor, normed: torch.Tensor) -> None:
        """Set what the choice and the products of a step's experts read and write."""
        rows, choice = self._rows, half.FIELDS
        rows[:, choice + CHOICES], rows[:, choice + ORDER] = len(order), order.data_ptr()
        rows[:, choice + CHOSEN], rows[:, choice + SHARES] = rows[:, half.CHOSEN], rows[:, half.SHARES]
        for block in self._mixtures():
            item = int(block[0, ITEM])
            direct = tokens == 1 and item == 2
            block[:, TOKENS], block[:, DIRECT], block[:, X] = tokens, direct, normed.data_ptr()
            block[:, READ] = normed.data_ptr() if direct else read.data_ptr()
            block[:, READ_INNER] = read.data_ptr() + item * len(order) * self.sizes.hidden

    def _set_sum(self, outputs: torch.Tensor, attended: torch.Tensor, result: torch.Tensor) -> None:
        """Set where the experts' outputs lie, what their sum is added to, and where the result goes."""
        for block in self._mixtures():
            block[:, OUT], block[:, RESIDUAL] = outputs.data_ptr(), attended.data_ptr()
            block[:, RESULT] = result.data_ptr()


@compiled_part
def _hand_over(row: int) -> None:
    """Give the chosen experts of a layer, with their tokens, to the block of their precision; the last of these sums
    the outputs.
    """
    choice = carray(integers(row + half.FIELDS * WORD), CHOICE_FIELDS)
    choices, known, place = choice[CHOICES], choice[KNOWN], choice[ORDER]
    chosen, last = carray(integers(choice[CHOSEN]), choices), 0
    for number in range(choice[COUNT_EXPERTS]):
        count, order = 0, carray(integers(place), choices)
        for i in range(choices):
            if chosen[i] == number:
                order[count] = i
                count += 1
        if count == 0:
            continue
        expert = carray(integers(known + number * (1 + MATRICES) * WORD), 1 + MATRICES)
        block = choice[BLOCKS] + expert[0] * MIXTURE_FIELDS * WORD
        numbers = carray(integers(block), MIXTURE_FIELDS)
        entry = carray(integers(numbers[TABLE] + numbers[EXPERTS] * EXPERT_FIELDS * WORD), EXPERT_FIELDS)
        entry[:MATRICES] = expert[1:]
        entry[PLACES], entry[COUNT], entry[FIRST] = place, count, numbers[ROWS]
        numbers[EXPERTS] += 1
        numbers[ROWS] += count
        place += count * WORD
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
