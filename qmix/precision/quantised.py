"""Quantised matrices as `matmul` has them, and the choice of the kernel that multiplies them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from ctypes import c_int64, c_void_p
from functools import cache

import torch

from qmix.kernels.cpu.paths import current
from qmix.kernels.packing import BLOCK, PACK_ROWS
from qmix.precision.bitsandbytes import cpu_library
from qmix.precision.bitsandbytes import functional as bnb
from qmix.precision.formats import FOUR_BITS, KERNEL_WEIGHTS, fits_kernels
from qmix.precision.matmul import WIDENED_WEIGHTS, Matrix

PACKED_WIDENED = 4 * WIDENED_WEIGHTS  # dequantised at once without copies: 4 MiB
OURS, THEIRS = "qmix", "bitsandbytes"  # owners of kernels for packed matrices


class Int8Matrix(Matrix):
    """bitsandbytes' row-wise int8: weight = code * row_max / 127."""

    def __init__(
        self,
        codes: torch.Tensor,
        row_max: torch.Tensor,
        rows: int,
        cols: int,
        invariant: bool = False,
        widened_from: int | None = None,
    ) -> None:
        super().__init__(rows, cols, invariant, widened_from)
        self.codes, self.row_max = codes, row_max

    @property
    def places(self) -> tuple[int, int]:
        return self.codes.data_ptr(), self.row_max.data_ptr()

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        return self.codes[start:stop].float() * (self.row_max[start:stop, None] / 127)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.widens(len(x)):
            return self.multiply_widened(x)
        if self.uses_ours:
            from qmix.kernels.cpu.products import multiply_rows

            return multiply_rows(x, self.codes, self.row_max / 127)
        if not fits_kernels(self.rows, self.cols):
            return super().multiply(x)
        # the kernel is fast only in bf16, with bf16 scales: ours stay in fp32 and are applied after it
        ones = torch.ones(self.rows, dtype=torch.bfloat16)
        sums = torch._weight_int8pack_mm(x.bfloat16(), self.codes, ones)
        return (sums * (self.row_max / 127)).to(x.dtype)


