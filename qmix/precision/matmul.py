"""Multiply with matrices that are read in place from a record's bytes; here those in half precision.

Each class, here and in `quantised`, has views of a buffer and two methods: `multiply(x)` returns [T, rows] for x
[T, cols], in x's type, and `dequantize(start, stop)` returns those rows in fp32, the definition that every kernel is
tested against. Where no fast kernel takes the shape, or the CPU has none, rows are dequantised a few at a time and
multiplied in fp32. The buffer is a pool slot, whose content changes, so nothing is computed from it in advance.

The fastest kernel for a few rows of x is not the fastest for many, and rounds differently. An `invariant` matrix uses
one kernel for both, so that a row's product does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from qmix.kernels.packing import PACK_ROWS
from qmix.precision.formats import KERNEL_WEIGHTS

SLOW_PATH_WEIGHTS = 2**20  # dequantised at once without a kernel: 4 MiB of fp32
WIDENED_WEIGHTS = 2**19  # dequantised at once for torch's product, with two copies in fp32 on the way: 5 MiB
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
        """Yield the same pieces by the fastest way, rounded as the products round; the next may overwrite one."""
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
