"""How many slots of a pool are for records of which size: pure arithmetic. Loads no torch.

A slot takes records of one size, so that experts in several precisions waste no memory. Keeping a record saves, for
each byte of memory, as many bytes of reading as the record is likely to be used, whatever its size; so slots go to the
records that are most used, and where use is not known, each size gets the same share of its records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qmix.store.layout import StoreLayout

MIN_SLOTS = 2  # of a size: one expert computes while the next is read; those that end on GPUs are loaded through them


@dataclass(frozen=True, slots=True)
class SlotClass:
    """`slots` slots of `nbytes` each. `records` are the store's of that size, `served` those of them on no GPU."""

    nbytes: int
    slots: int
    records: int
    served: int

    @property
    def least(self) -> int:
        """The fewest slots that do."""
        return min(MIN_SLOTS, self.records)

    @property
    def on_disk(self) -> int:
        """Records that neither a GPU nor a slot has room for."""
        return max(0, self.served - self.slots)


def least_slots(layout: StoreLayout) -> dict[int, int]:
    """The fewest slots that do, for each size of record in a store."""
    return {nbytes: min(MIN_SLOTS, count) for nbytes, count in layout.record_counts.items()}


def share_slots(wanted: Sequence[int], least: Mapping[int, int], room: int) -> dict[int, int]:
    """Slots by the bytes of the records that they hold, which `room` bytes in all have room for.

    `wanted` are the sizes of the records to be held, those likeliest to be used first. `least` slots of each size
    there are in any case; the first record that has no room then is the last that is looked at, so that more room
    never gives fewer slots of any size.
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
