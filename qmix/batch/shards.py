"""Shards of a file of requests, one for each machine: which lines belong to a shard. Loads no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qmix.errors import UsageError, arg

MOST = 100_000  # shards: far more than machines


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `index` of `of`, from 1. Every `of`-th line is in it, so that all shards have lines of all lengths."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard of `2/8`. Raises UsageError."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        index, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= of <= MOST or not 1 <= index <= of:
            advice = "; count from 1, in a Slurm array too" if found and index == 0 else ""
            raise UsageError(f"{arg('shard')} {text[:100]!r}: must be I/N, with I from 1 to N{advice}")
        return cls(index, of)

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def has(self, position: int) -> bool:
        """Return whether the request at a position, from 0, belongs to the shard."""
        return position % self.of == self.index - 1
