"""The journal of a long write: one JSON line for each finished weight or unit, appended once its data is on the disk.

Every line ends with the XXH3 (64 bits) of the rest of it, `"sum": "..."`. A line that was cut off or changed is dropped
together with all lines behind it, and their work is done again.
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

JOURNAL = "journal.jsonl"
SUM = b',"sum":"%s"}\n'
SUM_BYTES = len(SUM % (b"0" * 16))


class Subject(msgspec.Struct, frozen=True):
    """The store that is being written: its format, and its precisions [layer][expert]."""

    format_version: int
    precision: tuple[tuple[str, ...], ...]
    dtype: str
    clip: bool = False


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line: the subject, the identity of the checkpoint from here on, a weight with the digest of the bytes `read`,
    or a unit with its checksum.
    """

    subject: Subject | None = None
    checkpoint: str | None = None
    weight: str | None = None
    read: str | None = None
    unit: str | None = None
    xxh3: str | None = None


class Journal:
    """An append-only file of entries, locked by one process at a time; `entries` are those of earlier runs.

    Where another process holds the lock, `on_wait` is called once, and may raise; then this waits for the lock.
    `is_current` is false if that process finished the store and moved the file.
    """

    def __init__(self, path: Path, on_wait: Callable[[], None]) -> None:
        self._file = path.open("a+b")
        try:
            self._lock(on_wait)
            self.is_current = leads_to(path, self._file)
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
        """Return the entries up to the first damaged line, and cut off the rest."""
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
        """Close the file and give up its lock."""
        self._file.close()


def read_subject(path: Path) -> Subject | None:
    """Return the subject of a journal, whoever writes it now; None where it has none yet."""
    try:
        with path.open("rb") as file:
            return _decoded(file.readline()).subject
    except (OSError, _DamagedLine):
        return None


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
