"""Products by torch over matrices that are dequantised a few rows at a time, and when they are chosen."""

from __future__ import annotations

import pytest
import torch

from qmix.machine import many_rows
from qmix.plan.memory import PREFILL_CHUNK, SLOW_PATH_BYTES
from qmix.precision import matmul, quantised
from qmix.precision.matmul import Matrix
from qmix.precision.quantised import FourBitMatrix, Int8Matrix

ROWS, COLS = 416, 1344  # thirteen groups of rows, 21 blocks; large enough for qmix's own kernels


def matrix(precision: str, rows: int = ROWS, cols: int = COLS, **how: object) -> FourBitMatrix | Int8Matrix:
    draws = torch.Generator().manual_seed(0)
    if precision == "int8":
        codes = torch.randint(-127, 128, (rows, cols), dtype=torch.int8, generator=draws)
        return Int8Matrix(codes, torch.rand(rows, generator=draws), rows, cols, **how)
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=draws)
    absmax = torch.rand(cols // 64, rows, generator=draws).bfloat16()
    return FourBitMatrix(precision, codes, absmax, rows, cols, **how)


def flat(kind: str, rows: int, cols: int) -> FourBitMatrix:
    draws, count = torch.Generator().manual_seed(0), rows * cols
    codes = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8, generator=draws)
    return FourBitMatrix(kind, codes, torch.rand(-(-count // 64), generator=draws).bfloat16(), rows, cols)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8"])
def test_both_products_differ_by_the_rounding_of_weights_and_result(monkeypatch, precision, dtype):
    monkeypatch.setattr(quantised, "PACKED_WIDENED", 160 * COLS)  # pieces of 160 rows, the last of 96
    monkeypatch.setattr(matmul, "WIDENED_WEIGHTS", 160 * COLS)
    weights = matrix(precision)
    x = torch.randn(70, COLS, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    dense = weights.dequantize(0, ROWS).double()
    error = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    slack = 2 * error * (x.double().abs() @ dense.abs().T) + 2.0**-8 * (precision == "nf4") * dense.abs().sum(1)
    got = weights.multiply_widened(x)
    assert got.dtype == dtype
    assert ((got.double() - x.double() @ dense.T).abs() <= slack + 1e-6).all()
    assert (got.float() - weights.multiply(x).float()).norm() < 0.004 * got.float().norm()


def test_the_choice_follows_the_measurement_and_never_holds_for_invariant_matrices(monkeypatch):
    called: list[int] = []
    monkeypatch.setattr(Matrix, "multiply_widened", lambda self, x: called.append(len(x)))
    for precision in ("nf4", "int8"):
        for how, wanted in (
            ({}, []),
            ({"widened_from": 64}, [64, 100]),
            ({"widened_from": 64, "invariant": True}, []),
        ):
            called.clear()
            weights = matrix(precision, 512, 1024, **how)
            for tokens in (1, 63, 64, 100):
                weights.multiply(torch.ones(tokens, 1024).bfloat16())
            assert called == wanted


@pytest.mark.parametrize("precision", ["nf4", "int8"])
@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336), (6144, 16384)], ids=str)
def test_a_piece_and_its_result_fit_the_work_space_of_a_plan(precision, shape):
    rows, cols = shape
    weights = matrix(precision, 32, 64)  # pieces are counted, not made
    weights.rows, weights.cols = rows, cols
    wanted = quantised.PACKED_WIDENED if precision == "nf4" else matmul.WIDENED_WEIGHTS
    step = max(1, wanted // cols // 32) * 32
    item = 2 if precision == "nf4" else 1 + 4 + 4 + 2  # codes' copy, fp32, times the scale, half
    assert step * cols * item + PREFILL_CHUNK * step * 2 <= SLOW_PATH_BYTES


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(37, 47), (64, 96), (1, 63), (33, 130)], ids=str)
def test_flat_rows_in_vectors_are_those_of_the_table(monkeypatch, kind, shape):
    weights = flat(kind, *shape)
    rows = shape[0]
    spans = [(0, rows), (rows // 2, rows), (0, rows // 2 + 1)]
    slowly = [weights.dequantize(*span) for span in spans]
    monkeypatch.setattr(quantised, "KERNEL_WEIGHTS", 0)
    assert all(torch.equal(weights.dequantize(*span), want) for span, want in zip(spans, slowly, strict=True))


class Clocked(Matrix):
    """Its own product takes a second a row; torch's takes 100 and half a second a row."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__(1, 1)
        self.clock = clock

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        self.clock[0] += len(x)
        return x

    def multiply_widened(self, x: torch.Tensor) -> torch.Tensor:
        self.clock[0] += self.fixed + len(x) / 2
        return x

    fixed = 50.0


def test_torchs_product_is_taken_from_where_it_is_clearly_faster(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(many_rows.time, "perf_counter", lambda: clock[0])
    weights = Clocked(clock)
    assert many_rows.faster_from(weights, torch.bfloat16) == 128  # 114 to 128 seconds; with 64 rows 82 to 64
    weights.fixed = 20.0  # 52 to 64; with 32 rows 36 to 32
    assert many_rows.faster_from(weights, torch.bfloat16) == 64
    weights.fixed = 61.0  # 125 to 128: too close
    assert many_rows.faster_from(weights, torch.bfloat16) is None
