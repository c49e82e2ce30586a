"""A store while it is being written: files, journal, checksums, and the rename that finishes it.

Everything happens in `STORE.partial`; a journal there says which weights are safely on the disk. A unit's checksum
is taken of the bytes on their way there where they come in order, and read back where they do not. `write` and
`digest` may be called from any thread, the rest from one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from qmix.checkpoint.naming import expert_key
from qmix.disk import DirectMemory, UncachedFile, require_space
from qmix.errors import CheckpointError, StoreError
from qmix.files import JSON_LIMIT, read_bounded
from qmix.journal import Journal
from qmix.layout import FileLayout, StoreLayout, part_name
from qmix.profile import Profile
from qmix.safetensors_header import TensorInfo
from qmix.store import (
    CONFIG,
    FORMAT_VERSION,
    MANIFEST,
    SMALL_FILES,
    file_digest,
    manifest,
    partial_directory,
    put_profile,
)

JOURNAL = "journal.jsonl"
FLUSH_SECONDS = 2.0  # a killed run repeats at most what it wrote since the last flush


@dataclass(frozen=True, slots=True)
class Unit:
    """What has one checksum: a dense tensor, or an expert record of three weights. Offsets are in `file`.

    `parts` are in the order of their bytes; what lies between and behind them is zero.
    """

    name: str
    file: FileLayout
    offset: int
    nbytes: int
    keys: tuple[str, ...]
    parts: tuple[TensorInfo, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight's parts lie in `unit.file`, and in which precision."""

    unit: Unit
    precision: str
    parts: tuple[TensorInfo, ...]


def places(layout: StoreLayout) -> dict[str, Place]:
    """The place of every weight of the model, by key."""
    return dict(_places(layout))


def _places(layout: StoreLayout) -> Iterator[tuple[str, Place]]:
    for key, info in layout.dense.tensors.items():
        yield key, Place(Unit(key, layout.dense, info.offset, info.nbytes, (key,), (info,)), "half", (info,))
    matrices = layout.geometry.expert_matrices
    for layer in range(layout.geometry.num_layers):
        file = layout.layer(layer)
        for expert in range(layout.geometry.num_experts):
            record = layout.record(layer, expert)
            keys = tuple(expert_key(layer, expert, matrix) for matrix in matrices)
            parts = tuple(file.tensors[part_name(expert, item.matrix, item.part.name)] for item in record.parts)
            unit = Unit(f"{layer}.{expert}", file, layout.record_offset(layer, expert), record.nbytes, keys, parts)
            for matrix, key in zip(matrices, keys, strict=True):
                mine = (part for item, part in zip(record.parts, parts, strict=True) if item.matrix == matrix)
                yield key, Place(unit, record.precision, tuple(mine))


class RunningDigest:
    """The checksum of a unit from its parts' bytes as they come; None if they did not come all and in order."""

    def __init__(self, unit: Unit) -> None:
        self._digest = xxhash.xxh3_64()
        self._position, self._end = unit.offset, unit.offset + unit.nbytes
        self._before: dict[int, int] = {}  # zeros before each part, by its offset
        end = unit.offset
        for part in unit.parts:
            self._before[part.offset], end = part.offset - end, part.offset + part.nbytes
        self._parts_end = end

    def update(self, data: memoryview, offset: int) -> None:
        """Bytes that lie at an offset of the unit's file."""
        padding = self._before.get(offset, 0)
        if offset - padding == self._position:
            self._digest.update(bytes(padding))
            self._digest.update(data)
            self._position = offset + data.nbytes

    def hexdigest(self) -> str | None:
        if self._position != self._parts_end:
            return None
        whole = self._digest.copy()
        whole.update(bytes(self._end - self._position))
        return whole.hexdigest()


