"""Compare two ways to reach expert records: a mapping of their file, and a pool's slots.

    python benchmarks/mmap_or_pool.py STORE

A record that is not in memory is fetched and multiplied with one token; a record in memory is only multiplied. The
mapping uses the file's own pages, faulted in on access or populated beforehand. The pool reads past the page cache
into a slot on huge pages and multiplies in place. The contestants alternate on records drawn at random.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from qmix.disk import PAGE
from qmix.disk.reads import READ_THREADS, Read, Reader
from qmix.pool.eviction import Key
from qmix.precision.expert import Expert
from qmix.precision.memory import anonymous_memory
from qmix.store.file import StoreFile
from qmix.store.opened import Store, open_store
from qmix.units import format_bytes

MADV_POPULATE_READ = 22  # of Linux's mman.h; Python's mmap does not name it
WARM_BYTES = 2 * 10**9  # records that are in memory: beyond any cache


class Mapped:
    """A store's expert files, mapped."""

    def __init__(self, store: Store) -> None:
        self.store, self.maps, self.fds = store, [], []
        for layer in range(store.geometry.num_layers):
            fd = os.open(store.path(store.layout.layer(layer)), os.O_RDONLY)
            self.fds.append(fd)
            self.maps.append(mmap.mmap(fd, 0, prot=mmap.PROT_READ))
        self._threads = ThreadPoolExecutor(READ_THREADS)

    def forget(self, key: Key) -> None:
        """Out of the page cache, and out of this process."""
        start, nbytes = self._place(key)
        self.maps[key[0]].madvise(mmap.MADV_DONTNEED, start, nbytes)
        os.posix_fadvise(self.fds[key[0]], start, nbytes, os.POSIX_FADV_DONTNEED)

    def populate(self, key: Key) -> None:
        """All its pages at once, by as many threads as a pool reads with."""
        start, nbytes = self._place(key)
        step = -(-nbytes // READ_THREADS // PAGE) * PAGE
        pieces = [(start + done, min(step, nbytes - done)) for done in range(0, nbytes, step)]
        list(self._threads.map(lambda piece: self.maps[key[0]].madvise(MADV_POPULATE_READ, *piece), pieces))

    def expert(self, key: Key) -> Expert:
        start, nbytes = self._place(key)
        return _expert(self.store, key, torch.frombuffer(self.maps[key[0]], dtype=torch.uint8)[start : start + nbytes])

    def _place(self, key: Key) -> tuple[int, int]:
        return self.store.layout.record_offset(*key), self.store.layout.record(*key).nbytes


class Slots:
    """Memory as a pool has it, one record after another, and reads into it."""

    def __init__(self, store: Store, count: int) -> None:
        self.store, self.nbytes = store, max(store.layout.record_counts)
        self.memory = anonymous_memory(count * self.nbytes)
        self.files = [StoreFile(store.path(store.layout.layer(i))) for i in range(store.geometry.num_layers)]
        self.reader = Reader()

    def read(self, key: Key, slot: int = 0) -> Expert:
        buffer = self.memory[slot * self.nbytes :][: self.store.layout.record(*key).nbytes]
        read = Read(self.files[key[0]], buffer.numpy().data, self.store.layout.record_offset(*key))
        self.reader.submit(read).done.result()
        return _expert(self.store, key, buffer)


def _expert(store: Store, key: Key, buffer: torch.Tensor) -> Expert:
    return Expert(buffer, store.layout.record(*key), store.geometry.expert_matrices)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(store: Store, rounds: int) -> dict[str, list[float]]:
    """Seconds a record, by case."""
    geometry = store.geometry
    keys = [(layer, expert) for layer in range(geometry.num_layers) for expert in range(geometry.num_experts)]
    random.Random(0).shuffle(keys)
    count = max(2, min(len(keys) // 2, WARM_BYTES // max(store.layout.record_counts)))
    warm, cold = keys[:count], keys[count:]
    mapped, slots = Mapped(store), Slots(store, count + 1)
    x = torch.randn(1, geometry.hidden_size).bfloat16()

    def multiply(expert: Expert) -> None:
        expert(x, F.silu)

    in_slots = [slots.read(key, slot) for slot, key in enumerate(warm, 1)]
    for key in warm:
        mapped.populate(key)
    in_cache = [mapped.expert(key) for key in warm]

    def faulted(key: Key) -> None:
        multiply(mapped.expert(key))

    def populated(key: Key) -> None:
        mapped.populate(key)
        multiply(mapped.expert(key))

    def pooled(key: Key) -> None:
        multiply(slots.read(key))

    times: dict[str, list[float]] = {}
    for turn in range(-1, rounds):
        key, held = cold[turn % len(cold)], turn % count
        for name, work in (
            ("on disk, mapping as faulted", partial(faulted, key)),
            ("on disk, mapping populated", partial(populated, key)),
            ("on disk, pool", partial(pooled, key)),
            ("in memory, mapping", partial(multiply, in_cache[held])),
            ("in memory, pool", partial(multiply, in_slots[held])),
        ):
            mapped.forget(key)
            took = _seconds(work)
            if turn >= 0:  # the first warms up
                times.setdefault(name, []).append(took)
    return times


def report(store: Store, rounds: int) -> dict[str, Any]:
    """Measures and shows the table; what the JSON line says."""
    warnings.simplefilter("ignore")  # a mapping cannot be written to: nothing here does
    nbytes, times = store.layout.record(0, 0).nbytes, measure(store, rounds)
    table = Table(title=f"records of {format_bytes(nbytes)}, {torch.get_num_threads()} threads, {rounds} rounds")
    for column in ("", "median ms", "min", "max", "GB/s"):
        table.add_column(column, justify="right")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        cells = (f"{1e3 * value:.1f}" for value in (median, min(seconds), max(seconds)))
        table.add_row(name, *cells, f"{nbytes / median / 1e9:.2f}")
    Console(width=100).print(table)
    return {"store": store.directory.name, "record_bytes": nbytes, "seconds": times}


@click.command()
@click.argument("store", type=click.Path(exists=True, path_type=Path))
@click.option("--rounds", default=24, show_default=True)
def main(store: Path, rounds: int) -> None:
    """Print a table and a JSON line."""
    print(json.dumps(report(open_store(store), rounds)))


if __name__ == "__main__":
    main()
