"""Weights on their way from a checkpoint into a store: read by row chunks, quantised, written in place.

Worker threads each take a chunk through read, quantise and write, all of it outside the GIL and past the page cache.
There are more of them than cores, so that the disk has requests waiting while the cores are busy; memory holds the
few chunks on their way, whatever the model's size. Chunks are taken and noted in the order of their bytes in the
store, so that a record's checksum is computed from the bytes as they are written.
"""

from __future__ import annotations

import errno
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmix.checkpoint.fingerprint import WeightDigest
from qmix.checkpoint.reader import Checkpoint, Weight
from qmix.checkpoint.rows import WeightFile
from qmix.checkpoint.safetensors_header import ITEM_BYTES
from qmix.disk import PAGE
from qmix.disk.direct import DirectMemory, copied
from qmix.disk.faults import FULL, disk_advice
from qmix.errors import CheckpointError, StoreError
from qmix.precision.formats import chunk_rows
from qmix.precision.quantizer import MatrixQuantizer
from qmix.progress import OnProgress, Progress
from qmix.store.layout import StoreLayout
from qmix.store.places import Place, Unit, places
from qmix.store.writer import UnitWriter
from qmix.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

# Of one chunk: with the pages at its ends, 8 MiB of bf16 in, 2 MiB of codes out. Rows begin anywhere in a file, and a
# disk with larger blocks reads a block that two requests share twice: with chunks of 4 MiB a third of the rate was
# lost, with 8 MiB a tenth, and 16 MiB take twice the memory.
CHUNK_WEIGHTS = 4 * 2**20 - PAGE
IN_FLIGHT = 7  # chunks, each with a worker: two cores compute while others wait for the disk
WRITTEN_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1, "half": 2}  # per weight, besides its scales

Note = Callable[[], Any]  # run by the one thread that keeps the books, behind a worker's task; may return one more task


@dataclass(frozen=True, slots=True)
class Slot:
    """Memory of one chunk, until the chunk is noted."""

    read: DirectMemory
    written: DirectMemory


Task = Callable[[Slot], Note]


class _Job:
    """One weight on its way into the store."""

    def __init__(self, weight: Weight, place: Place, layout: StoreLayout) -> None:
        self.weight, self.place = weight, place
        name = weight.piece.tensor
        self.quantizer = MatrixQuantizer(place.precision, layout.dtype, weight.rows, weight.cols, name, layout.clip)
        step = _rows_at_once(weight, place, layout)
        self.chunks = [(start, min(start + step, weight.rows)) for start in range(0, weight.rows, step)]
        self.scales: memoryview | None = None
        self.digest = WeightDigest(weight)  # as read
        self._remaining, self._lock = len(self.chunks), threading.Lock()

    def was_last(self) -> bool:
        """Count a quantised chunk, and return whether it was the last."""
        with self._lock:
            self._remaining -= 1
            return self._remaining == 0


