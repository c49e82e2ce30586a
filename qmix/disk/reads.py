"""Reads in flight: records in pieces, by several threads, demand before prefetch.

A few threads take pieces of reads from two queues. Pieces of a read that somebody waits for ("demand") are always
taken before those of a read ahead of need, so that prefetch uses the time in which the disk would be idle. Pieces end
where a multiple of their size lies in the file: a disk with larger blocks then reads each block once.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import CancelledError, Future
from threading import Condition, Lock, Thread
from typing import Protocol

from qmix.disk.direct import DirectFile
from qmix.errors import StoreError

PIECE_BYTES = 8 * 2**20  # large enough for a disk's full rate, small enough to share a record among threads
READ_THREADS = 4


class Check(Protocol):
    """Compares what is read with what is expected."""

    def take(self, part: memoryview) -> None:
        """Take the next part, in order."""

    def finish(self) -> None:
        """Raise StoreError where the parts are not what is expected. The next part is the first again."""


class Read:
    """One read of `buffer`, whole pages, from `offset` of a file; `done` resolves when all of it is there and checked.

    `check` takes the pieces in order, each as soon as those before it are there: when the last one is read, little is
    left to check. Where it raises StoreError, all is read once more, past every cache; `done` raises what it raises
    then.
    """

    def __init__(self, file: DirectFile, buffer: memoryview, offset: int, check: Check | None = None) -> None:
        self.done: Future[None] = Future()
        self.view, self.file, self.offset, self.check = buffer, file, offset, check
        self._lock, self._there, self._checking, self._checked = Lock(), set[int](), False, 0
        first = PIECE_BYTES - offset % PIECE_BYTES
        self.waiting = deque([0, *range(first, len(self.view), PIECE_BYTES)])  # starts of pieces no thread has taken
        self.unfinished = len(self.waiting)
        self.errors: dict[int, BaseException] = {}  # of pieces by their start; the first in the file is raised

    def run(self, start: int) -> None:
        """Read one piece, in the calling thread, and check what can be checked."""
        try:
            self.file.read_into(self.piece(start), self.offset + start)
            self._check_along(start)
        except BaseException as error:
            self.errors[start] = error

    def piece(self, start: int) -> memoryview:
        """Return the part of the buffer for the piece that starts there."""
        return self.view[start : start + PIECE_BYTES - (self.offset + start) % PIECE_BYTES]

    def settle(self) -> None:
        """Check what was read and resolve `done`; after the last piece."""
        try:
            if self.errors:
                raise self.errors[min(self.errors)]
            if self.check is not None:
                self._finish_check(self.check)
        except BaseException as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)

    def _check_along(self, start: int) -> None:
        """Note a piece as read; check it and those behind it that are there, unless another thread is at it."""
        if self.check is None:
            return
        with self._lock:
            self._there.add(start)
            if self._checking or self._checked not in self._there:
                return
            self._checking = True
        while self._checking:
            piece = self.piece(self._checked)
            self.check.take(piece)
            with self._lock:
                self._checked += len(piece)
                self._checking = self._checked in self._there

    def _finish_check(self, check: Check) -> None:
        try:
            check.finish()
        except StoreError:  # perhaps memory, a bus or a cached page was at fault, and the disk is right
            self.file.forget(self.offset, len(self.view))
            self.file.read_into(self.view, self.offset)
            check.take(self.view)
            check.finish()


class Reader:
    """Threads that read. Its methods may be called from any thread."""

    def __init__(self, threads: int = READ_THREADS) -> None:
        self._busy, self._reading, self._since = 0.0, 0, 0.0  # seconds; pieces now, and since when there is one
        self._changed = Condition()
        self._demand: deque[Read] = deque()
        self._ahead: deque[Read] = deque()
        self._closed = False
        self._threads = [Thread(target=self._work, name="qmix-read", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def busy(self) -> float:
        """The seconds in which at least one piece was being read."""
        with self._changed:
            return self._busy + (time.perf_counter() - self._since if self._reading else 0.0)

    def close(self) -> None:
        """Finish all submitted reads and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(self, read: Read, ahead: bool = False) -> Read:
        """Begin a read: at once, or with `ahead` when no demanded read has pieces left to take."""
        with self._changed:
            (self._ahead if ahead else self._demand).append(read)
            self._changed.notify(read.unfinished)
        return read

    def hasten(self, read: Read) -> None:
        """Make a read ahead of need a demanded one."""
        with self._changed:
            if read in self._ahead:
                self._ahead.remove(read)
                self._demand.append(read)

    def cancel(self, read: Read) -> int:
        """Drop the pieces that no thread has taken yet, and return their bytes; `done` then raises CancelledError."""
        with self._changed:
            left_out = len(read.waiting)
            nbytes = sum(len(read.piece(start)) for start in read.waiting)
            read.waiting.clear()
            for queue in (self._demand, self._ahead):
                if read in queue:
                    queue.remove(read)
            read.unfinished -= left_out
            if left_out:
                read.errors[len(read.view)] = CancelledError()  # after those of the disk
            last = left_out > 0 and read.unfinished == 0
        if last:
            read.settle()
        return nbytes

    def _work(self) -> None:
        while (piece := self._next()) is not None:
            read, start = piece
            read.run(start)
            with self._changed:
                self._reading -= 1
                if not self._reading:
                    self._busy += time.perf_counter() - self._since
                read.unfinished -= 1
                last = read.unfinished == 0
            if last:
                read.settle()
            del read, piece  # hold no file or buffer while waiting

    def _next(self) -> tuple[Read, int] | None:
        with self._changed:
            while not (self._demand or self._ahead):
                if self._closed:
                    return None
                self._changed.wait()
            queue = self._demand or self._ahead
            read = queue[0]
            start = read.waiting.popleft()
            if not read.waiting:
                queue.popleft()
            if not self._reading:
                self._since = time.perf_counter()
            self._reading += 1
            return read, start
