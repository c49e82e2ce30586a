"""One expert over the bytes of its record, in whatever precision it has."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from qmix.checkpoint.torch_dtypes import TORCH
from qmix.geometry import MATRICES
from qmix.precision.matmul import HalfMatrix, Matrix
from qmix.precision.quantised import FourBitMatrix, Int8Matrix
from qmix.precision.record import RecordLayout


class Expert:
    """One expert's three matrices in a buffer; a call is the expert's forward.

    `places` are the addresses of gate, up and down, each with its scales.
    """

    def __init__(
        self,
        buffer: torch.Tensor,
        layout: RecordLayout,
        shapes: dict[str, tuple[int, int]],
        invariant: bool = False,
        widened_from: int | None = None,
    ) -> None:
        tensors: dict[str, list[torch.Tensor]] = {matrix: [] for matrix in MATRICES}
        for item in layout.parts:
            raw = buffer[item.offset : item.offset + item.part.nbytes]
            tensors[item.matrix].append(raw.view(TORCH[item.part.dtype]).view(item.part.shape))
        self.gate, self.up, self.down = (
            _matrix(layout.precision, tensors[matrix], *shapes[matrix], invariant, widened_from) for matrix in MATRICES
        )
        self.precision = layout.precision
        self.places = (*self.gate.places, *self.up.places, *self.down.places)  # of its slot, which does not move

    def takes_ours(self, tokens: int) -> bool:
        """Return True if qmix's own products compute so many rows: then `multiply_experts` takes them."""
        return all(matrix.takes_ours(tokens) for matrix in (self.gate, self.up, self.down))

    def __call__(self, x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return down(activation(gate(x)) * up(x)), [T, hidden] for x [T, hidden]."""
        if activation is F.silu and type(x) is torch.Tensor and self.takes_ours(len(x)):
            from qmix.kernels.cpu.experts import multiply_experts

            outputs, places = x.new_empty(len(x), 1, x.shape[1]), torch.arange(len(x))
            multiply_experts(self.precision, [(self.places, places.data_ptr(), len(x))], x, outputs, self.gate.rows)
            return outputs[:, 0]
        return self.down.multiply(activation(self.gate.multiply(x)).mul_(self.up.multiply(x)))


def _matrix(
    precision: str, tensors: list[torch.Tensor], rows: int, cols: int, invariant: bool, widened_from: int | None
) -> Matrix:
    if precision == "half":
        return HalfMatrix(tensors[0], rows, cols, invariant)
    codes, scales = tensors
    if precision == "int8":
        return Int8Matrix(codes, scales, rows, cols, invariant, widened_from)
    return FourBitMatrix(precision, codes, scales, rows, cols, invariant, widened_from)
