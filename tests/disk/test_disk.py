"""Files past the page cache: the same bytes wherever they lie, and whatever the filesystem refuses."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest

from qmix.disk import PAGE
from qmix.disk.direct import DirectFile, DirectMemory, copied

# offset and size: whole pages; inside one page; across one border; odd ends on both sides; the end of the file
RANGES = [(0, 8192), (4096, 4096), (5000, 100), (4000, 200), (3, 12_290), (8191, 8194), (20_000, 5_001)]
SIZE = 25_001


@pytest.fixture
def content() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture(params=["direct", "refused when opened", "refused when used"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose files take O_DIRECT, or do not."""

    def refusing(real, flag_at):
        def call(*args):
            if flag_at is not None and args[flag_at] & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(*args)

        return call

    def refusing_use(real):
        def call(fd, *args):
            if _is_direct(fd):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(fd, *args)

        return call

    if request.param == "refused when opened":
        monkeypatch.setattr(os, "open", refusing(os.open, 1))
    elif request.param == "refused when used":
        for name in ("preadv", "pwrite"):
            monkeypatch.setattr(os, name, refusing_use(getattr(os, name)))
    return tmp_path


def _is_direct(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


@pytest.mark.parametrize(("offset", "nbytes"), RANGES)
def test_reads_give_what_lies_there(disk: Path, content: bytes, offset: int, nbytes: int) -> None:
    (disk / "f").write_bytes(content)
    file = DirectFile(disk / "f", os.O_RDONLY)
    memory = DirectMemory(nbytes)
    assert bytes(file.read(memory, offset, nbytes)) == content[offset : offset + nbytes]
    file.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(SIZE - 10, 11), (SIZE, 1), (40_960, 4096), (0, SIZE + 1)])
def test_a_read_beyond_the_end_is_told(disk: Path, content: bytes, offset: int, nbytes: int) -> None:
    (disk / "f").write_bytes(content)
    file = DirectFile(disk / "f", os.O_RDONLY)
    with pytest.raises(EOFError):
        file.read(DirectMemory(nbytes), offset, nbytes)
    file.close()


@pytest.mark.parametrize("kind", ["in place", "anywhere"])
@pytest.mark.parametrize(("offset", "nbytes"), RANGES)
def test_writes_change_what_they_name_and_nothing_else(
    disk: Path, content: bytes, offset: int, nbytes: int, kind: str
) -> None:
    (disk / "f").write_bytes(content)
    data = random.Random(1).randbytes(nbytes)
    file = DirectFile(disk / "f", os.O_RDWR | os.O_CREAT)
    file.write(copied(np.frombuffer(data, np.uint8), offset) if kind == "in place" else data, offset)
    file.close()
    assert (disk / "f").read_bytes() == content[:offset] + data + content[offset + nbytes :]


def test_whole_pages_go_past_the_cache_and_only_they(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = DirectFile(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    if not _takes_direct(file):
        pytest.skip("this filesystem has no O_DIRECT")
    seen = []
    pwrite = os.pwrite

    def noting(fd, data, offset):
        seen.append((_is_direct(fd), offset, len(data)))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", noting)
    file.write(copied(np.zeros(12_000, np.uint8), 4000), 4000)
    assert seen == [(False, 4000, 96), (True, 4096, 8192), (False, 12_288, 3712)]
    file.close()


def test_a_write_cut_short_goes_on(disk: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal or a filling disk may end a write anywhere."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[: max(1, len(data) // 3)], offset))
    file = DirectFile(disk / "f", os.O_RDWR | os.O_CREAT)
    file.write(copied(np.frombuffer(content, np.uint8), 4096), 4096)
    file.close()
    assert (disk / "f").read_bytes() == bytes(4096) + content


@pytest.mark.parametrize("failing", ["preadv", "pwrite"])
def test_errors_of_the_disk_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def call(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = DirectFile(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    monkeypatch.setattr(os, failing, call)
    memory = DirectMemory(8192)
    with pytest.raises(OSError, match="Input/output error"):
        file.read(memory, 0, 8192) if failing == "preadv" else file.write(memory.at(0, 8192), 0)
    file.close()


def _takes_direct(file: DirectFile) -> bool:
    return file._directly(os.pwrite, DirectMemory(PAGE).at(0, PAGE), 0) > 0
