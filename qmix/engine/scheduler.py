"""Choose the tokens that go through the model next: admission, prompts in pieces, room given back.

Arithmetic only, loads no torch. Sequences begin in the order in which they came. A sequence that begins takes room for
all that it may become, so that none ever has to be thrown out. Each pass continues every sequence whose prompt is done
by one token, and fills up with prompts.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field


class KVAllocator:
    """The free positions of a KV cache. Neighbours are given out together, first fit."""

    def __init__(self, capacity: int) -> None:
        self._free = [(0, capacity)]  # starts and ends, in order, never touching

    def take(self, size: int) -> int | None:
        """Take `size` free positions in a row; return the first, or None where there are not so many."""
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
class Sequence:
    """The `tokens` of a prompt and of its continuation, at most `limit` in all.

    `done` of them have gone through the model; `start` is the first of its positions in the KV cache.
    """

    tokens: list[int]
    limit: int
    done: int = field(default=0, init=False)
    start: int = field(default=-1, init=False)

    @property
    def room(self) -> int:
        """The positions that it can take: its last token never goes through the model."""
        return self.limit - 1


class Scheduler:
    """Shares `capacity` positions, `batch` sequences at once, and passes of `pass_tokens`.

    `batch` is `pass_tokens` at most, so that every sequence has its token in every pass.
    """

    def __init__(self, capacity: int, batch: int, pass_tokens: int) -> None:
        assert 1 <= batch <= pass_tokens
        self.capacity, self.batch, self.pass_tokens = capacity, batch, pass_tokens
        self._positions = KVAllocator(capacity)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    def __len__(self) -> int:
        """Return the number of sequences that have not ended."""
        return len(self._waiting) + len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; alone it fits the cache."""
        assert 0 < len(sequence.tokens) < sequence.limit <= self.capacity + 1
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out; its room is free for others."""
        self._running.remove(sequence)
        self._positions.give_back(sequence.start, sequence.room)

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out, whether it has begun or waits."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self.finish(sequence)

    def next_pass(self) -> list[tuple[Sequence, int]]:
        """Return sequences, and how many of their tokens go through the model now."""
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
            start = self._positions.take(self._waiting[0].room)
            if start is None:
                return
            sequence = self._waiting.popleft()
            sequence.start = start
            self._running.append(sequence)
