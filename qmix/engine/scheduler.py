"""Choose the tokens that go through the model next: admission, prompts in pieces, room given back.

Arithmetic only, loads no torch. Sequences begin in the order in which they came. A sequence that begins takes room for
all that it may become, so that none ever has to be thrown out. Each pass continues every sequence whose prompt is done
by one token, and fills up with prompts.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from qmix.engine.prefixes import Copy, Placed, Prefixes


class Slots:
    """Places of `size` positions each, `count` of them, for sequences that share nothing; used as Prefixes are."""

    def __init__(self, count: int, size: int) -> None:
        self.copies: list[Copy] = []
        self._size, self._free = size, list(range(count))

    def place(self, sequence: Placed, room: int, shares: bool) -> bool:
        """Give a sequence a place; return False where none is free."""
        assert room <= self._size
        if self._free:
            sequence.start = self._free.pop(0) * self._size
        return sequence.start >= 0

    def follow(self, sequence: Placed) -> None:
        """Do nothing: none waits for another."""

    def leave(self, sequence: Placed, room: int) -> None:
        """Make a sequence's place free again."""
        insort(self._free, sequence.start // self._size)


@dataclass(slots=True, eq=False)
class Sequence(Placed):
    """The `tokens` of a prompt and of its continuation, at most `limit` in all.

    `done` of them have gone through the model; `start` is the first of its positions in the KV cache. One that `shares`
    may take over what others with the same beginning have computed.
    """

    limit: int
    shares: bool = True

    @property
    def room(self) -> int:
        """The positions that it can take: its last token never goes through the model."""
        return self.limit - 1


class Scheduler:
    """Shares `capacity` positions, `batch` sequences at once, and passes of `pass_tokens`.

    `batch` is `pass_tokens` at most, so that every sequence has its token in every pass. `pass_tokens` may be set anew
    before each pass.
    """

    def __init__(self, capacity: int, batch: int, pass_tokens: int, places: Prefixes | Slots | None = None) -> None:
        """With Slots as `places` every sequence has a place of its own; by default they share the positions."""
        assert 1 <= batch <= pass_tokens
        self.capacity, self.batch, self.pass_tokens = capacity, batch, pass_tokens
        self.places = places or Prefixes(capacity)
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
        """Take a sequence out; its room is for others, and what it computed is kept while no other needs it."""
        self._running.remove(sequence)
        self.places.leave(sequence, sequence.room)

    def clear(self) -> None:
        """Take all sequences out. The rows of running ones hold what `done` says: they are kept."""
        self._waiting.clear()
        for sequence in list(self._running):
            self.finish(sequence)

    def take_copies(self) -> list[Copy]:
        """Return the copies to make, in order, before the pass that was returned last."""
        copies, self.places.copies = self.places.copies, []
        return copies

    def drop(self, sequence: Sequence) -> None:
        """Take a sequence out, whether it has begun or waits."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            self.finish(sequence)

    def next_pass(self) -> list[tuple[Sequence, int]]:
        """Return sequences, and how many of their tokens go through the model now."""
        for sequence in self._running:
            self.places.follow(sequence)
        self._admit()
        waiting = {each: len(each.tokens) - each.done for each in self._running if each.leader is None}
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
            sequence = self._waiting[0]
            if not self.places.place(sequence, sequence.room, sequence.shares):
                return
            self._running.append(self._waiting.popleft())
