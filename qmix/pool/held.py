"""Records in a pool's slots, and the reads that bring them there.

A record is resident, or being read: because it was requested, or ahead of need. The eviction policy chooses the record
that gives up its slot.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch
import xxhash

from qmix.disk.reads import Read, Reader
from qmix.errors import StoreError, mending
from qmix.pool.counters import PoolCounters
from qmix.pool.eviction import DEFAULT_POLICY, POLICIES, Eviction, Key
from qmix.pool.slots import SlotMemory
from qmix.store.file import StoreFile
from qmix.store.opened import Store

READS_AHEAD = 2  # records: one that the disk reads and the next; each further one only takes a slot


class _Checksum:
    """Checks a record's checksum; `damage` says what is wrong if it differs."""

    def __init__(self, wanted: str, damage: str) -> None:
        self.wanted, self.damage, self._digest = wanted, damage, xxhash.xxh3_64()

    def take(self, part: memoryview) -> None:
        self._digest.update(part)

    def finish(self) -> None:
        found, self._digest = self._digest.hexdigest(), xxhash.xxh3_64()
        if found != self.wanted:
            raise StoreError(self.damage)


class HeldRecords:
    """Slots over a store's records. Base of the pool, which says what is read, and when.

    `slots` are counts by the bytes of their records, at least one for every size in the store. A store's profile
    decides how likely a use is before the first, and the policy unless `policy` is given.
    """

    def __init__(self, store: Store, slots: Mapping[int, int], policy: Eviction | None = None) -> None:
        self.store, self.slots = store, slots
        advised = store.profile.policy if store.profile is not None else None
        held = sum(slots.values()) / store.geometry.num_records
        self.policy = policy or POLICIES[advised or DEFAULT_POLICY](store.geometry, store.use, held)
        self._slots = SlotMemory(slots)
        self._nbytes = {key: store.layout.record(*key).nbytes for key in store.layout.experts}
        self.counters = PoolCounters()
        self.closed = False
        self.waited = 0.0  # seconds that requests have waited for reads
        self._resident: dict[Key, int] = {}
        self._ahead: dict[Key, tuple[int, Read]] = {}  # being read, not yet requested
        self._ending: list[tuple[int, Read]] = []  # abandoned; the disk still writes to their slots
        self._unused: set[Key] = set()  # prefetched, not yet requested
        self._coming: frozenset[Key] = frozenset()
        self._files = [StoreFile(store.path(store.layout.layer(i))) for i in range(store.geometry.num_layers)]
        self._reader = Reader()

    @property
    def reading(self) -> float:
        """The seconds in which a read was under way."""
        return self._reader.busy

    @property
    def memory(self) -> torch.Tensor:
        """The memory of all slots, uint8."""
        return self._slots.memory

    def close(self) -> None:
        """End the reads under way and close the files; later requests raise UsageError."""
        self.closed = True
        for key in list(self._ahead):
            self._abandon(key)
        self._reader.close()
        for file in self._files:
            file.close()

    def holds(self, layer: int, expert: int) -> bool:
        """Return whether a record is in memory."""
        return (layer, expert) in self._resident

    def held(self) -> frozenset[Key]:
        """Return the records that are in memory now. May be called by any thread."""
        return frozenset(self._resident.copy())  # which no other thread can interrupt

    def record(self, layer: int, expert: int) -> torch.Tensor:
        """Return the bytes, uint8, of a record in memory."""
        return self._slots.bytes(self._resident[layer, expert])

    def _begin_next(self, layer: int, waiting: deque[Key], pinned: set[Key]) -> tuple[Key, int, Read] | None:
        """Begin to read the first waiting record that there is a slot for."""
        full = set()
        for key in waiting:
            if self._nbytes[key] in full:
                continue
            if (slot := self._take_slot(key, layer, pinned)) is not None:
                waiting.remove(key)
                return self._begin(key, slot)
            full.add(self._nbytes[key])
        return None

    def _begin(self, key: Key, slot: int, ahead: bool = False) -> tuple[Key, int, Read]:
        layer, expert = key
        buffer = self._slots.bytes(slot)
        offset = self.store.layout.record_offset(layer, expert)
        place = f"bytes {offset} to {offset + len(buffer) - 1}"
        damage = (
            f"{self._files[layer].path}: the record of expert {expert} ({place}) is damaged; "
            f"{mending(self.store.directory)}"
        )
        check = _Checksum(self.store.record_checksums[layer][expert], damage)
        self.counters.bytes_read += len(buffer)
        read = Read(self._files[layer], buffer.numpy().data, offset, check)
        return key, slot, self._reader.submit(read, ahead)

    def _finish(self, reading: deque[tuple[Key, int, Read]]) -> Key:
        """Wait for the first of the reads, and return its key, now resident."""
        key, slot, read = reading[0]
        started = time.perf_counter()
        read.done.result()
        self.waited += time.perf_counter() - started
        reading.popleft()
        self._resident[key] = slot
        return key

    def _release(self, reading: deque[tuple[Key, int, Read]]) -> None:
        """Wait for reads that are no longer needed, and free their slots."""
        for _, slot, read in reading:
            read.done.exception()  # a slot is free only when nothing writes to it
            self._slots.give(slot)

    def _take_slot(self, key: Key, layer: int, pinned: set[Key] | frozenset[Key]) -> int | None:
        """Return a slot for a record; None where there is none.

        It is free, or that of the record of the same size worth least that is not pinned. A record that is coming is
        evicted only where nothing else is left.
        """
        nbytes = self._nbytes[key]
        if (slot := self._slots.take(nbytes)) is not None:
            return slot
        free = [held for held in self._resident if held not in pinned and self._nbytes[held] == nbytes]
        if not free:
            return None
        victim = min(free, key=lambda held: (held in self._coming, self.policy.worth(held, layer)))
        self.counters.unused += victim in self._unused
        self._unused.discard(victim)
        return self._resident.pop(victim)

    def _read_ahead(self, layer: int, coming: Sequence[Key], pinned: set[Key]) -> None:
        """Begin to read what is coming, into slots that hold nothing worth more.

        Prefetch may hold at most a quarter of a size's slots, so that requests always find one.
        """
        kept = pinned | self._coming
        for key in coming:
            if key in self._resident or key in self._ahead:
                continue
            begun = [self._slots.size(slot) for slot, _ in [*self._ahead.values(), *self._ending]]
            if len(begun) >= READS_AHEAD:
                return
            if begun.count(self._nbytes[key]) >= self.slots[self._nbytes[key]] // 4:
                continue
            if (slot := self._take_slot(key, layer, kept)) is None:
                continue
            _, slot, read = self._begin(key, slot, ahead=True)
            self._ahead[key] = slot, read

    def _collect(self) -> None:
        """Make prefetched records resident; a read that failed is tried again at the record's next request."""
        ended = [item for item in self._ending if item[1].done.done()]
        for item in ended:
            self._ending.remove(item)
            self._slots.give(item[0])
        for key in [key for key, (_, read) in self._ahead.items() if read.done.done()]:
            slot, read = self._ahead.pop(key)
            if read.done.exception() is None:
                self._resident[key] = slot
                self._unused.add(key)
            else:
                self._slots.give(slot)

    def _abandon(self, key: Key) -> None:
        """Cancel a prefetch that proved wrong; one whose last pieces are under way is kept."""
        slot, read = self._ahead[key]
        left_out = self._reader.cancel(read)
        if left_out:
            self.counters.bytes_read -= left_out
            self.counters.unused += 1
            del self._ahead[key]
            self._ending.append((slot, read))
