"""A whole store read at the disk's speed and compared with its checksums: all that is damaged, not the first of it.

Works without what `open_store` asks for: where the config is damaged, the weights' places are taken from the headers of
their files. A part that is wrong, or that the disk fails to read, is read a second time by itself before it is
reported. In memory are a few windows of a file, whatever the store's size.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import xxhash

from qmix.checkpoint.reader import TOKENIZERS
from qmix.checkpoint.safetensors_header import read_header
from qmix.disk import PAGE
from qmix.disk.direct import DirectMemory, UncachedFile
from qmix.disk.files import DirectFile, anonymous_memory
from qmix.disk.reads import PIECE_BYTES, Read, Reader
from qmix.errors import CheckpointError, StoreError
from qmix.files import JSON_LIMIT, read_bounded, read_json
from qmix.progress import OnProgress, Progress, ignore
from qmix.store.layout import DENSE_FILE, FileLayout, StoreLayout, layer_file
from qmix.store.opened import (
    CONFIG,
    EDITABLE,
    MANIFEST,
    PROFILE,
    SMALL_FILES,
    Manifest,
    file_digest,
    layout_of,
    profile_of,
    read_manifest,
)
from qmix.store.writer import places

WINDOW_BYTES = 2 * PIECE_BYTES
WINDOWS = 4  # in memory
MISSING = "missing"
STRANGE = "a file that is not part of the store"


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a weight file that have one checksum; `unit` is as StoreWriter names it."""

    file: str
    unit: str
    what: str
    offset: int
    nbytes: int
    checksum: str | None

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Damage:
    """Something of a store that is not as it was made. `part` is None where it is no part of the weights."""

    file: str
    what: str
    why: str
    part: Part | None = None

    def __str__(self) -> str:
        place = "" if self.part is None else f", bytes {self.part.offset} to {self.part.end - 1}"
        return f"{self.file}: {self.what}{place}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        place = None if self.part is None else [self.part.offset, self.part.end - 1]
        return {"file": self.file, "what": self.what, "bytes": place, "why": self.why}


@dataclass(frozen=True)
class Verification:
    """The result. `parts` were compared, of `nbytes` in all; `unchecked` are files that nothing is known about."""

    directory: Path
    parts: int
    small_files: int
    nbytes: int
    seconds: float
    damages: tuple[Damage, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def is_lost(self) -> bool:
        """Return true if the manifest is damaged: then nothing says what the rest should be."""
        return any(damage.file == MANIFEST for damage in self.damages)

    @property
    def rate(self) -> float:
        """Bytes/s."""
        return self.nbytes / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": "qmix-verify-1",
            "store": str(self.directory),
            "parts": self.parts,
            "small_files": self.small_files,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "bytes_per_second": self.rate,
            "damaged": [damage.to_json() for damage in self.damages],
            "unchecked": list(self.unchecked),
        }


def verify_store(directory: Path, on_progress: OnProgress = ignore, layout: StoreLayout | None = None) -> Verification:
    """Read all of a store; `layout` is for one whose config cannot tell. Raises StoreError where it is no store."""
    started = time.perf_counter()
    if not (directory / MANIFEST).is_file():
        raise StoreError(f"{directory}: not a qmix store ({MANIFEST} is missing); name a store's directory")
    try:
        content, found = read_manifest(directory / MANIFEST)
    except StoreError as error:
        unchecked = tuple(sorted(path.name for path in directory.iterdir() if path.name != MANIFEST))
        damage = Damage(MANIFEST, "the manifest", _reason(error, directory / MANIFEST))
        return Verification(directory, 0, 0, 0, time.perf_counter() - started, (damage,), unchecked)
    damages, small = _small_files(directory, content, found)
    if layout is None and all(damage.file != CONFIG for damage in damages):
        try:
            layout = layout_of(directory, found, read_json(directory / CONFIG, dict[str, Any], StoreError, ""))
            damages += _profile(directory, layout, content)
        except StoreError as error:
            damages.append(Damage(MANIFEST, "the manifest", _reason(error, directory / MANIFEST)))
    of_files, parts, unchecked = _weight_files(directory, found, layout)
    damages += of_files + list(_compare(directory, parts, on_progress))
    nbytes = sum(part.nbytes for part in parts)
    seconds = time.perf_counter() - started
    return Verification(directory, len(parts), small, nbytes, seconds, tuple(damages), unchecked)


