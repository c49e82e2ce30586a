"""The free positions of a KV cache. Arithmetic only, loads no torch."""

from __future__ import annotations

from bisect import insort


class KVAllocator:
    """The free positions of a KV cache. Neighbours are given out together, first fit."""

    def __init__(self, capacity: int) -> None:
        self._free = [(0, capacity)]  # starts and ends, in order, never touching

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The free stretches, as first positions and ends."""
        return list(self._free)

    def take(self, size: int) -> int | None:
        """Take `size` free positions in a row; return the first, or None where there are not so many."""
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def take_at(self, start: int, size: int) -> bool:
        """Take the `size` positions from `start` on, if all are free."""
        for index, (first, last) in enumerate(self._free):
            if first <= start and start + size <= last:
                rest = [(first, start), (start + size, last)]
                self._free[index : index + 1] = [span for span in rest if span[0] < span[1]]
                return True
        return size == 0

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
