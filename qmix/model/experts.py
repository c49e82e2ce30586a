"""The forward of the mixture of experts, over records in a pool.

Tokens are grouped by expert: each record is fetched once and used for all of its tokens. All experts that are in memory
together are one piece of work for the cores (`multiply_experts`); the others follow as they are read.
The result does not depend on which experts were in memory: each output has a place of its own, and outputs are added in
router order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch.nn.functional import silu

from qmix.model.gradients import Activation, Forward, differentiable, one_by_one
from qmix.model.refusals import PoolExperts
from qmix.plan.memory import PREFILL_CHUNK
from qmix.pool.prefetch import Prefetcher
from qmix.pool.protocol import Pool
from qmix.precision.expert import Expert

CHUNK = PREFILL_CHUNK  # rows through experts at once: longer passes take no more work space


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
        self.silu = activation is silu  # the activation that the kernel has

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return [T, H] for tokens [T, H], their experts [T, k] and the experts' weights [T, k] in fp32."""
        if self.layer == 0:  # once a pass: it takes a microsecond
            self.check_caller()
        tokens, top_k = top_k_index.shape
        outputs = hidden_states.new_empty(tokens, top_k, hidden_states.shape[-1])  # [T, k, H]
        chosen = top_k_index[0].tolist() if tokens == 1 else top_k_index.unique().tolist()
        places: _Places | None = None
        left, total = len(chosen), None
        for group in self._get(hidden_states, chosen):
            left -= len(group)
            together: list[tuple[int, Expert]] = []
            for expert, forward in group:
                if isinstance(forward, Expert) and self._kernel_takes(hidden_states):
                    places = places or _Places(chosen, top_k_index)
                    if forward.takes_ours(places.count(expert)):
                        together.append((expert, forward))
                        continue
                self._compute(expert, forward, hidden_states, top_k_index, outputs)
            if together and places:
                last = left == 0 and not top_k_weights.requires_grad
                weights = top_k_weights.contiguous() if last else None
                total = _multiply(together, places, hidden_states, outputs, weights)
        return weighted_sums(outputs, top_k_weights) if total is None else total

    def _kernel_takes(self, hidden_states: torch.Tensor) -> bool:
        """Return whether qmix's kernel can compute experts together: for addresses, and without gradients."""
        return self.silu and type(hidden_states) is torch.Tensor and not hidden_states.requires_grad

    def _compute(
        self,
        expert: int,
        forward: Forward,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """Put one expert's results into their places of `outputs`."""
        if hidden_states.requires_grad:
            forward = differentiable(forward, self.pool, (self.layer, expert))
        tokens = len(hidden_states)
        if tokens == 1:
            place = top_k_index[0].tolist().index(expert)
            outputs[0, place] = forward(hidden_states, self.activation)[0]
            return
        token, position = torch.where(top_k_index == expert)
        parts = _groups(token, tokens, self.pool.invariant)
        for some, places in zip(token.tensor_split(parts), position.tensor_split(parts), strict=True):
            if len(some):
                outputs[some, places] = forward(hidden_states[some], self.activation)

    def _get(self, hidden_states: torch.Tensor, chosen: list[int]) -> Iterator[Sequence[tuple[int, Forward]]]:
        if hidden_states.requires_grad:
            return ([one] for one in one_by_one(self.pool, self.layer, chosen))
        if self.prefetcher is None:
            return self.pool.groups(self.layer, chosen)
        self.prefetcher.chosen(self.layer, chosen)
        return self.pool.groups(self.layer, chosen, self.prefetcher.coming(self.layer, hidden_states))


class _Places:
    """The places t * k + i of each expert among the outputs [T, k] of `top_k_index`, ascending, int64."""

    def __init__(self, chosen: list[int], top_k_index: torch.Tensor) -> None:
        if len(top_k_index) == 1:
            self._order, counts = torch.arange(len(chosen)), [1] * len(chosen)
        else:
            numbers = top_k_index.flatten()
            self._order, counts = numbers.argsort(stable=True), numbers.bincount().tolist()
            counts = [counts[expert] for expert in chosen]  # ascending, as `chosen` is
        ends = list(accumulate(counts))
        self._spans = {expert: (end - count, count) for expert, end, count in zip(chosen, ends, counts, strict=True)}

    def count(self, expert: int) -> int:
        """Return the number of an expert's tokens."""
        return self._spans[expert][1]

    def parts(self, expert: int) -> Iterator[tuple[int, int]]:
        """Yield address and number of an expert's places, at most CHUNK at a time."""
        start, count = self._spans[expert]
        for first in range(0, count, CHUNK):
            yield self._order.data_ptr() + 8 * (start + first), min(CHUNK, count - first)


def _multiply(
    experts: Sequence[tuple[int, Expert]],
    places: _Places,
    hidden_states: torch.Tensor,
    outputs: torch.Tensor,
    weights: torch.Tensor | None,
) -> torch.Tensor | None:
    """Put the experts' results into `outputs`, at most CHUNK rows in a call of the kernel.

    With `weights` the last call returns the weighted sums [T, H].
    """
    from qmix.kernels.cpu.experts import Rows, multiply_experts

    calls: list[tuple[str, list[Rows]]] = []
    room = 0
    for number, expert in sorted(experts, key=lambda item: item[1].precision):
        for place, count in places.parts(number):
            if not calls or calls[-1][0] != expert.precision or count > room:
                calls.append((expert.precision, []))
                room = CHUNK
            calls[-1][1].append((expert.places, place, count))
            room -= count
    inner = experts[0][1].gate.rows
    for precision, rows in calls[:-1]:
        multiply_experts(precision, rows, hidden_states, outputs, inner)
    precision, rows = calls[-1]
    return multiply_experts(precision, rows, hidden_states, outputs, inner, weights)


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


def weighted_sums(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return [T, H] for outputs [T, k, H] and weights [T, k] in fp32, CHUNK tokens at a time."""
    sums = [weighted_sum(*parts) for parts in zip(outputs.split(CHUNK), weights.split(CHUNK), strict=True)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def weighted_sum(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return [T, H] for outputs [T, k, H] and weights [T, k] in fp32: summed in fp32 and rounded once."""
    total = outputs[:, 0] * weights[:, :1]
    for place in range(1, outputs.shape[1]):
        total += outputs[:, place] * weights[:, place : place + 1]
    return total.to(outputs.dtype)
