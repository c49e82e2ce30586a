"""Experts as qmix encodes them, on the device of the kernels, with a dense reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qmix.geometry import Geometry
from qmix.kernels.gpu.shapes import ExpertShape
from qmix.precision.encode import encoded
from qmix.precision.record import record_layout

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error of a tensor, which is not a number where any of it is not."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


class Experts:
    """`number` random experts of one precision: their records, and their weights in fp32."""

    def __init__(self, precision: str, dtype: str, hidden: int, inner: int, number: int = 4) -> None:
        geometry = Geometry(hidden, inner, 1, 4, 2, 32, 2, 2, 64, 64)
        layout = record_layout(geometry, precision, dtype)
        main = tuple(item.offset for item in layout.parts if item.part.name in ("codes", "weight"))
        scales = tuple(item.offset for item in layout.parts if item.part.name in ("absmax", "row_max"))
        self.shape = ExpertShape(precision, hidden, inner, main, scales or (0, 0, 0))
        self.dtype, self.number = DTYPES[dtype], number
        self.records, self.weights = [], []
        with torch.device("cpu"):
            for _ in range(number):
                shapes = geometry.expert_matrices.items()
                matrices = {name: (torch.randn(r, c) / c**0.5).to(self.dtype) for name, (r, c) in shapes}
                expert = encoded(matrices, geometry, precision, dtype)
                first = expert.gate.weight if precision == "half" else expert.gate.codes
                self.records.append(torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage()))
                sizes = ((expert.gate, inner), (expert.up, inner), (expert.down, hidden))
                self.weights.append([matrix.dequantize(0, rows) for matrix, rows in sizes])
        device = torch.get_default_device()
        self.records = [record.to(device) for record in self.records]
        self.weights = [[matrix.to(device) for matrix in matrices] for matrices in self.weights]

    def addresses(self, absent: tuple[int, ...] = ()) -> torch.Tensor:
        return torch.tensor([0 if e in absent else record.data_ptr() for e, record in enumerate(self.records)])

    def forward(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return an expert's forward in fp64, with silu(gate) * up rounded to half precision."""
        gate, up, down = (matrix.double() for matrix in self.weights[expert])
        inner = F.silu(x.double() @ gate.T) * (x.double() @ up.T)
        return inner.to(self.dtype).double() @ down.T
