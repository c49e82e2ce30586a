"""Products compared with the dequantised matrix in fp32, for shapes of every remainder and any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qmix.kernels.cpu import products, row_tile, team
from qmix.kernels.cpu.paths import current
from qmix.precision import matmul
from qmix.precision.dense import HalfLinear, use_half_linear
from qmix.precision.matmul import HalfMatrix
from qmix.precision.quantised import FourBitMatrix, Int8Matrix, packed_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # largest relative error of one rounding
needs_pairs = pytest.mark.skipif(not current().pairs, reason="a CPU path without AVX512-BF16")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def assert_product(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rounding: float) -> None:
    """Assert that `got` is x @ weight.T in fp64 within one rounding of the result and fp32's of the sum."""
    want = x.double() @ weight.double().T
    sums = x.double().abs() @ weight.double().abs().T
    assert got.dtype == x.dtype
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= rounding * want.abs() + 1e-5 * sums + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(tokens=st.integers(1, 40), rows=st.integers(1, 140), columns=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_half_products_of_any_shape(dtype, tokens, rows, columns):
    x, weight = randn(tokens, columns).to(dtype), randn(rows, columns, seed=1).to(dtype)
    assert_product(products.multiply_rows(x, weight), x, weight, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@given(tokens=st.integers(1, 40), rows=st.integers(1, 140), columns=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_int8_products_of_any_shape(dtype, tokens, rows, columns):
    x, codes = randn(tokens, columns).bfloat16().to(dtype), random_bytes(rows, columns).view(torch.int8)
    scales = randn(rows, seed=2).abs() / 127
    weight = codes.double() * scales[:, None].double()
    assert_product(products.multiply_rows(x, codes, scales), x, weight, ROUNDING[dtype] + 2.0**-22)


@pytest.mark.parametrize("holds", [row_tile.BF16_WIDE, row_tile.INT8_WIDE], ids=["bf16", "int8"])
@pytest.mark.parametrize("shape", [(1, 33, 47), (7, 64, 100)], ids=str)
def test_products_on_cpus_without_bf16_arithmetic(monkeypatch, holds, shape):
    tokens, rows, columns = shape
    monkeypatch.setattr(products, "holds_of", lambda dtype: holds)
    x = randn(tokens, columns).bfloat16()
    weight = random_bytes(rows, columns).view(torch.int8)
    if holds == row_tile.BF16_WIDE:
        weight = weight.bfloat16()
    assert_product(products.multiply_rows(x, weight), x, weight, ROUNDING[torch.bfloat16])


def packed(kind: str, rows: int, columns: int) -> FourBitMatrix:
    absmax = randn(columns // 64, rows).abs().bfloat16()
    return FourBitMatrix(kind, random_bytes(rows, columns // 2), absmax, rows, columns)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@given(tokens=st.integers(1, 40), groups=st.integers(1, 5), blocks=st.integers(1, 35))
@settings(max_examples=40, deadline=None)
def test_four_bit_products_of_any_packed_shape(kind, tokens, groups, blocks):
    matrix = packed(kind, 32 * groups, 64 * blocks)
    x = randn(tokens, matrix.cols).bfloat16()
    got = products.multiply_packed(x, kind, *matrix.places, matrix.rows, matrix.cols)
    table = (
        matrix.table.bfloat16() if kind == "nf4" else matrix.table
    )  # nf4's values are rounded to bf16, fp4's are exact
    matrix.table = table.float()
    assert_product(got, x, matrix.dequantize(0, matrix.rows), ROUNDING[torch.bfloat16])


@needs_pairs
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_products_are_bitsandbytes_own(kind):
    matrix = packed(kind, 96, 1152)
    x, theirs = randn(5, 1152).bfloat16(), torch.empty(5, 96, dtype=torch.bfloat16)
    packed_kernel(kind)(5, 96, 1152, x.data_ptr(), *matrix.places, theirs.data_ptr(), 64, 1152, 96)
    ours = products.multiply_packed(x, kind, *matrix.places, 96, 1152)
    assert (ours.float() - theirs.float()).norm() < 0.003 * theirs.float().norm()


def test_a_product_by_hand():
    """(1 - 4 - 508) / 2 = -255.5, rounded to eight bits in bf16, and 6 * 2; three columns, fewer than any vector."""
    x, codes = torch.tensor([[1.0, 2.0, -4.0]]).bfloat16(), torch.tensor([[1, -2, 127], [0, 3, 0]], dtype=torch.int8)
    assert products.multiply_rows(x, codes, torch.tensor([0.5, 2.0])).tolist() == [[-256.0, 12.0]]


def test_rows_out_of_place_and_reading_nothing_behind_a_row():
    wide = randn(3, 100).bfloat16()
    buffer = torch.full((4, 50), torch.nan).bfloat16()
    buffer[:3] = randn(3, 50)
    assert torch.equal(
        products.multiply_rows(wide[:, ::2], buffer[:3]), products.multiply_rows(wide[:, ::2].contiguous(), buffer[:3])
    )
    transposed = randn(50, 3).bfloat16().T
    assert products.multiply_rows(transposed, buffer[:3]).isfinite().all()


def test_what_is_not_finite_stays_so():
    weight = torch.tensor([[1.0], [torch.nan], [torch.inf], [-torch.inf], [3e38]]).bfloat16()
    got = products.multiply_rows(torch.ones(1, 1).bfloat16(), weight)[0]
    assert torch.equal(got[[0, 2, 3, 4]], weight[[0, 2, 3, 4], 0])
    assert got[1].isnan()
    assert products.multiply_rows(torch.full((1, 1), 300.0).half(), torch.full((1, 1), 300.0).half()).isinf()


@pytest.mark.usefixtures("two_threads")
def test_neither_threads_nor_other_tokens_change_a_result():
    x, weight, matrix = randn(29, 1200).bfloat16(), randn(333, 1200).bfloat16(), packed("nf4", 320, 1152)
    codes = random_bytes(333, 1200).view(torch.int8)

    def of_each(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed_x = x[:, :1152]
        rows = products.multiply_rows(x, weight), products.multiply_rows(x, codes)
        return *rows, products.multiply_packed(packed_x, "nf4", *matrix.places, 320, 1152)

    shared = of_each(x)
    torch.set_num_threads(1)
    for many, alone in zip(shared, of_each(x), strict=True):
        assert torch.equal(many, alone)
    for t in range(len(x)):
        for many, alone in zip(shared, of_each(x[t : t + 1]), strict=True):
            assert torch.equal(many[t : t + 1], alone)


def test_without_futexes_kernels_run_on_one_thread(monkeypatch, two_threads):
    x, weight = randn(3, 70).bfloat16(), randn(65, 70, seed=1).bfloat16()
    want = products.multiply_rows(x, weight)
    monkeypatch.setattr(team, "FUTEX", 0)
    monkeypatch.setattr(team, "Team", None)
    team._team_of.cache_clear()
    assert torch.equal(products.multiply_rows(x, weight), want)


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_large_matrices_take_the_kernels(tokens):
    """Sizes from which records use them; 200 rows take the faster kernel."""
    x = randn(tokens, 1024).bfloat16()
    half = HalfMatrix(randn(512, 1024, seed=1).bfloat16(), 512, 1024)
    int8 = Int8Matrix(random_bytes(512, 1024).view(torch.int8), randn(512).abs(), 512, 1024)
    for matrix in (half, int8, packed("nf4", 512, 1024), packed("fp4", 512, 1024)):
        want = x.float() @ matrix.dequantize(0, 512).T
        assert (matrix.multiply(x).float() - want).norm() < 0.004 * want.norm()


def test_a_half_linear_keeps_the_parameter_and_its_name(monkeypatch):
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.Linear(4, 3)).bfloat16()
    weight, x = model[0].weight, randn(2, 3, 6).bfloat16()
    want = model[0](x)
    use_half_linear(model)
    assert isinstance(model[0], HalfLinear)
    assert not isinstance(model[1], HalfLinear)
    assert model[0].weight is weight
    assert set(model.state_dict()) == {"0.weight", "1.weight", "1.bias"}
    monkeypatch.setattr(matmul, "KERNEL_WEIGHTS", 0)
    with torch.inference_mode():
        torch.testing.assert_close(model[0](x), want)
        assert model[0](x[:, :0]).shape == (2, 0, 4)


@pytest.mark.slow
def test_a_kernel_is_compiled_once_for_an_installation(tmp_path):
    code = (
        "from qmix.kernels.cpu.row_tile import FP16, INT8_WIDE; from qmix.kernels.cpu.sums import sums_of; "
        "sums_of(FP16), sums_of(INT8_WIDE)"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
        assert len(files) == 2


@pytest.mark.slow
@pytest.mark.skipif(not current().pairs, reason="bitsandbytes' kernels cannot be held to this path")
def test_the_embedded_models_run_loads_no_kernels():
    """Numba's 100 MB are a quarter of the run's memory; its one large matrix, the head, does not justify them."""
    code = (
        "import sys, qmix; runner = qmix.load('tiny', ram='1GiB'); "
        "print(runner.complete('Click the', max_new_tokens=2).completion_tokens, 'numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"]
