"""Products on a GPU with the matrices of a record that lies there.

4 bits   a matrix is dequantised at each use, into a buffer that all of a device share, and torch multiplies
int8     codes are widened to half precision, exactly, and multiplied by torch. bitsandbytes' own int8 product would
         quantise x too, and a token's text would then depend on where an expert lies
half     torch multiplies

The same calls run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from qmix.checkpoint.torch_dtypes import TORCH
from qmix.geometry import MATRICES
from qmix.kernels.packing import BLOCK, PACK_ROWS
from qmix.plan.device_memory import DEQUANTISED_AT_ONCE
from qmix.precision.bitsandbytes import functional
from qmix.precision.formats import FOUR_BITS, fits_kernels
from qmix.precision.record import RecordLayout

VALUES = {kind: functional.get_4bit_type(kind, device="cpu").tolist() for kind in FOUR_BITS}  # of the 16 codes


def check_together(what: str, *operands: torch.Tensor) -> None:
    """Raise RuntimeError where operands lie on different devices: kernels take addresses unchecked."""
    places = {operand.device for operand in operands}
    if len(places) > 1:
        raise RuntimeError(f"{what}: operands on {', '.join(sorted(map(str, places)))}")


class DeviceMatrix:
    """A [rows, cols] matrix on a device. All of its parts and x must lie on the same device."""

    def __init__(self, rows: int, cols: int, *parts: torch.Tensor) -> None:
        self.rows, self.cols, self.parts = rows, cols, parts

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ self.T, [T, cols] to [T, rows], in x's type. Raises RuntimeError where operands lie apart."""
        check_together(f"product of x [{len(x)}, {self.cols}] with a matrix", x, *self.parts)
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
    """4-bit codes and absmax as a record has them, dequantised to `dense` [rows, cols] at each product.

    Other matrices use the same memory. `values` are those of the codes.
    """

    def __init__(self, codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, dense: torch.Tensor) -> None:
        rows, cols = dense.shape
        super().__init__(rows, cols, codes, absmax, values, dense)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        codes, absmax, values, dense = self.parts
        dequantise(codes, absmax, values, dense)
        return F.linear(x, dense)


class DeviceExpert:
    """An expert on a device; calling it is the expert's forward."""

    def __init__(self, gate: DeviceMatrix, up: DeviceMatrix, down: DeviceMatrix) -> None:
        self.gate, self.up, self.down = gate, up, down

    def __call__(self, x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Return down(activation(gate(x)) * up(x)): [T, hidden] to [T, hidden]."""
        return self.down.multiply(activation(self.gate.multiply(x)).mul_(self.up.multiply(x)))


def is_dequantised(precision: str) -> bool:
    """Return True if a record in this precision is dequantised to be multiplied on a GPU."""
    return precision in FOUR_BITS


def code_values(precisions: Iterable[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the 16 values of each 4-bit precision, in fp32 on a device."""
    return {name: torch.tensor(VALUES[name]).to(device) for name in precisions if is_dequantised(name)}


def device_expert(
    record: torch.Tensor,
    layout: RecordLayout,
    shapes: dict[str, tuple[int, int]],
    memory: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> DeviceExpert:
    """Return the expert whose record's bytes, uint8, lie on a device.

    It consists of views of `record`. Where `is_dequantised` its products use `memory`, with room for a matrix in half
    precision on the same device, and `values`, its precision's.
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
    assert values is not None
    matrices = []
    for matrix in MATRICES:
        (rows, cols), (codes, absmax) = shapes[matrix], parts[matrix]
        matrices.append(DeviceFourBit(codes, absmax, values, memory[: rows * cols].view(rows, cols)))
    return DeviceExpert(*matrices)


@torch.library.custom_op("qmix::dequantise", mutates_args={"out"})
def dequantise(codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    """Write a 4-bit matrix [rows, cols] of a record's layout in half precision, on any device.

    Of the 32 packed bytes for two columns, byte j holds column j % 2 of rows j // 2 (low nibble) and 16 + j // 2 (high
    nibble). A shape that is not packed lies in bitsandbytes' ordinary order: a byte holds two columns of a row, the
    first in the high nibble. Some rows are written at a time.
    """
    rows, cols = out.shape
    if not fits_kernels(rows, cols):
        numbers = values[torch.stack((codes >> 4, codes & 15), dim=1).view(-1)[: rows * cols].int()]
        out.view(-1).copy_(numbers * absmax.float().repeat_interleave(BLOCK)[: rows * cols])
        return
    groups = codes.view(-1, cols // 2, PACK_ROWS)  # [rows / 32, columns / 2, 32]
    step = max(1, DEQUANTISED_AT_ONCE // (cols * PACK_ROWS))
    for first in range(0, len(groups), step):
        piece = groups[first : first + step]
        nibbles = torch.stack((piece & 15, piece >> 4), dim=2)  # the low nibbles are rows 0-15, the high ones 16-31
        index = nibbles.view(-1, cols // 2, PACK_ROWS, 2).transpose(1, 2).reshape(-1, cols // BLOCK, BLOCK).int()
        start, stop = first * PACK_ROWS, first * PACK_ROWS + len(index)
        numbers = values[index].mul_(absmax[:, start:stop].T.float()[:, :, None])
        out[start:stop].copy_(numbers.view(-1, cols))


@dequantise.register_fake
def _(codes: torch.Tensor, absmax: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    """Change no shapes."""
