"""Reads in pieces, by several threads, what is waited for first."""

from __future__ import annotations

from concurrent.futures import CancelledError
from contextlib import closing
from threading import Event
from time import sleep

import pytest
import torch

from qmix.disk import reads as reading
from qmix.disk.direct import DirectFile, huge_pages
from qmix.disk.reads import Read, Reader
from qmix.errors import StoreError


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Ten pages, read a page at a time."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 4096)
    path = tmp_path / "file"
    path.write_bytes(bytes(page for page in range(10) for _ in range(4096)))
    with DirectFile(path) as opened:
        yield opened


class Slow:
    """A file that notes which pages are read, and reads none before `go`."""

    def __init__(self, file):
        self.file, self.go, self.begun, self.pages = file, Event(), Event(), []

    def read_into(self, buffer, offset):
        self.begun.set()
        self.go.wait()
        self.pages.append(offset // 4096)
        self.file.read_into(buffer, offset)


def read_of(file, pages, offset=0, check=None):
    return Read(file, huge_pages(pages * 4096), offset * 4096, check)


def test_every_piece_lands_in_its_place(file):
    with closing(Reader(3)) as reader:
        read = reader.submit(read_of(file, 8, offset=2))
        read.done.result()
    assert torch.tensor(list(read.view)).view(8, 4096).float().std(dim=1).eq(0).all()
    assert [read.view[page * 4096] for page in range(8)] == list(range(2, 10))


def test_what_is_waited_for_comes_before_what_is_read_ahead(file):
    slow = Slow(file)
    with closing(Reader(1)) as reader:
        ahead = reader.submit(read_of(slow, 4), ahead=True)
        slow.begun.wait()
        demanded = reader.submit(read_of(slow, 2, offset=8))
        slow.go.set()
        ahead.done.result()
        demanded.done.result()
    assert slow.pages == [0, 8, 9, 1, 2, 3]


def test_the_time_of_reading_counts_once_whatever_is_read_and_while_it_lasts(file, monkeypatch):
    slow, clock = Slow(file), [0.0]
    monkeypatch.setattr(reading.time, "perf_counter", lambda: clock[0])
    with closing(Reader(2)) as reader:
        assert reader.busy == 0
        reads = [reader.submit(read_of(slow, 1, offset=at)) for at in (0, 4)]
        slow.begun.wait()
        while reader._reading < 2:
            sleep(0.001)
        clock[0] = 3.0
        assert reader.busy == 3
        slow.go.set()
        for read in reads:
            read.done.result()
        while reader._reading:
            sleep(0.001)
        clock[0] = 9.0
        assert reader.busy == 3


def test_a_read_ahead_can_be_hastened(file):
    slow = Slow(file)
    with closing(Reader(1)) as reader:
        first, second = (reader.submit(read_of(slow, 2, offset=at), ahead=True) for at in (0, 4))
        slow.begun.wait()
        reader.hasten(second)
        slow.go.set()
        first.done.result()
        second.done.result()
    assert slow.pages == [0, 4, 5, 1]


def test_a_cancelled_read_leaves_out_what_was_not_begun(file):
    slow = Slow(file)
    with closing(Reader(1)) as reader:
        read = reader.submit(read_of(slow, 4), ahead=True)
        slow.begun.wait()
        assert reader.cancel(read) == 3 * 4096
        assert not read.done.done()  # its first page is being written to
        slow.go.set()
        assert isinstance(read.done.exception(), CancelledError)
        assert reader.cancel(read) == 0
    assert slow.pages == [0]


def test_cancelling_a_finished_read_changes_nothing(file):
    with closing(Reader()) as reader:
        read = reader.submit(read_of(file, 2))
        read.done.result()
        assert reader.cancel(read) == 0
        read.done.result()


def test_what_the_check_raises_the_read_raises(file):
    check = Pages(right=False)
    with closing(Reader()) as reader, pytest.raises(StoreError, match="nothing good"):
        reader.submit(read_of(file, 2, offset=3, check=check)).done.result()
    assert check.whole == [b"\3" * 4096 + b"\4" * 4096] * 2  # it was read once more


class Pages:
    """A check that notes what it takes, and how the parts came."""

    def __init__(self, right=True, before=lambda part: None):
        self.right, self.before, self.parts, self.whole = right, before, [], []

    def take(self, part):
        self.before(part)
        self.parts.append(bytes(part))

    def finish(self):
        self.whole.append(b"".join(self.parts))
        self.parts = []
        if not self.right:
            raise StoreError("nothing good")


@pytest.mark.parametrize("threads", [1, 4])
def test_pieces_are_checked_in_order_while_others_are_read(file, threads):
    """Each piece comes later than those behind it: with several threads they are there before it."""
    gates, seen = [Event() for _ in range(8)], []

    class Late(Slow):
        def read_into(self, buffer, offset):
            page = offset // 4096
            if threads > 1 and page in (1, 2, 5):
                gates[page + 1].wait(10)
            self.file.read_into(buffer, offset)
            seen.append(page)
            gates[page].set()

    check = Pages()
    with closing(Reader(threads)) as reader:
        reader.submit(read_of(Late(file), 8, check=check)).done.result()
    assert check.whole == [bytes(page for page in range(8) for _ in range(4096))]
    assert sorted(seen) == list(range(8))
    assert (seen == sorted(seen)) == (threads == 1)


def test_the_first_pieces_are_checked_before_the_last_is_read(file):
    first = Event()

    class Late(Slow):
        def read_into(self, buffer, offset):
            assert offset < 4 * 4096 or first.wait(10)
            self.file.read_into(buffer, offset)

    check = Pages(before=lambda part: first.set() if part[0] == 2 else None)
    with closing(Reader(2)) as reader:
        reader.submit(read_of(Late(file), 5, check=check)).done.result()
    assert len(check.whole) == 1


def test_what_a_check_raises_while_pieces_come_ends_the_read(file):
    def fail(part):
        raise RuntimeError(f"page {part[0]}")

    with closing(Reader(2)) as reader, pytest.raises(RuntimeError, match="page 0"):
        reader.submit(read_of(file, 4, check=Pages(before=fail))).done.result()


def test_a_failed_piece_fails_the_read_when_all_are_over(file):
    with closing(Reader(2)) as reader, pytest.raises(EOFError, match="ends at byte 40960"):
        reader.submit(read_of(file, 4, offset=8)).done.result()


def test_closing_ends_the_threads(file):
    reader = Reader(2)
    read = reader.submit(read_of(file, 4))
    reader.close()
    assert read.done.done()
    assert not any(thread.is_alive() for thread in reader._threads)
