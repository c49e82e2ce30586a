"""A pool's memory: one mapping made once, cut into slots of the sizes that records have."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qmix.precision.memory import anonymous_memory


class SlotMemory:
    """So many slots of each size, `counts` by bytes, known by their numbers; which of them hold nothing.

    Sizes are multiples of a page, so that every slot starts on one.
    """

    def __init__(self, counts: Mapping[int, int]) -> None:
        self.memory = anonymous_memory(sum(nbytes * count for nbytes, count in counts.items()))
        sizes = [nbytes for nbytes, count in counts.items() for _ in range(count)]
        self._slots = self.memory.split(sizes)
        self._free: dict[int, list[int]] = {nbytes: [] for nbytes in counts}
        for slot in reversed(range(len(sizes))):
            self.give(slot)

    def free(self, nbytes: int) -> int:
        """How many slots of a size hold nothing."""
        return len(self._free[nbytes])

    def take(self, nbytes: int) -> int | None:
        """A slot of a size that holds nothing; None where there is none."""
        return self._free[nbytes].pop() if self._free[nbytes] else None

    def give(self, slot: int) -> None:
        """A slot that was taken holds nothing any more."""
        self._free[self.size(slot)].append(slot)

    def size(self, slot: int) -> int:
        return len(self._slots[slot])

    def bytes(self, slot: int) -> torch.Tensor:
        """The whole slot, uint8."""
        return self._slots[slot]
