"""A prompt of an evaluation, and how its answer is drawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qmix.engine.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to be continued, up to `most` new ones, or to one of `stop`.

    `drawn` are Sampling's fields of draws, in a fixed order, with the seed; empty is greedy.
    """

    tokens: tuple[int, ...]
    most: int
    stop: tuple[str, ...]
    drawn: tuple[tuple[str, float], ...] = ()

    @property
    def needs(self) -> int:
        """Tokens of context that it takes at most."""
        return len(self.tokens) + self.most

    @property
    def sampling(self) -> Sampling:
        draws: dict[str, Any] = dict(self.drawn) or {"temperature": 0.0, "seed": 0}
        return Sampling(max_new_tokens=self.most, stop=self.stop, **draws)

    def part(self) -> bytes:
        """Return the parts of its result's key."""
        return json.dumps([self.tokens, self.most, self.stop, self.drawn]).encode()
