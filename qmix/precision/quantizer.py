"""Quantise a matrix of a checkpoint by row chunks, to the bytes of a record's parts."""

from __future__ import annotations

import numpy as np
import torch

from qmix.checkpoint.torch_dtypes import HALF
from qmix.errors import CheckpointError, arg
from qmix.kernels.cpu.quantize import quantize_4bit_flat, quantize_4bit_packed, quantize_int8_rows
from qmix.kernels.packing import BLOCK
from qmix.precision.formats import fits_kernels, parts

LARGEST_SCALE = torch.finfo(torch.bfloat16).max


class MatrixQuantizer:
    """Quantises one [rows, cols] matrix by row chunks, in any order and from several threads.

    `quantize` returns a chunk's codes (or half-precision weights) for writing; the scales, which are small, are kept
    until the last chunk is done. `name` is the tensor's, for errors. With `clip`, each 4-bit block takes the scale with
    the least squared error among some near its absmax.
    """

    def __init__(self, precision: str, dtype: str, rows: int, cols: int, name: str, clip: bool = False) -> None:
        self.precision, self.dtype, self.name, self.clip = precision, dtype, name, clip
        self.rows, self.cols = rows, cols
        self.main, *scales = parts(precision, dtype, rows, cols)
        self._packed = precision in ("nf4", "fp4") and fits_kernels(rows, cols)
        self._scales = np.empty(scales[0].shape if scales else 0, np.float32)

    def quantize(self, chunk: torch.Tensor, start: int) -> tuple[int, np.ndarray]:
        """Quantise rows [start, start + len(chunk)); return their offset in the first part, in bytes, and uint8 bytes.

        Raises CheckpointError if a weight is NaN, infinite, or too large for the precision.
        """
        if self.precision == "half":
            return start * self.cols * 2, self._to_half(chunk)
        weights = _for_kernels(chunk)
        if self.precision == "int8":
            codes = np.empty(chunk.shape, np.int8)
            finite = quantize_int8_rows(weights, codes, self._scales[start : start + len(chunk)])
            offset = start * self.cols
        elif self._packed:
            codes = np.empty(chunk.numel() // 2, np.uint8)
            scales = self._scales[:, start : start + len(chunk)]
            finite = quantize_4bit_packed(weights, self.precision, codes, scales, self.clip)
            offset = start * self.cols // 2
        else:
            first, count = start * self.cols, chunk.numel()
            codes = np.empty((count + 1) // 2, np.uint8)
            scales = self._scales[first // BLOCK : -(-(first + count) // BLOCK)]
            last = start + len(chunk) == self.rows
            finite = quantize_4bit_flat(weights.reshape(-1), self.precision, codes, scales, last, self.clip)
            offset = first // 2
        if not finite:
            raise not_finite(self.name)
        if self.precision != "int8" and scales.max() > LARGEST_SCALE:
            raise too_large(self.name, "bf16")
        return offset, codes.view(np.uint8).reshape(-1)

    def scales(self) -> np.ndarray | None:
        """Return the second part's uint8 bytes: row maxima in fp32, or absmax rounded to bf16; None for half."""
        if self.precision == "half":
            return None
        if self.precision == "int8":
            return self._scales.view(np.uint8)
        return torch.from_numpy(self._scales).bfloat16().view(torch.uint8).numpy().reshape(-1)

    def _to_half(self, chunk: torch.Tensor) -> np.ndarray:
        half = chunk.to(HALF[self.dtype])
        # a value times zero is zero unless it is NaN or infinite: one pass, no mask in memory
        if not bool(torch.isfinite((half * 0).sum())):
            if bool(torch.isfinite(chunk).all()):
                raise too_large(self.name, self.dtype)
            raise not_finite(self.name)
        return half.contiguous().view(torch.uint8).numpy().reshape(-1)


def too_large(name: str, dtype: str) -> CheckpointError:
    """Return the error for a tensor with values that `dtype` cannot hold."""
    advice = f"use {arg('dtype', 'bf16')}" if dtype == "fp16" else "no half precision holds them"
    return CheckpointError(f"tensor {name!r} has values too large for {dtype}; {advice}")


def not_finite(name: str) -> CheckpointError:
    """Return the error for a tensor with NaN or infinite values."""
    return CheckpointError(f"tensor {name!r} holds NaN or infinite weights; the checkpoint is damaged, fetch it again")


def _for_kernels(chunk: torch.Tensor) -> np.ndarray:
    """Return bf16 as its bit patterns, any other type as fp32."""
    chunk = chunk.contiguous()
    if chunk.dtype == torch.bfloat16:
        return chunk.view(torch.uint16).numpy()
    return chunk.float().numpy()
