"""Decide which experts change places with residents of a GPU between steps. Pure arithmetic.

An expert that the CPU computes often is worth an exchange with a resident of its layer that is used little: its record
goes to the GPU, the other one back to main memory. Use is a sum that fades with every token. An exchange is imagined
where the use so far promises more than it costs. Exchanges are made only once imagined ones would have saved ENOUGH of
the last tokens' seconds against the first residents: with Mixtral's even routing that may be never. The numbers come
from replayed routing (benchmarks/promotion.py, docs/gpus.md).

Only experts of one layer and one precision change places, so captured steps stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

DECAY = 32  # tokens after which a use counts 1 / e
PERIOD = 16  # tokens between exchanges
WINDOW = 256  # tokens over which exchanges must have been worth it, as DECAY
ENOUGH = 0.05  # least share of the seconds to save


@dataclass(frozen=True, slots=True)
class Exchange:
    """An expert that becomes a resident, and the one of its layer that leaves the GPU."""

    layer: int
    arriving: int
    leaving: int


@dataclass(slots=True)
class Group:
    """Experts of one layer and precision that have residents among them, and others.

    `start` are the residents that the plan chose, `use` is the faded use of each expert. `computed` are the seconds of
    an expert on the CPU, `exchanged` those of an exchange.
    """

    layer: int
    start: frozenset[int]
    use: dict[int, float]
    computed: float
    exchanged: float
    imagined: set[int] = field(init=False)
    real: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.imagined, self.real = set(self.start), set(self.start)

    def imagine(self) -> int:
        """Exchange imagined residents where it is worth it; return the number of exchanges."""
        least = self.exchanged / self.computed
        wanted = sorted(self.use.keys() - self.imagined, key=lambda each: (-self.use[each], each))
        given = sorted(self.imagined, key=lambda each: (self.use[each], each))
        count = 0
        for arriving, leaving in zip(wanted, given, strict=False):
            if self.use[arriving] - self.use[leaving] <= least:
                break
            self.imagined = self.imagined - {leaving} | {arriving}
            count += 1
        return count

    def follow(self) -> list[Exchange]:
        """Make the imagined residents the real ones; return the exchanges."""
        pairs = zip(sorted(self.imagined - self.real), sorted(self.real - self.imagined), strict=True)
        self.real = set(self.imagined)
        return [Exchange(self.layer, arriving, leaving) for arriving, leaving in pairs]


class Promotion:
    """The use of experts in a run's steps, and the exchanges that follow from it."""

    def __init__(self, groups: Iterable[Group]) -> None:
        self.groups = list(groups)
        self._of = {(group.layer, expert): group for group in self.groups for expert in group.use}
        self._tokens = self._since = 0
        self._stayed = self._followed = 0.0  # seconds with the first residents, and with the imagined ones

    def used(self, layer: int, chosen: Iterable[Sequence[int]]) -> None:
        """Note the experts of a layer for each token of a step."""
        gained, weight = math.exp(self._since / DECAY), math.exp(self._since / WINDOW)
        for expert in (expert for row in chosen for expert in row):
            group = self._of.get((layer, expert))
            if group is not None:
                group.use[expert] += gained
                self._stayed += weight * group.computed * (expert not in group.start)
                self._followed += weight * group.computed * (expert not in group.imagined)

    def exchanges(self, tokens: int) -> list[Exchange]:
        """Return the exchanges to make before a step of so many tokens, mostly none."""
        self._tokens, self._since = self._tokens + tokens, self._since + tokens
        if self._since < PERIOD:
            return []
        keep, fade, self._since = math.exp(-self._since / DECAY), math.exp(-self._since / WINDOW), 0
        for group in self.groups:
            group.use = {expert: use * keep for expert, use in group.use.items()}
        self._stayed, self._followed = self._stayed * fade, self._followed * fade
        self._followed += sum(group.exchanged * group.imagine() for group in self.groups)
        if self._tokens < WINDOW // 4 or self._followed >= (1 - ENOUGH) * self._stayed:
            return []
        return [exchange for group in self.groups for exchange in group.follow()]


def long_used(shares: Sequence[float]) -> list[float]:
    """Return the faded use of a layer's experts after many tokens of which each gets such a share."""
    return [share / (1 - math.exp(-1 / DECAY)) for share in shares]