class StoreWriter:
    """Opens `STORE.partial`, new or as an earlier run left it; close it in any case.

    `also_needed` is what else will be written, as (path, bytes), when room on the disk is checked. Raises
    StoreError if there is too little, another process writes there, or it was begun for something else.
    """

    def __init__(
        self,
        directory: Path,
        layout: StoreLayout,
        source_name: str,
        fingerprint: str,
        also_needed: Iterable[tuple[Path, int]] = (),
    ) -> None:
        self.directory, self.layout = directory, layout
        self.source_name, self.fingerprint = source_name, fingerprint
        self.partial = partial_directory(directory)
        require_space([(directory, self._space_needed()), *also_needed])
        self.partial.mkdir(parents=True, exist_ok=True)
        subject = {
            "format_version": FORMAT_VERSION,
            "checkpoint": fingerprint,
            "precision": [list(row) for row in layout.precisions],
            "dtype": layout.dtype,
            **({"clip": True} if layout.clip else {}),
        }
        self.journal = Journal(self.partial / JOURNAL, subject, str(directory))
        self._files: dict[str, UncachedFile] = {}
        self._digests: dict[str, RunningDigest] = {}
        try:
            self._open_files()
        except BaseException:
            self._release()
            raise
        self.written = {entry["weight"] for entry in self.journal.entries if "weight" in entry}
        self.checksums = {entry["unit"]: entry["xxh3"] for entry in self.journal.entries if "unit" in entry}
        self._pending: list[dict[str, str]] = []
        self._flusher = ThreadPoolExecutor(1, "qmix-flush")
        self._flushing: Future[None] | None = None
        self._flushed_at = time.monotonic()

    def _open_files(self) -> None:
        for file in self.layout.files:
            path = self.partial / file.name
            if self.journal.entries and not (path.is_file() and path.stat().st_size == file.size):
                raise StoreError(f"{path}: not as an earlier run left it; delete {self.partial} and start again")
            self._files[file.name] = UncachedFile(path, os.O_RDWR | os.O_CREAT)
            os.ftruncate(self._files[file.name].fd, file.size)
            self.write(file, file.header, 0)

    def _release(self) -> None:
        for file in self._files.values():
            file.close()
        self.journal.close()

    def close(self) -> None:
        """Sync and journal what is finished, and let go of the files."""
        try:
            self.flush()
        finally:
            self._flusher.shutdown()
            self._release()

    def write(self, file: FileLayout, data: Any, offset: int) -> None:
        """Put bytes at an offset of a file; past the page cache if they lie in DirectMemory."""
        self._files[file.name].write(data, offset)

    def digest_in_passing(self, unit: Unit, data: memoryview, offset: int) -> None:
        """Note bytes of a unit that are written, in the order of their offsets or else in vain."""
        self._digests.setdefault(unit.name, RunningDigest(unit)).update(data, offset)

    def weight_written(self, key: str, place: Place) -> bool:
        """Note a weight whose parts are all written; says whether it completes a unit that is to be read back."""
        self.written.add(key)
        self._pending.append({"weight": key})
        if not self.written.issuperset(place.unit.keys):
            return False
        running = self._digests.pop(place.unit.name, None)
        checksum = running.hexdigest() if running else None
        if checksum is not None:
            self.unit_digested(place.unit, checksum)
        return checksum is None

    def digest(self, unit: Unit, memory: DirectMemory) -> str:
        """The checksum of a complete unit, read back from its file piece by piece."""
        digest, position, end = xxhash.xxh3_64(), unit.offset, unit.offset + unit.nbytes
        while position < end:
            piece = self._files[unit.file.name].read(memory, position, min(memory.nbytes, end - position))
            digest.update(piece)
            position += piece.nbytes
        return digest.hexdigest()

    def unit_digested(self, unit: Unit, digest: str) -> None:
        self.checksums[unit.name] = digest
        self._pending.append({"unit": unit.name, "xxh3": digest})

    def flush_if_due(self) -> None:
        """Start a flush in the background if the last one is over and long enough ago."""
        if self._flushing is not None and self._flushing.done():
            self._flushing.result()
            self._flushing = None
        if self._flushing is None and time.monotonic() - self._flushed_at > FLUSH_SECONDS and self._pending:
            entries, self._pending = self._pending, []
            self._flushed_at = time.monotonic()
            self._flushing = self._flusher.submit(self._sync, entries)

    def flush(self) -> None:
        """Wait until all that was noted is on the disk and in the journal."""
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            flushing.result()
        entries, self._pending = self._pending, []
        if entries:
            self._sync(entries)

    def finish(self, config: dict[str, Any], tokenizer_files: Iterable[Path], profile: Profile | None = None) -> None:
        """Write the manifest and the model's own small files, and give the store its name."""
        self.flush()
        files = small_files(config, tokenizer_files)
        for name in SMALL_FILES:  # those of an earlier run may be others
            (self.partial / name).unlink(missing_ok=True)
        for name, data in files.items():
            (self.partial / name).write_bytes(data)
        if profile is not None:
            put_profile(self.partial, profile)
        geometry = self.layout.geometry
        records = [
            [self.checksums[f"{layer}.{expert}"] for expert in range(geometry.num_experts)]
            for layer in range(geometry.num_layers)
        ]
        dense = {name: self.checksums[name] for name in geometry.dense_tensors}
        known = {name: file_digest(data) for name, data in files.items()}
        checksums = {"dense": dense, "records": records, "files": known}
        write_manifest(self.partial, manifest(self.layout, self.source_name, self.fingerprint, checksums))
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)  # what passed through on its way into the store
            else:
                _sync_path(path)
        _sync_path(self.partial)
        self.partial.rename(self.directory)
        _sync_path(self.directory.absolute().parent)
        # last, so that a run killed before the rename goes on from it
        (self.directory / JOURNAL).unlink(missing_ok=True)

    def _sync(self, entries: list[dict[str, str]]) -> None:
        for file in self._files.values():
            os.fdatasync(file.fd)
        self.journal.append(entries)

    def _space_needed(self) -> int:
        there = self.partial.glob("*.safetensors") if self.partial.is_dir() else []
        return max(0, self.layout.total_bytes - sum(path.stat().st_blocks * 512 for path in there))


def small_files(config: dict[str, Any], tokenizer_files: Iterable[Path]) -> dict[str, bytes]:
    """Return the small files that a store of this model has, by name. Raises CheckpointError."""
    files = {path.name: read_bounded(path, JSON_LIMIT, CheckpointError, "fetch it again") for path in tokenizer_files}
    return {CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), **files}


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    (directory / MANIFEST).write_bytes((json.dumps(content, indent=1) + "\n").encode())


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
