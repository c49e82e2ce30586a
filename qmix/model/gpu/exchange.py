"""Let experts change places with residents of a GPU between steps, in the memory that both have.

A captured step reads the addresses of residents from device memory, so it stays as it is. The records pass through a
staging buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qmix.model.gpu.away import AwayExperts, may_copy
from qmix.model.gpu.captured import OnDevice
from qmix.model.gpu.copy_or_compute import exchange_seconds, read_seconds
from qmix.model.gpu.promotion import Exchange, Group, Promotion, long_used
from qmix.model.gpu.step import StepLayer
from qmix.pool.protocol import Pool


class Exchanges:
    """Makes the exchanges of a run's steps."""

    def __init__(self, pool: Pool, parts: Sequence[OnDevice]) -> None:
        """Exchange records of `parts` if the pool's may move out of their slots, else none."""
        self.pool = pool
        layers = [(part.layers[index], away) for part in parts for index, away in enumerate(part.away)]
        self._layers: dict[int, tuple[StepLayer, AwayExperts]] = {
            away.layer: (layer, away) for layer, away in layers if away is not None
        }
        moving = self._layers.values() if may_copy(pool) else ()
        self.promotion = Promotion(group for _, away in moving for group in _groups(away))
        for _, away in moving:
            away.promotion = self.promotion

    @property
    def moved(self) -> dict[int, list[int]]:
        """The residents of each layer that has others than at the start."""
        layers = {group.layer for group in self.promotion.groups if group.real != group.start}
        return {layer: list(self._layers[layer][1].experts.residents) for layer in layers}

    def make(self, tokens: int) -> None:
        """Make the exchanges that are due before a step of so many tokens."""
        for exchange in self.promotion.exchanges(tokens):
            self._make(exchange)

    def _make(self, exchange: Exchange) -> None:
        (layer, away), arriving, leaving = self._layers[exchange.layer], exchange.arriving, exchange.leaving
        experts, staging = away.experts, away.staging
        assert staging is not None
        if not self.pool.holds(exchange.layer, arriving):  # something else has taken its slot
            next(iter(self.pool.get(exchange.layer, [arriving])))
        place, record = experts.residents[leaving], self.pool.record(exchange.layer, arriving)
        staged = staging.copy(record)
        staged.wait()
        with staged.in_use() as taken:
            record.copy_(place)  # behind all queued work that reads the place
            place.copy_(taken)
        self.pool.exchange(exchange.layer, leaving, arriving)
        del experts.residents[leaving]
        experts.residents[arriving] = place
        shape, address = away.shapes[experts.precisions[arriving]], away.kernels.address(place)
        for table in (layer.here, *(table for each, table in layer.tables if each == shape)):
            _set(table, arriving, address)
            _set(table, leaving, 0)


def _set(table: torch.Tensor, expert: int, address: int) -> None:
    table[expert].fill_(address)


def _groups(away: AwayExperts) -> list[Group]:
    """Return the experts of a layer that can change places: of one precision, some residents and some not."""
    experts, store = away.experts, away.pool.store
    count, top_k = store.geometry.num_experts, store.geometry.experts_per_token
    use = long_used(store.use[away.layer] if store.use else [top_k / count] * count)
    found = []
    for precision in dict.fromkeys(experts.precisions):
        members = [each for each in range(count) if experts.precisions[each] == precision]
        residents, size = frozenset(members) & experts.residents.keys(), experts.loader.sizes[precision]
        if 0 < len(residents) < len(members):
            seconds = read_seconds(size, away.rates), exchange_seconds(size, away.rates)
            found.append(Group(away.layer, residents, {each: use[each] for each in members}, *seconds))
    return found
