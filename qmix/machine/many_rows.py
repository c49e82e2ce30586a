"""Try for many rows of x which is faster here: a matrix's own product, or dequantising it for torch's product.

Torch's product may use units that qmix's kernels do not (AMX). Its sums depend on the number of rows, so a choice for
it holds only where a token's numbers may depend on the tokens beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from qmix.kernels.packing import BLOCK
from qmix.precision.formats import FOUR_BITS
from qmix.precision.matmul import Matrix
from qmix.precision.quantised import FourBitMatrix, Int8Matrix

ROWS, COLS = 1024, 4096
TOKENS = (128, 64, 32)  # rows of x, tried until torch's product is no faster
CLEARLY = 0.95  # of the own product's time: a choice that a measurement's noise could turn is not made
ROUNDS = 3
HOPELESS = 4  # times the own product's time in the first round; torch may take a hundred times as long in fp16


def try_widened() -> dict[str, int]:
    """Return by precision and type ("nf4 bf16") from how many rows of x on torch's product is faster, where it is."""
    found: dict[str, int] = {}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        for precisions, matrix in ((FOUR_BITS, _four_bit()), (("int8",), _int8())):
            rows = faster_from(matrix, dtype)
            if rows is not None:
                found |= {f"{precision} {name}": rows for precision in precisions}
    return found


def faster_from(matrix: Matrix, dtype: torch.dtype) -> int | None:
    """Return the least of TOKENS from which on `multiply_widened` is faster than `multiply`; None if it never is."""
    least = None
    with torch.inference_mode():
        for tokens in TOKENS:
            x = torch.ones(tokens, matrix.cols, dtype=dtype)
            own, widened = _compared(partial(matrix.multiply, x), partial(matrix.multiply_widened, x))
            if widened > CLEARLY * own:
                break
            least = tokens
    return least


def _compared(own: Callable[[], object], other: Callable[[], object]) -> tuple[float, float]:
    """Return the least seconds of both, taking turns: other processes only make one longer."""
    own()  # compiles, and wakes the threads
    other()
    least = _seconds(own), _seconds(other)
    for _ in range(ROUNDS if least[1] < HOPELESS * least[0] else 0):
        least = min(least[0], _seconds(own)), min(least[1], _seconds(other))
    return least


def _seconds(product: Callable[[], object]) -> float:
    started = time.perf_counter()
    product()
    return time.perf_counter() - started


def _four_bit() -> FourBitMatrix:
    codes = torch.full((ROWS, COLS // 2), 0x5A, dtype=torch.uint8)
    return FourBitMatrix(FOUR_BITS[0], codes, torch.ones(COLS // BLOCK, ROWS).bfloat16(), ROWS, COLS)


def _int8() -> Int8Matrix:
    return Int8Matrix(torch.full((ROWS, COLS), 90, dtype=torch.int8), torch.ones(ROWS), ROWS, COLS)