def _small_files(directory: Path, content: dict[str, Any], found: Manifest) -> tuple[list[Damage], int]:
    """Compare what the manifest knows of small files, and count them; people may edit some."""
    if content["format_version"] == 1:
        known = {CONFIG: content["checksums"].get("config")}
    else:
        known = dict(found.checksums.files)
    damages = []
    for name, want in known.items():
        path = directory / name
        try:
            data = read_bounded(path, JSON_LIMIT, StoreError, "")
        except StoreError as error:
            if path.exists() or name not in EDITABLE:
                damages.append(Damage(name, "the file", _reason(error, path)))
            continue
        if small_digest(content, data) != want and name not in EDITABLE:
            damages.append(Damage(name, "the file", "changed since the store was made"))
    if content["format_version"] != 1 and not known.keys().isdisjoint(TOKENIZERS):
        beside = [name for name in SMALL_FILES if name not in known and name not in EDITABLE]
        why = "not there when the store was made"
        damages += [Damage(name, STRANGE, why) for name in beside if (directory / name).exists()]
    return damages, len(known)


def small_digest(content: dict[str, Any], data: bytes) -> str:
    """Return the checksum by which a manifest of this content knows a small file."""
    return xxhash.xxh3_64_hexdigest(data) if content["format_version"] == 1 else file_digest(data)


def _profile(directory: Path, layout: StoreLayout, content: dict[str, Any]) -> list[Damage]:
    path = directory / PROFILE
    try:
        profile_of(path, layout.geometry, content["source"]["fingerprint"], content["format_version"])
    except StoreError as error:
        return [Damage(PROFILE, "the profile", _reason(error, path))]
    return []


def _weight_files(
    directory: Path, found: Manifest, layout: StoreLayout | None
) -> tuple[list[Damage], list[Part], tuple[str, ...]]:
    """Return what is wrong with the files as such, the parts to be compared, and files whose parts are not known."""
    damages: list[Damage] = []
    parts = [] if layout is None else parts_of(layout, found)
    unchecked: list[str] = []
    known = {} if layout is None else {file.name: file for file in layout.files}
    for index, name in enumerate([DENSE_FILE, *map(layer_file, range(len(found.precisions)))]):
        if not (directory / name).is_file():
            damages.append(Damage(name, "the file", MISSING))
        elif layout is not None:
            damages += _outside(directory / name, known[name])
        else:
            try:
                parts += _parts_by_header(directory / name, None if index == 0 else index - 1, found)
            except CheckpointError as error:
                damages.append(Damage(name, "the header", _reason(error, directory / name)))
                unchecked.append(name)
    return damages, parts, tuple(unchecked)


def _outside(path: Path, layout: FileLayout) -> list[Damage]:
    """Return what is wrong with a file's length and header."""
    damages = []
    size = path.stat().st_size
    if size != layout.size:
        damages.append(Damage(path.name, "the length", f"{size} bytes, {layout.size} expected"))
    length = len(layout.header)
    header = Part(path.name, "", "the header", 0, length, xxhash.xxh3_64_hexdigest(layout.header))
    why = recheck(path, header)
    return damages if why is None else [*damages, Damage(path.name, header.what, why, header)]


def parts_of(layout: StoreLayout, found: Manifest) -> list[Part]:
    units = {place.unit.name: place.unit for place in places(layout).values()}
    return [_part(unit.file.name, name, unit.offset, unit.nbytes, found) for name, unit in units.items()]


def _part(file: str, unit: str, offset: int, nbytes: int, found: Manifest) -> Part:
    if file == DENSE_FILE:
        return Part(file, unit, f"the tensor {unit}", offset, nbytes, found.checksums.dense.get(unit))
    layer, expert = map(int, unit.split("."))
    checksum = found.checksums.records[layer][expert]
    return Part(file, unit, f"the record of expert {expert}", offset, nbytes, checksum)


def _parts_by_header(path: Path, layer: int | None, found: Manifest) -> list[Part]:
    """The parts of a file as its own header has them. Raises CheckpointError where that cannot be used."""
    tensors = read_header(path)
    if layer is None:
        dense = (tensors[name] for name in found.checksums.dense if name in tensors)
        return [_part(path.name, each.name, each.offset, each.nbytes, found) for each in dense]
    starts: dict[int, int] = {}
    for tensor in tensors.values():
        _, expert, *_ = [*tensor.name.split("."), ""]
        if expert.isdecimal() and not tensor.name.startswith("__pad__"):
            starts[int(expert)] = min(tensor.offset, starts.get(int(expert), tensor.offset))
    checksums = dict(enumerate(found.checksums.records)).get(layer, ())
    ends = [*sorted(starts.values()), path.stat().st_size]
    return [
        _part(path.name, f"{layer}.{expert}", start, ends[ends.index(start) + 1] - start, found)
        for expert, start in starts.items()
        if expert < len(checksums)
    ]


