"""A checkpoint into a store: every matrix read by row chunks, quantised, and written where it belongs.

Worker threads each take a chunk through read, quantise and write, all of it outside the GIL and past the page cache.
There are more of them than cores, so that the disk has requests waiting while the cores are busy; memory holds the
few chunks on their way, whatever the model's size. Chunks are taken and noted in the order that their bytes have in
the store, so that a record's checksum is had in passing.
"""

from __future__ import annotations

import errno
import math
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmix.checkpoint.fingerprint import WeightDigest, fingerprint_of, read_fingerprint, weight_digests
from qmix.checkpoint.reader import Checkpoint, Weight
from qmix.checkpoint.rows import WeightFile
from qmix.checkpoint.safetensors_header import ITEM_BYTES
from qmix.disk.direct import DirectMemory, copied
from qmix.disk.faults import FULL, disk_advice
from qmix.errors import CheckpointError, StoreError, arg
from qmix.precision.formats import chunk_rows
from qmix.precision.quantizer import MatrixQuantizer
from qmix.progress import OnProgress, Progress, counted, ignore
from qmix.store.layout import StoreLayout
from qmix.store.opened import Store, is_store, open_store, put_origin, put_profile
from qmix.store.profile import Profile
from qmix.store.writer import JOURNAL, Place, StoreWriter, Unit, UnitWriter, bring_small_files, places
from qmix.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

# At once: with the pages at its ends, 8 MiB of bf16 in, 2 MiB of codes out. Rows begin anywhere in a file, and disks
# made of larger blocks read those at both ends of a request for each of the two that meet there: with 4 MiB a third of
# the rate was lost, with 8 MiB a tenth, and 16 MiB take twice the memory.
CHUNK_WEIGHTS = 4 * 2**20 - 4096
IN_FLIGHT = 7  # chunks, each with a worker: two cores compute while others wait for the disk
WRITTEN_BYTES = {"nf4": 0.5, "fp4": 0.5, "int8": 1, "half": 2}  # of a weight, besides its scales

Note = Callable[[], Any]  # what a worker leaves to the one thread that keeps the books; may give one more task


@dataclass(frozen=True, slots=True)
class Slot:
    """Memory of one chunk, from its reading until it is noted."""

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
        self.digest = WeightDigest(weight)  # of what is read
        self._remaining, self._lock = len(self.chunks), threading.Lock()

    def was_last(self) -> bool:
        """Count a chunk that is quantised; says whether it was the last."""
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


def quantize(
    checkpoint: Checkpoint,
    directory: Path,
    layout: StoreLayout,
    on_progress: OnProgress = ignore,
    profile: Profile | None = None,
) -> Store:
    """Write the store of a checkpoint to `directory`, or go on with one that was begun; returns it opened.

    Where another process writes it, this waits, and goes on from what that one leaves. A finished store of the same
    weights and precisions is left as it is, but for the `profile` that it is to carry, and for small files that are not
    the checkpoint's. Raises CheckpointError, StoreError or HubError; what was finished stays in `directory` +
    ".partial" for the next run.
    """
    while not (directory.exists() or directory.is_symlink()):
        try:
            with closing(_writer(checkpoint, directory, layout, on_progress)) as writer:
                if writer.superseded:
                    continue
                if directory.exists():  # finished by another process between the look above and the lock
                    shutil.rmtree(writer.partial)
                    break
                WeightRun(checkpoint, writer, layout, on_progress).run()
                put_origin(writer.partial, checkpoint.source.location)
                fingerprint = _fingerprint(checkpoint, writer.read)
                writer.finish(checkpoint.config, checkpoint.tokenizer_files(), fingerprint, profile)
        except OSError as error:
            raise write_error(error, directory, layout) from error
        return open_store(directory)
    return _existing(checkpoint, directory, layout, profile, on_progress)


def _writer(checkpoint: Checkpoint, directory: Path, layout: StoreLayout, on_progress: OnProgress) -> StoreWriter:
    total = _size(checkpoint, checkpoint.weights)

    def still_same(read: Mapping[str, str]) -> bool:
        """Read again what was read by a run that found other files, or the same ones elsewhere."""
        known = [key for key in read if key in checkpoint.weights]
        note = "comparing with what an earlier run read"
        return weight_digests(checkpoint, known, counted(_size(checkpoint, known), on_progress, note)) == read

    return StoreWriter(
        directory,
        layout,
        Path(checkpoint.source.name).absolute().name,
        checkpoint.identity,
        checkpoint.source.space_needed(checkpoint.files),
        still_same,
        lambda: on_progress(Progress(0, total, f"waiting for another qmix process that is writing {directory}")),
    )


