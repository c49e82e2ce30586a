"""Multiply with quantised matrices, read in place from a record's bytes.

Each class has views of a buffer and two methods: `multiply(x)` returns [T, rows] for x [T, cols], in x's type, and
`dequantize(start, stop)` returns those rows in fp32, the definition that every kernel is tested against. Where no fast
kernel takes the shape, or the CPU has none, rows are dequantised a few at a time and multiplied in fp32. The buffer is
a pool slot, whose content changes, so nothing is computed from it in advance.

The fastest kernel for a few rows of x is not the fastest for many, and rounds differently. An `invariant` matrix uses
one kernel for both, so that a row's product does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from ctypes import c_int64, c_void_p
from functools import cache

import torch
import torch.nn.functional as F

from qmix.checkpoint.torch_dtypes import TORCH
from qmix.geometry import MATRICES
from qmix.kernels.cpu.paths import current
from qmix.kernels.packing import BLOCK, PACK_ROWS
from qmix.precision.bitsandbytes import cpu_library
from qmix.precision.bitsandbytes import functional as bnb
from qmix.precision.formats import FOUR_BITS, KERNEL_WEIGHTS, fits_kernels
from qmix.precision.record import RecordLayout

SLOW_PATH_WEIGHTS = 2**20  # dequantised at once without a kernel: 4 MiB of fp32
WIDENED_WEIGHTS = 2**19  # dequantised at once for torch's product, with two copies in fp32 on the way: 5 MiB
PACKED_WIDENED = 4 * WIDENED_WEIGHTS  # without copies: 4 MiB
OURS, THEIRS = "qmix", "bitsandbytes"  # owners of kernels for packed matrices
FEW_TOKENS = 32  # from this many rows of x on, torch's product in bf16 is as fast as qmix's


class Matrix:
    """A [rows, cols] matrix in one of the precisions."""

    def __init__(self, rows: int, cols: int, invariant: bool = False, widened_from: int | None = None) -> None:
        self.rows, self.cols, self.invariant = rows, cols, invariant
        self.widened_from = None if invariant else widened_from

    @property
    def places(self) -> tuple[int, int]:
        """The addresses of the weights or codes, and of the scales; 0 for none."""
        raise NotImplementedError

    def takes_ours(self, tokens: int) -> bool:
        """Return True if `multiply` uses qmix's own product for so many rows of x."""
        return self.uses_ours and not self.widens(tokens)

    @property
    def uses_ours(self) -> bool:
        """True if qmix's own products, which are invariant, multiply this matrix."""
        return self.invariant or self.rows * self.cols >= KERNEL_WEIGHTS

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) in fp32."""
        raise NotImplementedError

    def pieces(self, dtype: torch.dtype, weights: int = SLOW_PATH_WEIGHTS) -> Iterator[torch.Tensor]:
        """Yield the matrix a few rows at a time, about `weights`, dequantised and rounded to `dtype`."""
        step = max(1, weights // self.cols // PACK_ROWS) * PACK_ROWS
        for start in range(0, self.rows, step):
            yield self.dequantize(start, min(start + step, self.rows)).to(dtype)

    def widened(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Yield the same pieces for a product by torch; each may be overwritten by the next."""
        return self.pieces(dtype, WIDENED_WEIGHTS)

    def widens(self, tokens: int) -> bool:
        """Return True if `multiply` dequantises for so many rows of x and lets torch multiply."""
        return self.widened_from is not None and tokens >= self.widened_from

    def multiply_widened(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ self.T by torch's product in x's type, with a few rows of the matrix dequantised at a time."""
        out, row = torch.empty((len(x), self.rows), dtype=x.dtype), 0
        for piece in self.widened(x.dtype):
            out[:, row : row + len(piece)] = x @ piece.T
            row += len(piece)
        return out

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the whole matrix, dequantised and rounded to `dtype`, in new memory."""
        whole, row = torch.empty((self.rows, self.cols), dtype=dtype), 0
        for piece in self.pieces(dtype):
            whole[row : row + len(piece)] = piece
            row += len(piece)
        return whole

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return x @ self.T, [T, rows] for x [T, cols], without a kernel: a few rows of the matrix at a time."""
        out = torch.empty((len(x), self.rows), dtype=x.dtype)
        wide, step = x.float(), max(1, SLOW_PATH_WEIGHTS // self.cols)
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            weights = self.dequantize(start, stop)
            if self.invariant:  # each row by itself and copied: the library's order of additions depends on alignment
                for row, token in zip(out, wide, strict=True):
                    row[start:stop] = weights @ token.clone()
            else:
                out[:, start:stop] = wide @ weights.T
        return out


def half_takes_ours(tokens: int, weight: torch.Tensor, invariant: bool = False) -> bool:
    """Return True if qmix's product multiplies a weight in half precision with so many rows of x.

    In fp16 torch multiplies a single row at the speed of reading the weight, and more rows at a sixth of qmix's speed;
    in bf16 it is fast with many rows.
    """
    ours = tokens > 1 if weight.dtype == torch.float16 else 0 < tokens < FEW_TOKENS
    return invariant or (ours and weight.numel() >= KERNEL_WEIGHTS and weight.is_contiguous())


def half_product(x: torch.Tensor, weight: torch.Tensor, invariant: bool = False) -> torch.Tensor:
    """Return x [..., cols] @ weight.T, both in the same half precision, by the faster kernel.

    With `invariant` that is always qmix's own. If x or the weight requires a gradient it is torch's.
    """
    tokens = x.numel() // weight.shape[1]
    ours = half_takes_ours(tokens, weight, invariant)
    ours = ours and type(x) is torch.Tensor  # our kernel takes addresses: subclasses may have none
    if not ours or x.dtype != weight.dtype or x.requires_grad or weight.requires_grad:
        return F.linear(x, weight)
    from qmix.kernels.cpu.products import multiply_rows

    return multiply_rows(x.reshape(tokens, weight.shape[1]), weight).view(*x.shape[:-1], len(weight))


class HalfMatrix(Matrix):
    """The weights themselves in bf16 or fp16."""

    def __init__(self, weight: torch.Tensor, rows: int, cols: int, invariant: bool = False) -> None:
        super().__init__(rows, cols, invariant)
        self.weight = weight

    @property
    def places(self) -> tuple[int, int]:
        return self.weight.data_ptr(), 0

    def takes_ours(self, tokens: int) -> bool:
        return half_takes_ours(tokens, self.weight, self.invariant)

    def dequantize(self, start: int, stop: int) -> torch.Tensor:
        return self.weight[start:stop].float()

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return half_product(x, self.weight, self.invariant)


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
        self._ones = torch.ones(rows, dtype=torch.bfloat16)

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
        sums = torch._weight_int8pack_mm(x.bfloat16(), self.codes, self._ones)
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
