"""Positions of a KV cache that sequences share in time: running ones, and prefixes kept for later ones.

A sequence that has ended leaves its keys and values where they lie. One that begins with the same tokens copies them,
or goes on in their place, and computes only the rest: a conversation's next turn, or a system prompt that many have.
Prompts that begin alike and come together are computed once as well: one goes first, the others wait for it. A token's
keys and values depend on the tokens before it alone, to the bit, so that no answer changes.

Kept prefixes only use positions that no running sequence needs; the least recently used make room. Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from qmix.engine.positions import KVAllocator

LEAST_SHARED = 16  # tokens in common: fewer are computed
MOST_KEPT = 512  # prefixes, so that finding the best one takes about a millisecond
T = TypeVar("T")


class Copy(NamedTuple):
    """Copy the keys and values of `size` positions from `source` on to those from `target` on."""

    source: int
    target: int
    size: int


@dataclass(slots=True, eq=False)
class Placed:
    """A sequence's tokens and its positions in the KV cache, from `start` on; `done` of them are computed.

    Of `prompt` tokens it is certain that they will be, unless the sequence is dropped. With `leader` it waits until
    that has computed the `leading` tokens that both begin with. `shared` tokens were not computed for this sequence.
    """

    tokens: list[int]
    start: int = field(default=-1, init=False)
    done: int = field(default=0, init=False)
    prompt: int = field(default=0, init=False)
    shared: int = field(default=0, init=False)
    leader: Placed | None = field(default=None, init=False)
    leading: int = field(default=0, init=False)

    @property
    def reach(self) -> int:
        """The tokens that others can take over from it, now or later."""
        return max(self.done, self.prompt)


class Prefixes:
    """Gives sequences room among `capacity` positions. `copies` are to be made, in order, before the next pass."""

    def __init__(self, capacity: int) -> None:
        self.copies: list[Copy] = []
        self._free = KVAllocator(capacity)
        self._kept: dict[Placed, None] = {}  # the least recently used first
        self._known: dict[tuple[int, ...], list[Placed]] = {}  # kept and running ones, by their first tokens

    def __len__(self) -> int:
        """Return the number of kept prefixes."""
        return len(self._kept)

    def place(self, sequence: Placed, room: int, shares: bool) -> bool:
        """Give a sequence `room` positions and, if it `shares`, the beginning that others have; False where none fit.

        Sequences that run keep theirs, kept prefixes make room.
        """
        found, common = self._longest(sequence) if shares else (None, 0)
        kept = found if found is not None and found in self._kept else None
        if kept is not None and common == kept.done and self._grow(kept, room):
            self._forget(kept)
            sequence.start, sequence.done, sequence.shared = kept.start, common, common
        else:
            start = self._take(room, kept)
            if start is None:
                return False
            sequence.start = start
            if found is not None:
                self._share(sequence, found, common)
            if kept is not None and kept in self._kept and common == kept.done:  # the sequence has all of it
                self._evict(kept)
        sequence.prompt = len(sequence.tokens)
        self._note(sequence)
        return True

    def follow(self, sequence: Placed) -> None:
        """Let a sequence that waits for another take over what that has computed by now, or look for another."""
        leader = sequence.leader
        if leader is None or (leader.done < sequence.leading and self._is_known(leader)):
            return
        sequence.leader = None
        self._forget(sequence)  # it does not find itself
        found, common = self._longest(sequence, waiting=False)
        if found is not None:
            self._share(sequence, found, common)
        self._note(sequence)

    def leave(self, sequence: Placed, room: int) -> None:
        """Take back the positions of a sequence that has ended; what it computed is kept."""
        self._forget(sequence)
        if sequence.done < LEAST_SHARED:
            self._free.give_back(sequence.start, room)
            return
        if room > sequence.done:
            self._free.give_back(sequence.start + sequence.done, room - sequence.done)
        kept = Placed(sequence.tokens[: sequence.done])
        kept.start, kept.done = sequence.start, sequence.done
        for other in [each for each in self._alike(kept) if each in self._kept]:
            if other.tokens == kept.tokens[: other.done]:
                self._evict(other)
        if len(self._kept) == MOST_KEPT:
            self._evict(next(iter(self._kept)))
        self._kept[kept] = None
        self._note(kept)

    def _share(self, sequence: Placed, found: Placed, common: int) -> None:
        """Copy what two sequences have in common, or have the one wait until the other has it."""
        if found.done < common:
            sequence.leader, sequence.leading = found, common
            return
        if found.start != sequence.start:
            self.copies.append(Copy(found.start, sequence.start, common))
        sequence.done = sequence.shared = common
        if found in self._kept:
            self._kept[found] = self._kept.pop(found)  # the most recently used

    def _longest(self, sequence: Placed, waiting: bool = True) -> tuple[Placed | None, int]:
        """Return what has the most tokens in common with a sequence's, all but its last; of equals one that is done.

        Those that wait themselves count only if `waiting`, so that never two wait for each other.
        """
        wanted = sequence.tokens[:-1]
        best: tuple[int, bool, Placed | None] = (LEAST_SHARED - 1, False, None)
        for other in self._alike(sequence):
            if other.leader is not None and not waiting:
                continue
            common = common_prefix(wanted, other.tokens[: other.reach])
            if (common, other.done >= common) > best[:2]:
                best = common, other.done >= common, other
        return best[2], best[0]

    def _take(self, room: int, spared: Placed | None) -> int | None:
        """Take positions in a row, those of the least recently used prefixes if there is no other way."""
        start = self._free.take(room)
        if start is not None or not self._kept:
            return start
        window = self._window(room, spared)
        for kept in window:
            self._evict(kept)
        return self._free.take(room) if window else None

    def _window(self, room: int, spared: Placed | None) -> list[Placed]:
        """Return the kept prefixes that make `room` in a row with what is free around them; none where they cannot.

        Of several ways the one whose most recently used prefix was used the longest ago, then that with the fewest
        tokens; `spared` is the last resort.
        """
        age = {kept: index for index, kept in enumerate(self._kept)}
        age |= {spared: len(age)} if spared is not None else {}
        spans: list[tuple[int, int, Placed | None]] = [(start, end, None) for start, end in self._free.spans]
        spans = sorted(
            [*spans, *((kept.start, kept.start + kept.done, kept) for kept in age)], key=lambda span: span[0]
        )
        best: tuple[int, int, list[Placed]] = (len(age) + 1, 0, [])
        for first, (start, _, _) in enumerate(spans):
            end, taken = start, list[Placed]()
            for begin, stop, kept in spans[first:]:
                if begin != end:
                    break
                end = stop
                taken += [] if kept is None else [kept]
                if end - start >= room:
                    newest = max(age[each] for each in taken)
                    best = min(best, (newest, sum(each.done for each in taken), taken), key=lambda way: way[:2])
                    break
        return best[2]

    def _grow(self, kept: Placed, room: int) -> bool:
        """Take the positions behind a kept prefix, so that it has `room`, where they are free."""
        return room >= kept.done and self._free.take_at(kept.start + kept.done, room - kept.done)

    def _evict(self, kept: Placed) -> None:
        self._forget(kept)
        self._free.give_back(kept.start, kept.done)

    def _alike(self, sequence: Placed) -> Iterator[Placed]:
        """Return those with the same first tokens."""
        return iter(self._known.get(_key(sequence), ()))

    def _is_known(self, sequence: Placed) -> bool:
        return any(each is sequence for each in self._alike(sequence))

    def _note(self, sequence: Placed) -> None:
        if len(sequence.tokens) >= LEAST_SHARED:
            self._known.setdefault(_key(sequence), []).append(sequence)

    def _forget(self, sequence: Placed) -> None:
        self._kept.pop(sequence, None)
        alike = self._known.get(_key(sequence), [])
        if sequence in alike:
            alike.remove(sequence)
            if not alike:
                del self._known[_key(sequence)]


def _key(sequence: Placed) -> tuple[int, ...]:
    return tuple(sequence.tokens[:LEAST_SHARED])


def common_prefix(one: Sequence[T], other: Sequence[T]) -> int:
    """Return how many items two sequences begin with in common, by halving: slices compare fast."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low
