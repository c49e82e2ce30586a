"""Which expert record gives up its slot: policies behind one small interface.

A policy is told of every use, and says what keeping a record is worth at some layer of the pass; the record worth
least goes. What each brings is found by replaying recorded routing (`qmix.pool.replay`), beside the best that any
policy could do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from qmix.geometry import Geometry
from qmix.store.expert_frequency import ExpertFrequency, uniform_frequency
from qmix.store.profile import POLICIES as NAMES

Key = tuple[int, int]  # layer, expert

DECAY = 0.9  # of a use's weight from one visit of its layer to the next


class Eviction(Protocol):
    """Decides what a pool keeps."""

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """A layer's step has asked for these experts."""

    def worth(self, key: Key, layer: int) -> float:
        """What keeping `key` is worth while `layer` computes; only compared with that of others."""


class LeastRecentlyUsed:
    """Keeps what was used last. Of no use where one token needs more experts than there are slots."""

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
    """Keeps what was used most, a use counting less with every visit of its layer since.

    The sum of decayed uses, scaled by 1 - decay, estimates the probability of a use at the layer's next visit. It
    begins with the expected `use`, by default even.
    """

    def __init__(self, geometry: Geometry, use: ExpertFrequency | None = None, decay: float = DECAY) -> None:
        self._decay = decay
        self._prior = use or uniform_frequency(geometry)
        self._visits = [0] * geometry.num_layers
        self._rates: dict[Key, tuple[float, int]] = {}  # probability, and the visit at which it was right

    def used(self, layer: int, experts: Sequence[int]) -> None:
        self._visits[layer] += 1
        for expert in experts:
            key = (layer, expert)
            self._rates[key] = self.rate(key) + 1 - self._decay, self._visits[layer]

    def rate(self, key: Key) -> float:
        """The estimated probability that the layer's next visit uses this expert."""
        rate, visit = self._rates.get(key) or (self._prior[key[0]][key[1]], 0)
        return rate * self._decay ** (self._visits[key[0]] - visit)

    def worth(self, key: Key, layer: int) -> float:
        return self.rate(key)


class UsesPerTime(LeastFrequentlyUsed):
    """Keeps what promises most uses for the time that it takes a slot: probability over layers until its next turn.

    Where every pass uses every expert (prefill, large batches) this is what Belady's rule does: a layer just passed
    goes first, because its turn is farthest away.
    """

    def __init__(self, geometry: Geometry, use: ExpertFrequency | None = None, decay: float = DECAY) -> None:
        super().__init__(geometry, use, decay)
        self._layers = geometry.num_layers

    def worth(self, key: Key, layer: int) -> float:
        away = (key[0] - layer) % self._layers or self._layers
        return self.rate(key) / away


class Policy(Protocol):
    """Makes an Eviction for a model whose experts are expected to be used so, evenly if nothing is known."""

    def __call__(self, geometry: Geometry, use: ExpertFrequency | None = None) -> Eviction: ...


MAKERS: tuple[Policy, ...] = (lambda geometry, use=None: LeastRecentlyUsed(), LeastFrequentlyUsed, UsesPerTime)
POLICIES: dict[str, Policy] = dict(zip(NAMES, MAKERS, strict=True))
DEFAULT_POLICY = "uses-per-time"
