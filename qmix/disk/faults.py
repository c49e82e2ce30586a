"""Second attempts at failed reads, and advice for disk errors."""

from __future__ import annotations

import errno
from collections.abc import Callable

# errors of a failing disk, cable or network; a second try may succeed
DISK_ERRORS = frozenset({errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EBADMSG})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def read_fully(
    read: Callable[[memoryview, int], int], buffer: memoryview, offset: int, nbytes: int | None = None
) -> None:
    """Fill `buffer`, or at least its first `nbytes`, from `offset` by as many calls of `read` as that takes.

    `read` takes the rest of the buffer and its offset, and returns how many bytes it read. What the disk fails to read
    is tried once more. Raises OSError naming the bytes, and EOFError where the file ends before.
    """
    done, end = 0, len(buffer) if nbytes is None else nbytes
    while done < end:
        count = _read_again(read, buffer[done:], offset + done)
        if count == 0:
            raise EOFError(f"ends at byte {offset + done}")
        done += count


def _read_again(read: Callable[[memoryview, int], int], buffer: memoryview, offset: int) -> int:
    """Return what `read` returns; where the disk fails it is called a second time."""
    try:
        return read(buffer, offset)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
    try:
        return read(buffer, offset)
    except OSError as error:
        where = f"{error.strerror} at bytes {offset} to {offset + len(buffer) - 1}, read twice"
        raise OSError(error.errno, where) from None


def disk_advice(error: OSError) -> str:
    """Return what to do about a file that could not be read or written, whatever its content."""
    if error.errno in DISK_ERRORS:
        return "the disk failed there: see `dmesg`"
    if error.errno in FULL:
        return "free some space"
    if error.errno == errno.EFBIG:
        return "write to a disk that takes larger files, or raise `ulimit -f`"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise `ulimit -n`"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "change its permissions"
    return "try again"


def write_advice(error: OSError, elsewhere: str) -> str:
    """Return what to do about a file that could not be written; `elsewhere` names another place or way."""
    if error.errno in FULL or error.errno in DISK_ERRORS:
        return f"{disk_advice(error)}, or {elsewhere}"
    return elsewhere
