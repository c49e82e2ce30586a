"""A checkpoint into a store: every matrix read by row chunks, quantised, and written where it belongs.

Worker threads each take a chunk through read, quantise and write, all of it outside the GIL, so that disk and
cores are busy at once and memory holds a few chunks whatever the model's size.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from qmix.checkpoint.reader import Checkpoint, Weight
from qmix.checkpoint.rows import WeightFile
from qmix.errors import CheckpointError, StoreError
from qmix.layout import StoreLayout
from qmix.precision.formats import chunk_rows
from qmix.precision.quantizer import MatrixQuantizer
from qmix.progress import OnProgress, Progress, ignore
from qmix.safetensors_header import ITEM_BYTES
from qmix.store import Store, is_store, open_store
from qmix.store_writer import JOURNAL, Place, StoreWriter, Unit, places
from qmix.units import format_bytes

CHUNK_WEIGHTS = 4 * 2**20  # weights in one chunk: 8 MiB of bf16 in, 2 MiB of codes out
MAX_WORKERS = 8  # each holds a chunk; so many keep up with any disk

Note = Callable[[], Any]  # what a worker leaves to the one thread that keeps the books; may give one more task
Task = Callable[[], Note]


class _Job:
    """One weight on its way into the store."""

    def __init__(self, weight: Weight, place: Place, layout: StoreLayout) -> None:
        self.weight, self.place = weight, place
        name = weight.piece.tensor
        self.quantizer = MatrixQuantizer(place.precision, layout.dtype, weight.rows, weight.cols, name)
        step = chunk_rows(place.precision, weight.rows, weight.cols, CHUNK_WEIGHTS)
        if weight.piece.interleaved:  # whole heads only: their rows change places among themselves
            step = max(1, step // layout.geometry.head_dim) * layout.geometry.head_dim
        self.chunks = [(start, min(start + step, weight.rows)) for start in range(0, weight.rows, step)]
        self.remaining = len(self.chunks)


def quantize(
    checkpoint: Checkpoint,
    directory: Path,
    layout: StoreLayout,
    on_progress: OnProgress = ignore,
) -> Store:
    """Write the store of a checkpoint to `directory`, or go on with one that was begun; returns it opened.

    A finished store of the same weights and precisions is left as it is. Raises CheckpointError, StoreError
    or HubError; what was finished stays in `directory` + ".partial" for the next run.
    """
    if directory.exists() or directory.is_symlink():
        return _existing(checkpoint, directory, layout)
    try:
        downloads = checkpoint.source.space_needed(checkpoint.files)
        name = Path(checkpoint.source.name).absolute().name
        writer = StoreWriter(directory, layout, name, checkpoint.fingerprint, downloads)
        try:
            if directory.exists():  # finished by another process between the look above and the lock
                shutil.rmtree(writer.partial)
                return _existing(checkpoint, directory, layout)
            _Run(checkpoint, writer, layout, on_progress).run()
        finally:
            writer.close()
    except OSError as error:
        raise _os_error(error, directory, layout) from error
    return open_store(directory)


def _existing(checkpoint: Checkpoint, directory: Path, layout: StoreLayout) -> Store:
    if not is_store(directory):
        raise StoreError(f"{directory}: exists and is not a qmix store; choose another name")
    if (directory / JOURNAL).exists():  # a run killed in its very last step leaves it
        (directory / JOURNAL).unlink(missing_ok=True)
    store = open_store(directory)
    if store.fingerprint != checkpoint.fingerprint:
        raise StoreError(f"{directory}: is the store of another model ({store.source_name}); choose another name")
    if (store.layout.precisions, store.layout.dtype) != (layout.precisions, layout.dtype):
        raise StoreError(f"{directory}: is a store of this model in another precision; choose another name")
    return store


def _os_error(error: OSError, directory: Path, layout: StoreLayout) -> StoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"{directory}: the disk is full; the store takes {format_bytes(layout.total_bytes)} in all. "
            "Free some space and run the same command: it goes on where it was"
        )
    no_place = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT)
    advice = "choose a directory that can be written" if no_place else "the same command goes on where it was"
    return StoreError(f"{error.filename or directory}: {error.strerror}; {advice}")


class _Run:
    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: StoreWriter,
        layout: StoreLayout,
        on_progress: OnProgress,
    ) -> None:
        self.checkpoint, self.writer, self.layout, self.on_progress = checkpoint, writer, layout, on_progress
        self.places = places(layout)
        sizes = {key: w.rows * w.cols * ITEM_BYTES[w.dtype] for key, w in checkpoint.weights.items()}
        self.total = sum(sizes.values())
        self.done = sum(sizes[key] for key in writer.written)
        self.workers = min(MAX_WORKERS, max(2, os.cpu_count() or 2))

    def run(self) -> None:
        with ThreadPoolExecutor(self.workers, "qmix-quantize") as pool:
            for file in self.checkpoint.files:
                todo = [weight for weight in self.checkpoint.of_file(file) if weight.key not in self.writer.written]
                if not todo:
                    self.checkpoint.source.release(file)  # a run killed just before may have left it
                    continue
                path = self.checkpoint.source.fetch(file, self._fetching(file))
                with WeightFile(path) as source:
                    self._drain(pool, self._chunks(source, todo))
                self.writer.flush()  # before the shard may go
                self.checkpoint.source.release(file)
            self._drain(pool, (partial(self._digest, unit) for unit in self._undigested()))
        self.writer.finish(self.checkpoint.config, self.checkpoint.tokenizer_files())

    def _fetching(self, file: str) -> Callable[[int, int], None]:
        def report(done: int, total: int) -> None:
            note = f"fetching {file}: {format_bytes(done)} of {format_bytes(total)}"
            self.on_progress(Progress(self.done, self.total, note))

        return report

    def _undigested(self) -> list[Unit]:
        units = {place.unit.name: place.unit for place in self.places.values()}
        return [unit for name, unit in units.items() if name not in self.writer.checksums]

    def _chunks(self, source: WeightFile, todo: list[Weight]) -> Iterator[Task]:
        for weight in todo:
            job = _Job(weight, self.places[weight.key], self.layout)
            for start, stop in job.chunks:
                yield partial(self._chunk, source, job, start, stop)

    def _drain(self, pool: ThreadPoolExecutor, tasks: Iterator[Task]) -> None:
        """Run tasks in the workers, a few in flight, and in this thread what each leaves to be noted."""
        running: set[Future[Note]] = set()
        follow_up: list[Task] = []
        try:
            while True:
                while len(running) < 2 * self.workers:
                    task = follow_up.pop() if follow_up else next(tasks, None)
                    if task is None:
                        break
                    running.add(pool.submit(task))
                if not running:
                    return
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    task = future.result()()
                    follow_up += [task] if task is not None else []
                self.writer.flush_if_due()
        finally:
            for future in running:
                future.cancel()
            wait(running)

    def _chunk(self, source: WeightFile, job: _Job, start: int, stop: int) -> Note:
        """In a worker: one chunk through read, quantise and write."""
        rows = source.rows(job.weight, start, stop, self.layout.geometry.head_dim)
        try:
            offset, data = job.quantizer.quantize(rows, start)
        except CheckpointError as error:
            raise CheckpointError(f"{source.path}: {error}") from None
        self.writer.write(job.place.unit.file, data, job.place.parts[0].offset + offset)
        return partial(self._chunk_done, job, rows.nbytes)

    def _chunk_done(self, job: _Job, nbytes: int) -> Task | None:
        self.done += nbytes
        self.on_progress(Progress(self.done, self.total))
        job.remaining -= 1
        if job.remaining:
            return None
        scales = job.quantizer.scales()
        if scales is not None:
            self.writer.write(job.place.unit.file, scales, job.place.parts[1].offset)
        complete = self.writer.weight_written(job.weight.key, job.place)
        return partial(self._digest, job.place.unit) if complete else None

    def _digest(self, unit: Unit) -> Note:
        """In a worker: the checksum of a finished unit."""
        return partial(self.writer.unit_digested, unit, self.writer.digest(unit))
