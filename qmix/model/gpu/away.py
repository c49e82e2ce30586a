"""Compute the experts of a layer that lie on no GPU, in a step of a few tokens.

The CPU computes some while the copy engine carries others to the GPU, whose kernels compute them there. The shares
follow from the machine's rates. A record that is being copied must stay in its slot, so copies are made only where
every expert has a slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

import torch

from qmix.kernels.gpu.shapes import ExpertShape
from qmix.machine.rates import Rates
from qmix.model.gpu.copy_or_compute import copied_share
from qmix.model.gpu.experts import DeviceExperts
from qmix.model.gpu.kernels import Kernels
from qmix.model.gpu.promotion import Promotion
from qmix.pool.protocol import Pool
from qmix.precision.expert import Expert


@dataclass(frozen=True, slots=True)
class Exchange:
    """Main memory, pinned where there is CUDA, by which a GPU's step and the host exchange a layer's numbers.

    From the GPU: ids [R, k] and the normed stream x [R, H]. To the GPU: results [R * k, H] of the CPU, and the
    addresses [E] of experts that were copied, by shape. A layer's numbers are used before the next layer's come.
    """

    ids: torch.Tensor
    x: torch.Tensor
    results: torch.Tensor
    staged: dict[ExpertShape, torch.Tensor]


def may_copy(pool: Pool) -> bool:
    """Return whether steps may copy or exchange experts: all have slots, and nobody minds who computes an expert.

    The share that is copied depends on the tokens of a step, and a result on who computed it by its last bits.
    """
    return pool.holds_all and not pool.invariant


class AwayExperts:
    """The experts of one layer that are not on its GPU."""

    def __init__(self, experts: DeviceExperts, shapes: dict[str, ExpertShape], rates: Rates, kernels: Kernels) -> None:
        self.experts, self.shapes, self.rates, self.kernels = experts, shapes, rates, kernels
        self.layer, self.pool = experts.layer, experts.pool
        self.staging = experts.loader.staging if may_copy(self.pool) else None
        self.promotion: Promotion | None = None  # where experts may change places

    def compute(self, exchange: Exchange, tokens: int) -> AbstractContextManager[object]:
        """Compute what the first `tokens` rows of the exchange ask for.

        Work that reads the staging buffers is queued inside the returned context.
        """
        rows = self.experts.read_routing(exchange.ids[:tokens])
        chosen = [row for row in rows if row[0] >= 0]  # rows without a token come last, with numbers of another step
        if self.promotion is not None:
            self.promotion.used(self.layer, chosen)
        pairs: dict[int, list[int]] = {}  # of each expert that is away
        for place, expert in enumerate(expert for row in chosen for expert in row):
            if expert not in self.experts.residents:
                pairs.setdefault(expert, []).append(place)
        for addresses in exchange.staged.values():
            addresses.zero_()
        copies = ExitStack()
        copied = self._copied(pairs, exchange)
        for group in self._groups(chosen, sorted(pairs, key=lambda each: each not in copied), exchange.x):
            for expert, _ in group:
                if expert in copied:
                    self._begin_copy(expert, exchange, copies)
            self._on_cpu([each for each in group if each[0] not in copied], pairs, exchange, len(chosen))
        return copies

    def _begin_copy(self, expert: int, exchange: Exchange, copies: ExitStack) -> None:
        """Begin to copy an expert that has a slot to a staging buffer, which is in use until `copies` ends."""
        assert self.staging is not None
        staged = self.staging.copy(self.pool.record(self.layer, expert))
        exchange.staged[self.shapes[self.experts.precisions[expert]]][expert] = self.kernels.address(staged.bytes)
        copies.enter_context(staged.in_use())

    def _on_cpu(
        self, group: list[tuple[int, Expert]], pairs: dict[int, list[int]], exchange: Exchange, tokens: int
    ) -> None:
        """Put the results of experts that are in memory together to their places among the exchange's.

        What qmix's kernel takes is one piece of work for the cores; the activation is SiLU where steps are captured.
        """
        top_k, together = exchange.ids.shape[1], []
        for expert, forward in group:
            places = pairs[expert]
            if isinstance(forward, Expert) and type(exchange.x) is torch.Tensor and forward.takes_ours(len(places)):
                together.append((forward, places))
            else:
                x = exchange.x[[pair // top_k for pair in places]]
                exchange.results[places] = forward(x, self.experts.activation)
        if not together:
            return
        from qmix.kernels.cpu.experts import Rows, multiply_experts

        order = torch.tensor([pair for _, places in together for pair in places])
        rows: dict[str, list[Rows]] = {}
        first = order.data_ptr()
        for forward, places in together:
            rows.setdefault(forward.precision, []).append((forward.places, first, len(places)))
            first += order.itemsize * len(places)
        outputs = exchange.results.view(-1, top_k, exchange.x.shape[1])[:tokens]
        for precision, mine in rows.items():
            multiply_experts(precision, mine, exchange.x[:tokens], outputs, together[0][0].gate.rows)

    def _copied(self, pairs: dict[int, list[int]], exchange: Exchange) -> frozenset[int]:
        """Return the experts to copy: the ones with the most tokens that the captured step can receive."""
        if self.staging is None or not exchange.staged:
            return frozenset()
        shapes = {expert: self.shapes[self.experts.precisions[expert]] for expert in pairs}
        if not all(shape in exchange.staged for shape in shapes.values()):
            return frozenset()
        order = sorted(pairs, key=lambda expert: -len(pairs[expert]))
        sizes = [self.experts.loader.sizes[self.experts.precisions[expert]] for expert in order]
        largest = max(sizes, key=lambda size: size.record, default=None)
        if largest is None:
            return frozenset()
        counts = [len(pairs[expert]) for expert in order]
        return frozenset(order[: copied_share(largest, counts, self.rates, len(self.staging.buffers))])

    def _groups(self, chosen: list[list[int]], away: list[int], x: torch.Tensor) -> Iterator[list[tuple[int, Expert]]]:
        """Return the experts of `away` from the pool, and begin to read what later layers will probably need."""
        return self.experts.groups(sorted({expert for row in chosen for expert in row}), away, x[: len(chosen)])
