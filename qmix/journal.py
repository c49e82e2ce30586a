"""What a long write has finished, one JSON line each: appended once the data it speaks of is on the disk."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from qmix.errors import StoreError


class Journal:
    """An append-only file of JSON lines, held by one process at a time.

    The first line says what is being written; opening an existing journal with another first line is an
    error. A last line that was cut off by a crash is dropped.
    """

    def __init__(self, path: Path, subject: dict[str, Any], what: str) -> None:
        self._file = path.open("a+b")
        try:
            self.entries = self._opened(path, subject, what)
        except BaseException:
            self._file.close()
            raise

    def _opened(self, path: Path, subject: dict[str, Any], what: str) -> list[dict[str, Any]]:
        """Take the lock, and what earlier runs noted."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{what}: another qmix is writing it; wait until that one ends") from None
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        try:
            lines = [dict(json.loads(line)) for line in whole.splitlines()]
        except (TypeError, ValueError):
            raise StoreError(f"{path}: damaged; delete the directory {path.parent} and start again") from None
        if lines and lines[0] != subject:
            differs = ", ".join(key for key in subject | lines[0] if lines[0].get(key) != subject.get(key))
            raise StoreError(
                f"{path.parent}: begun with another {differs}; delete that directory, or choose another name"
            )
        if not lines:
            self.append([subject])
        return lines[1:]

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Add lines and wait until they are on the disk."""
        self._file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
