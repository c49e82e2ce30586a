"""Eviction policies: which expert record gives up its slot.

A policy is told of every use, and returns what keeping a record is worth at some layer of the pass; the record worth
least is evicted. `qmix.pool.replay` replays recorded routing through each policy, and through the best possible one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qmix.geometry import Geometry
from qmix.store.expert_frequency import ExpertFrequency, uniform_frequency
from qmix.store.profile import POLICIES as NAMES

Key = tuple[int, int]  # layer, expert

DECAY = 0.9  # factor of a use's weight at each later visit of its layer
EARLY = (4.0, 2.0)  # how much more a hit in the first layers is worth, where the disk is often idle
OFTEN_IDLE = 0.5  # share of the experts with a slot from which it is


class Eviction(Protocol):
    """Decides what a pool keeps."""

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Note that a layer's step has requested these experts."""

    def worth(self, key: Key, layer: int) -> float:
        """Return what keeping `key` is worth while `layer` computes; only the order of worths counts."""


class LeastRecentlyUsed:
    """Keeps the last used. Useless where one token needs more experts than there are slots."""

    def __init__(self) -> None:
        self._time = 0
        self._last: dict[Key, int] = {}

    def used(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self._time += 1
            self._last[layer, expert] = self._time

    def worth(self, key: Key, layer: int) -> float:
        return self._last.get(key, 0)


class LeastFrequentlyUsed:
    """Keeps the most used; a use counts less with every later visit of its layer.

    The sum of decayed uses, scaled by 1 - decay, estimates the probability of a use at the layer's next visit. It
    begins with the expected `use`, by default the same for all.
    """

    def __init__(self, geometry: Geometry, use: ExpertFrequency | None = None, decay: float = DECAY) -> None:
        self._decay = decay
        self._prior = use or uniform_frequency(geometry)
        self._visits = [0] * geometry.num_layers
        self._rates: dict[Key, tuple[float, int]] = {}  # probability, and the visit that it was estimated at

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self._visits[layer] += 1
        for expert in experts:
            key = (layer, expert)
            self._rates[key] = self.rate(key) + 1 - self._decay, self._visits[layer]

    def rate(self, key: Key) -> float:
        """Return the estimated probability that the layer's next visit uses this expert."""
        rate, visit = self._rates.get(key) or (self._prior[key[0]][key[1]], 0)
        return rate * self._decay ** (self._visits[key[0]] - visit)

    def worth(self, key: Key, layer: int) -> float:
        return self.rate(key)


class UsesPerTime(LeastFrequentlyUsed):
    """Keeps the most expected uses for the time in a slot: the probability over the layers until the next turn.

    Where every pass uses every expert (prefill, large batches) it evicts as Belady's rule does: the layer just passed
    goes first, because its next turn is farthest away.

    A miss in the first layers is waited for in full: nothing is known of a token before it is chosen, so no read can
    begin earlier. Later layers are read while the first compute, if the disk has time. So if `held`, the share of the
    experts that have a slot, is large, hits in the first layers count more.
    """

    def __init__(
        self, geometry: Geometry, use: ExpertFrequency | None = None, held: float = 0.0, decay: float = DECAY
    ) -> None:
        super().__init__(geometry, use, decay)
        self._layers = geometry.num_layers
        self._early = dict(enumerate(EARLY)) if held >= OFTEN_IDLE else {}

    def worth(self, key: Key, layer: int) -> float:
        away = (key[0] - layer) % self._layers or self._layers
        return self.rate(key) * self._early.get(key[0], 1.0) / away


class Policy(Protocol):
    """Makes an Eviction for a model, the expected use of its experts, and the share of them that have a slot."""

    def __call__(self, geometry: Geometry, use: ExpertFrequency | None, held: float) -> Eviction: ...


MAKERS: tuple[Policy, ...] = (
    lambda geometry, use, held: LeastRecentlyUsed(),
    lambda geometry, use, held: LeastFrequentlyUsed(geometry, use),
    UsesPerTime,
)
POLICIES: dict[str, Policy] = dict(zip(NAMES, MAKERS, strict=True))
DEFAULT_POLICY = "uses-per-time"
