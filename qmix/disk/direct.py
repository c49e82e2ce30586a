"""Files read and written past the page cache, and memory on huge pages to do it with.

With O_DIRECT a read lands in its buffer without a copy and leaves no cached pages behind: a process holds what it
planned to hold. Filesystems that refuse it (some tmpfs) are read and written through the cache.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from qmix.disk import HUGE_PAGE, PAGE
from qmix.disk.faults import read_fully

MADV_POPULATE_WRITE, MADV_COLLAPSE = 23, 25  # from Linux's mman.h; Python's mmap does not name them
POPULATE_BYTES = 64 * 2**20  # taken by one thread at a time
POPULATE_THREADS = 8


def huge_pages(nbytes: int, populate: bool = False) -> memoryview:
    """Return zeroed anonymous memory in a mapping of its own, on huge pages if it is large and the system has them.

    A disk request to small pages scattered over memory is cut into pieces of 4 kB to 1 MB: reads reached 1.5 GB/s,
    and 3.8 GB/s on huge pages.

    With `populate` all pages are taken at once: planned memory is there from the start, or the system refuses it now.
    The mapping then ends where the memory does, because a huge page across that end would take more than planned.
    """
    spare = HUGE_PAGE if nbytes >= HUGE_PAGE and not populate else 0  # to begin at a huge page
    # private: shared anonymous memory, mmap's default, is kept on small pages
    mapping = mmap.mmap(-1, max(nbytes, PAGE) + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if (spare or populate) and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(mapping)
    view = view[-_address(view) % HUGE_PAGE if spare else 0 :][:nbytes]
    if populate:
        _populate(view)
        with suppress(OSError):  # puts fragmented memory together into huge pages; Linux 6.1 and later
            mapping.madvise(MADV_COLLAPSE)
    return view


def _populate(view: memoryview) -> None:
    """Take all pages now, with a thread for each core: the system zeroes each page."""
    advise = ctypes.CDLL(None).madvise  # mmap's own method holds the GIL
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def populate(start: int) -> None:
        part = np.frombuffer(view[start : start + POPULATE_BYTES], np.uint8)
        if advise(part.ctypes.data, len(part), MADV_POPULATE_WRITE):  # Linux before 5.14
            part.fill(0)

    with ThreadPoolExecutor(min(POPULATE_THREADS, os.cpu_count() or 1), "qmix-populate") as pool:
        list(pool.map(populate, range(0, len(view), POPULATE_BYTES)))


class DirectMemory:
    """Memory for `nbytes` of a file, read or written past the page cache wherever they lie in it.

    Bytes from offset 10,000 of a file start at byte 10,000 mod 4096 of the memory, so that both have whole pages at
    the same places.
    """

    def __init__(self, nbytes: int, view: memoryview | None = None) -> None:
        self.nbytes = nbytes
        self.view = view or huge_pages(self.taken(nbytes))

    @staticmethod
    def taken(nbytes: int) -> int:
        """Return the bytes of memory that `nbytes` of a file may touch."""
        return (-(-nbytes // PAGE) + 1) * PAGE

    @classmethod
    def several(cls, sizes: Iterable[int]) -> list[DirectMemory]:
        """Return one after another in one mapping, so that they share its huge pages."""
        sizes = list(sizes)
        rest, found = huge_pages(sum(map(cls.taken, sizes))), []
        for nbytes in sizes:
            found.append(cls(nbytes, rest[: cls.taken(nbytes)]))
            rest = rest[cls.taken(nbytes) :]
        return found

    def at(self, offset: int, nbytes: int) -> memoryview:
        """Return the place of `nbytes` from `offset` of a file."""
        return self.view[offset % PAGE :][:nbytes]


def copied(data: np.ndarray, offset: int, memory: DirectMemory | None = None) -> memoryview:
    """Copy uint8 data to where it can be written directly to `offset` of a file; by default in new memory."""
    place = (memory or DirectMemory(data.nbytes)).at(offset, data.nbytes)
    np.frombuffer(place, np.uint8)[:] = data
    return place


class DirectFile:
    """A file read and written with O_DIRECT where memory, offset and filesystem allow, else through the page cache.

    Passing the cache saves a copy, and a page taken and given back for every 4096 bytes. Pages that are not written
    whole go through the cache; no page is written both ways. All methods run without the GIL and raise OSError.
    """

    _direct: int | None

    def __init__(self, path: Path, flags: int = os.O_RDONLY) -> None:
        self.path = path
        self.fd, self._direct = -1, None  # whatever fails to open
        self._refused = False
        self.fd = os.open(path, flags, 0o644)
        with suppress(OSError):  # a filesystem without it
            self._direct = os.open(path, flags & ~os.O_CREAT | getattr(os, "O_DIRECT", 0))

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # of a model that was let go of without its close()

    def close(self) -> None:
        """Close the file; harmless to repeat."""
        fds, self.fd, self._direct = (self.fd, self._direct), -1, None
        for fd in fds:
            if fd is not None and fd >= 0:
                os.close(fd)

    def read_into(self, pages: memoryview, offset: int, nbytes: int | None = None) -> None:
        """Fill whole pages of memory from `offset`, a multiple of 4096; with `nbytes` at least so many of them.

        What the disk fails to read is tried once more. Raises OSError naming the bytes, and EOFError where the file
        ends before.
        """
        read_fully(self._read_some, pages, offset, nbytes)

    def read(self, memory: DirectMemory, offset: int, nbytes: int) -> memoryview:
        """Return `nbytes` from any `offset`, as a part of `memory`; raises what `read_into` raises."""
        before = offset % PAGE
        self.read_into(memory.view[: -(-(before + nbytes) // PAGE) * PAGE], offset - before, before + nbytes)
        if not self._is_direct:
            self.forget(offset, nbytes)
        return memory.at(offset, nbytes)

    def write(self, data: Any, offset: int) -> None:
        """Write all of `data` at `offset`. Raises OSError naming the file."""
        view = memoryview(data)
        while view.nbytes:
            try:
                count = self._write_some(view, offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            view, offset = view[count:], offset + count

    def forget(self, offset: int, nbytes: int) -> None:
        """Let the page cache drop these bytes, so that they are read from the disk next time."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def _read_some(self, view: memoryview, offset: int) -> int:
        """Read what the system gives at once, and return how many bytes; 0 at the end of the file."""
        if offset % PAGE or view.nbytes % PAGE:  # behind a read that ended inside a page
            return os.preadv(self.fd, [view], offset)
        return self._directly(os.preadv, [view], offset) or os.preadv(self.fd, [view], offset)

    def _write_some(self, view: memoryview, offset: int) -> int:
        """Write the whole pages that `view` begins with, or what lies before the first, and return how many bytes."""
        before = -offset % PAGE
        if view.nbytes < before + PAGE or (_address(view) - offset) % PAGE:
            return os.pwrite(self.fd, view, offset)
        if before:
            return os.pwrite(self.fd, view[:before], offset)
        pages = view[: view.nbytes // PAGE * PAGE]
        return self._directly(os.pwrite, pages, offset) or os.pwrite(self.fd, view, offset)

    @property
    def _is_direct(self) -> bool:
        return self._direct is not None and not self._refused

    def _directly(self, call: Callable[[int, Any, int], int], data: Any, offset: int) -> int:
        """Return the bytes moved past the page cache, 0 where that is not possible."""
        if self._direct is None or self._refused:
            return 0
        try:
            return call(self._direct, data, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._refused = True  # a filesystem that refuses O_DIRECT only when it is used
            return 0


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)
