"""Check free space before the first byte is written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from qmix.errors import StoreError
from qmix.units import format_bytes


def existing_parent(path: Path) -> Path:
    """Return the path itself, or the nearest directory above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def require_space(needs: Iterable[tuple[Path, int]]) -> None:
    """Compare the bytes needed under several paths with what is free; paths on one disk are added up.

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
