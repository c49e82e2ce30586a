"""Counters of a pool's work, as a whole and by expert."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields


@dataclass(slots=True)
class PoolCounters:
    """Records so far, and `bytes_read` from the disk.

    hits       requested and in memory from earlier use
    misses     requested and read since their last use, or for the first time
    ahead      misses whose read had begun before the request
    hidden     misses whose read had ended before the request
    unused     prefetched and never requested
    """

    hits: int = 0
    misses: int = 0
    ahead: int = 0
    hidden: int = 0
    unused: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the requested experts that were in memory; 1 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    def since(self, earlier: PoolCounters) -> PoolCounters:
        """Return the counts since an earlier copy."""
        return PoolCounters(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    def copy(self) -> PoolCounters:
        """Return the counts as they are now."""
        return self.since(PoolCounters())


class ExpertCounts:
    """Requests of each expert so far, [layer][expert]: those `asked`, and those `missed`, which had to be read.

    Written by the thread that computes, and read by others as it is.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.asked = [[0] * experts for _ in range(layers)]
        self.missed = [[0] * experts for _ in range(layers)]

    def add(self, keys: Iterable[tuple[int, int]], hits: Collection[tuple[int, int]]) -> None:
        """Count requests of these experts, (layer, expert), of which `hits` were in memory from earlier use."""
        for key in keys:
            layer, expert = key
            self.asked[layer][expert] += 1
            if key not in hits:
                self.missed[layer][expert] += 1

    def found(self, layer: int, experts: Iterable[int]) -> None:
        """Count requests of a layer's experts that were all in memory."""
        for expert in experts:
            self.asked[layer][expert] += 1
