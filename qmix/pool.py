"""The host tier: slots of one expert record each, in one mapping made once.

Records are read straight into slots and multiplied there. The slot that a missing record takes is the one used
least recently, never one that the present step still needs.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import xxhash

from qmix.direct_io import READ_THREADS, DirectFile, Read, anonymous_memory
from qmix.errors import REMAKE, Cancelled, StoreError
from qmix.precision.matmul import Expert
from qmix.progress import OnProgress, Progress, ignore
from qmix.store import Store

Key = tuple[int, int]  # layer, expert


@dataclass(slots=True)
class PoolCounters:
    """What the pool has done so far; `bytes_read` from the disk."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were in memory; 1 before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    def since(self, earlier: PoolCounters) -> PoolCounters:
        return PoolCounters(
            self.hits - earlier.hits, self.misses - earlier.misses, self.bytes_read - earlier.bytes_read
        )

    def copy(self) -> PoolCounters:
        return PoolCounters(self.hits, self.misses, self.bytes_read)


class ExpertPool:
    """`slots` slots over a store's records; serves one thread, reads with several.

    Setting `cancelled` makes the next request raise Cancelled.
    """

    def __init__(self, store: Store, slots: int) -> None:
        self.store, self.slots = store, slots
        self.slot_bytes = store.layout.slot_bytes
        self.memory = anonymous_memory(slots * self.slot_bytes)
        self.counters = PoolCounters()
        self.cancelled = False
        self._resident: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._free = list(range(slots - 1, -1, -1))
        self._views: dict[tuple[int, str], Expert] = {}
        self._files = [DirectFile(store.path(store.layout.layer(i))) for i in range(store.geometry.num_layers)]
        self._threads = ThreadPoolExecutor(READ_THREADS, "qmix-read")

    def close(self) -> None:
        """Wait for reads under way and close the files; the pool cannot be used afterwards."""
        self._threads.shutdown()
        for file in self._files:
            file.close()

    def fill(self, on_progress: OnProgress = ignore) -> None:
        """Read records in order, first layer first, until the pool is full or every expert is in it."""
        layers, experts = self.store.geometry.num_layers, self.store.geometry.num_experts
        wanted = [(layer, expert) for layer in range(layers) for expert in range(experts)]
        sizes = [self.store.layout.record(*key).nbytes for key in wanted[: self.slots]]
        done = 0
        for _, size in zip(self._stream(wanted[: self.slots]), sizes, strict=True):
            done += size
            on_progress(Progress(done, sum(sizes)))

    def get(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """Each of these experts of a layer once, those in memory first while the others are read.

        An expert may be used until the next one is asked for. Raises StoreError where a record is damaged.
        """
        keys = [(layer, expert) for expert in experts]
        hits = sum(key in self._resident for key in keys)
        self.counters.hits += hits
        self.counters.misses += len(keys) - hits
        for key in self._stream(keys):
            yield key[1], self._expert(key)

    def _stream(self, keys: Sequence[Key]) -> Iterator[Key]:
        """The keys, each resident while it is the last one given; reads for the missing ones run ahead."""
        if self.cancelled:
            raise Cancelled
        needed = deque(key for key in keys if key in self._resident)
        waiting = deque(key for key in keys if key not in self._resident)
        pinned = set(needed)
        reading: deque[tuple[Key, int, Read]] = deque()
        for key in needed:
            self._resident.move_to_end(key)
        try:
            while needed or waiting or reading:
                while waiting and (slot := self._take_slot(pinned)) is not None:
                    key = waiting.popleft()
                    reading.append((key, slot, self._read(key, slot)))
                if needed:
                    key = needed.popleft()
                else:
                    key, slot, read = reading[0]
                    read.done.result()
                    reading.popleft()
                    self._resident[key] = slot
                    pinned.add(key)
                yield key
                pinned.discard(key)
        finally:
            for _, slot, read in reading:
                read.done.exception()  # a slot is free again only when nothing writes to it any more
                self._free.append(slot)

    def _take_slot(self, pinned: set[Key]) -> int | None:
        """A free slot, or that of the least recently used expert that is not pinned; None if there is none."""
        if self._free:
            return self._free.pop()
        victim = next((key for key in self._resident if key not in pinned), None)
        return None if victim is None else self._resident.pop(victim)

    def _read(self, key: Key, slot: int) -> Read:
        layer, expert = key
        layout = self.store.layout
        buffer = self._slot(slot)[: layout.record(layer, expert).nbytes]
        want, path = self.store.record_checksums[layer][expert], self._files[layer].path

        def check(record: memoryview) -> None:
            if xxhash.xxh3_64_hexdigest(record) != want:
                raise StoreError(f"{path}: the record of expert {expert} is damaged; {REMAKE}")

        self.counters.bytes_read += len(buffer)
        return Read(self._threads, self._files[layer], buffer, layout.record_offset(layer, expert), check)

    def _slot(self, slot: int) -> torch.Tensor:
        return self.memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def _expert(self, key: Key) -> Expert:
        slot, precision = self._resident[key], self.store.layout.precisions[key[0]][key[1]]
        view = self._views.get((slot, precision))
        if view is None:
            record = self.store.layout.records[precision]
            view = Expert(self._slot(slot), record, self.store.geometry.expert_matrices)
            self._views[slot, precision] = view
        return view
