"""Which tokens of which sequence go through the model next: admission, prompts in pieces, room given back.

Arithmetic only, loads no torch. Sequences begin in the order they came in. A sequence takes room for all that it may
become when it begins, so that none ever has to be thrown out; each pass continues every sequence that has begun to
answer by one token, and fills up with prompts.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field


class KVAllocator:
    """Which positions of an arena are taken: stretches of neighbours, the first that is long enough."""

    def __init__(self, capacity: int) -> None:
        self._free = [(0, capacity)]  # starts and ends, in order, never touching

    def take(self, size: int) -> int | None:
        """The first position of `size` free ones in a row; None where there are none."""
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        """Make positions free again that were taken."""
        insort(self._free, (start, start + size))
        joined: list[tuple[int, int]] = []
        for first, last in self._free:
            if joined and joined[-1][1] == first:
                joined[-1] = joined[-1][0], last
            else:
                joined.append((first, last))
        self._free = joined


@dataclass(slots=True, eq=False)
class Continuation:
    """A prompt and what has been added to it: `tokens`, `limit` of them at most.

    `done` of them have gone through the model; `start` is where its stretch of the arena begins.
    """

    tokens: list[int]
    limit: int
    done: int = field(default=0, init=False)
    start: int = field(default=-1, init=False)


class Scheduler:
    """Shares an arena of `capacity` positions, `batch` sequences at once, and passes of `pass_tokens`.

    `batch` is `pass_tokens` at most, so that every sequence has its token in every pass.
    """

    def __init__(self, capacity: int, batch: int, pass_tokens: int) -> None:
        assert 1 <= batch <= pass_tokens
        self.capacity, self.batch, self.pass_tokens = capacity, batch, pass_tokens
        self._positions = KVAllocator(capacity)
        self._waiting: deque[Continuation] = deque()
        self._running: list[Continuation] = []

    def __len__(self) -> int:
        """Sequences that have not ended."""
        return len(self._waiting) + len(self._running)

    def add(self, sequence: Continuation) -> None:
        """Let a sequence wait for its turn; it fits an empty arena."""
        assert 0 < len(sequence.tokens) < sequence.limit <= self.capacity + 1
        self._waiting.append(sequence)

    def finish(self, sequence: Continuation) -> None:
        """Take a sequence out; its room is free for others."""
        self._running.remove(sequence)
        self._positions.give_back(sequence.start, _room(sequence))

    def next_pass(self) -> list[tuple[Continuation, int]]:
        """Sequences, and how many of their tokens go through the model now."""
        self._admit()
        waiting = {sequence: len(sequence.tokens) - sequence.done for sequence in self._running}
        left = self.pass_tokens - sum(count == 1 for count in waiting.values())
        chosen = []
        for sequence, count in waiting.items():
            taken = min(count, left) if count > 1 else 1
            left -= taken if count > 1 else 0
            if taken:
                chosen.append((sequence, taken))
        return chosen

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.batch:
            start = self._positions.take(_room(self._waiting[0]))
            if start is None:
                return
            sequence = self._waiting.popleft()
            sequence.start = start
            self._running.append(sequence)


def _room(sequence: Continuation) -> int:
    """Positions that it can take: its last token never goes through the model."""
    return sequence.limit - 1
