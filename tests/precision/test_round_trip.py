"""Round trips compared with records of stores, and with bitsandbytes at other block sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmix.errors import CheckpointError, UsageError
from qmix.geometry import MATRICES, Geometry
from qmix.precision import round_trip as module
from qmix.precision.bitsandbytes import functional as bnb
from qmix.precision.encode import encoded
from qmix.precision.formats import PRECISIONS
from qmix.precision.round_trip import BLOCKS, round_trip

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# hidden and intermediate size: packed; w2 alone not packed; short last blocks; an odd number of weights
SIZES = [(64, 128), (64, 96), (36, 50), (33, 35)]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
four_bits = pytest.mark.parametrize("kind", ["nf4", "fp4"])


def normal(*shape: int, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equal bits, so that the sign of a zero counts."""
    assert found.dtype == expected.dtype
    assert torch.equal(bits(found), bits(expected))


def geometry(hidden: int, inner: int) -> Geometry:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 8}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return Geometry.from_config({"model_type": "mixtral", **sizes, **heads, **experts}, "config.json")


def by_bitsandbytes(weights: torch.Tensor, kind: str, block: int) -> torch.Tensor:
    """Return a matrix quantised and dequantised by bitsandbytes, with all zeros positive (one of fp4's is not).

    It is passed as one row: on a CPU no block may be longer than a row.
    """
    codes, state = bnb.quantize_4bit(weights.float().view(-1), blocksize=block, quant_type=kind)
    state.absmax = state.absmax.bfloat16().float()
    return (bnb.dequantize_4bit(codes, state).view(weights.shape) + 0.0).to(weights.dtype)


@four_bits
def test_by_hand(kind: str) -> None:
    """absmax 12, 1.01 and 0; of nf4 the values at 0 and at 0.0796 of 12 are near 0.1 and 0.5."""
    weights = torch.zeros(3, 32)
    weights[0, :5] = torch.tensor([-12.0, 0.1, 0.5, 5.1, -5.1])
    weights[1, :2] = torch.tensor([1.01, -0.3])  # 1.01 is 1.0078125 in bf16
    found = round_trip(weights, kind, 32)
    first, second = {
        "nf4": (
            [-12.0, 0.0, 0.07958029955625534 * 12, 0.44070982933044434 * 12, -0.39491748809814453 * 12],
            -0.28444138,
        ),
        "fp4": ([-12.0, 0.0625, 0.0625, 6.0, -6.0], -1 / 3),
    }[kind]
    assert found[0, :5].tolist() == pytest.approx(first, rel=1e-6)
    assert found[1, :2].tolist() == pytest.approx([1.0078125, 1.0078125 * second], rel=1e-6)
    assert not found[0, 5:].any()
    assert not found[1, 2:].any()
    assert not found[2].any()


@every_dtype
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_is_what_a_record_dequantises_to(dtype: torch.dtype, precision: str, hidden: int, inner: int) -> None:
    model = geometry(hidden, inner)
    matrices = {name: normal(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(model.expert_matrices.items())}
    half = "fp16" if dtype is torch.float16 else "bf16"
    expert = encoded(matrices, model, precision, half)
    if precision == "half" and dtype is torch.float32:
        matrices = {
            name: matrix.bfloat16().float() for name, matrix in matrices.items()
        }  # a record rounds; this does not
    for name, matrix in zip(MATRICES, (expert.gate, expert.up, expert.down), strict=True):
        expected = matrix.dequantize(0, matrix.rows).to(dtype)
        assert_same(round_trip(matrices[name], precision), expected)


@four_bits
@every_dtype
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(64, 256), (37, 111)])
def test_any_block_is_what_bitsandbytes_gives(
    kind: str, dtype: torch.dtype, block: int, shape: tuple[int, int]
) -> None:
    weights = normal(*shape).to(dtype)
    assert_same(round_trip(weights, kind, block), by_bitsandbytes(weights, kind, block))


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["nf4", "fp4"]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    block=st.sampled_from(BLOCKS),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 130)),
    seed=st.integers(0, 2**31),
    exponents=st.floats(0, 20),
)
def test_any_weights_are_what_bitsandbytes_gives(kind, dtype, block, shape, seed, exponents) -> None:
    """Magnitudes spread over `exponents` powers of two, with a few zeros of either sign."""
    spread = normal(*shape, seed=seed + 1, scale=exponents).exp2()
    weights = normal(*shape, seed=seed) * spread
    weights.view(-1)[::7] *= 0
    assert_same(round_trip(weights.to(dtype), kind, block), by_bitsandbytes(weights.to(dtype), kind, block))


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_the_pieces_that_threads_take_change_nothing(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    weights = normal(50, 130)
    whole = round_trip(weights, precision, 32)
    monkeypatch.setattr(module, "PIECE", 130)
    assert_same(round_trip(weights, precision, 32), whole)


def test_rows_that_do_not_lie_together_are_taken_as_they_are_seen() -> None:
    weights = normal(64, 128)
    assert_same(round_trip(weights.T, "nf4"), round_trip(weights.T.contiguous(), "nf4"))


def test_its_weights_are_left_alone() -> None:
    weights = normal(8, 64).half()
    before = weights.clone()
    round_trip(weights, "fp4")
    assert_same(weights, before)


@every_dtype
@pytest.mark.parametrize("precision", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_named(dtype: torch.dtype, precision: str, value: float) -> None:
    weights = normal(40, 66).to(dtype)
    weights[3, 5] = value
    with pytest.raises(CheckpointError, match="'w1' holds NaN or infinite"):
        round_trip(weights, precision, name="w1")


def test_what_no_record_could_hold_is_refused() -> None:
    weights = torch.full((2, 64), torch.finfo(torch.float32).max)
    with pytest.raises(CheckpointError, match="'w1' has values too large for bf16"):
        round_trip(weights, "nf4", name="w1")
    with pytest.raises(ValueError, match="not 48"):
        round_trip(weights, "nf4", 48)
    with pytest.raises(UsageError, match="nf5"):
        round_trip(weights, "nf5")
