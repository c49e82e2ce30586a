"""Files read past the page cache, and memory that stays where it is to read them into.

With O_DIRECT a read lands in the buffer without a copy and leaves no cached pages behind, so that what a process
holds is what it planned to hold. Filesystems that refuse it (tmpfs) are read through the cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from qmix.disk import PAGE
from qmix.disk.faults import DISK_ERRORS, disk_advice, read_fully
from qmix.errors import StoreError, mending

MADV_POPULATE_WRITE, MADV_COLLAPSE = 23, 25  # of Linux's mman.h; Python's mmap does not name them
POPULATE_BYTES = 64 * 2**20  # a thread's piece of memory to be taken
POPULATE_THREADS = 8


def anonymous_memory(nbytes: int) -> torch.Tensor:
    """A page-aligned uint8 buffer in one mapping of its own, on huge pages where the system allows.

    Its pages are taken at once: what was planned is there from the start, or the system says now that it is not.
    """
    # private: shared anonymous memory, which mmap gives by default, is kept on small pages
    mapping = mmap.mmap(-1, max(nbytes, PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)[:nbytes]
    _populate(memory)
    with suppress(OSError):  # where memory was in pieces, huge pages are put together now; Linux 6.1 and later
        mapping.madvise(MADV_COLLAPSE)
    return memory


def _populate(memory: torch.Tensor) -> None:
    """Have its pages now, taken by as many threads as there are cores: the system zeroes each."""
    advise = ctypes.CDLL(None).madvise  # mmap's own method holds the GIL
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def populate(part: torch.Tensor) -> None:
        if advise(part.data_ptr(), len(part), MADV_POPULATE_WRITE):  # Linux before 5.14
            part.zero_()

    with ThreadPoolExecutor(min(POPULATE_THREADS, os.cpu_count() or 1), "qmix-populate") as pool:
        list(pool.map(populate, memory.split(POPULATE_BYTES)))


class DirectFile:
    """A file open for reading at multiples of 4096 bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            advice = mending(path.parent) if isinstance(error, FileNotFoundError) else disk_advice(error)
            raise StoreError(f"{path}: {error.strerror}; {advice}") from None
        with suppress(OSError):
            direct = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            try:
                os.preadv(direct, [mmap.mmap(-1, PAGE)], 0)  # some filesystems refuse only now
            except OSError:
                os.close(direct)
            else:
                os.close(self.fd)
                self.fd = direct

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; harmless to repeat."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset`; in the calling thread, without the GIL.

        What the disk fails to read is tried once more. Raises StoreError naming the bytes.
        """
        try:
            read_fully(self.fd, buffer, offset)
        except OSError as error:
            self._check_length(offset, len(buffer))  # past the end, O_DIRECT finds the rest of the buffer unaligned
            more = f"; {mending(self.path.parent)}" if error.errno in DISK_ERRORS else ""
            raise StoreError(f"{self.path}: {error.strerror}; {disk_advice(error)}{more}") from None
        except EOFError:
            self._check_length(offset, len(buffer))
            raise StoreError(f"{self.path}: was truncated while it was read; {mending(self.path.parent)}") from None

    def _check_length(self, offset: int, nbytes: int) -> None:
        size = os.fstat(self.fd).st_size
        if size < offset + nbytes:
            wanted = f"bytes {offset} to {offset + nbytes - 1} were wanted"
            raise StoreError(f"{self.path}: cut short, ends at byte {size}, {wanted}; {mending(self.path.parent)}")

    def forget(self, offset: int, nbytes: int) -> None:
        """Let the page cache drop these bytes, so that they are read from the disk next time."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
