"""Probes of this machine's memory, disk and cores. Rates are in bytes/s and FLOP/s.

The speed of disks and of shared machines changes by the minute: take slices of the `...Probe` classes before, between
and after measurements.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from qmix.disk import PAGE
from qmix.disk.reads import Read, Reader
from qmix.precision.memory import anonymous_memory
from qmix.store.file import StoreFile
from qmix.store.opened import Store

MEMORY_BYTES = 2**30  # read by the memory probe: far more than caches hold
MATMUL_SIZES = (1024, 2048, 4096)
ROUNDS = 5
PRODUCTS = 3  # in a slice
LONGEST_PRODUCT = 0.25  # seconds; larger products are left out
DISK_SLICE_BYTES = 512 * 10**6
DISK_PASSES = 8  # most times that a slice reads a small store
SLOTS = 4  # reads in flight, as in a pool that is filled
SLOT_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate a second, measured in a few rounds; `how` names the way that reached it."""

    rounds: tuple[float, ...]
    how: str

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        """The slowest and the fastest round."""
        return min(self.rounds), max(self.rounds)

    def to_json(self) -> dict[str, object]:
        return {"median": self.median, **asdict(self)}


class MemoryProbe:
    """Reads memory from end to end with all of torch's threads, a slice at a time, in three ways."""

    def __init__(self, memory: torch.Tensor) -> None:
        floats, integers = memory.view(torch.float32), memory.view(torch.int64)
        self._nbytes = memory.nbytes
        self._ways: dict[str, Callable[[], object]] = {
            "sum of float32": floats.sum,
            "sum of int64": integers.sum,
            "dot product of float32": lambda: torch.dot(floats, floats),
        }
        self._rates: dict[str, list[float]] = {how: [] for how in self._ways}

    def slice(self) -> float:
        """Read all of the memory in each way, and return the best rate."""
        found = {how: self._nbytes / _seconds(way) for how, way in self._ways.items()}
        for how, rate in found.items():
            self._rates[how].append(rate)
        return max(found.values())

    def rate(self) -> Rate:
        """Return the rate of the slices so far in the best way."""
        return best(Rate(tuple(rates), how) for how, rates in self._rates.items())


def memory_read(nbytes: int = MEMORY_BYTES, rounds: int = ROUNDS) -> Rate:
    """Measure reading `nbytes` of memory on huge pages."""
    memory = anonymous_memory(nbytes)
    MemoryProbe(memory).slice()  # wakes the threads
    probe = MemoryProbe(memory)
    for _ in range(rounds):
        probe.slice()
    return probe.rate()


class MatmulProbe:
    """Multiplies two square bf16 matrices, a few times a slice, which takes the memory of three."""

    def __init__(self, size: int = MATMUL_SIZES[0]) -> None:
        self.size = size
        self.flops = 2 * size**3
        self.rates: list[float] = []

    def slice(self) -> float:
        """Return the median rate of a few products."""
        a, b = (torch.randn(self.size, self.size, dtype=torch.bfloat16) for _ in range(2))
        multiply = partial(torch.mm, a, b, out=torch.empty_like(a))
        multiply()  # wakes the threads, prepares what the shape needs
        self.rates.append(statistics.median(self.flops / _seconds(multiply) for _ in range(PRODUCTS)))
        return self.rates[-1]

    def rate(self) -> Rate:
        """Return the rate of the slices so far."""
        return Rate(tuple(self.rates), f"bf16, {self.size} x {self.size}")


def matmul(rounds: int = ROUNDS, sizes: Sequence[int] = MATMUL_SIZES) -> Rate:
    """Measure bf16 products of square matrices; return the best of a few sizes."""
    found: list[Rate] = []
    for probe in map(MatmulProbe, sizes):
        if found and probe.flops / found[-1].median > LONGEST_PRODUCT:
            break
        for _ in range(rounds):
            probe.slice()
        found.append(probe.rate())
    return best(found)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a record: the index of its file, its offset and its bytes."""

    file: int
    offset: int
    nbytes: int


class DiskProbe:
    """Reads records at random places as the engine does, a slice at a time.

    A read is a whole record, or as much of one as fits a slot. A slice takes `memory_limit` bytes at most, and gives
    them back. Close it, or use it as a context manager.
    """

    def __init__(
        self, files: Sequence[Path], places: Sequence[Place], memory_limit: int = SLOTS * SLOT_BYTES, seed: int = 0
    ) -> None:
        largest = max(place.nbytes for place in places)
        self.slot_bytes = max(PAGE, min(largest, memory_limit // SLOTS) // PAGE * PAGE)
        self.total = sum(place.nbytes for place in places)
        self.rates: list[float] = []
        self._random = random.Random(seed)
        self._places = places
        self._files = [StoreFile(path) for path in files]
        self._reader = Reader()

    @classmethod
    def of_store(cls, store: Store, memory_limit: int = SLOTS * SLOT_BYTES, seed: int = 0) -> DiskProbe:
        """Return a probe of a store's expert records."""
        layout, geometry = store.layout, store.geometry
        places = [
            Place(layer, layout.record_offset(layer, expert), layout.record(layer, expert).nbytes)
            for layer in range(geometry.num_layers)
            for expert in range(geometry.num_experts)
        ]
        files = [store.path(layout.layer(layer)) for layer in range(geometry.num_layers)]
        return cls(files, places, memory_limit, seed)

    def __enter__(self) -> DiskProbe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()
        for file in self._files:
            file.close()

    def slice(self, nbytes: int = DISK_SLICE_BYTES) -> float:
        """Read about `nbytes`, less of a small store, and return the rate."""
        memory = anonymous_memory(SLOTS * self.slot_bytes)
        free = deque(memory.split(self.slot_bytes))
        reading: deque[tuple[Read, torch.Tensor]] = deque()
        left, read = min(nbytes, DISK_PASSES * self.total), 0
        started = time.perf_counter()
        while left > 0 or reading:
            while left > 0 and free:
                slot = free.popleft()
                reading.append((self._begin(slot), slot))
                left -= len(reading[-1][0].view)
            done, slot = reading.popleft()
            done.done.result()
            read += len(done.view)
            free.append(slot)
        self.rates.append(read / (time.perf_counter() - started))
        return self.rates[-1]

    def rate(self) -> Rate:
        """Return the rate of the slices so far."""
        return Rate(tuple(self.rates), "O_DIRECT, records at random places")

    def _begin(self, slot: torch.Tensor) -> Read:
        place = self._random.choice(self._places)
        length = min(place.nbytes, len(slot))
        offset = place.offset + self._random.randint(0, (place.nbytes - length) // PAGE) * PAGE
        return self._reader.submit(Read(self._files[place.file], slot[:length].numpy().data, offset))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def best(rates: Iterable[Rate]) -> Rate:
    return max(rates, key=lambda rate: rate.median)
