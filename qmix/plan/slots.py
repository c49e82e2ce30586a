"""Share a pool's memory out between slots for each size of record. Pure arithmetic; loads no torch.

A slot takes records of one size, so that experts in several precisions waste no memory. Keeping a record saves, for
each byte of memory, as many bytes of reading as the record is likely to be used, whatever its size. So slots go to the
most used records; where use is not known, each size gets the same share of its records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qmix.store.layout import StoreLayout

# Two of a size: one expert computes while the next is read. Residents of GPUs are loaded through the same slots.
MIN_SLOTS = 2


@dataclass(frozen=True, slots=True)
class SlotClass:
    """`slots` slots of `nbytes` bytes. The store has `records` of that size, of which `served` lie on no GPU."""

    nbytes: int
    slots: int
    records: int
    served: int

    @property
    def least(self) -> int:
        """The fewest slots that a run works with."""
        return min(MIN_SLOTS, self.records)

    @property
    def on_disk(self) -> int:
        """Records that neither a GPU nor a slot has room for."""
        return max(0, self.served - self.slots)


def least_slots(layout: StoreLayout) -> dict[int, int]:
    """Return the fewest slots that a run works with, for each size of record in a store."""
    return {nbytes: min(MIN_SLOTS, count) for nbytes, count in layout.record_counts.items()}


def share_slots(wanted: Sequence[int], least: Mapping[int, int], room: int) -> dict[int, int]:
    """Return the slots that fit in `room` bytes, by the bytes of the records that they hold.

    `wanted` are the sizes of the records to hold, likeliest use first. Each size has at least its `least` slots. The
    first record without room ends the search, so that more room never gives fewer slots of any size.
    """
    slots, taken = dict(least), dict.fromkeys(least, 0)
    room -= sum(nbytes * count for nbytes, count in least.items())
    for nbytes in wanted:
        if taken[nbytes] == slots[nbytes]:
            if nbytes > room:
                break
            room -= nbytes
            slots[nbytes] += 1
        taken[nbytes] += 1
    return slots
