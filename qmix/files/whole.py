"""Files replaced in one step, and scratch files."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file in one step, and return when it is on the disk. Raises OSError, and leaves nothing then."""
    with written_whole(path) as file:
        file.write(content)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, which replaces `path` in one step once all of it is on the disk.

    It is written under one scratch name beside `path`, by one process at a time: the next run that writes this file
    takes over what a killed run left. Raises OSError, also where `path` is not a regular file: a device must not be
    replaced.
    """
    target = path.resolve()  # a link's target is replaced, not the link
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with scratch_file(target.with_name(f".{target.name[:200]}.new")) as (scratch, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        scratch.replace(target)
    sync(target.parent)


@contextmanager
def scratch_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yield an empty file, for one process at a time; it is deleted afterwards.

    Its name is the same in every run: a file left by a killed run is taken over. Waits for a process that has it.
    Raises OSError.
    """
    file = _held(path)
    try:
        yield path, file
    finally:
        if leads_to(path, file):
            path.unlink()
        file.close()


def _held(scratch: Path) -> BinaryIO:
    while True:
        file = os.fdopen(os.open(scratch, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if leads_to(scratch, file):
                file.truncate(0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # another process has renamed or deleted it


def leads_to(path: Path, file: BinaryIO) -> bool:
    """Return whether the open file lies at `path`: another process may have moved or replaced it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
