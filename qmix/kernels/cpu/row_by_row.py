"""Norms and choices of experts for any number of tokens, equal to those of `attention_half` to the bit.

A batch-invariant model computes a few tokens with the kernels of half a layer or of all layers, and many with a module
at a time. Both have the code of `half_layer_pieces`, so that a token's numbers are the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray

from qmix.kernels.cpu import team
from qmix.kernels.cpu.addresses import float_at, half_at, next_piece
from qmix.kernels.cpu.compiled import compiled_address
from qmix.kernels.cpu.half_layer_pieces import choose, norm

TOGETHER = 64  # rows of logits in a piece


def norm_rows(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the RMS norms of x [..., H] times a weight [H], all in bf16, rounded as transformers rounds them."""
    x, out, constant = x.contiguous(), torch.empty_like(x), torch.tensor([epsilon])
    size = len(weight)
    places = x.data_ptr(), weight.data_ptr(), constant.data_ptr(), out.data_ptr()
    team.run(norm_kernel(), x.numel() // size, size, *places)
    return out


def choose_rows(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the experts [T, k], int64, with the largest of the logits [T, E] in bf16, and their shares, fp32."""
    tokens, experts = logits.shape
    logits, chosen, shares = (
        logits.contiguous(),
        torch.empty(tokens, top_k, dtype=torch.int64),
        torch.empty(tokens, top_k),
    )
    team.run(choose_kernel(), tokens, experts, top_k, logits.data_ptr(), chosen.data_ptr(), shares.data_ptr())
    return chosen, shares


@cache
def norm_kernel() -> int:
    """Return the address of the kernel of norms."""

    def kernel(block: Any) -> None:
        rows, size, x, weight, epsilon, out = carray(block, 7)[1:]
        row = next_piece(block)
        while row < rows:
            norm(2, x + row * size * 2, weight, float_at(epsilon), size, out + row * size * 2, 0)
            row = next_piece(block)

    return compiled_address(kernel)


@cache
def choose_kernel() -> int:
    """Return the address of the kernel of choices."""

    def kernel(block: Any) -> None:
        rows, experts, top_k, logits, chosen, shares = carray(block, 7)[1:]
        numbers, first = np.empty(experts, np.float32), next_piece(block) * TOGETHER
        while first < rows:
            for row in range(first, min(first + TOGETHER, rows)):
                for expert in range(experts):
                    numbers[expert] = half_at(logits + (row * experts + expert) * 2, 0)
                choose(numbers, top_k, chosen + row * top_k * 8, shares + row * top_k * 4)
            first = next_piece(block) * TOGETHER

    return compiled_address(kernel)
