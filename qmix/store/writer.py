"""A store while it is being written: files, journal, checksums, and the rename that finishes it.

Everything happens in `STORE.partial`; a journal there lists the weights that are safely on the disk. A unit's checksum
is computed from its bytes as they are written, if they come in order; otherwise the unit is read back. `write` and
`digest` may be called from any thread, all else from one.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qmix.disk.direct import DirectFile, DirectMemory
from qmix.disk.space import require_space
from qmix.errors import StoreError
from qmix.files import sync
from qmix.store.journal import JOURNAL, Entry, Journal, Subject
from qmix.store.layout import FileLayout, StoreLayout
from qmix.store.manifest import FORMAT_VERSION, SMALL_FILES, file_digest, manifest, write_manifest
from qmix.store.opened import partial_directory, put_profile
from qmix.store.places import Place, RunningDigest, Unit, read_digest
from qmix.store.profile import Profile
from qmix.store.small_files import small_files

FLUSH_SECONDS = 2.0  # a killed run repeats at most what it wrote since the last flush


class UnitWriter:
    """Writes weights to their places in a store's files, and keeps the checksums of the units they make up.

    `read` are the digests of the written weights as they were in the checkpoint, by key; `checksums` are those of
    finished units, by name.
    """

    def __init__(self, read: dict[str, str], checksums: dict[str, str]) -> None:
        self.read, self.checksums = read, checksums
        self._files: dict[str, DirectFile] = {}
        self._digests: dict[str, RunningDigest] = {}
        self._pending: list[Entry] = []
        self._flusher = ThreadPoolExecutor(1, "qmix-flush")
        self._flushing: Future[None] | None = None
        self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Sync finished units and close the files."""
        try:
            self.flush()
        finally:
            self._flusher.shutdown()
            self._release()

    def write(self, file: FileLayout, data: Any, offset: int) -> None:
        """Write bytes at an offset of a file; past the page cache if they lie in DirectMemory."""
        self._files[file.name].write(data, offset)

    def digest_in_passing(self, unit: Unit, data: memoryview, offset: int) -> None:
        """Add written bytes of a unit to its running checksum; they count only in the order of their offsets."""
        self._digests.setdefault(unit.name, RunningDigest(unit)).update(data, offset)

    def weight_written(self, key: str, place: Place, read: str) -> bool:
        """Note a weight whose parts are all written, and return whether it completes a unit that must be read back.

        `read` is the digest of the weight as it was in the checkpoint.
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
        """Return the checksum of a complete unit, read back from its file piece by piece."""
        return read_digest(self._files[unit.file.name], unit.offset, unit.nbytes, memory)

    def unit_digested(self, unit: Unit, digest: str) -> None:
        """Note the checksum of a finished unit."""
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
        """Wait until everything noted is on the disk."""
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
    """Writes `STORE.partial`, new or as an earlier run left it; close it in any case.

    `identity` is the checkpoint's. Where an earlier run read a checkpoint of another identity, `still_same` is called
    with the digests of the weights read then, and returns whether the checkpoint still has them. `also_needed` are
    other bytes to be written, as (path, bytes), counted when free space is checked. Where another process writes the
    store, `on_wait` is called and this waits; `superseded` is true if that process finished it. Raises StoreError if
    there is too little space, or the directory was begun for another store.
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
        """Check that an earlier run wrote the same store from the same checkpoint, and begin the journal."""
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
            self._files[file.name] = DirectFile(path, os.O_RDWR | os.O_CREAT)
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
        """Write the manifest and the model's own small files, and rename the directory to the store's name."""
        self.flush()
        files = small_files(config, tokenizer_files)
        for name in SMALL_FILES:  # an earlier run may have left others
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
                shutil.rmtree(path)  # checkpoint files on their way into the store
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
