"""The parts of a matrix in each precision, and their bytes. Arithmetic only, no torch.

nf4, fp4   bitsandbytes' 4-bit codes in blocks of 64 weights, a block's absmax in bf16: 4.25 bits a weight.
           Where the shape allows it, both have the layout of bitsandbytes' CPU kernel ("packed"): codes of 32 rows
           interleaved, absmax as [columns / 64, rows]. Other shapes have bitsandbytes' default order ("flat").
int8       bitsandbytes' row-wise codes, weight = code * row_max / 127, row_max in fp32.
half       the weights themselves in bf16 or fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, prod

from qmix.checkpoint.safetensors_header import DTYPES, ITEM_BYTES
from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.kernels.cpu.paths import current
from qmix.kernels.packing import BLOCK, PACK_ROWS
from qmix.units import quoted

PRECISIONS = ("nf4", "fp4", "int8", "half")
FOUR_BITS = ("nf4", "fp4")
KERNEL_WEIGHTS = 2**19  # weights of the smallest matrix for which qmix's own products pay


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a quantised matrix; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def check_precision(precision: str) -> str:
    """Return `precision`; raise UsageError if it is unknown."""
    if precision not in PRECISIONS:
        raise UsageError(f"{quoted(precision)} is not a precision; choose one of {', '.join(PRECISIONS)}")
    return precision


def fits_kernels(rows: int, cols: int) -> bool:
    """Return whether the fast CPU kernels take a matrix of this shape.

    The packed 4-bit kernel needs whole groups of 32 rows and whole blocks in a row; torch's int8 kernel reads past the
    end of a row whose length is not a multiple of 32 (torch 2.13).
    """
    return rows % PACK_ROWS == 0 and cols % BLOCK == 0


def uses_kernels(geometry: Geometry) -> bool:
    """Return whether a run with this model loads qmix's products and with them Numba, which takes 100 MB and 0.25 s.

    Smaller matrices use bitsandbytes' kernels, if it has any for this processor.
    """
    largest = max(rows * cols for rows, cols in geometry.expert_matrices.values())
    return largest >= KERNEL_WEIGHTS or not current().pairs


def parts(precision: str, dtype: str, rows: int, cols: int) -> tuple[Part, ...]:
    """Return the tensors of a [rows, cols] matrix; `dtype`, "bf16" or "fp16", is the type of `half`."""
    if precision == "half":
        return (Part("weight", DTYPES[dtype], (rows, cols)),)
    if precision == "int8":
        return (Part("codes", "I8", (rows, cols)), Part("row_max", "F32", (rows,)))
    if fits_kernels(rows, cols):
        return (Part("codes", "U8", (rows, cols // 2)), Part("absmax", "BF16", (cols // BLOCK, rows)))
    count = rows * cols
    return (Part("codes", "U8", ((count + 1) // 2,)), Part("absmax", "BF16", (-(-count // BLOCK),)))


def chunk_rows(precision: str, rows: int, cols: int, max_weights: int) -> int:
    """Return the rows to quantise at once: about `max_weights` weights in whole blocks and groups of rows."""
    step = 1
    if precision in FOUR_BITS:
        step = PACK_ROWS if fits_kernels(rows, cols) else BLOCK // gcd(BLOCK, cols)
    return min(rows, max(1, max_weights // (cols * step)) * step)
