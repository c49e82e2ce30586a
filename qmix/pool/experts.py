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

from qmix.disk.reads import PIECE_BYTES, READ_THREADS, Read
from qmix.errors import Cancelled, UsageError
from qmix.pool.counters import ExpertCounts
from qmix.pool.eviction import Eviction, Key
from qmix.pool.held import HeldRecords
from qmix.pool.protocol import refuse_copy
from qmix.pool.slots import all_have_slots
from qmix.precision.expert import Expert
from qmix.progress import OnProgress, Progress, ignore
from qmix.store.expert_frequency import by_frequency
from qmix.store.opened import Store

READS_IN_FLIGHT = 4  # records, when filling


class ExpertPool(HeldRecords):
    """Serves a store's experts, except for those `elsewhere`, to one thread; reads with several.

    `slots` and `policy` as HeldRecords takes them; a store's profile decides what is read first. With `invariant`, an
    expert's result for a token does not depend on the tokens beside it; otherwise `widened_from` has by precision the
    tokens from which on torch multiplies dequantised weights. Setting `cancelled` makes the next request raise
    Cancelled. `layer` is the layer of the last request, for progress displays.
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
        super().__init__(store, slots, policy)
        self.invariant, self.elsewhere = invariant, elsewhere
        self._widened_from = widened_from
        self.by_expert = ExpertCounts(store.geometry.num_layers, store.geometry.num_experts)
        self.cancelled = False
        self.layer = 0
        self.computed = 0.0  # seconds that callers have used the experts that they got
        self._views: dict[tuple[int, str], Expert] = {}
        # One whose last pieces are read, and as many as keep all threads busy: each further one takes the slot of a
        # record that a later layer will need.
        self._reads_awaited = 1 + math.ceil(READ_THREADS / math.ceil(min(slots) / PIECE_BYTES))

    @property
    def holds_all(self) -> bool:
        """True if every expert served has a slot, so that nothing is ever read twice."""
        return all_have_slots(self.store.layout, self.slots, self.elsewhere)

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

    def exchange(self, layer: int, arriving: int, leaving: int) -> None:
        """Note that the slot of an expert has got the record, of the same size, of one that was elsewhere."""
        if (copy := self._resident.pop((layer, arriving), None)) is not None:  # read here as well, by somebody else
            self._slots.give(copy)
            self._unused.discard((layer, arriving))
        self._resident[layer, arriving] = self._resident.pop((layer, leaving))
        self._unused.discard((layer, leaving))
        self.elsewhere = self.elsewhere - {(layer, arriving)} | {(layer, leaving)}

    def get(self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()) -> Iterator[tuple[int, Expert]]:
        """Yield each of a layer's `experts` once, first those in memory while the others are read.

        `coming` are experts that later layers will probably need, soonest first. An expert may be used until the next
        is requested. Raises StoreError where a record is damaged.
        """
        return (one for group in self.groups(layer, experts, coming) for one in group)

    def groups(
        self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()
    ) -> Iterator[list[tuple[int, Expert]]]:
        """Yield the same experts as `get`, in lists of experts that are in memory together; each until the next list.

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

    def whole(self) -> list[list[Expert]] | None:
        """Return every expert, [layer][expert], if all are in memory, where they stay then; None otherwise."""
        layers, experts = range(self.store.geometry.num_layers), range(self.store.geometry.num_experts)
        if len(self._resident) < len(self._nbytes):
            return None
        return [[self._expert((layer, expert)) for expert in experts] for layer in layers]

    def used(self, chosen: Sequence[Sequence[int]], seconds: float) -> None:
        """Count a token's experts of every layer, all in memory, which took some seconds to compute."""
        for layer, experts in enumerate(chosen):
            self.by_expert.found(layer, experts)
            self.policy.used(layer, experts)
            self.counters.hits += len(experts)
        self.layer = len(chosen) - 1
        self.computed += seconds

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

    def _expert(self, key: Key) -> Expert:
        slot, precision = self._resident[key], self.store.layout.precisions[key[0]][key[1]]
        view = self._views.get((slot, precision))
        if view is None:
            record = self.store.layout.records[precision]
            shapes, widened = self.store.geometry.expert_matrices, self._widened_from.get(precision)
            view = Expert(self._slots.bytes(slot), record, shapes, self.invariant, widened)
            self._views[slot, precision] = view
        return view
