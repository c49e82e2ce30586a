"""The forward of the mixture of experts, over records in a pool.

Tokens are grouped by expert: each record is fetched once and used for all of its tokens. The result does not depend on
which experts were in memory: each output has a place of its own, and outputs are added in router order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qmix.model.gradients import Activation, Forward, differentiable, one_by_one
from qmix.model.refusals import PoolExperts
from qmix.plan.memory import PREFILL_CHUNK
from qmix.pool.prefetch import Prefetcher
from qmix.pool.protocol import Pool

CHUNK = PREFILL_CHUNK  # tokens through an expert at once: longer passes take no more work space


class PooledExperts(PoolExperts):
    """Replaces transformers' MixtralExperts of one layer. Without `prefetcher`, reads wait for the router."""

    def __init__(
        self,
        layer: int,
        pool: Pool,
        activation: Activation,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        super().__init__(layer, pool)
        self.activation, self.prefetcher = activation, prefetcher

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return [T, H] for tokens [T, H], their experts [T, k] and the experts' weights [T, k] in fp32."""
        if self.layer == 0:  # once a pass: it takes a microsecond
            self.check_caller()
        tokens, top_k = top_k_index.shape
        outputs = hidden_states.new_empty(tokens, top_k, hidden_states.shape[-1])  # [T, k, H]
        chosen = top_k_index[0].tolist() if tokens == 1 else top_k_index.unique().tolist()
        for expert, forward in self._get(hidden_states, chosen):
            if hidden_states.requires_grad:
                forward = differentiable(forward, self.pool, (self.layer, expert))  # noqa: PLW2901
            if tokens == 1:
                outputs[0, chosen.index(expert)] = forward(hidden_states, self.activation)[0]
            else:
                token, position = torch.where(top_k_index == expert)
                parts = _groups(token, tokens, self.pool.invariant)
                for some, places in zip(token.tensor_split(parts), position.tensor_split(parts), strict=True):
                    if len(some):
                        outputs[some, places] = forward(hidden_states[some], self.activation)
        sums = [weighted_sum(*parts) for parts in zip(outputs.split(CHUNK), top_k_weights.split(CHUNK), strict=True)]
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _get(self, hidden_states: torch.Tensor, chosen: list[int]) -> Iterator[tuple[int, Forward]]:
        if hidden_states.requires_grad:
            return one_by_one(self.pool, self.layer, chosen)
        if self.prefetcher is None:
            return self.pool.get(self.layer, chosen)
        self.prefetcher.chosen(self.layer, chosen)
        return self.pool.get(self.layer, chosen, self.prefetcher.coming(self.layer, hidden_states))


def _groups(token: torch.Tensor, tokens: int, invariant: bool) -> list[int]:
    """Return where to cut an expert's tokens, ascending, so that at most CHUNK go through it at once.

    A product may depend on its number of rows unless it is invariant. Cut where the chunks of all tokens end, every
    product has the rows that it has when the chunks come one after the other.
    """
    if tokens <= CHUNK:
        return []
    if invariant:
        return list(range(CHUNK, len(token), CHUNK))
    ends = torch.arange(CHUNK, tokens, CHUNK)
    cuts: list[int] = torch.searchsorted(token, ends).tolist()
    return cuts


def weighted_sum(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return [T, H] for outputs [T, k, H] and weights [T, k] in fp32: summed in fp32 and rounded once."""
    total = outputs[:, 0] * weights[:, :1]
    for place in range(1, outputs.shape[1]):
        total += outputs[:, place] * weights[:, place : place + 1]
    return total.to(outputs.dtype)
