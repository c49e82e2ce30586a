"""Batch invariance: a token's numbers depend on its own sequence alone, and not on what is computed beside it.

Sequences come and go in a batch, and a resumed run has other neighbours, yet the same line has to get the same answer.
In torch the last bits of a row change with the number of rows: products choose another kernel by size, and elementwise
functions end in an incomplete vector step whose place varies. Both are replaced. Norms, softmax and top-k treat each
row by itself already; where qmix's kernels take passes of a few tokens as a whole, longer ones have their norms and
choices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import MixtralForCausalLM

from qmix.precision.dense import use_half_linear
from qmix.precision.matmul import half_product

ALONE = 2**15 - 1  # numbers: torch shares out more among threads
STEP = 64  # columns: a multiple leaves no incomplete vector step (two vectors of bf16)
POSITIONS = 64  # rotary angles are computed for so many at once

Elementwise = Callable[[torch.Tensor], torch.Tensor]


def make_invariant(model: MixtralForCausalLM, kernels: bool) -> None:
    """Replace transformers' parts by invariant ones with the same parameters; the pool's experts already are.

    With `kernels` norms and choices are those of qmix's kernels for half a layer, in bf16.
    """
    use_half_linear(model, invariant=True)
    for layer in model.model.layers:
        layer.mlp.gate = InvariantRouter(layer.mlp.gate.weight, layer.mlp.gate.top_k, kernels)
        layer.mlp.experts.activation = row_by_row(layer.mlp.experts.activation)
        if kernels:
            layer.input_layernorm = InvariantNorm(layer.input_layernorm)
            layer.post_attention_layernorm = InvariantNorm(layer.post_attention_layernorm)
    if kernels:
        model.model.norm = InvariantNorm(model.model.norm)
    model.model.rotary_emb = BlockRotary(model.model.rotary_emb)


def row_by_row(function: Elementwise) -> Elementwise:
    """Return an elementwise function of [T, W] that takes every row in the same steps."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        rows = max(1, ALONE // x.shape[1]) if x.shape[1] % STEP == 0 else 1
        if len(x) <= rows:
            return function(x)
        return torch.cat([function(part) for part in x.split(rows)])

    return apply


class InvariantNorm(nn.Module):
    """Replaces transformers' MixtralRMSNorm in bf16; sums in the order of qmix's kernel."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the norms of [..., H]."""
        from qmix.kernels.cpu.row_by_row import norm_rows

        return norm_rows(hidden_states, self.weight, self.variance_epsilon)


class InvariantRouter(nn.Module):
    """Replaces transformers' MixtralTopKRouter with qmix's product; with `kernels`, a kernel also chooses experts."""

    def __init__(self, weight: nn.Parameter, top_k: int, kernels: bool) -> None:
        super().__init__()
        self.weight, self.top_k, self._kernels = weight, top_k, kernels

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits [T, E], weights [T, k] and experts [T, k] for [..., H]."""
        logits = half_product(hidden_states.reshape(-1, hidden_states.shape[-1]), self.weight, invariant=True)
        if self._kernels:
            from qmix.kernels.cpu.row_by_row import choose_rows

            experts, shares = choose_rows(logits, self.top_k)
            return logits, shares, experts
        chosen, experts = logits.float().softmax(-1).topk(self.top_k, dim=-1)
        return logits, chosen / chosen.sum(-1, keepdim=True), experts


class BlockRotary(nn.Module):
    """A rotary embedding that computes its angles for whole blocks of positions.

    Blocks are kept: for a context of 4096 tokens and heads of 128 columns they take 2 MB.
    """

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary
        self._blocks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines [1, T, D] in x's type for the positions [1, T]."""
        blocks = int(position_ids.max()) // POSITIONS + 1
        if blocks > len(self._blocks):
            for block in range(len(self._blocks), blocks):
                positions = torch.arange(block * POSITIONS, (block + 1) * POSITIONS)[None]
                self._blocks.append(self.rotary(x, positions))
            self._table = [torch.cat(parts, dim=1) for parts in zip(*self._blocks, strict=True)]
        cos, sin = (table[0, position_ids] for table in self._table)
        return cos, sin
