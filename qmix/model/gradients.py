"""Gradients through experts, recomputed from dequantised weights in the backward pass.

The kernels that multiply quantised matrices record nothing for autograd, and by the time of the backward pass the slot
of a record may hold another. The backward pass therefore fetches each record again and dequantises it, one expert at a
time: it keeps no weights, and takes the memory of one expert in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qmix.pool.eviction import Key
from qmix.pool.protocol import Pool
from qmix.precision.expert import Expert

Activation = Callable[[torch.Tensor], torch.Tensor]
Forward = Callable[[torch.Tensor, Activation], torch.Tensor]


def differentiable(forward: Forward, pool: Pool, key: Key) -> Forward:
    """Return an expert's forward that autograd can differentiate. The expert's weights get no gradient."""

    def run(x: torch.Tensor, activation: Activation) -> torch.Tensor:
        output: torch.Tensor = _Recomputed.apply(x, activation, forward, pool, key)
        return output

    return run


def one_by_one(pool: Pool, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Expert]]:
    """Yield experts in the given order, whichever are in memory: checkpointing compares a pass with its repeat."""
    for expert in experts:
        yield from pool.get(layer, [expert])


class _Recomputed(torch.autograd.Function):
    """Forward by the kernels, backward through the dequantised expert."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, activation: Activation, forward: Forward, pool: Pool, key: Key
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.activation, ctx.pool, ctx.key = activation, pool, key
        return forward(x, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        layer, number = ctx.key
        for _, expert in ctx.pool.get(layer, [number]):
            with torch.enable_grad():
                host = x.detach().cpu().requires_grad_()
                output = _dequantised(expert, host, ctx.activation)
            (found,) = torch.autograd.grad(output, host, gradient.cpu())
        return found.to(x.device), None, None, None, None


def _dequantised(expert: Expert, x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Return the expert's output [T, H] for x [T, H], by plain products that autograd records."""
    gate, up, down = (matrix.dense(x.dtype) for matrix in (expert.gate, expert.up, expert.down))
    return F.linear(activation(F.linear(x, gate)) * F.linear(x, up), down)
