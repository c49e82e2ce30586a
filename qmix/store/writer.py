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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from qmix.checkpoint.naming import expert_key
from qmix.checkpoint.reader import TOKENIZERS, Checkpoint
from qmix.checkpoint.safetensors_header import TensorInfo
from qmix.disk.direct import DirectMemory, UncachedFile
from qmix.disk.space import require_space
from qmix.errors import CheckpointError, StoreError
from qmix.files import JSON_LIMIT, read_bounded, sync, write_whole
from qmix.store.journal import Entry, Journal, Subject
from qmix.store.layout import FileLayout, StoreLayout, part_name
from qmix.store.opened import (
    CONFIG,
    EDITABLE,
    FORMAT_VERSION,
    MANIFEST,
    SMALL_FILES,
    Store,
    file_digest,
    manifest,
    open_store,
    partial_directory,
    put_profile,
    read_manifest,
    sealed,
)
from qmix.store.profile import Profile

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

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


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


class UnitWriter:
    """Writes weights where they belong in a store's files, and knows the checksums of the units they make up.

    `read` has the digests of the weights that are written, as the checkpoint has them, by key; `checksums` are those of
    finished units.
    """

    def __init__(self, read: dict[str, str], checksums: dict[str, str]) -> None:
        self.read, self.checksums = read, checksums
        self._files: dict[str, UncachedFile] = {}
        self._digests: dict[str, RunningDigest] = {}
        self._pending: list[Entry] = []
        self._flusher = ThreadPoolExecutor(1, "qmix-flush")
        self._flushing: Future[None] | None = None
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Sync what is finished, and let go of the files."""
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

    def weight_written(self, key: str, place: Place, read: str) -> bool:
        """Note a weight whose parts are all written; says whether it completes a unit that is to be read back.

        `read` is the digest of the weight as the checkpoint has it.
        """
        self.read[key] = read
        self._pending.append(Entry(weight=key, read=read))
        if not self.read.keys() >= set(place.unit.keys):
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
        self._pending.append(Entry(unit=unit.name, xxh3=digest))

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
        """Wait until all that was noted is on the disk."""
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            flushing.result()
        entries, self._pending = self._pending, []
        if entries:
            self._sync(entries)

    def _sync(self, entries: list[Entry]) -> None:
        for file in self._files.values():
            os.fdatasync(file.fd)

    def _release(self) -> None:
        for file in self._files.values():
            file.close()


class StoreWriter(UnitWriter):
    """Opens `STORE.partial`, new or as an earlier run left it; close it in any case.

    `identity` is the checkpoint's. `still_same` is asked about weights that were noted under another one, with the
    digests of what was read then: it says whether the checkpoint still has them. `also_needed` is what else will be
    written, as (path, bytes), when room on the disk is checked. Where another process writes there, `on_wait` is called
    and this waits; `superseded` says that it finished. Raises StoreError if there is too little room, or it was begun
    for something else.
    """

    def __init__(
        self,
        directory: Path,
        layout: StoreLayout,
        source_name: str,
        identity: str,
        also_needed: Iterable[tuple[Path, int]] = (),
        still_same: Callable[[Mapping[str, str]], bool] = lambda read: False,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory, self.layout, self.source_name = directory, layout, source_name
        self.partial = partial_directory(directory)
        require_space([(directory, self._space_needed()), *also_needed])
        self.partial.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(self.partial / JOURNAL, on_wait)
        self.superseded = not self.journal.is_current
        noted = self.journal.entries
        read = {entry.weight: entry.read or "" for entry in noted if entry.weight is not None}
        super().__init__(read, {entry.unit: entry.xxh3 or "" for entry in noted if entry.unit is not None})
        try:
            if not self.superseded:
                self._begin(identity, still_same)
                self._open_files()
        except BaseException:
            self._release()
            raise

    def _begin(self, identity: str, still_same: Callable[[Mapping[str, str]], bool]) -> None:
        """Check that what an earlier run noted is of this store and checkpoint, and note what this one writes."""
        layout = self.layout
        subject = Subject(FORMAT_VERSION, layout.precisions, layout.dtype, layout.clip)
        noted = self.journal.entries
        if not noted or noted[0].subject is None:
            self.read, self.checksums = {}, {}
            self.journal.append([Entry(subject=subject), Entry(checkpoint=identity)])
            return
        before = [entry.checkpoint for entry in noted if entry.checkpoint is not None]
        same = before[-1:] == [identity] or not self.read or still_same(self.read)
        differs = [] if same else ["checkpoint"]
        differs += [
            name for name in subject.__struct_fields__ if getattr(subject, name) != getattr(noted[0].subject, name)
        ]
        if differs:
            other = ", ".join(differs)
            raise StoreError(
                f"{self.partial}: started with another {other}; delete that directory, or choose another name"
            )
        if before[-1:] != [identity]:
            self.journal.append([Entry(checkpoint=identity)])

    def _open_files(self) -> None:
        for file in self.layout.files:
            path = self.partial / file.name
            if (self.read or self.checksums) and not (path.is_file() and path.stat().st_size == file.size):
                raise StoreError(f"{path}: changed since it was written; delete {self.partial} and start again")
            self._files[file.name] = UncachedFile(path, os.O_RDWR | os.O_CREAT)
            os.ftruncate(self._files[file.name].fd, file.size)
            self.write(file, file.header, 0)

    def _release(self) -> None:
        super()._release()
        self.journal.close()

    def finish(
        self,
        config: dict[str, Any],
        tokenizer_files: Iterable[Path],
        fingerprint: str,
        profile: Profile | None = None,
    ) -> None:
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
        write_manifest(self.partial, manifest(self.layout, self.source_name, fingerprint, checksums))
        for path in self.partial.iterdir():
            if path.is_dir():
                shutil.rmtree(path)  # what passed through on its way into the store
            else:
                sync(path)
        sync(self.partial)
        self.partial.rename(self.directory)
        sync(self.directory.absolute().parent)
        # last, so that a run killed before the rename goes on from it
        (self.directory / JOURNAL).unlink(missing_ok=True)

    def _sync(self, entries: list[Entry]) -> None:
        super()._sync(entries)
        self.journal.append(entries)

    def _space_needed(self) -> int:
        there = self.partial.glob("*.safetensors") if self.partial.is_dir() else []
        return max(0, self.layout.total_bytes - sum(path.stat().st_blocks * 512 for path in there))


def small_files(config: dict[str, Any], tokenizer_files: Iterable[Path]) -> dict[str, bytes]:
    """Return the small files that a store of this model has, by name. Raises CheckpointError."""
    files = {path.name: read_bounded(path, JSON_LIMIT, CheckpointError, "fetch it again") for path in tokenizer_files}
    return {CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), **files}


def bring_small_files(checkpoint: Checkpoint, fingerprint: str, directory: Path) -> Store:
    """Give a finished store the small files that its checkpoint has now, and return it opened.

    What may be edited in a store stays as it is there, unless the checkpoint's own has changed. `fingerprint` is the
    checkpoint's: the store of another is left alone. Raises StoreError.
    """
    content, found = read_manifest(directory / MANIFEST)
    known = dict(found.checksums.files)
    if found.source.fingerprint == fingerprint and known:
        files = small_files(checkpoint.config, checkpoint.tokenizer_files())
        given = known.keys().isdisjoint(TOKENIZERS)  # the store's user may have given it a tokenizer
        for name in SMALL_FILES:
            path, data = directory / name, files.get(name)
            theirs = None if data is None else file_digest(data)
            if theirs == known.get(name) and (name in EDITABLE or (given and data is None)):
                continue
            _replace(path, data)
            known = {**known, name: theirs} if theirs else {each: known[each] for each in known if each != name}
        if known != found.checksums.files:
            content["checksums"]["files"] = known
            write_whole(directory / MANIFEST, _manifest_bytes(sealed(content)))
    return open_store(directory)


def _replace(path: Path, data: bytes | None) -> None:
    """Let a file hold `data`, or not be there."""
    if data is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    (directory / MANIFEST).write_bytes(_manifest_bytes(content))


def _manifest_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
