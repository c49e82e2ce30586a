"""The parts of a store's weight files that have checksums, read at the disk's speed and compared.

A few windows of a file are in memory, whatever the store's size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import xxhash

from qmix.checkpoint.safetensors_header import read_header
from qmix.disk import PAGE
from qmix.disk.direct import DirectFile, DirectMemory, huge_pages
from qmix.disk.reads import PIECE_BYTES, Read, Reader
from qmix.store.file import StoreFile
from qmix.store.layout import DENSE_FILE, StoreLayout
from qmix.store.manifest import Manifest
from qmix.store.places import read_digest, units_of

WINDOW_BYTES = 2 * PIECE_BYTES
WINDOWS = 4  # in memory


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of a weight file with one checksum; `unit` is the name of their Unit."""

    file: str
    unit: str
    what: str
    offset: int
    nbytes: int
    checksum: str | None

    @property
    def end(self) -> int:
        """Return the offset behind the last byte."""
        return self.offset + self.nbytes


def parts_of(layout: StoreLayout, found: Manifest) -> list[Part]:
    """Return all parts of a store's weight files."""
    return [_part(unit.file.name, name, unit.offset, unit.nbytes, found) for name, unit in units_of(layout).items()]


def parts_by_header(path: Path, layer: int | None, found: Manifest) -> list[Part]:
    """Return the parts of one file by its own header; `layer` is None for the dense weights.

    Raises CheckpointError where the header cannot be used.
    """
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


def _part(file: str, unit: str, offset: int, nbytes: int, found: Manifest) -> Part:
    if file == DENSE_FILE:
        return Part(file, unit, f"the tensor {unit}", offset, nbytes, found.checksums.dense.get(unit))
    layer, expert = map(int, unit.split("."))
    checksum = found.checksums.records[layer][expert]
    return Part(file, unit, f"the record of expert {expert}", offset, nbytes, checksum)


def recheck(path: Path, part: Part) -> str | None:
    """Read one part by itself, past the caches, and return what is wrong with it."""
    memory = DirectMemory(min(part.nbytes, PIECE_BYTES))
    try:
        with DirectFile(path) as file:
            found = read_digest(file, part.offset, part.nbytes, memory)
    except OSError as error:
        return error.strerror or str(error)
    except EOFError as error:
        return f"cut short, the file {error}"
    return None if found == part.checksum else "wrong checksum"


def sweep(directory: Path, parts: list[Part]) -> Iterator[tuple[Part, bool]]:
    """Read all parts, and yield each with whether it was read and is right; by file and offset."""
    parts = sorted(parts, key=lambda part: (part.file, part.offset))
    with ExitStack() as stack:
        reader = stack.enter_context(closing(Reader()))
        files = {name: stack.enter_context(StoreFile(directory / name)) for name in {part.file for part in parts}}
        windows = _read(reader, _windows(directory, parts, files))
        by_file = {name: iter(list(mine)) for name, mine in groupby(parts, key=lambda part: part.file)}
        for name, mine in groupby(windows, key=lambda window: window[0].path.name):
            yield from _compared(mine, by_file.pop(name))
        for left in by_file.values():
            yield from ((part, False) for part in left)


Window = tuple[DirectFile, int, int]  # file, offset, bytes
ReadWindow = tuple[DirectFile, int, int, memoryview | None]


def _windows(directory: Path, parts: Iterable[Part], files: dict[str, DirectFile]) -> Iterator[Window]:
    """Yield whole pages that hold the parts; a last page that is cut short is left out."""
    for name, mine in groupby(parts, key=lambda part: part.file):
        of_file = list(mine)
        end = min(max(part.end for part in of_file) + PAGE - 1, (directory / name).stat().st_size) // PAGE * PAGE
        for offset in range(of_file[0].offset // PAGE * PAGE, end, WINDOW_BYTES):
            yield files[name], offset, min(WINDOW_BYTES, end - offset)


def _read(reader: Reader, windows: Iterator[Window]) -> Iterator[ReadWindow]:
    """Yield each window with its bytes, valid until the next one; None where they could not be read."""
    memory = huge_pages(WINDOWS * WINDOW_BYTES, populate=True)
    free = deque(memory[start : start + WINDOW_BYTES] for start in range(0, len(memory), WINDOW_BYTES))
    reading: deque[tuple[Window, memoryview, Read]] = deque()
    while True:
        while free and (window := next(windows, None)) is not None:
            file, offset, nbytes = window
            buffer = free.popleft()
            reading.append((window, buffer, reader.submit(Read(file, buffer[:nbytes], offset))))
        if not reading:
            return
        window, buffer, read = reading.popleft()
        yield (*window, None if read.done.exception() else read.view)
        free.append(buffer)


def _compared(windows: Iterable[ReadWindow], parts: Iterator[Part]) -> Iterator[tuple[Part, bool]]:
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
