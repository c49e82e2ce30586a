"""Quantisers equal bitsandbytes to the bit, including ties, denormal numbers and fp4's two zeros."""

from __future__ import annotations

import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numba.core.caching import CompileResultCacheImpl

from qmix.kernels.cpu import blocks
from qmix.kernels.cpu.compiled import compiled
from qmix.kernels.cpu.quantize import quantize_4bit_flat, quantize_4bit_packed, quantize_int8_rows
from qmix.kernels.packing import BLOCK
from qmix.precision.bitsandbytes import functional as bnb

KINDS = ("nf4", "fp4")
DTYPES = (torch.bfloat16, torch.float32)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))

both_kinds = pytest.mark.parametrize("kind", KINDS)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def bits(weights: torch.Tensor) -> np.ndarray:
    """Return weights as the kernels take them."""
    return weights.view(torch.uint16).numpy() if weights.dtype == torch.bfloat16 else weights.numpy()


def flat(weights: torch.Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    n = weights.numel()
    codes, absmax = np.empty((n + 1) // 2, np.uint8), np.empty(-(-n // BLOCK), np.float32)
    assert quantize_4bit_flat(bits(weights).reshape(-1), kind, codes, absmax, last=True) is True
    return codes, absmax


def packed(weights: torch.Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = weights.shape
    codes, absmax = np.empty(rows * cols // 2, np.uint8), np.empty((cols // BLOCK, rows), np.float32)
    assert quantize_4bit_packed(bits(weights), kind, codes, absmax) is True
    return codes, absmax


def int8(weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    codes, row_max = np.empty(weights.shape, np.int8), np.empty(len(weights), np.float32)
    assert quantize_int8_rows(bits(weights), codes, row_max) is True
    return codes, row_max


def assert_flat_equals(weights: torch.Tensor, kind: str) -> None:
    expected, state = bnb.quantize_4bit(weights, blocksize=BLOCK, quant_type=kind)
    codes, absmax = flat(weights, kind)
    np.testing.assert_array_equal(absmax.view(np.uint32), state.absmax.numpy().view(np.uint32))
    np.testing.assert_array_equal(codes, expected.numpy().reshape(-1))


def assert_packed_equals(weights: torch.Tensor, kind: str) -> None:
    expected, state = bnb.quantize_4bit(weights, blocksize=BLOCK, quant_type=kind)
    transposed = state.absmax.reshape(len(weights), -1).T.contiguous()
    expected, state = bnb._convert_weight_packed_for_cpu(expected, state)
    codes, absmax = packed(weights, kind)
    np.testing.assert_array_equal(absmax.view(np.uint32), transposed.numpy().view(np.uint32))
    assert torch.equal(torch.from_numpy(absmax).bfloat16(), state.absmax)
    np.testing.assert_array_equal(codes, expected.numpy().reshape(-1))


def assert_int8_equals(weights: torch.Tensor) -> None:
    expected, expected_max, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(weights)
    codes, row_max = int8(weights)
    np.testing.assert_array_equal(row_max, expected_max.numpy())
    np.testing.assert_array_equal(codes, expected.numpy())


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def in_blocks(values: torch.Tensor, absmax: float) -> torch.Tensor:
    """Return [rows, 64], rows a multiple of 32: each block has `absmax` and 63 of the values not above it."""
    values = values[values.abs() <= absmax]
    rows = -(-len(values) // (63 * 32)) * 32
    blocks = torch.full((rows, BLOCK), absmax, dtype=values.dtype)
    blocks[:, 1:] = torch.cat([values, values.new_zeros(rows * 63 - len(values))]).reshape(rows, 63)
    return blocks


# hand-computed


def example() -> torch.Tensor:
    """Return the module's example: absmax 2 everywhere."""
    weights = torch.zeros(32, 64)
    weights[:, 63] = 2.0
    weights[0, :4] = torch.tensor([-2.0, 0.0, 0.5, 1.0])
    weights[16, :4] = torch.tensor([0.5, 1.0, -2.0, 0.0])
    return weights


@both_dtypes
def test_flat_layout_by_hand(dtype: torch.dtype) -> None:
    codes, absmax = flat(example().to(dtype), "nf4")
    assert codes[:3].tobytes().hex() == "07ac77"
    assert codes[31] == 0x7F
    assert absmax.tolist() == [2.0] * 32


@both_dtypes
def test_packed_layout_by_hand(dtype: torch.dtype) -> None:
    codes, absmax = packed(example().to(dtype), "nf4")
    # columns 0 and 1: row 0 has 0 and 7, row 16 has 10 and 12; rows 1 and 17 are zeros
    assert codes[:4].tobytes().hex() == "a0c77777"
    # columns 2 and 3: row 0 has 10 and 12, row 16 has 0 and 7
    assert codes[32:34].tobytes().hex() == "0a7c"
    assert codes[-32:].tobytes().hex() == "77ff" * 16
    assert absmax.tolist() == [[2.0] * 32]


def test_fp4_has_two_zeros() -> None:
    weights = torch.zeros(64)
    weights[:6] = torch.tensor([12.0, 0.0, -0.0, 0.001, -0.001, -12.0])
    assert flat(weights, "fp4")[0][:3].tobytes().hex() == "30080b"


def test_int8_by_hand() -> None:
    codes, row_max = int8(torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5], [0.0, -0.0, 0, 0, 0, 0]]))
    assert codes.tolist() == [[127, -127, 0, 2, 2, 0], [0] * 6]
    assert row_max.tolist() == [127.0, 0.0]


# equality with bitsandbytes


@both_kinds
@both_dtypes
@pytest.mark.parametrize("scale", [0.02, 1.0, 1e-30, 1e30])
def test_normal_weights(kind: str, dtype: torch.dtype, scale: float) -> None:
    weights = normal(96, 320, scale=scale).to(dtype)
    assert_flat_equals(weights, kind)
    assert_packed_equals(weights, kind)
    assert_int8_equals(weights)


@both_kinds
@pytest.mark.parametrize(
    "absmax",
    [2.0**-133, 2.0**-127, 9.9e-39, 1e-38, 1.18e-38, 1e-30, 0.0173, 1.0, 1.9921875, 3.0, 448.0, 3.3e38],
)
def test_every_bfloat16_number(kind: str, absmax: float) -> None:
    """All bf16 numbers up to an absmax: zeros, denormals and every tie."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    weights = in_blocks(every, torch.tensor(absmax).bfloat16().item())
    assert_flat_equals(weights, kind)
    assert_packed_equals(weights, kind)


def near_midpoints(kind: str, absmax: np.float32) -> torch.Tensor:
    """Return absmax, and each midpoint times absmax with its two neighbours: 46 fp32 numbers."""
    middle = np.array(blocks.midpoints_of(kind)) * absmax
    below, above = np.nextafter(middle, np.float32(-np.inf)), np.nextafter(middle, np.float32(np.inf))
    return torch.from_numpy(np.concatenate([[absmax], below, middle, above]))


@both_kinds
@pytest.mark.parametrize("n", [46, 64])
def test_float32_numbers_next_to_a_midpoint(kind: str, n: int) -> None:
    """Here the last bit of a scale decides: full blocks are multiplied by the inverse, short ones divided."""
    random = np.random.default_rng(0)
    for absmax in np.exp2(random.uniform(-140, 120, 400)).astype(np.float32):
        near = near_midpoints(kind, absmax)
        assert_flat_equals(torch.cat([near, near[: n - 46]]), kind)


@both_kinds
@both_dtypes
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 0.3, 1e-38, -1e-38, 1e-40, 3e38])
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 128])
def test_blocks_of_one_value(kind: str, dtype: torch.dtype, value: float, n: int) -> None:
    assert_flat_equals(torch.full((n,), value, dtype=dtype), kind)


@both_kinds
@both_dtypes
def test_outlier_zero_blocks_and_negative_zeros(kind: str, dtype: torch.dtype) -> None:
    weights = normal(64, 192)
    weights[3, 70] = -1e4
    weights[5, :64] = 0.0
    weights[40, 64:128] = -0.0
    weights[33, ::2] = -0.0
    assert_flat_equals(weights.to(dtype), kind)
    assert_packed_equals(weights.to(dtype), kind)
    assert_int8_equals(weights.to(dtype))


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_number_of_any_weights_flat(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300))
    values = data.draw(arrays(np.float32, n, elements=floats))
    weights = torch.from_numpy(values).to(dtype)
    # the largest fp32 numbers round to an infinite bf16
    assert_flat_equals(weights.nan_to_num(posinf=3e38, neginf=-3e38), kind)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 3).map(lambda g: 32 * g), st.integers(1, 4).map(lambda b: 64 * b)),
    seed=st.integers(0, 2**31),
    exponents=st.floats(0, 20),
)
def test_any_shape_packed(kind, dtype, shape, seed, exponents) -> None:
    """Magnitudes spread over `exponents` powers of two."""
    spread = normal(*shape, seed=seed + 1, scale=exponents).exp2()
    assert_packed_equals((normal(*shape, seed=seed) * spread).to(dtype), kind)


@settings(max_examples=100, deadline=None)
@given(dtype=st.sampled_from(DTYPES), rows=st.integers(1, 5), cols=st.integers(1, 200), data=st.data())
def test_any_shape_int8(dtype, rows, cols, data) -> None:
    elements = st.floats(-100, 100, width=32, allow_subnormal=False)
    weights = torch.from_numpy(data.draw(arrays(np.float32, (rows, cols), elements=elements))).to(dtype)
    weights[:, 0] = 1.0  # rows too small for a scale have a test of their own
    assert_int8_equals(weights)


@both_dtypes
def test_int8_ties_go_to_even(dtype: torch.dtype) -> None:
    halves = torch.arange(-127, 127) + 0.5
    assert_int8_equals(torch.cat([halves, torch.tensor([127.0])])[None].to(dtype))


@both_dtypes
@pytest.mark.parametrize("largest", [1e-45, 1e-40, 2e-39, 1e-38, 1e-37, 3.7e-37, 3.8e-37, 1e-36])
def test_int8_rows_without_a_finite_scale(dtype: torch.dtype, largest: float) -> None:
    weights = torch.tensor([[0.0, largest, -largest, 0.5 * largest] * 9 + [largest]]).to(dtype)
    codes, _ = int8(weights)
    assert codes[0, 1] == (127 if largest > 3.74e-37 else 0)
    if platform.machine() == "x86_64":  # elsewhere torch's cast of an infinity to int8 need not give 0
        assert_int8_equals(weights)


# chunks, threads, refusals


@both_kinds
@both_dtypes
def test_chunks_of_rows_in_threads_equal_the_whole(kind: str, dtype: torch.dtype) -> None:
    rows, cols, step = 352, 256, 64
    weights = normal(rows, cols).to(dtype)
    codes, absmax = np.zeros(rows * cols // 2, np.uint8), np.zeros((cols // BLOCK, rows), np.float32)

    def quantize(start: int) -> bool:
        chunk = bits(weights)[start : start + step]
        part = codes[start * cols // 2 :][: chunk.size // 2]
        return quantize_4bit_packed(chunk, kind, part, absmax[:, start : start + step])

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(quantize, range(0, rows, step)))
    whole_codes, whole_absmax = packed(weights, kind)
    np.testing.assert_array_equal(codes, whole_codes)
    np.testing.assert_array_equal(absmax, whole_absmax)


@both_kinds
def test_flat_runs_equal_the_whole(kind: str) -> None:
    weights = normal(1000)
    codes, absmax = np.zeros(500, np.uint8), np.zeros(16, np.float32)
    for start in range(0, 1000, 192):
        end = min(start + 192, 1000)
        out = codes[start // 2 : (end + 1) // 2], absmax[start // 64 : -(-end // 64)]
        assert quantize_4bit_flat(weights.numpy()[start:end], kind, *out, last=end == 1000)
    np.testing.assert_array_equal(codes, flat(weights, kind)[0])
    np.testing.assert_array_equal(absmax, flat(weights, kind)[1])


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    value=st.sampled_from(NOT_FINITE),
    position=st.integers(0, 64 * 128 - 1),
    short=st.integers(0, 63),
)
def test_one_weight_that_is_not_finite_is_found(dtype, value, position, short) -> None:
    weights = normal(64, 128).to(dtype)
    weights.view(-1)[position] = value
    codes, absmax = np.empty(64 * 64, np.uint8), np.empty((2, 64), np.float32)
    assert quantize_4bit_packed(bits(weights), "nf4", codes, absmax) is False
    assert quantize_int8_rows(bits(weights), np.empty((64, 128), np.int8), absmax[0]) is False
    run = bits(weights).reshape(-1)[: position + 1 + short]
    outputs = np.empty((run.size + 1) // 2, np.uint8), np.empty(-(-run.size // 64), np.float32)
    assert quantize_4bit_flat(run, "fp4", *outputs, last=True) is False


def test_the_largest_finite_weights_are_finite() -> None:
    for dtype in DTYPES:
        weights = torch.full((32, 64), torch.finfo(dtype).max, dtype=dtype)
        assert_packed_equals(weights, "nf4")


W, C, A = np.zeros((32, 64), np.float32), np.zeros(1024, np.uint8), np.zeros((1, 32), np.float32)


@pytest.mark.parametrize(
    "arguments",
    [
        (W, "nf3", C, A),
        (W.astype(np.float16), "nf4", C, A),
        (W[:16], "nf4", C[:512], A[:, :16]),
        (np.zeros((32, 32), np.float32), "nf4", C[:512], A),
        (np.zeros((64, 32), np.float32).T, "nf4", C, A),
        (W, "nf4", C[:-1], A),
        (W, "nf4", C.astype(np.int8), A),
        (W, "nf4", np.zeros(2048, np.uint8)[::2], A),
        (W, "nf4", C, A[:, :-1]),
        (W, "nf4", C, A.T),
        (W, "nf4", C, A.astype(np.float64)),
    ],
)
def test_what_does_not_fit_is_refused(arguments) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        quantize_4bit_packed(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        (W[0, :63], "nf4", C[:32], A[0, :1], False),
        (W[0], "nf4", C[:64:2], A[0, :1], True),
        (W[0], "nf4", C[:31], A[0, :1], True),
        (W[:2].reshape(-1), "nf4", C[:64], A[0, :1], True),
        (W[:2].reshape(-1)[::2], "nf4", C[:32], A[0, :1], True),
    ],
)
def test_what_does_not_fit_the_flat_layout_is_refused(arguments) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        quantize_4bit_flat(*arguments)


def test_kernels_compile_where_nothing_can_be_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    assert compiled(lambda x: x + 1)(1) == 2
