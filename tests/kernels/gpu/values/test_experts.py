"""Experts read in place equal the dense reference, and a token's numbers do not depend on the other tokens."""

from __future__ import annotations

import pytest
import torch
from records import Experts, error

from qmix.kernels.gpu import moe
from qmix.kernels.gpu.shapes import down_splits

ROUNDING = {"bf16": 0.008, "fp16": 0.0015}  # of x, inner, and nf4's and fp4's values


def choices(tokens: int, experts: int, top_k: int = 2) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])


def run(
    experts: Experts, x: torch.Tensor, ids: torch.Tensor, absent: tuple[int, ...] = (), tile: int | None = None
) -> torch.Tensor:
    """Return the results [T * k, H] in fp32, with NaN where the kernels wrote nothing."""
    shape, pairs = experts.shape, ids.numel()
    inner = torch.full((pairs, shape.inner), float("nan"), dtype=experts.dtype)
    parts = torch.full((down_splits(shape.inner), pairs, shape.hidden), float("nan"))
    groups = None if tile is None else moe.group(ids, experts.number, tile)
    moe.gate_up(shape, experts.addresses(absent), ids, x, inner, groups)
    moe.down(shape, experts.addresses(absent), ids, inner, parts, groups)
    return parts.sum(0)


@pytest.mark.parametrize(
    ("precision", "dtype", "tokens", "hidden", "inner", "absent", "tile"),
    [
        ("nf4", "bf16", 1, 64, 512, (), None),  # four partial sums
        ("nf4", "bf16", 7, 128, 128, (1,), None),
        ("nf4", "fp16", 2, 64, 320, (), None),  # an odd number of blocks in both directions
        ("nf4", "bf16", 33, 64, 64, (0,), 16),
        ("fp4", "bf16", 2, 64, 128, (0, 1, 2, 3), None),
        ("fp4", "fp16", 32, 64, 64, (), None),
        ("int8", "bf16", 2, 80, 96, (), None),  # rows and columns that fill no tile
        ("int8", "fp16", 7, 64, 128, (0,), None),
        ("int8", "bf16", 33, 32, 48, (), 8),
        ("half", "bf16", 1, 80, 36, (), None),
        ("half", "fp16", 32, 32, 32, (2,), None),
    ],
)
def test_equals_reference(precision, dtype, tokens, hidden, inner, absent, tile):
    experts = Experts(precision, dtype, hidden, inner)
    ids, x = choices(tokens, experts.number), torch.randn(tokens, hidden).to(experts.dtype)
    found = run(experts, x, ids, absent, tile)
    for pair, expert in enumerate(ids.flatten().tolist()):
        if expert in absent:
            assert torch.isnan(found[pair]).all()
        else:
            assert error(found[pair], experts.forward(expert, x[pair // 2])) < ROUNDING[dtype]


@pytest.mark.parametrize(("precision", "top_k"), [("nf4", 1), ("int8", 3)])
def test_pairs_without_an_expert_are_left_alone(precision, top_k):
    experts = Experts(precision, "bf16", 64, 64)
    ids, x = choices(3, experts.number, top_k), torch.randn(3, 64).bfloat16()
    ids[1] = -1
    for tile in (None, 8):
        found = run(experts, x, ids, tile=tile).view(3, top_k, -1)
        assert torch.isnan(found[1]).all()
        assert not torch.isnan(found[::2]).any()


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_one_order_of_sums_for_any_number_of_tokens(precision):
    experts = Experts(precision, "bf16", 64, 128, number=3)
    ids, x = choices(18, 3), torch.randn(18, 64).bfloat16()
    together = run(experts, x, ids, tile=8).view(18, 2, -1)
    for tokens in (slice(0, 1), slice(9, 16)):
        assert torch.equal(run(experts, x[tokens], ids[tokens]), together[tokens].flatten(0, 1))


def test_many_tokens_need_groups():
    experts = Experts("half", "bf16", 32, 32)
    with pytest.raises(ValueError, match="33 tokens need groups"):
        run(experts, torch.zeros(33, 32).bfloat16(), choices(33, 4))


def test_groups_are_chunks_of_pairs_by_expert():
    ids = torch.tensor([[2, 0], [-1, 2], [2, 0], [2, 2]])  # pairs 0..7
    groups = moe.group(ids, experts=4, tile=2)
    assert groups.order.tolist() == [1, 5, 0, 3, 4, 6, 7, 2]
    used = [(0, 0, 2), (2, 2, 2), (2, 4, 2), (2, 6, 1)]
    assert [tuple(chunk) for chunk in groups.chunks.tolist() if chunk[0] >= 0] == used
    assert len(groups.chunks) == 8
