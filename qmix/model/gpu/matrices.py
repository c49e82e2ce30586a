"""Products on a GPU: matrices as bitsandbytes' CUDA kernels take them, made from a record's bytes.

4 bits   the CPU's packed layout is reordered, absmax is widened to fp32, and `bitsandbytes::gemm_4bit` multiplies: with
         its own kernel for few tokens, dequantised and multiplied by torch for many
int8     codes are widened to half precision, exactly, and multiplied by torch. bitsandbytes' own int8 product would
         quantise x too, and a token's text would then depend on where an expert lies
half     torch multiplies

The same calls run on a CPU, by bitsandbytes' and torch's CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from qmix.checkpoint.safetensors_header import aligned
from qmix.checkpoint.torch_dtypes import TORCH
from qmix.geometry import MATRICES
from qmix.kernels.packing import BLOCK, PACK_ROWS
from qmix.plan.memory import ALIGNMENT
from qmix.precision.bitsandbytes import functional  # noqa: F401 -- registers torch.ops.bitsandbytes
from qmix.precision.formats import FOUR_BITS, fits_kernels
from qmix.precision.record import RecordLayout


class DeviceMatrix:
    """A [rows, cols] matrix on a device. All of its parts and x must lie on the same device.

    bitsandbytes' kernels take addresses unchecked: a part left elsewhere would be read as garbage.
    """

    def __init__(self, rows: int, cols: int, *parts: torch.Tensor) -> None:
        self.rows, self.cols, self.parts = rows, cols, parts

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ self.T, [T, cols] to [T, rows], in x's type. Raises RuntimeError where operands lie apart."""
        places = {x.device, *(part.device for part in self.parts)}
        if len(places) > 1:
            found = ", ".join(sorted(map(str, places)))
            raise RuntimeError(f"product of x [{len(x)}, {self.cols}] with a matrix: operands on {found}")
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class DeviceHalf(DeviceMatrix):
    """The weights themselves in bf16 or fp16."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.parts[0])


class DeviceInt8(DeviceMatrix):
    """Row-wise int8: weight = code * row_max / 127."""

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        codes, row_max = self.parts
        return (F.linear(x, codes.to(x.dtype)) * (row_max / 127)).to(x.dtype)


class DeviceFourBit(DeviceMatrix):
    """4-bit codes in bitsandbytes' order, uint8, and absmax in fp32, both flat."""

    def __init__(self, kind: str, rows: int, cols: int, codes: torch.Tensor, absmax: torch.Tensor) -> None:
        super().__init__(rows, cols, codes, absmax)
        self.kind = kind

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        codes, absmax = self.parts
        return torch.ops.bitsandbytes.gemm_4bit(
            x.contiguous(), codes.view(-1, 1), (self.rows, self.cols), absmax, BLOCK, self.kind
        )


class DeviceExpert:
    """An expert on a device; calling it is the expert's forward."""

    def __init__(self, gate: DeviceMatrix, up: DeviceMatrix, down: DeviceMatrix) -> None:
        self.gate, self.up, self.down = gate, up, down

    def __call__(self, x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return down(activation(gate(x)) * up(x)): [T, hidden] to [T, hidden]."""
        return self.down.multiply(activation(self.gate.multiply(x)).mul_(self.up.multiply(x)))


def is_reordered(precision: str) -> bool:
    """Return True if a record in this precision is reordered to be multiplied on a GPU."""
    return precision in FOUR_BITS


def device_expert(
    record: torch.Tensor, layout: RecordLayout, shapes: dict[str, tuple[int, int]], memory: torch.Tensor | None = None
) -> DeviceExpert:
    """Return the expert whose record's bytes, uint8, lie on a device.

    In int8 and half precision it consists of views of `record`. Where `is_reordered` it lies in `memory`,
    `device_record_bytes` long, on the same device, and `record` is no longer needed.
    """
    parts: dict[str, list[torch.Tensor]] = {matrix: [] for matrix in MATRICES}
    for item in layout.parts:
        raw = record[item.offset : item.offset + item.part.nbytes]
        parts[item.matrix].append(raw.view(TORCH[item.part.dtype]).view(item.part.shape))
    if layout.precision == "half":
        return DeviceExpert(*(DeviceHalf(*shapes[matrix], *parts[matrix]) for matrix in MATRICES))
    if layout.precision == "int8":
        return DeviceExpert(*(DeviceInt8(*shapes[matrix], *parts[matrix]) for matrix in MATRICES))
    assert memory is not None
    matrices, position = [], 0
    for matrix in MATRICES:
        (rows, cols), (codes, absmax) = shapes[matrix], parts[matrix]
        to_codes = memory[position : position + codes.numel()]
        position += aligned(codes.numel(), ALIGNMENT)
        to_absmax = memory[position : position + absmax.numel() * 4].view(torch.float32)
        position += aligned(absmax.numel() * 4, ALIGNMENT)
        reorder(codes, absmax, rows, cols, to_codes, to_absmax)
        matrices.append(DeviceFourBit(layout.precision, rows, cols, to_codes, to_absmax))
    return DeviceExpert(*matrices)


def reorder(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    rows: int,
    cols: int,
    to_codes: torch.Tensor,
    to_absmax: torch.Tensor,
) -> None:
    """Write a 4-bit matrix of a record's layout in bitsandbytes' ordinary one, on any device.

    Of the 32 packed bytes for two columns, byte j holds column j % 2 of rows j // 2 (low nibble) and 16 + j // 2 (high
    nibble); in the ordinary order a byte holds two columns of a row, the first in the high nibble. The work space is
    as large as the codes.
    """
    if not fits_kernels(rows, cols):  # a record has it in the ordinary order
        to_codes.copy_(codes)
        to_absmax.copy_(absmax)
        return
    pairs = codes.view(-1, cols // 2, PACK_ROWS // 2, 2)  # [groups, column pairs, rows of a nibble, column of a pair]
    first, second = pairs.unbind(-1)
    ordered = to_codes.view(-1, PACK_ROWS, cols // 2)
    upper = (first & 15).bitwise_left_shift_(4).bitwise_or_(second & 15)
    ordered[:, : PACK_ROWS // 2] = upper.transpose(1, 2)
    del upper
    lower = (first & 240).bitwise_or_(second >> 4)
    ordered[:, PACK_ROWS // 2 :] = lower.transpose(1, 2)
    to_absmax.view(rows, cols // BLOCK).copy_(absmax.T)
