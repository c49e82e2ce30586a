"""A file of whole lines."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qmix.disk.faults import disk_advice
from qmix.errors import DiskError, QmixError, UsageError
from qmix.files.parse import JSON_LIMIT


class LineFile:
    """A file to which whole lines are appended, on the disk before the call returns; close it, or use it in `with`.

    Raises DiskError with the advice `elsewhere` where the file cannot be opened, QmixError where another process writes
    it, and UsageError where it is a device, a pipe, or anything else that is not a regular file.
    """

    def __init__(self, path: Path, elsewhere: str) -> None:
        self.path = path
        try:
            if path.exists() and not path.is_file():  # before it is opened: opening it may have an effect, or wait
                raise UsageError(f"{path}: not a regular file; {elsewhere}")
            self._file = path.open("a+b")
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror}; {elsewhere}") from None
        self._end = 0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise QmixError(f"{path}: another qmix process is writing it; wait until it ends") from None

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and let another process write it."""
        self._file.close()

    def lines(self, limit: int = JSON_LIMIT) -> Iterator[bytes]:
        """Yield the file's lines. Read to the end, this drops a last line that was cut off from the file.

        A line of more than `limit` bytes is yielded cut, without its newline, as the last one; nothing is dropped then.
        """
        self._end = 0
        self._file.seek(0)
        while raw := self._file.readline(limit + 1):
            if len(raw) > limit:
                yield raw
                return
            if not raw.endswith(b"\n"):
                break
            yield raw
            self._end += len(raw)
        os.ftruncate(self._file.fileno(), self._end)

    def append(self, lines: list[bytes]) -> None:
        """Add lines, and return when they are on the disk. Raises DiskError, and keeps none, where not all fit."""
        data = b"".join(lines)
        try:
            self._write(data)
            os.fsync(self._file.fileno())
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            if not isinstance(error, OSError):
                raise
            raise DiskError(
                f"{self.path}: {error.strerror}; {disk_advice(error)}. Run the same command again to continue"
            ) from None
        self._end += len(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file.fileno(), view) :]