def _size(checkpoint: Checkpoint, keys: Iterable[str]) -> int:
    return sum(checkpoint.weights[key].nbytes for key in keys)


def _existing(
    checkpoint: Checkpoint, directory: Path, layout: StoreLayout, profile: Profile | None, on_progress: OnProgress
) -> Store:
    if not is_store(directory):
        raise StoreError(f"{directory}: exists and is not a qmix store; choose another name")
    if (directory / JOURNAL).exists():  # a run killed in its very last step leaves it
        (directory / JOURNAL).unlink(missing_ok=True)
    note = f"comparing with the weights that {directory} was made from"
    compared = counted(_size(checkpoint, checkpoint.weights), on_progress, note)
    fingerprint = checkpoint.known_fingerprint or read_fingerprint(checkpoint, compared)
    store = bring_small_files(checkpoint, fingerprint, directory)
    if store.fingerprint != fingerprint and not store.small_files:
        raise StoreError(
            f"{directory}: made by an earlier version of qmix, or from another model; choose another name, or delete it"
        )
    if store.fingerprint != fingerprint:
        raise StoreError(f"{directory}: is the store of another model ({store.source_name}); choose another name")
    if (store.layout.precisions, store.layout.dtype) != (layout.precisions, layout.dtype):
        raise StoreError(f"{directory}: is a store of this model in another precision; choose another name")
    if store.layout.clip != layout.clip:
        made = f"made {'with' if store.layout.clip else 'without'} {arg('clip')}"
        raise StoreError(f"{directory}: is a store of this model {made}; choose another name")
    if profile is not None and profile != store.profile:
        put_profile(directory, profile)
        store = replace(store, profile=profile)
    return store


def write_error(error: OSError, directory: Path, layout: StoreLayout) -> StoreError:
    """Return what to tell of a store that could not be written."""
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


def _fingerprint(checkpoint: Checkpoint, read: Mapping[str, str]) -> str:
    """The checkpoint's, from all that was read, by earlier runs too."""
    known = checkpoint.known_fingerprint
    if checkpoint.source.fingerprint(checkpoint.files):
        assert known is not None
        return known
    found = fingerprint_of(checkpoint.config, read)
    checkpoint.source.remember(checkpoint.identity, found)
    return found


class WeightRun:
    """Brings the weights that a writer lacks from a checkpoint into a store's files."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: UnitWriter,
        layout: StoreLayout,
        on_progress: OnProgress,
    ) -> None:
        self.checkpoint, self.writer, self.layout, self.on_progress = checkpoint, writer, layout, on_progress
        self.places = places(layout)
        self.total = _size(checkpoint, checkpoint.weights)
        self.done = _size(checkpoint, writer.read)
        weights = [(weight, self.places[weight.key]) for weight in checkpoint.weights.values()]
        chunks = [(w.cols * _rows_at_once(w, place, layout), ITEM_BYTES[w.dtype], place) for w, place in weights]
        read = max(count * item for count, item, _ in chunks)  # bytes
        written = max(math.ceil(count * WRITTEN_BYTES[place.precision]) for count, _, place in chunks)
        memories = DirectMemory.several([read, written] * IN_FLIGHT)
        self.slots = [Slot(*pair) for pair in zip(memories[::2], memories[1::2], strict=True)]

    def run(self) -> None:
        """Read, quantise and write them. Raises CheckpointError, HubError and OSError."""
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
            self._drain(pool, (partial(self._digest, unit) for unit in self._undigested()))
        self.checkpoint.check_unchanged()

    def _fetching(self, file: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            note = f"fetching {file}: {format_bytes(done)} of {format_bytes(total)}"
            self.on_progress(Progress(self.done, self.total, note))

        return report

    def _undigested(self) -> list[Unit]:
        units = {place.unit.name: place.unit for place in self.places.values()}
        return [unit for name, unit in units.items() if name not in self.writer.checksums]

    def _position(self, weight: Weight) -> tuple[str, int]:
        """Where a weight lies in the store."""
        place = self.places[weight.key]
        return place.unit.file.name, place.parts[0].offset

    def _chunks(self, source: WeightFile, todo: list[Weight]) -> Iterator[Task]:
        for weight in sorted(todo, key=self._position):
            job = _Job(weight, self.places[weight.key], self.layout)
            for start, stop in job.chunks:
                yield partial(self._chunk, source, job, start, stop)

    def _drain(self, pool: ThreadPoolExecutor, tasks: Iterator[Task]) -> None:
        """Run tasks in the workers, and in this thread, in order, what each leaves to be noted."""
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
        """In a worker: one chunk through read, quantise and write, in the memory of `slot`."""
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
        """In a worker: the checksum of a finished unit."""
        return partial(self.writer.unit_digested, unit, self.writer.digest(unit, slot.written))