def _compare(directory: Path, parts: list[Part], on_progress: OnProgress) -> Iterator[Damage]:
    """Read all parts, the wrong ones twice."""
    there = [part for part in parts if (directory / part.file).is_file()]
    done, total = 0, sum(part.nbytes for part in there)
    for part, well in _swept(directory, sorted(there, key=lambda part: (part.file, part.offset))):
        if not well and (why := recheck(directory / part.file, part)) is not None:
            yield Damage(part.file, part.what, why, part)
        done += part.nbytes
        on_progress(Progress(done, total))


def recheck(path: Path, part: Part) -> str | None:
    """Read one part by itself, past the caches, and return what is wrong with it."""
    digest, position, memory = xxhash.xxh3_64(), part.offset, DirectMemory(min(part.nbytes, PIECE_BYTES))
    try:
        file = UncachedFile(path, os.O_RDONLY)
        with closing(file):
            while position < part.end:
                digest.update(file.read(memory, position, min(PIECE_BYTES, part.end - position)))
                position = min(part.end, position + PIECE_BYTES)
    except OSError as error:
        return error.strerror or str(error)
    except EOFError as error:
        return f"cut short, the file {error}"
    return None if digest.hexdigest() == part.checksum else "wrong checksum"


def _swept(directory: Path, parts: list[Part]) -> Iterator[tuple[Part, bool]]:
    """Say of each part, in order of file and offset, whether it was read and is right."""
    with ExitStack() as stack:
        reader = stack.enter_context(closing(Reader()))
        files = {name: stack.enter_context(DirectFile(directory / name)) for name in {part.file for part in parts}}
        windows = _read(reader, _windows(directory, parts, files))
        by_file = {name: iter(list(mine)) for name, mine in groupby(parts, key=lambda part: part.file)}
        for name, mine in groupby(windows, key=lambda window: window[0].path.name):
            yield from _digested(mine, by_file.pop(name))
        for left in by_file.values():
            yield from ((part, False) for part in left)


Window = tuple[DirectFile, int, int]  # file, offset, bytes


def _windows(directory: Path, parts: Iterable[Part], files: dict[str, DirectFile]) -> Iterator[Window]:
    """Whole pages that hold the parts; what lies in a last page that is cut short is not among them."""
    for name, mine in groupby(parts, key=lambda part: part.file):
        of_file = list(mine)
        end = min(max(part.end for part in of_file) + PAGE - 1, (directory / name).stat().st_size) // PAGE * PAGE
        for offset in range(of_file[0].offset // PAGE * PAGE, end, WINDOW_BYTES):
            yield files[name], offset, min(WINDOW_BYTES, end - offset)


def _read(reader: Reader, windows: Iterator[Window]) -> Iterator[tuple[DirectFile, int, int, memoryview | None]]:
    """Each window with its bytes, good until the next is asked for; None where they could not be read."""
    free = deque(anonymous_memory(WINDOWS * WINDOW_BYTES).split(WINDOW_BYTES))
    reading: deque[tuple[Window, torch.Tensor, Read]] = deque()
    while True:
        while free and (window := next(windows, None)) is not None:
            file, offset, nbytes = window
            memory = free.popleft()
            read = Read(file, memory[:nbytes], offset, lambda whole: None)
            reading.append((window, memory, reader.submit(read)))
        if not reading:
            return
        window, memory, read = reading.popleft()
        yield (*window, None if read.done.exception() else read.view)
        free.append(memory)


def _digested(
    windows: Iterable[tuple[DirectFile, int, int, memoryview | None]], parts: Iterator[Part]
) -> Iterator[tuple[Part, bool]]:
    """Compare a file's parts with its windows, both in order."""
    part, digest, well = next(parts, None), xxhash.xxh3_64(), True
    for _, offset, nbytes, data in windows:
        while part is not None and part.offset < offset + nbytes:
            if data is None:
                well = False
            else:
                digest.update(data[max(0, part.offset - offset) : part.end - offset])
            if part.end > offset + nbytes:
                break
            yield part, well and digest.hexdigest() == part.checksum
            part, digest, well = next(parts, None), xxhash.xxh3_64(), True
    while part is not None:
        yield part, False
        part = next(parts, None)


def _reason(error: Exception, path: Path) -> str:
    """An error's message without the file's name before it and the advice behind."""
    return str(error).removeprefix(f"{path}: ").split(";")[0]
