"""Files read and written past the page cache, and memory to do it with."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qmix.disk import PAGE
from qmix.disk.faults import read_again, read_fully

HUGE_PAGE = 2 * 2**20


class DirectMemory:
    """Memory that `nbytes` of a file can be read into or written from past the page cache, wherever they lie there.

    Bytes from offset 10,000 of a file start at byte 10,000 mod 4096 of it: whole pages in both places at once.
    """

    def __init__(self, nbytes: int, view: memoryview | None = None) -> None:
        self.nbytes = nbytes
        self.view = view or _huge_pages(self.taken(nbytes))

    @staticmethod
    def taken(nbytes: int) -> int:
        return (-(-nbytes // PAGE) + 1) * PAGE

    @classmethod
    def several(cls, sizes: Iterable[int]) -> list[DirectMemory]:
        """One behind the other in one mapping, that shares its huge pages among them."""
        sizes = list(sizes)
        rest, found = _huge_pages(sum(map(cls.taken, sizes))), []
        for nbytes in sizes:
            found.append(cls(nbytes, rest[: cls.taken(nbytes)]))
            rest = rest[cls.taken(nbytes) :]
        return found

    def at(self, offset: int, nbytes: int) -> memoryview:
        """The place of `nbytes` from `offset` of a file."""
        return self.view[offset % PAGE :][:nbytes]


def _huge_pages(nbytes: int) -> memoryview:
    """Zeroed anonymous memory, on huge pages if it is large and the system has them.

    On small pages, scattered over the machine, a request to the disk is cut into pieces of 4 kB to 1 MB: reading went
    at 1.5 GB/s where it goes at 3.8 on huge ones.
    """
    mapping = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(mapping)
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
        view = view[-_address(view) % HUGE_PAGE :]
    return view[:nbytes]


def copied(data: np.ndarray, offset: int, memory: DirectMemory | None = None) -> memoryview:
    """uint8 data, in memory that can be written from at this offset of a file; by default in new memory."""
    place = (memory or DirectMemory(data.nbytes)).at(offset, data.nbytes)
    np.frombuffer(place, np.uint8)[:] = data
    return place


class UncachedFile:
    """A file read and written with O_DIRECT wherever memory, offset and filesystem allow, else through the page cache.

    Going past the cache saves the cores a copy, and the taking and giving back of a page for every 4096 bytes. Pages
    that are not written whole go through the cache; no page is written both ways.
    """

    def __init__(self, path: Path, flags: int) -> None:
        self.path = path
        self.fd = os.open(path, flags, 0o644)
        self._direct: int | None = None
        with suppress(OSError):  # a filesystem without it
            self._direct = os.open(path, flags & ~os.O_CREAT | getattr(os, "O_DIRECT", 0))

    def close(self) -> None:
        os.close(self.fd)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, memory: DirectMemory, offset: int, nbytes: int) -> memoryview:
        """`nbytes` from `offset`, as a part of `memory`; without the GIL.

        What the disk fails to read is tried once more. Raises OSError naming the bytes, and EOFError where the file
        ends before.
        """
        before = offset % PAGE
        end = before + nbytes
        whole = -(-end // PAGE) * PAGE
        directly = partial(self._directly, os.preadv, [memory.view[:whole]], offset - before)
        done = max(before, read_again(directly, offset, nbytes))
        if done < end:
            start = offset - before + done
            read_fully(self.fd, memory.view[done:end], start)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.fd, start, end - done, os.POSIX_FADV_DONTNEED)
        return memory.at(offset, nbytes)

    def write(self, data: Any, offset: int) -> None:
        """All of `data` at `offset`; without the GIL. Raises OSError naming the file."""
        view = memoryview(data)
        while view.nbytes:
            try:
                count = self._write_some(view, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            view, offset = view[count:], offset + count

    def _write_some(self, view: memoryview, offset: int) -> int:
        """Write the whole pages that `view` begins with, or what lies before the first; returns how many bytes."""
        before = -offset % PAGE
        if view.nbytes < before + PAGE or (_address(view) - offset) % PAGE:
            return os.pwrite(self.fd, view, offset)
        if before:
            return os.pwrite(self.fd, view[:before], offset)
        pages = view[: view.nbytes // PAGE * PAGE]
        return self._directly(os.pwrite, pages, offset) or os.pwrite(self.fd, view, offset)

    def _directly(self, call: Callable[[int, Any, int], int], data: Any, offset: int) -> int:
        """Bytes moved past the page cache, 0 where that is not possible."""
        if self._direct is None:
            return 0
        try:
            return call(self._direct, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:  # so some filesystems refuse O_DIRECT only now
                raise
            return 0


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)
