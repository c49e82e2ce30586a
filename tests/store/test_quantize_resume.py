"""An interrupted quantisation goes on where it was, and ends byte for byte as an uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from checkpoints import TINY_CONFIG, random_weights, write_mistral
from stores import files_of, interrupt_store, journaled, make_store, refusal

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.hub import HubRepo
from qmix.checkpoint.source import HubSource, LocalSource
from qmix.progress import Progress
from qmix.store import weight_run
from qmix.store.opened import ORIGIN
from qmix.store.quantize import quantize
from qmix.store.sources import layout_for

SPEC = "nf4,0.*=int8,*.2=half"
CONFIG = TINY_CONFIG | {"intermediate_size": 96}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_mistral(tmp_path_factory.mktemp("checkpoint") / "m", random_weights(CONFIG), CONFIG, shards=3)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    return files_of(make_store(checkpoint, tmp_path_factory.mktemp("whole") / "s", SPEC).directory)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weight of every chunk that is read."""
    seen: list[str] = []
    rows = weight_run.WeightFile.rows
    monkeypatch.setattr(
        weight_run.WeightFile,
        "rows",
        lambda self, weight, *more: seen.append(weight.key) or rows(self, weight, *more),
    )
    monkeypatch.setattr(weight_run, "CHUNK_WEIGHTS", 2048)
    return seen


@pytest.mark.parametrize("after", [1, 10, 37, 80])
def test_weights_that_were_finished_are_not_read_again(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, reads: list[str], after: int
) -> None:
    opened, store = open_checkpoint(LocalSource(checkpoint)), tmp_path / "s"
    interrupt_store(checkpoint, store, SPEC, after)
    assert not store.exists()
    first, done = set(reads), journaled(store)
    assert done <= first
    assert len(first - done) <= weight_run.IN_FLIGHT + 1
    reads.clear()
    seen: list[Progress] = []
    quantize(opened, store, layout_for(opened, SPEC, None), seen.append)
    assert set(reads) == opened.weights.keys() - done
    assert files_of(store) == whole
    finished = sum(opened.weights[key].rows * opened.weights[key].cols * 2 for key in done)
    assert seen[0].done > finished
    assert seen[-1].done == seen[-1].total


class Releasing(LocalSource):
    """Notes which files are said to be used up, and what the journal had then."""

    def __init__(self, directory: Path, store: Path) -> None:
        super().__init__(directory)
        self.store, self.released = store, {}

    def release(self, name: str) -> None:
        self.released[name] = journaled(self.store)


def test_a_file_is_released_when_its_weights_are_noted_even_by_an_earlier_run(checkpoint: Path, tmp_path: Path) -> None:
    for name, begin in (("new", False), ("begun", True)):
        store = tmp_path / name
        if begin:
            interrupt_store(checkpoint, store, SPEC, after=30)  # of 39 weights in three files
        source = Releasing(checkpoint, store)
        opened = open_checkpoint(source)
        quantize(opened, store, layout_for(opened, SPEC, None))
        assert list(source.released) == opened.files
        for file, noted in source.released.items():
            assert noted >= {weight.key for weight in opened.of_file(file)}


def test_a_shard_from_the_hub_that_an_earlier_run_left_is_evicted(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    left = tmp_path / "shards" / "model.safetensors"
    left.write_bytes(b"left by a killed run")
    HubSource(HubRepo("org/m", None, "http://127.0.0.1:9"), tmp_path / "shards").release(left.name)
    assert not left.exists()


def test_errors_of_the_disk_at_any_write_lose_nothing(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every seventh call that changes the disk fails, each in a run of its own."""
    calls = fatal = 0

    def failing(real, *args):
        nonlocal calls
        calls += 1
        if calls == fatal:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    for name in ("pwrite", "fsync", "fdatasync", "ftruncate"):
        monkeypatch.setattr(os, name, partial(failing, getattr(os, name)))
    make_store(checkpoint, tmp_path / "s", SPEC)
    for each in range(1, calls + 1, 7):
        store, calls, fatal = tmp_path / f"s{each}", 0, each
        told = "Input/output error; the disk failed there: see `dmesg`; run the same command again to continue"
        assert re.fullmatch(rf"{store}(\.partial/[\w.-]+)?: {told}", refusal(checkpoint, store, SPEC))
        make_store(checkpoint, store, SPEC)
        assert files_of(store) == whole


@pytest.fixture
def begun(checkpoint: Path, tmp_path: Path) -> Path:
    """A store of which a part is written."""
    interrupt_store(checkpoint, tmp_path / "s", SPEC, after=20)
    return tmp_path / "s"


@pytest.mark.parametrize("damage", [b"{broken}\n", b"[1]\n", b"5\n", b"\0\0\0\n"])
def test_a_damaged_line_of_the_journal_and_what_follows_are_done_again(
    checkpoint: Path, begun: Path, whole: dict[str, bytes], damage: bytes
) -> None:
    journal = begun.with_name("s.partial") / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:9]) + damage + b"".join(lines[9:]))
    make_store(checkpoint, begun, SPEC)
    assert files_of(begun) == whole


@pytest.mark.parametrize("line", [0, 1, 2, 3, 7, -1])
def test_a_flipped_bit_of_the_journal_never_makes_a_wrong_store(
    checkpoint: Path, begun: Path, whole: dict[str, bytes], reads: list[str], line: int
) -> None:
    """One bit of a line: it and those behind it count for nothing."""
    journal = begun.with_name("s.partial") / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    kept = {entry["weight"] for entry in map(json.loads, lines[: line % len(lines)]) if "weight" in entry}
    lost = {entry["weight"] for entry in map(json.loads, lines) if "weight" in entry} - kept
    damaged = bytearray(lines[line])
    damaged[len(damaged) // 2] ^= 4
    lines[line] = bytes(damaged)
    journal.write_bytes(b"".join(lines))
    reads.clear()
    make_store(checkpoint, begun, SPEC)
    assert files_of(begun) == whole
    assert lost <= set(reads)
    assert kept.isdisjoint(reads)


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_files_that_changed_between_two_runs_are_named(checkpoint: Path, begun: Path, change: str) -> None:
    file = begun.with_name("s.partial") / "experts-00001.safetensors"
    if change == "gone":
        file.unlink()
    else:
        os.truncate(file, 5000)
    assert refusal(checkpoint, begun, SPEC) == (
        f"{file}: changed since it was written; delete {file.parent} and start again"
    )


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        ((0, "nf4", None), "precision"),
        ((0, SPEC, "fp16"), "dtype"),
        ((1, SPEC, None), "checkpoint"),
        ((1, "half", "fp16"), "checkpoint, precision, dtype"),
    ],
)
def test_a_store_begun_for_something_else_says_what_differs(
    begun: Path, tmp_path: Path, other: tuple, differs: str
) -> None:
    seed, spec, dtype = other
    checkpoint = write_mistral(tmp_path / "other", random_weights(CONFIG, seed), CONFIG, shards=3)
    partial = begun.with_name("s.partial")
    before = files_of(partial)
    assert refusal(checkpoint, begun, spec, dtype) == (
        f"{partial}: started with another {differs}; delete that directory, or choose another name"
    )
    assert files_of(partial) == before


def test_the_same_checkpoint_elsewhere_goes_on_with_a_store(
    checkpoint: Path, begun: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy" / "m")
    make_store(tmp_path / "copy" / "m", begun, SPEC)
    found = files_of(begun)
    assert json.loads(found.pop(ORIGIN)) == {"location": str(tmp_path / "copy" / "m")}
    assert found == {name: content for name, content in whole.items() if name != ORIGIN}
