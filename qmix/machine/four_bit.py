"""Try a 4-bit product on this machine: whose kernel multiplies, if its values are right, and how fast it is.

A processor's flags do not say which kernel runs: torch, bitsandbytes and Numba decide that between them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from qmix.kernels.cpu.paths import current
from qmix.kernels.packing import BLOCK
from qmix.machine.measured import FourBitTrial
from qmix.precision.matmul import Matrix
from qmix.precision.quantised import FourBitMatrix

LARGE, SMALL = (1024, 4096), (128, 512)  # of qmix's own kernel and of bitsandbytes'
SECONDS = 0.2  # of repetitions
TOLERANCE = 0.008  # of the product's norm: x and the weights' values are rounded to bf16


def try_four_bit(kind: str = "nf4") -> FourBitTrial:
    """Multiply a large and a small matrix with one token, as experts are multiplied."""
    large, small = _matrix(kind, *LARGE), _matrix(kind, *SMALL)
    with torch.inference_mode():
        correct = _is_right(large) and _is_right(small)  # also compiles, and wakes the threads
        x = torch.ones(1, large.cols).bfloat16()
        seconds = _seconds(lambda: large.multiply(x))
        dequantising = _seconds(lambda: Matrix.multiply(large, x))
    nbytes = large.codes.nbytes + large.absmax.nbytes
    return FourBitTrial(current().name, large.kernel, small.kernel, correct, nbytes / seconds, dequantising / seconds)


def _matrix(kind: str, rows: int, cols: int) -> FourBitMatrix:
    """Return a packed matrix of random codes, the same each time."""
    draws = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=draws)
    absmax = torch.rand(cols // BLOCK, rows, generator=draws).bfloat16()
    return FourBitMatrix(kind, codes, absmax, rows, cols)


def _is_right(matrix: FourBitMatrix) -> bool:
    x = torch.randn(2, matrix.cols, generator=torch.Generator().manual_seed(1)).bfloat16()
    want = x.float() @ matrix.dequantize(0, matrix.rows).T
    return bool((matrix.multiply(x).float() - want).norm() < TOLERANCE * want.norm())


def _seconds(work: Callable[[], object]) -> float:
    """Return the least seconds of several calls: other processes only make one longer."""
    until, least = time.perf_counter() + SECONDS, math.inf
    while (started := time.perf_counter()) < until or least == math.inf:
        work()
        least = min(least, time.perf_counter() - started)
    return least