def _rows_at_once(weight: Weight, place: Place, layout: StoreLayout) -> int:
    in_place = weight.dtype == "BF16" and place.precision != "half"  # else a wide copy is made on the way
    weights = CHUNK_WEIGHTS if in_place else max(1, CHUNK_WEIGHTS // 2)
    step = chunk_rows(place.precision, weight.rows, weight.cols, weights)
    if weight.piece.interleaved:  # whole heads only: their rows change places among themselves
        step = max(1, step // layout.geometry.head_dim) * layout.geometry.head_dim
    return step


class WeightRun:
    """Copies the weights that a writer lacks from a checkpoint into a store's files."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: UnitWriter,
        layout: StoreLayout,
        on_progress: OnProgress,
    ) -> None:
        self.checkpoint, self.writer, self.layout, self.on_progress = checkpoint, writer, layout, on_progress
        self.places = places(layout)
        self.units = {place.unit.name: place.unit for place in self.places.values()}
        self.total = source_bytes(checkpoint, checkpoint.weights)
        self.done = source_bytes(checkpoint, writer.read)
        weights = [(weight, self.places[weight.key]) for weight in checkpoint.weights.values()]
        chunks = [(w.cols * _rows_at_once(w, place, layout), ITEM_BYTES[w.dtype], place) for w, place in weights]
        read = max(count * item for count, item, _ in chunks)  # bytes
        written = max(math.ceil(count * WRITTEN_BYTES[place.precision]) for count, _, place in chunks)
        memories = DirectMemory.several([read, written] * IN_FLIGHT)
        self.slots = [Slot(*pair) for pair in zip(memories[::2], memories[1::2], strict=True)]

    def run(self) -> None:
        """Read, quantise and write the weights. Raises CheckpointError, HubError and OSError."""
        with ThreadPoolExecutor(IN_FLIGHT, "qmix-quantize") as pool:
            for file in self.checkpoint.files:
                todo = [weight for weight in self.checkpoint.of_file(file) if weight.key not in self.writer.read]
                if not todo:
                    self.checkpoint.source.release(file)  # a run killed just before may have left it
                    continue
                path = self.checkpoint.source.fetch(file, self._fetching(file))
                with WeightFile(path) as source:
                    self._drain(pool, self._chunks(source, todo))
                self.checkpoint.check_unchanged([file])
                self.writer.flush()  # before the shard may go
                self.checkpoint.source.release(file)
            undigested = [unit for name, unit in self.units.items() if name not in self.writer.checksums]
            self._drain(pool, (partial(self._digest, unit) for unit in undigested))
        self.checkpoint.check_unchanged()

    def _fetching(self, file: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            note = f"fetching {file}: {format_bytes(done)} of {format_bytes(total)}"
            self.on_progress(Progress(self.done, self.total, note))

        return report

    def _position(self, weight: Weight) -> tuple[str, int]:
        """Return a weight's file and offset in the store."""
        place = self.places[weight.key]
        return place.unit.file.name, place.parts[0].offset

    def _chunks(self, source: WeightFile, todo: list[Weight]) -> Iterator[Task]:
        for weight in sorted(todo, key=self._position):
            job = _Job(weight, self.places[weight.key], self.layout)
            for start, stop in job.chunks:
                yield partial(self._chunk, source, job, start, stop)

    def _drain(self, pool: ThreadPoolExecutor, tasks: Iterator[Task]) -> None:
        """Run tasks in the workers, and their notes in this thread, in order."""
        running: deque[tuple[Future[Note], Slot]] = deque()
        free, follow_up = list(self.slots), deque[Task]()
        try:
            while True:
                while free:
                    task = follow_up.popleft() if follow_up else next(tasks, None)
                    if task is None:
                        break
                    slot = free.pop()
                    running.append((pool.submit(task, slot), slot))
                if not running:
                    return
                future, slot = running.popleft()
                task = future.result()()
                follow_up += [task] if task is not None else []
                free.append(slot)
                self.writer.flush_if_due()
        finally:
            for future, _ in running:
                future.cancel()
            wait([future for future, _ in running])

    def _chunk(self, source: WeightFile, job: _Job, start: int, stop: int, slot: Slot) -> Note:
        """Read, quantise and write one chunk in the memory of `slot`; runs in a worker."""
        rows = source.rows(job.weight, start, stop, self.layout.geometry.head_dim, slot.read)
        try:
            offset, data = job.quantizer.quantize(rows, start)
        except CheckpointError as error:
            raise CheckpointError(f"{source.path}: {error.message}") from None
        file, offset = job.place.unit.file, job.place.parts[0].offset + offset
        written = copied(data, offset, slot.written)
        del data
        self.writer.write(file, written, offset)
        if job.was_last():
            scales = job.quantizer.scales()
            if scales is not None:
                job.scales = copied(scales, job.place.parts[1].offset)
                self.writer.write(file, job.scales, job.place.parts[1].offset)
        return partial(self._chunk_done, job, rows, written, offset, stop == job.weight.rows)

    def _chunk_done(self, job: _Job, rows: Tensor, written: memoryview, offset: int, last: bool) -> Task | None:
        self.done += rows.nbytes
        job.digest.update(rows)
        self.on_progress(Progress(self.done, self.total))
        unit = job.place.unit
        self.writer.digest_in_passing(unit, written, offset)
        if not last:
            return None
        if job.scales is not None:
            self.writer.digest_in_passing(unit, job.scales, job.place.parts[1].offset)
        read_back = self.writer.weight_written(job.weight.key, job.place, job.digest.hexdigest())
        return partial(self._digest, unit) if read_back else None

    def _digest(self, unit: Unit, slot: Slot) -> Note:
        """Read a finished unit back for its checksum; runs in a worker."""
        return partial(self.writer.unit_digested, unit, self.writer.digest(unit, slot.written))


def source_bytes(checkpoint: Checkpoint, keys: Iterable[str]) -> int:
    """Return the bytes of weights in a checkpoint, by their keys."""
    return sum(checkpoint.weights[key].nbytes for key in keys)


def write_error(error: OSError, directory: Path, layout: StoreLayout) -> StoreError:
    """Return the StoreError for a store that could not be written."""
    if error.errno in FULL:
        return StoreError(
            f"{directory}: the disk is full; the store takes {format_bytes(layout.total_bytes)} in all. "
            "Free some space and run the same command again to continue"
        )
    no_place = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
    if no_place:
        advice = "choose a directory that can be written"
    else:
        advice = f"{disk_advice(error)}; run the same command again to continue"
    return StoreError(f"{error.filename or directory}: {error.strerror}; {advice}")
