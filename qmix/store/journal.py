"""Journal of what a long write has finished, one JSON line each: appended once the data it speaks of is on the disk.

Every line ends with the XXH3 (64 bits) of what is before, `"sum": "..."`. A line that was cut off or changed is dropped
with all that follow it: what they said is done again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import xxhash

from qmix.errors import StoreError
from qmix.files import decode_json, leads_to

SUM = b',"sum":"%s"}\n'
SUM_BYTES = len(SUM % (b"0" * 16))


class Subject(msgspec.Struct, frozen=True):
    """The subject of the write: a store of this format, with these precisions [layer][expert]."""

    format_version: int
    precision: tuple[tuple[str, ...], ...]
    dtype: str
    clip: bool = False


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line: the subject, the identity of the checkpoint that the lines behind are of, a weight with the digest of
    what was `read`, or a unit with its checksum."""

    subject: Subject | None = None
    checkpoint: str | None = None
    weight: str | None = None
    read: str | None = None
    unit: str | None = None
    xxh3: str | None = None


class Journal:
    """An append-only file of entries, held by one process at a time; `entries` are those of earlier runs.

    `on_wait` is called once where another process holds it, and may raise; else this waits until that one ends.
    """

    def __init__(self, path: Path, on_wait: Callable[[], None]) -> None:
        self._file = path.open("a+b")
        try:
            self._lock(on_wait)
            self.is_current = leads_to(path, self._file)  # or who had it finished, and moved it
            self.entries = self._read() if self.is_current else []
        except BaseException:
            self._file.close()
            raise

    def _lock(self, on_wait: Callable[[], None]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def _read(self) -> list[Entry]:
        """Return the entries up to the first line that is not whole; the rest is cut off."""
        found, end = [], 0
        self._file.seek(0)
        for line in self._file:
            try:
                found.append(_decoded(line))
            except _DamagedLine:
                break
            end += len(line)
        self._file.truncate(end)
        return found

    def append(self, entries: list[Entry]) -> None:
        """Add lines and wait until they are on the disk."""
        self._file.write(b"".join(map(encoded, entries)))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def encoded(entry: Entry) -> bytes:
    """Return the line of an entry."""
    body = msgspec.json.encode(entry)
    return body[:-1] + SUM % xxhash.xxh3_64_hexdigest(body).encode()


def _decoded(line: bytes) -> Entry:
    body = line[:-SUM_BYTES] + b"}"
    if line != body[:-1] + SUM % xxhash.xxh3_64_hexdigest(body).encode():
        raise _DamagedLine("damaged")
    return decode_json(body, Entry, "journal", _DamagedLine)


class _DamagedLine(StoreError):
    pass
