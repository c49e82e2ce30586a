"""What a pool has done, counted."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class PoolCounters:
    """What the pool has done so far, in records, and `bytes_read` from the disk.

    hits       asked for and in memory from earlier use
    misses     asked for and read since their last use, or read for the first time
    ahead      those of the misses whose read had begun before they were asked for
    hidden     those of them that were there when asked for
    unused     read ahead and never asked for
    """

    hits: int = 0
    misses: int = 0
    ahead: int = 0
    hidden: int = 0
    unused: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were in memory; 1 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    def since(self, earlier: PoolCounters) -> PoolCounters:
        return PoolCounters(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    def copy(self) -> PoolCounters:
        return self.since(PoolCounters())
