"""The mixture of experts' forward, over records that lie in a pool.

Tokens are grouped by expert, so that each record is fetched once and used for all of its tokens. Results do not
depend on which experts happened to be in memory: each lands in its own place and they are added in router order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qmix.pool import ExpertPool


class PooledExperts(nn.Module):
    """Stands in for transformers' MixtralExperts of one layer."""

    def __init__(self, layer: int, pool: ExpertPool, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.pool, self.activation = layer, pool, activation

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] tokens, [T, k] experts and their weights (fp32) to [T, H]."""
        tokens, top_k = top_k_index.shape
        outputs = hidden_states.new_empty(tokens, top_k, hidden_states.shape[-1])  # [T, k, H]
        if tokens == 1:
            choice = top_k_index[0].tolist()
            for expert, forward in self.pool.get(self.layer, choice):
                outputs[0, choice.index(expert)] = forward(hidden_states, self.activation)[0]
        else:
            for expert, forward in self.pool.get(self.layer, top_k_index.unique().tolist()):
                token, position = torch.where(top_k_index == expert)
                outputs[token, position] = forward(hidden_states[token], self.activation)
        # [T, 1, k] @ [T, k, H]
        return torch.bmm(top_k_weights.unsqueeze(1), outputs.float()).squeeze(1).to(hidden_states.dtype)