class FourBitMatrix(Matrix):
    """bitsandbytes' nf4 or fp4, packed for its CPU kernel where the shape allows it, else flat."""

    def __init__(
        self,
        kind: str,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        rows: int,
        cols: int,
        invariant: bool = False,
        widened_from: int | None = None,
    ) -> None:
        super().__init__(rows, cols, invariant, widened_from)
        self.kind, self.codes, self.absmax = kind, codes, absmax
        self.table = code_table(kind)
        self.packed = fits_kernels(rows, cols)
        self.kernel = four_bit_kernel(kind, self.uses_ours) if self.packed else None
        self._theirs = packed_kernel(kind) if self.kernel == THEIRS else None

    @property
    def places(self) -> tuple[int, int]:
        return self.codes.data_ptr(), self.absmax.data_ptr()

    def takes_ours(self, tokens: int) -> bool:
        return self.kernel == OURS and not self.widens(tokens)

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        if not self.packed:
            return self._dequantize_flat(start, stop)
        # whole groups of 32 rows: [groups, cols / 2, 32] bytes; the low nibbles are rows 0-15, the high ones 16-31
        first, last = start // PACK_ROWS, -(-stop // PACK_ROWS)
        groups = self.codes.view(-1, self.cols // 2, PACK_ROWS)[first:last]
        nibbles = torch.stack((groups & 15, groups >> 4), dim=2)  # [groups, cols / 2, 2, 32]
        pairs = nibbles.view(-1, self.cols // 2, PACK_ROWS, 2)  # 32 rows of 2 neighbouring columns
        codes = pairs.transpose(1, 2).reshape(-1, self.cols)
        absmax = self.absmax[:, first * PACK_ROWS : last * PACK_ROWS].T.float()
        values = self.table[codes.int()].view(-1, self.cols // BLOCK, BLOCK) * absmax[:, :, None]
        skip = start - first * PACK_ROWS
        return values.view(-1, self.cols)[skip : skip + stop - start]

    def _dequantize_flat(self, start: int, stop: int) -> torch.Tensor:
        begin, end = start * self.cols, stop * self.cols
        if self.rows * self.cols < KERNEL_WEIGHTS:
            return self._flat_values(begin, end).view(stop - start, self.cols)
        from qmix.kernels.cpu.dequantize import flat_blocks

        first, last = begin // BLOCK, end // BLOCK  # whole blocks by the kernel, the end of the last one apart
        codes, absmax = self.places
        values = torch.empty(end - first * BLOCK)
        flat_blocks(self.kind, codes + first * BLOCK // 2, absmax + 2 * first, last - first, values)
        values[(last - first) * BLOCK :] = self._flat_values(last * BLOCK, end)
        return values[begin % BLOCK :].view(stop - start, self.cols)

    def _flat_values(self, begin: int, end: int) -> torch.Tensor:
        codes = self.codes[begin // 2 : (end + 1) // 2]
        values = self.table[torch.stack((codes >> 4, codes & 15), dim=1).view(-1).int()]
        values = values[begin % 2 : begin % 2 + end - begin]
        blocks = torch.arange(begin, end) // BLOCK
        return values * self.absmax[blocks].float()

    def widened(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        if self.kernel != OURS:
            yield from super().widened(dtype)
            return
        from qmix.kernels.cpu.dequantize import packed_rows

        step = max(1, PACKED_WIDENED // self.cols // PACK_ROWS) * PACK_ROWS
        buffer = torch.empty(self.cols * min(step, self.rows), dtype=dtype)
        for start in range(0, self.rows, step):
            piece = buffer[: self.cols * min(step, self.rows - start)].view(self.cols, -1)
            packed_rows(self.kind, *self.places, self.rows, self.cols, start, piece)
            yield piece.T

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.kernel == OURS and self.widens(len(x)):
            return self.multiply_widened(x)
        if self.kernel is None:
            return super().multiply(x)
        if self.kernel == OURS:
            from qmix.kernels.cpu.products import multiply_packed

            return multiply_packed(x, self.kind, *self.places, self.rows, self.cols)
        assert self._theirs is not None
        half = x.to(torch.bfloat16).contiguous()
        out = torch.empty((len(x), self.rows), dtype=torch.bfloat16)
        sizes = len(x), self.rows, self.cols
        self._theirs(*sizes, half.data_ptr(), *self.places, out.data_ptr(), BLOCK, self.cols, self.rows)
        return out.to(x.dtype)


@cache
def code_table(kind: str) -> torch.Tensor:
    """Return the 16 values of nf4 or fp4, in fp32."""
    return bnb.get_4bit_type(kind, device="cpu")


def has_kernels(kinds: Collection[str], shapes: Iterable[tuple[int, int]]) -> bool:
    """Return whether this process has kernels for matrices of all these shapes and precisions."""
    return all(
        fits_kernels(rows, cols) and four_bit_kernel(kind, rows * cols >= KERNEL_WEIGHTS) is not None
        for kind in FOUR_BITS
        if kind in kinds
        for rows, cols in shapes
    )


def four_bit_kernel(kind: str, ours: bool) -> str | None:
    """Return the owner of the kernel for packed matrices, OURS or THEIRS; None where rows are dequantised.

    qmix's own is used with `ours`, and on CPU paths for which bitsandbytes has no kernel.
    """
    if ours or not current().pairs:
        return OURS
    return None if packed_kernel(kind) is None else THEIRS


@cache
def packed_kernel(kind: str) -> Callable[..., None] | None:
    """Return bitsandbytes' product of bf16 rows with the packed layout; None on a CPU without AVX512-BF16.

    It is called in the library directly: through `torch.ops.bitsandbytes.gemv_4bit`, which adds nothing, a small
    product takes 32 microseconds instead of 5. Arguments: T, rows, cols, x, codes, absmax, out, block, x's row stride,
    out's row stride.
    """
    try:
        library = cpu_library()
        if library is None or not library.has_avx512bf16_cpu():
            return None
        kernel = library[f"gemv_4bit_inference_cpu_{kind}_bf16"]
    except AttributeError:  # a build of the library without these kernels
        return None
    kernel.argtypes = [c_int64] * 3 + [c_void_p] * 4 + [c_int64] * 3
    kernel.restype = None
    return kernel
