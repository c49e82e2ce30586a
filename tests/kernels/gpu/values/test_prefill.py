"""Matrices are dequantised to the bit, and products of many tokens equal the dense reference."""

from __future__ import annotations

import pytest
import torch
from records import Experts, error

from qmix.kernels.gpu import prefill
from qmix.kernels.gpu.shapes import DENSE_FROM


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantised_matrices_equal_the_definition(kind, dtype):
    experts = Experts(kind, dtype, 192, 64, number=1)
    buffer = torch.empty(192 * 64, dtype=experts.dtype)
    for matrix, weights in enumerate(experts.weights[0]):
        found = prefill.dequantize(experts.shape, experts.records[0], matrix, buffer)
        assert torch.equal(found, weights.to(experts.dtype))


@pytest.mark.parametrize(
    ("precision", "dtype", "hidden", "inner"),
    [("nf4", "bf16", 64, 128), ("fp4", "fp16", 64, 64), ("int8", "bf16", 80, 96), ("half", "fp16", 48, 40)],
)
def test_forward_equals_reference(precision, dtype, hidden, inner):
    experts = Experts(precision, dtype, hidden, inner, number=2)
    buffer = torch.empty(hidden * inner, dtype=experts.dtype)
    for tokens in (1, 50):
        x = torch.randn(tokens, hidden).to(experts.dtype)
        found = prefill.forward(experts.shape, experts.records[1], x, buffer)
        assert error(found, experts.forward(1, x)) < 3 * torch.finfo(experts.dtype).eps


@pytest.mark.parametrize(("precision", "dtype"), [("nf4", "bf16"), ("fp4", "fp16")])
def test_in_place_equals_reference_and_a_tokens_sums_have_one_order(precision, dtype):
    experts = Experts(precision, dtype, 64, 128, number=2)
    x = torch.randn(40, 64).to(experts.dtype)
    found = prefill.in_place(experts.shape, experts.records[1], x)
    assert error(found, experts.forward(1, x)) < 3 * torch.finfo(experts.dtype).eps
    for tokens in (1, 32, 33):
        assert torch.equal(prefill.in_place(experts.shape, experts.records[1], x[:tokens]), found[:tokens])


def test_the_faster_way_is_measured_on_cards_only():
    experts = Experts("nf4", "bf16", 64, 64, number=1)
    buffer = torch.empty(64 * 64, dtype=experts.dtype)
    found = prefill.dense_from(experts.shape, experts.records[0], experts.dtype, buffer)
    assert (
        found == DENSE_FROM if buffer.device.type == "cpu" else found in (*prefill.MEASURED, 2 * prefill.MEASURED[-1])
    )
