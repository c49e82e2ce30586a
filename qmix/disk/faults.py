"""Reads that try again what a disk failed to give, and advice for errors of disks."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial

# what a failing disk, cable or network says; a second try may succeed
DISK_ERRORS = frozenset({errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EBADMSG})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def read_fully(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `offset`, without the GIL; what the disk fails to read is tried once more.

    Raises OSError naming the bytes, and EOFError where the file ends before.
    """
    done = 0
    while done < len(buffer):
        count = read_again(partial(os.preadv, fd, [buffer[done:]], offset + done), offset + done, len(buffer) - done)
        if count == 0:
            raise EOFError(f"ends at byte {offset + done}")
        done += count


def read_again(read: Callable[[], int], offset: int, nbytes: int) -> int:
    """Return what `read` returns; one that the disk fails is tried a second time."""
    try:
        return read()
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
    try:
        return read()
    except OSError as error:
        where = f"{error.strerror} at bytes {offset} to {offset + nbytes - 1}, read twice"
        raise OSError(error.errno, where) from None


def disk_advice(error: OSError) -> str:
    """Return what to do about a file that could not be read or written, whatever is in it."""
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
    """Return what to do about a file that could not be written, where `elsewhere` says what else would do."""
    if error.errno in FULL or error.errno in DISK_ERRORS:
        return f"{disk_advice(error)}, or {elsewhere}"
    return elsewhere
