"""The prompt of a generation request."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from qmix.engine.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids to continue by at most `most` new ones, or up to one of `stop`.

    `drawn` holds Sampling's fields for sampling, sorted, then the seed; empty means greedy decoding.
    """

    tokens: tuple[int, ...]
    most: int
    stop: tuple[str, ...]
    drawn: tuple[tuple[str, float], ...] = ()

    @property
    def needs(self) -> int:
        """Most tokens of context that prompt and answer take."""
        return len(self.tokens) + self.most

    @property
    def sampling(self) -> Sampling:
        """The prompt's options for a generation."""
        draws: dict[str, Any] = dict(self.drawn) or {"temperature": 0.0, "seed": 0}
        return Sampling(max_new_tokens=self.most, stop=self.stop, **draws)

    def part(self) -> bytes:
        """Return what distinguishes this prompt in its result's key."""
        return json.dumps([self.tokens, self.most, self.stop, self.drawn]).encode()
