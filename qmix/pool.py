"""The host tier: slots of one expert record each, in one mapping made once.

Records are read straight into slots and multiplied there. The record that gives up its slot is the one that the
eviction policy values least, never one that the present step still needs. What coming layers will probably ask for is
read ahead in the disk's idle time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
import xxhash

from qmix.direct_io import DirectFile, anonymous_memory
from qmix.errors import REMAKE, Cancelled, StoreError
from qmix.eviction import DEFAULT_POLICY, POLICIES, Eviction, Key
from qmix.precision.matmul import Expert
from qmix.progress import OnProgress, Progress, ignore
from qmix.reading import PIECE_BYTES, READ_THREADS, Read, Reader
from qmix.store import Store

READS_IN_FLIGHT = 4  # records, when filling
READS_AHEAD = 2  # records: one that the disk works on and the one after it; each further one only takes a slot


@dataclass(slots=True)
class PoolCounters:
    """What the pool has done so far, in records, and `bytes_read` from the disk.

    hits       asked for and in memory from earlier use
    misses     asked for and read since their last use, or read for the first time
    ahead      those of the misses whose read had begun before they were asked for
    hidden     those of them that were there when asked for
    unused     read ahead and never asked for
    """

    hits: int = 0
    misses: int = 0
    ahead: int = 0
    hidden: int = 0
    unused: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were in memory; 1 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    def since(self, earlier: PoolCounters) -> PoolCounters:
        return PoolCounters(*(getattr(self, field.name) - getattr(earlier, field.name) for field in fields(self)))

    def copy(self) -> PoolCounters:
        return self.since(PoolCounters())


class ExpertPool:
    """`slots` slots over a store's records, but for those that lie `elsewhere`; serves one thread, reads with several.

    With `invariant`, an expert's result for a token does not depend on the tokens beside it. Setting `cancelled` makes
    the next request raise Cancelled. `layer` is the one that asked last, for whoever watches.
    """

    def __init__(
        self,
        store: Store,
        slots: int,
        policy: Eviction | None = None,
        invariant: bool = False,
        elsewhere: frozenset[Key] = frozenset(),
    ) -> None:
        self.store, self.slots, self.invariant, self.elsewhere = store, slots, invariant, elsewhere
        self.policy = policy or POLICIES[DEFAULT_POLICY](store.geometry)
        self.slot_bytes = store.layout.slot_bytes
        self.memory = anonymous_memory(slots * self.slot_bytes)
        self.counters = PoolCounters()
        self.cancelled = False
        self.layer = 0
        self._resident: dict[Key, int] = {}
        self._ahead: dict[Key, tuple[int, Read]] = {}  # being read, not yet asked for
        self._ending: list[tuple[int, Read]] = []  # read ahead in error; the disk still writes to their slots
        self._unused: set[Key] = set()  # resident by looking ahead, not yet asked for
        self._coming: frozenset[Key] = frozenset()
        self._free = list(range(slots - 1, -1, -1))
        self._views: dict[tuple[int, str], Expert] = {}
        self._files = [DirectFile(store.path(store.layout.layer(i))) for i in range(store.geometry.num_layers)]
        self._reader = Reader()
        # one whose last pieces are read, and those that keep all threads busy: each further one takes the slot of a
        # record that a later layer will ask for
        self._reads_awaited = 1 + math.ceil(READ_THREADS / math.ceil(self.slot_bytes / PIECE_BYTES))

    @property
    def holds_all(self) -> bool:
        """Whether every expert that is asked for here has a slot, so that nothing is ever read twice."""
        return self.slots >= self.store.geometry.num_records - len(self.elsewhere)

    def close(self) -> None:
        """End the reads under way and close the files; the pool cannot be used afterwards."""
        for key in list(self._ahead):
            self._abandon(key)
        self._reader.close()
        for file in self._files:
            file.close()

    def fill(self, on_progress: OnProgress = ignore) -> None:
        """Read records in order, first layer first, until the pool is full or every expert is in it."""
        layers, experts = self.store.geometry.num_layers, self.store.geometry.num_experts
        keys = [(layer, expert) for layer in range(layers) for expert in range(experts)]
        wanted = [key for key in keys if key not in self.elsewhere][: self.slots]
        waiting = deque(key for key in wanted if key not in self._resident)
        total, done = sum(self.store.layout.record(*key).nbytes for key in waiting), 0
        for key in self._in_order(waiting):
            done += self.store.layout.record(*key).nbytes
            on_progress(Progress(done, total))

    def pass_through(self, keys: Sequence[Key]) -> Iterator[tuple[Key, torch.Tensor]]:
        """Each record's bytes once, in a slot that is used again when the next is asked for; in order, checked.

        For what is kept in other memory; needs a free slot.
        """
        for key in self._in_order(deque(keys)):
            yield key, self.record(*key)
            self._free.append(self._resident.pop(key))

    def _in_order(self, waiting: deque[Key]) -> Iterator[Key]:
        """Each key when its record is in memory, several read beside it as far as slots are free."""
        reading: deque[tuple[Key, int, Read]] = deque()
        try:
            while waiting or reading:
                if self.cancelled:
                    raise Cancelled
                while waiting and self._free and len(reading) < READS_IN_FLIGHT:
                    reading.append(self._begin(waiting.popleft(), self._free.pop()))
                yield self._finish(reading)
        finally:
            self._release(reading)

    def record(self, layer: int, expert: int) -> torch.Tensor:
        """The bytes, uint8, of a record that is in memory."""
        return self._slot(self._resident[layer, expert])[: self.store.layout.record(layer, expert).nbytes]

    def get(self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()) -> Iterator[tuple[int, Expert]]:
        """Each of these experts of a layer once, those in memory first while the others are read.

        `coming` is what later layers will probably ask for, soonest first. An expert may be used until the next one
        is asked for. Raises StoreError where a record is damaged.
        """
        if self.cancelled:
            raise Cancelled
        self.layer = layer
        keys = [(layer, expert) for expert in experts]
        for key in [key for key in self._ahead if key[0] == layer and key not in keys]:
            self._abandon(key)
        self._collect()
        self._coming = frozenset(coming)
        ready, begun, waiting = self._sort(keys)
        self.policy.used(layer, experts)
        return self._stream(layer, ready, begun, waiting, coming)

    def look_ahead(self, layer: int, coming: Sequence[Key]) -> None:
        """Begin to read, while `layer` computes, what later layers will probably ask for, soonest first."""
        self._collect()
        self._coming = frozenset(coming)
        self._read_ahead(layer, coming, set())

    def _sort(self, keys: Sequence[Key]) -> tuple[deque[Key], deque[tuple[Key, int, Read]], deque[Key]]:
        """Keys in memory, reads of keys that were begun ahead, and keys still to be read; counts them."""
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
        self._unused.difference_update(keys)
        return ready, begun, waiting

    def _stream(
        self,
        layer: int,
        ready: deque[Key],
        reading: deque[tuple[Key, int, Read]],
        waiting: deque[Key],
        coming: Sequence[Key],
    ) -> Iterator[tuple[int, Expert]]:
        """Each key while it is resident; reads for the missing ones run beside, then those for what is coming."""
        pinned = set(ready)
        try:
            while ready or waiting or reading:
                while (
                    waiting
                    and len(reading) < self._reads_awaited
                    and (slot := self._take_slot(layer, pinned)) is not None
                ):
                    reading.append(self._begin(waiting.popleft(), slot))
                if not waiting:
                    self._read_ahead(layer, coming, pinned)
                key = ready.popleft() if ready else self._finish(reading)
                pinned.add(key)
                yield key[1], self._expert(key)
                pinned.discard(key)
        finally:
            self._release(reading)

    def _read_ahead(self, layer: int, coming: Sequence[Key], pinned: set[Key]) -> None:
        """Begin reads of what is coming, as far as slots that hold nothing better allow."""
        kept = pinned | self._coming
        for key in coming:
            if key in self._resident or key in self._ahead:
                continue
            if len(self._ahead) + len(self._ending) >= min(READS_AHEAD, self.slots // 4):
                return
            if (slot := self._take_slot(layer, kept)) is None:
                return
            _, slot, read = self._begin(key, slot, ahead=True)
            self._ahead[key] = slot, read

    def _collect(self) -> None:
        """Make what was read ahead resident; a read that failed is tried again when somebody asks for it."""
        ended = [item for item in self._ending if item[1].done.done()]
        for item in ended:
            self._ending.remove(item)
            self._free.append(item[0])
        for key in [key for key, (_, read) in self._ahead.items() if read.done.done()]:
            slot, read = self._ahead.pop(key)
            if read.done.exception() is None:
                self._resident[key] = slot
                self._unused.add(key)
            else:
                self._free.append(slot)

    def _abandon(self, key: Key) -> None:
        """End a read ahead that proved wrong; one whose last pieces are under way is kept."""
        slot, read = self._ahead[key]
        left_out = self._reader.cancel(read)
        if left_out:
            self.counters.bytes_read -= left_out
            self.counters.unused += 1
            del self._ahead[key]
            self._ending.append((slot, read))

    def _begin(self, key: Key, slot: int, ahead: bool = False) -> tuple[Key, int, Read]:
        layer, expert = key
        layout = self.store.layout
        buffer = self._slot(slot)[: layout.record(layer, expert).nbytes]
        want, path = self.store.record_checksums[layer][expert], self._files[layer].path

        def check(record: memoryview) -> None:
            if xxhash.xxh3_64_hexdigest(record) != want:
                raise StoreError(f"{path}: the record of expert {expert} is damaged; {REMAKE}")

        self.counters.bytes_read += len(buffer)
        read = Read(self._files[layer], buffer, layout.record_offset(layer, expert), check)
        return key, slot, self._reader.submit(read, ahead)

    def _finish(self, reading: deque[tuple[Key, int, Read]]) -> Key:
        """Wait for the first of the reads; its key, now resident."""
        key, slot, read = reading[0]
        read.done.result()
        reading.popleft()
        self._resident[key] = slot
        return key

    def _release(self, reading: deque[tuple[Key, int, Read]]) -> None:
        """Let go of reads that nobody waits for any more."""
        for _, slot, read in reading:
            read.done.exception()  # a slot is free again only when nothing writes to it any more
            self._free.append(slot)

    def _take_slot(self, layer: int, pinned: set[Key] | frozenset[Key]) -> int | None:
        """A free slot, or that of the record worth least that is not pinned; None if there is none.

        What is coming goes only where nothing else is left.
        """
        if self._free:
            return self._free.pop()
        free = [key for key in self._resident if key not in pinned]
        if not free:
            return None
        victim = min(free, key=lambda key: (key in self._coming, self.policy.worth(key, layer)))
        self.counters.unused += victim in self._unused
        self._unused.discard(victim)
        return self._resident.pop(victim)

    def _slot(self, slot: int) -> torch.Tensor:
        return self.memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def _expert(self, key: Key) -> Expert:
        slot, precision = self._resident[key], self.store.layout.precisions[key[0]][key[1]]
        view = self._views.get((slot, precision))
        if view is None:
            record = self.store.layout.records[precision]
            view = Expert(self._slot(slot), record, self.store.geometry.expert_matrices, self.invariant)
            self._views[slot, precision] = view
        return view
