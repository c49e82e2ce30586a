"""A file of requests, checked line by line before anything is computed. Loads no torch.

An invalid line is an error of the file: nothing is run. A valid request that cannot be answered gets an error line
among the answers: a field that is not supported is found here, and what depends on the model (a prompt that is too long
for it) later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from qmix.batch.request import Line, LineError, parse_line
from qmix.batch.shards import Shard
from qmix.errors import UsageError
from qmix.files import TEXT_LIMIT

LINE_LIMIT = TEXT_LIMIT  # bytes of a line
TOLD = 20  # problems and model names that are kept; more are only counted
ENTRY_BYTES = 600  # bytes that a line takes in memory besides its id


@dataclass(frozen=True, slots=True)
class Entry:
    """The place of a line in the input: its number, from 1, and its bytes."""

    number: int
    id: str
    offset: int
    size: int


class Requests:
    """The lines of a seekable binary file. Only the place and the id of each line are kept in memory.

    `problems` are messages about the first invalid lines, `bad` is the number of invalid lines. `digest` is the sha256
    of the file, `models` are the models that lines ask for, and `has_system` is true where a line has a system message.
    With a `shard`, all lines are checked and only its own are kept; `count` are the valid lines of the whole file.
    Where the file is a part of another one, `digest` is the sha256 of that.
    """

    def __init__(self, file: BinaryIO, shard: Shard | None = None, digest: str = "") -> None:
        self._file, self.shard = file, shard
        self.count = 0
        self.entries: list[Entry] = []
        self.problems: list[str] = []
        self.bad = 0
        self.models: set[str] = set()
        self.has_system = False
        content, seen = hashlib.sha256(), dict[str, int]()
        for number, offset, raw in _lines(file):
            content.update(raw)
            if raw.strip():
                self._check(Entry(number, "", offset, len(raw)), raw, seen)
        self.digest = digest or content.hexdigest()

    @property
    def held(self) -> int:
        """Return the bytes that the lines take in memory."""
        return sum(ENTRY_BYTES + len(entry.id) for entry in self.entries)

    def line(self, entry: Entry) -> Line:
        """Return the request of a line."""
        self._file.seek(entry.offset)
        try:
            return parse_line(self._file.read(entry.size), unique=False)  # checked before
        except LineError as error:
            raise UsageError(f"line {entry.number}: {error}; the input changed during the run, run it again") from None

    def _check(self, entry: Entry, raw: bytes, seen: dict[str, int]) -> None:
        try:
            if entry.size > LINE_LIMIT:
                raise LineError(f"longer than {LINE_LIMIT} bytes; shorten it (the lines after it were not checked)")
            line = parse_line(raw)
            if (first := seen.setdefault(line.id, entry.number)) != entry.number:
                raise LineError(f"duplicate id {line.id!r} (first on line {first})")
        except LineError as error:
            self.bad += 1
            if len(self.problems) < TOLD:
                self.problems.append(f"line {entry.number}: {error}")
            return
        self.count += 1
        if self.shard is not None and not self.shard.has(self.count - 1):
            return
        self.entries.append(Entry(entry.number, line.id, entry.offset, entry.size))
        if line.model is not None and len(self.models) < TOLD:
            self.models.add(line.model[:100])
        self.has_system |= any(message["role"] == "system" for message in line.messages[:1])


def _lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and bytes of each line; one longer than the limit is cut there, and is the last."""
    file.seek(0)
    offset = number = 0
    while raw := file.readline(LINE_LIMIT + 1):
        number += 1
        yield number, offset, raw
        if len(raw) > LINE_LIMIT:
            return
        offset += len(raw)


def copy_lines(source: BinaryIO, target: BinaryIO) -> None:
    """Copy the lines of a stream, up to the first one longer than the limit."""
    while raw := source.readline(LINE_LIMIT + 1):
        target.write(raw)
        if len(raw) > LINE_LIMIT:
            return
