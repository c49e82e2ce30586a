"""A file of whole lines that are on the disk, written by one process at a time. Loads no torch."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from qmix.errors import QmixError


class LineFile:
    """Lines that are added for good; close it, or use it as a context manager.

    Raises QmixError, which says what to do (`elsewhere`), where the file cannot be opened or another has it open.
    """

    def __init__(self, path: Path, elsewhere: str) -> None:
        self.path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise QmixError(f"{path}: {error.strerror}; {elsewhere}") from None
        self._end = 0
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise QmixError(f"{path}: another qmix is writing it; wait until that one ends") from None

    def __enter__(self) -> LineFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def lines(self) -> Iterator[bytes]:
        """The lines that are there; read to the end, a last one that was cut off is dropped from the file."""
        self._end = 0
        self._file.seek(0)
        for raw in self._file:
            if not raw.endswith(b"\n"):
                break
            yield raw
            self._end += len(raw)
        with suppress(OSError):  # what is no real file has no end to cut
            os.ftruncate(self._file.fileno(), self._end)

    def append(self, lines: list[bytes]) -> None:
        """Add lines, and return when they are on the disk. What cannot be written whole is taken back."""
        data = b"".join(lines)
        try:
            self._write(data)
            os.fsync(self._file.fileno())
        except BaseException as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            if not isinstance(error, OSError):
                raise
            raise QmixError(
                f"{self.path}: {error.strerror}; what is in it is whole, and the same command goes on from there"
            ) from None
        self._end += len(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._file.fileno(), view) :]


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in place at once, on the disk with its name. Raises OSError, and leaves nothing then."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
