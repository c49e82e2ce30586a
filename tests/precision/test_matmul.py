"""Products with records in place, compared with bitsandbytes' own dequantisation, with and without fast kernels."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch

from qmix.geometry import Geometry
from qmix.precision import quantised
from qmix.precision.expert import Expert
from qmix.precision.quantizer import MatrixQuantizer
from qmix.precision.record import record_layout

SHAPES = {"packed": (64, 128), "one group of rows": (64, 32), "odd": (33, 47), "even": (72, 100)}
PRECISIONS = ("nf4", "fp4", "int8", "half")


def geometry(hidden: int, inner: int) -> Geometry:
    return Geometry(hidden, inner, 1, 2, 1, 16, 1, 1, 8, 64)


def weights(sizes: Geometry) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=rng).bfloat16() for name, shape in sizes.expert_matrices.items()}


def filled_expert(precision: str, sizes: Geometry, matrices: dict[str, torch.Tensor]) -> Expert:
    """Return an expert whose record the quantiser wrote from these matrices."""
    layout = record_layout(sizes, precision, "bf16")
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name, matrix in matrices.items():
        quantizer = MatrixQuantizer(precision, "bf16", *matrix.shape, name)
        offset, data = quantizer.quantize(matrix, 0)
        places = [item for item in layout.parts if item.matrix == name]
        for place, content in zip(places, (data, quantizer.scales()), strict=False):
            if content is not None:
                buffer[place.offset : place.offset + content.size] = torch.from_numpy(content.copy())
        assert offset == 0
    return Expert(buffer, layout, sizes.expert_matrices)


def theirs(precision: str, matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix quantised and dequantised by bitsandbytes, with scales rounded as in a store."""
    if precision == "half":
        return matrix.float()
    if precision == "int8":
        codes, row_max, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(matrix)
        return codes.float() * row_max[:, None] / 127
    # as one row: bitsandbytes 0.50 dequantises rows shorter than a block wrongly on a CPU
    codes, state = bnb.quantize_4bit(matrix.view(-1), blocksize=64, quant_type=precision)
    state.absmax = state.absmax.bfloat16().float()
    state.dtype = torch.float32
    return bnb.dequantize_4bit(codes, state).view(matrix.shape)


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_dequantised_rows_are_bitsandbytes_own(precision, sizes):
    shape = geometry(*sizes)
    matrices = weights(shape)
    expert = filled_expert(precision, shape, matrices)
    for part, name in ((expert.gate, "w1"), (expert.up, "w3"), (expert.down, "w2")):
        want = theirs(precision, matrices[name])
        torch.testing.assert_close(part.dequantize(0, part.rows), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(part.dequantize(5, 29), want[5:29], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_are_those_of_the_dequantised_matrix(monkeypatch, precision, sizes, dtype, kernels):
    if precision == "half" and dtype == torch.float16:
        pytest.skip("half experts have the type of the activations")
    if not kernels:  # a CPU without AVX512-BF16
        monkeypatch.setattr(quantised, "four_bit_kernel", lambda kind, ours: None)
    shape = geometry(*sizes)
    expert = filled_expert(precision, shape, weights(shape))
    for tokens in (1, 2, 7, 40):
        x = torch.randn(tokens, shape.hidden_size, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        got = expert.gate.multiply(x)
        want = x.float() @ expert.gate.dequantize(0, expert.gate.rows).T
        assert got.dtype == dtype
        assert (got.float() - want).norm() < 0.008 * want.norm()


def test_an_expert_by_hand():
    """Two hidden and two inner values, in half precision."""
    shape = Geometry(2, 2, 1, 1, 1, 2, 1, 1, 8, 64)
    matrices = {
        "w1": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),  # gate: (1, -2) stays
        "w3": torch.tensor([[2.0, 0.0], [0.0, 3.0]]),  # up: (2, -6)
        "w2": torch.tensor([[1.0, 1.0], [1.0, -1.0]]),
    }
    expert = filled_expert("half", shape, {name: matrix.bfloat16() for name, matrix in matrices.items()})
    x = torch.tensor([[1.0, -2.0]]).bfloat16()
    # relu(gate) * up = (2, 0); down = (2, 2)
    assert expert(x, torch.relu).tolist() == [[2.0, 2.0]]


def test_a_slots_new_content_is_what_counts(monkeypatch):
    """Views are made once for a slot; a product must use all of the content that is read into it later."""
    shape = geometry(64, 128)
    for precision in PRECISIONS:
        first, second = weights(shape), {name: -2 * matrix for name, matrix in weights(shape).items()}
        expert, other = (filled_expert(precision, shape, matrices) for matrices in (first, second))
        x = torch.ones(1, 64).bfloat16()
        want = other.gate.multiply(x)
        for mine, new in zip(vars(expert.gate).values(), vars(other.gate).values(), strict=True):
            if isinstance(mine, torch.Tensor) and mine.data_ptr() != new.data_ptr():
                mine.copy_(new)
        assert torch.equal(expert.gate.multiply(x), want)
