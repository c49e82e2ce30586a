"""Uploaded files, and the files that batches write: OpenAI's /v1/files.

A file is two in the server's directory: its bytes, and a description in JSON. Their names are ids made here; a name
from a client is only ever a label.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from qmix.errors import QmixError
from qmix.files import decode_json, read_state, write_whole
from qmix.serve.errors import ApiError, invalid

FILE_LIMIT = 200 * 2**20  # bytes, as OpenAI has it for batches
MOST_FILES = 1000
PART = 2**20  # bytes of a file that are copied together
LONGEST_NAME = 255
BATCH, BATCH_OUTPUT = "batch", "batch_output"
ID = re.compile(r"(file|batch)-[0-9a-f]{24}")
T = TypeVar("T")


def new_id(kind: str) -> str:
    """Return an id, which is also a file's name."""
    return f"{kind}-{secrets.token_hex(12)}"


class Records:
    """Small JSON files of one kind in a directory, by id; each is replaced as a whole."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory, self._kind = directory, kind
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, name: str, suffix: str = ".json") -> Path:
        """Return the path of a record, or of what belongs to it. Raises ApiError where it is no id."""
        match = ID.fullmatch(name)
        if match is None or match[1] != self._kind:
            raise self.missing(name)
        return self.directory / f"{name}{suffix}"

    def missing(self, name: str) -> ApiError:
        """Return the error for an id that does not exist."""
        return ApiError(404, f"no {self._kind} has the id {name[:100]!r}", param="id")

    def write(self, name: str, record: msgspec.Struct) -> None:
        """Replace a record; it is on the disk when this returns."""
        write_whole(self.path(name), msgspec.json.encode(record))

    def read(self, name: str, kind: type[T]) -> T:
        """Return a record. Raises ApiError where there is none."""
        found = read_state(self.path(name), kind) if self.path(name).is_file() else None
        if found is None:
            raise self.missing(name)
        return found

    def all(self, kind: type[T]) -> list[T]:
        """Return all records, in no order."""
        names = [path.stem for path in self.directory.glob(f"{self._kind}-*.json") if ID.fullmatch(path.stem)]
        return [found for name in names if (found := read_state(self.path(name), kind)) is not None]


class File(msgspec.Struct, frozen=True):
    """A file's description. `lines_of` is the batch whose answers it shows, or with `errors` whose errors."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    lines_of: str | None = None
    errors: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's file object."""
        own = {name: getattr(self, name) for name in ("id", "bytes", "created_at", "filename", "purpose")}
        return own | {"object": "file", "status": "processed", "expires_at": None, "status_details": None}


class _Answered(msgspec.Struct):
    error: dict[str, msgspec.Raw] | None


class Files:
    """The files of a server."""

    def __init__(self, directory: Path) -> None:
        self.records = Records(directory, "file")

    def sweep(self) -> None:
        """Delete what a killed server left of uploads that had not ended."""
        for path in self.records.directory.glob("file-*.jsonl"):
            if not path.with_suffix(".json").exists():
                path.unlink()

    def add(self, data: Iterator[bytes], filename: str, purpose: str) -> File:
        """Keep an upload. Raises ApiError where there are too many, and OSError where the disk has no room."""
        if purpose != BATCH:
            raise invalid(f"purpose {purpose[:100]!r}: must be 'batch'; files are only used for batches")
        if len(self.records.all(File)) >= MOST_FILES:
            raise ApiError(400, f"there are {MOST_FILES} files; delete some")
        name = new_id("file")
        path, size = self.records.path(name, ".jsonl"), 0
        try:
            with path.open("xb") as file:
                for part in data:
                    size += file.write(part)
            found = File(name, size, int(time.time()), filename[:LONGEST_NAME], purpose)
            self.records.write(name, found)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return found

    def add_view(self, batch: str, nbytes: int, errors: bool) -> File:
        """Make a file of the lines that a batch has written: its answers, or its errors."""
        name = new_id("file")
        label = f"{batch}_{'errors' if errors else 'output'}.jsonl"
        found = File(name, nbytes, int(time.time()), label, BATCH_OUTPUT, batch, errors)
        self.records.write(name, found)
        return found

    def get(self, name: str) -> File:
        """Return a file's description. Raises ApiError where there is none."""
        return self.records.read(name, File)

    def all(self) -> list[File]:
        """Return all files, the newest first."""
        return sorted(self.records.all(File), key=lambda file: (-file.created_at, file.id))

    def delete(self, name: str) -> File:
        """Delete a file, and return its description."""
        file = self.get(name)
        self.records.path(name).unlink(missing_ok=True)
        self.records.path(name, ".jsonl").unlink(missing_ok=True)
        return file

    def path(self, name: str) -> Path:
        """Return the path of an uploaded file's bytes. Raises ApiError where there is none."""
        file = self.get(name)
        if file.lines_of is not None:
            raise invalid(f"{name}: is the output of a batch")
        return self.records.path(name, ".jsonl")

    def content(self, file: File, source: Path) -> Iterator[bytes]:
        """Yield a file's bytes; `source` has them, with all lines of the batch that it shows."""
        with source.open("rb") as opened:
            if file.lines_of is None:
                yield from iter(lambda: opened.read(PART), b"")
            else:
                yield from (line for line in opened if is_error(line) == file.errors)


def is_error(line: bytes) -> bool:
    """Return whether a line of a batch's output is an error, damaged, or cut off by a kill."""
    try:
        return decode_json(line, _Answered, "output", QmixError).error is not None
    except QmixError:
        return True
