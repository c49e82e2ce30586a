"""Disks: room asked for before the first byte is written, and reads that give all that was asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from qmix.errors import StoreError
from qmix.units import format_bytes


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest directory above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def require_space(needs: Iterable[tuple[Path, int]]) -> None:
    """Check bytes wanted under several paths against what is free; paths on one disk are added up.

    Raises StoreError naming the first path of a disk that is too small.
    """
    by_disk: dict[int, tuple[Path, int]] = {}
    for path, count in needs:
        disk = existing_parent(path).stat().st_dev
        first, total = by_disk.get(disk, (path, 0))
        by_disk[disk] = (first, total + count)
    for path, count in by_disk.values():
        free = shutil.disk_usage(existing_parent(path)).free
        if count > free:
            raise StoreError(
                f"{path}: needs {format_bytes(count)} more on its disk, {format_bytes(free)} are free; "
                "free some space or choose another disk"
            )


def read_fully(fd: int, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `offset`, without the GIL. Raises OSError, and EOFError where the file ends before."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count
