"""A pool's memory: one mapping made once, cut into slots of the sizes that records have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from qmix.pool.eviction import Key
from qmix.precision.memory import anonymous_memory
from qmix.store.layout import StoreLayout


def all_have_slots(layout: StoreLayout, slots: Mapping[int, int], elsewhere: frozenset[Key]) -> bool:
    """Return True if every expert of a store that is not `elsewhere` has one of the `slots` by bytes."""
    served = Counter(layout.record(*key).nbytes for key in layout.experts if key not in elsewhere)
    return all(slots[nbytes] >= count for nbytes, count in served.items())


class SlotMemory:
    """Slots by number: `counts` by bytes says how many there are of each size.

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
        """Return the number of free slots of a size."""
        return len(self._free[nbytes])

    def take(self, nbytes: int) -> int | None:
        """Take a free slot of a size; None where there is none."""
        return self._free[nbytes].pop() if self._free[nbytes] else None

    def give(self, slot: int) -> None:
        """Free a slot that was taken."""
        self._free[self.size(slot)].append(slot)

    def size(self, slot: int) -> int:
        """Return the bytes of a slot."""
        return len(self._slots[slot])

    def bytes(self, slot: int) -> torch.Tensor:
        """Return the whole slot, uint8."""
        return self._slots[slot]
