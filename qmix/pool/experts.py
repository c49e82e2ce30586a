"""The host tier: slots of one expert record each, in one mapping made once.

Records are read straight into slots of their own size and multiplied there. The eviction policy chooses the record of
that size that gives up its slot, never one that the present step still needs. Records that later layers will probably
need are prefetched in the disk's idle time.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

import torch
import xxhash

from qmix.disk.reads import PIECE_BYTES, READ_THREADS, Read, Reader
from qmix.errors import Cancelled, StoreError, UsageError, mending
from qmix.pool.counters import ExpertCounts, PoolCounters
from qmix.pool.eviction import DEFAULT_POLICY, POLICIES, Eviction, Key
from qmix.pool.protocol import refuse_copy
from qmix.pool.slots import SlotMemory, all_have_slots
from qmix.precision.matmul import Expert
from qmix.progress import OnProgress, Progress, ignore
from qmix.store.expert_frequency import by_frequency
from qmix.store.file import StoreFile
from qmix.store.opened import Store

READS_IN_FLIGHT = 4  # records, when filling
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


class ExpertPool:
    """Slots over a store's records, except for those `elsewhere`; serves one thread, reads with several.

    `slots` are counts by the bytes of their records, at least one for every size in the store. A store's profile
    decides what is read first, how likely a use is before the first, and the policy unless `policy` is given. With
    `invariant`, an expert's result for a token does not depend on the tokens beside it; otherwise `widened_from` has by
    precision the tokens from which on torch multiplies dequantised weights. Setting `cancelled` makes the next request
    raise Cancelled. `layer` is the layer of the last request, for progress displays.
    """

    def __init__(
        self,
        store: Store,
        slots: Mapping[int, int],
        policy: Eviction | None = None,
        invariant: bool = False,
        elsewhere: frozenset[Key] = frozenset(),
        widened_from: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self.store, self.slots, self.invariant, self.elsewhere = store, slots, invariant, elsewhere
        self._widened_from = widened_from
        advised = store.profile.policy if store.profile is not None else None
        self.policy = policy or POLICIES[advised or DEFAULT_POLICY](store.geometry, store.use)
        self._slots = SlotMemory(slots)
        self._nbytes = {key: store.layout.record(*key).nbytes for key in store.layout.experts}
        self.counters = PoolCounters()
        self.by_expert = ExpertCounts(store.geometry.num_layers, store.geometry.num_experts)
        self.cancelled = self.closed = False
        self.layer = 0
        self.waited = 0.0  # seconds that requests have waited for reads
        self.computed = 0.0  # seconds that callers have used the experts that they got
        self._resident: dict[Key, int] = {}
        self._ahead: dict[Key, tuple[int, Read]] = {}  # being read, not yet requested
        self._ending: list[tuple[int, Read]] = []  # abandoned; the disk still writes to their slots
        self._unused: set[Key] = set()  # prefetched, not yet requested
        self._coming: frozenset[Key] = frozenset()
        self._views: dict[tuple[int, str], Expert] = {}
        self._files = [StoreFile(store.path(store.layout.layer(i))) for i in range(store.geometry.num_layers)]
        self._reader = Reader()
        # One whose last pieces are read, and as many as keep all threads busy: each further one takes the slot of a
        # record that a later layer will need.
        self._reads_awaited = 1 + math.ceil(READ_THREADS / math.ceil(min(slots) / PIECE_BYTES))

    @property
    def holds_all(self) -> bool:
        """True if every expert served has a slot, so that nothing is ever read twice."""
        return all_have_slots(self.store.layout, self.slots, self.elsewhere)

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

    def fill(self, on_progress: OnProgress = ignore) -> None:
        """Read records until no slot is free or every expert has one, by expected use if known, else by layer."""
        layout, free = self.store.layout, {nbytes: self._slots.free(nbytes) for nbytes in self.slots}
        waiting: deque[Key] = deque()
        for key in by_frequency(layout, self.store.use) if self.store.use else layout.experts:
            if key in self.elsewhere or key in self._resident or not free[self._nbytes[key]]:
                continue
            free[self._nbytes[key]] -= 1
            waiting.append(key)
        total, done = sum(map(self._nbytes.__getitem__, waiting)), 0
        for key in self._in_order(waiting):
            done += self._nbytes[key]
            on_progress(Progress(done, total))

    def pass_through(self, keys: Sequence[Key]) -> Iterator[tuple[Key, torch.Tensor]]:
        """Yield each record's bytes once, in order and checked, in a slot that is used again for the next.

        For records that are kept in other memory; needs a free slot of each size.
        """
        for key in self._in_order(deque(keys)):
            yield key, self.record(*key)
            self._slots.give(self._resident.pop(key))

    def _in_order(self, waiting: deque[Key]) -> Iterator[Key]:
        """Yield each key when its record is in memory; read several at once as far as slots are free."""
        reading: deque[tuple[Key, int, Read]] = deque()
        try:
            while waiting or reading:
                if self.cancelled:
                    raise Cancelled
                while (
                    waiting
                    and len(reading) < READS_IN_FLIGHT
                    and (slot := self._slots.take(self._nbytes[waiting[0]])) is not None
                ):
                    reading.append(self._begin(waiting.popleft(), slot))
                yield self._finish(reading)
        finally:
            self._release(reading)

    def holds(self, layer: int, expert: int) -> bool:
        """Return whether a record is in memory."""
        return (layer, expert) in self._resident

    def held(self) -> frozenset[Key]:
        """Return the records that are in memory now. May be called by any thread."""
        return frozenset(self._resident.copy())  # which no other thread can interrupt

    def record(self, layer: int, expert: int) -> torch.Tensor:
        """Return the bytes, uint8, of a record in memory."""
        return self._slots.bytes(self._resident[layer, expert])

    def get(self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()) -> Iterator[tuple[int, Expert]]:
        """Yield each of a layer's `experts` once, first those in memory while the others are read.

        `coming` are experts that later layers will probably need, soonest first. An expert may be used until the next
        is requested. Raises StoreError where a record is damaged.
        """
        return (one for group in self.groups(layer, experts, coming) for one in group)

    def groups(
        self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()
    ) -> Iterator[list[tuple[int, Expert]]]:
        """Yield the same experts as `get`, in lists of those that are in memory together; each until the next list.

        Experts in memory come one by one as long as others wait for a slot: a slot that is done with takes the next.
        """
        self.check_running()
        self.layer = layer
        keys = [(layer, expert) for expert in experts]
        for key in [key for key in self._ahead if key[0] == layer and key not in keys]:
            self._abandon(key)
        self._collect()
        self._coming = frozenset(coming)
        ready, begun, waiting = self._sort(keys)
        self.policy.used(layer, experts)
        return self._stream(layer, ready, begun, waiting, coming)

    def prefetch(self, layer: int, coming: Sequence[Key]) -> None:
        """Begin to read, while `layer` computes, experts that later layers will probably need, soonest first."""
        self.check_running()
        self._collect()
        self._coming = frozenset(coming)
        self._read_ahead(layer, coming, set())

    def check_running(self) -> None:
        """Raise Cancelled after a request to stop, and UsageError after `close`."""
        if self.closed:
            raise UsageError("this runner is closed; load the model again")
        if self.cancelled:
            raise Cancelled

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copy()

    def _sort(self, keys: Sequence[Key]) -> tuple[deque[Key], deque[tuple[Key, int, Read]], deque[Key]]:
        """Return and count the keys in memory, the reads of prefetched keys under way, and the keys still to read."""
        ready: deque[Key] = deque()
        begun: deque[tuple[Key, int, Read]] = deque()
        waiting: deque[Key] = deque()
        for key in keys:
            if key in self._resident:
                ready.append(key)
                self.counters.hits += key not in self._unused
                self.counters.hidden += key in self._unused
            elif key in self._ahead:
                slot, read = self._ahead.pop(key)
                self._reader.hasten(read)
                begun.append((key, slot, read))
            else:
                waiting.append(key)
        ahead = len(begun) + len(self._unused.intersection(keys))
        self.counters.ahead += ahead
        self.counters.misses += ahead + len(waiting)
        self.by_expert.add(keys, [key for key in ready if key not in self._unused])
        self._unused.difference_update(keys)
        return ready, begun, waiting

    def _stream(
        self,
        layer: int,
        ready: deque[Key],
        reading: deque[tuple[Key, int, Read]],
        waiting: deque[Key],
        coming: Sequence[Key],
    ) -> Iterator[list[tuple[int, Expert]]]:
        """Yield keys while they are resident, and read missing records and then what is coming meanwhile."""
        pinned = set(ready)
        try:
            while ready or waiting or reading:
                while len(reading) < self._reads_awaited and (begun := self._begin_next(layer, waiting, pinned)):
                    reading.append(begun)
                if not waiting:
                    self._collect()
                    self._read_ahead(layer, coming, pinned)
                together = len(ready) if not waiting else min(1, len(ready))
                keys = [ready.popleft() for _ in range(together)] or [self._finish(reading)]
                pinned.update(keys)
                group = [(key[1], self._expert(key)) for key in keys]
                given = time.perf_counter()
                yield group
                self.computed += time.perf_counter() - given
                pinned.difference_update(keys)
        finally:
            self._release(reading)

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

    def _expert(self, key: Key) -> Expert:
        slot, precision = self._resident[key], self.store.layout.precisions[key[0]][key[1]]
        view = self._views.get((slot, precision))
        if view is None:
            record = self.store.layout.records[precision]
            shapes, widened = self.store.geometry.expert_matrices, self._widened_from.get(precision)
            view = Expert(self._slots.bytes(slot), record, shapes, self.invariant, widened)
            self._views[slot, precision] = view
        return view
