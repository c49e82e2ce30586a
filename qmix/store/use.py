"""Mark stores as in use: a small file in the store, locked while a model runs, whose time is the last use.

Times of access are no help: most systems do not keep them, and backups change them. The file is not part of the store:
no digest depends on it. A store that cannot be written is used without it.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from qmix.errors import StoreError

LAST_USE = "last-use"
LOOK_SECONDS = 0.5  # at most, for a look at the lock


class StoreUse:
    """One use of a store, from now until `close`. Raises StoreError where another process is removing the store."""

    def __init__(self, directory: Path) -> None:
        self._fd: int | None = None
        try:
            self._fd = os.open(directory / LAST_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _share(self._fd)
            os.utime(self._fd)
        except BlockingIOError:
            self.close()
            raise StoreError(f"{directory}: another qmix process is removing it; make the store again") from None
        except OSError:
            pass  # read-only, another user's, or a filesystem without locks

    def close(self) -> None:
        """End the use; harmless to repeat."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _share(fd: int) -> None:
    """Take a shared lock; wait a moment for one that `in_use` takes to look. Raises BlockingIOError."""
    end = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(LOOK_SECONDS / 50)


class StoreRemoval:
    """The right to remove a store, until `close`. Raises StoreError while a model runs from it or it is repaired."""

    def __init__(self, directory: Path, manifest: str) -> None:
        self._fds: list[int] = []
        used = "a running qmix uses it; end that first, then remove the store"
        repaired = "another qmix process is repairing it; wait until it ends"
        for name, reason in ((LAST_USE, used), (manifest, repaired)):
            with suppress(FileNotFoundError):
                self._fds.append(os.open(directory / name, os.O_RDWR | os.O_CLOEXEC))
                try:
                    fcntl.flock(self._fds[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    self.close()
                    raise StoreError(f"{directory}: {reason}") from None

    def close(self) -> None:
        """Give up the right."""
        while self._fds:
            os.close(self._fds.pop())


def last_use(directory: Path) -> float | None:
    """Return when a store was last used, in seconds since 1970; None if it never was."""
    try:
        return (directory / LAST_USE).stat().st_mtime
    except OSError:
        return None


def in_use(directory: Path) -> bool:
    """Return True if a model is running from a store now."""
    try:
        fd = os.open(directory / LAST_USE, os.O_RDWR | os.O_CLOEXEC)  # NFS locks only what can be written
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(fd)
    return False
