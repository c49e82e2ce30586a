"""An interrupted quantisation goes on where it was, and ends byte for byte as an uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from checkpoints import TINY_CONFIG, random_weights, write_mistral
from killed_runs import Runs
from stores import files_of, make_store

from qmix import quantize as quantizing
from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.errors import StoreError
from qmix.prepare import layout_for
from qmix.progress import Progress
from qmix.store import open_store

SPEC = "nf4,0.*=int8,*.2=half"
CONFIG = TINY_CONFIG | {"intermediate_size": 96}


def refusal(*arguments) -> str:
    with pytest.raises(StoreError) as caught:
        make_store(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def journaled(store: Path) -> set[str]:
    """The weights that a run has noted as finished."""
    journal = store.with_name(store.name + ".partial") / "journal.jsonl"
    entries = map(json.loads, journal.read_text().splitlines()[1:])
    return {entry["weight"] for entry in entries if "weight" in entry}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_mistral(tmp_path_factory.mktemp("checkpoint") / "m", random_weights(CONFIG), CONFIG, shards=3)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    return files_of(make_store(checkpoint, tmp_path_factory.mktemp("whole") / "s", SPEC).directory)


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    started = Runs()
    yield started
    started.close()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The weight of every chunk that is read."""
    seen: list[str] = []
    rows = quantizing.WeightFile.rows
    monkeypatch.setattr(
        quantizing.WeightFile,
        "rows",
        lambda self, weight, *more: seen.append(weight.key) or rows(self, weight, *more),
    )
    monkeypatch.setattr(quantizing, "CHUNK_WEIGHTS", 2048)
    return seen


def test_runs_killed_at_random_moments_end_as_an_uninterrupted_one(
    checkpoint: Path, whole: dict[str, bytes], runs: Runs, tmp_path: Path
) -> None:
    for name in ("first", "timed"):
        started = time.monotonic()
        assert runs(checkpoint, tmp_path / name, SPEC) == 0
    seconds = time.monotonic() - started
    rng, kills, noted = random.Random(20), 0, []
    store, journal = tmp_path / "s", tmp_path / "s.partial" / "journal.jsonl"
    while kills < 30:
        done = journaled(store) if journal.exists() else set()
        status = runs(checkpoint, store, SPEC, after=rng.uniform(0, 0.8 * seconds))
        if store.exists():  # even so it may have been killed, in its very last step
            make_store(checkpoint, store, SPEC)
            assert files_of(store) == whole
            shutil.rmtree(store)
        else:
            assert status == -9
            kills += 1
            noted.append(len(journaled(store)) if journal.exists() else 0)
            assert not done or journaled(store) >= done
    assert runs(checkpoint, store, SPEC) == 0
    assert files_of(store) == whole
    assert not (tmp_path / "s.partial").exists()
    assert len(set(noted)) > 3  # they did fall into different moments


POINTS = [
    *(("write", count) for count in (1, 3, 4, 20, 90)),
    *(("journal", count) for count in (1, 2, 5)),
    *(("digest", count) for count in (1, 24)),
    *(("text", count) for count in (1, 2)),
    ("before the rename", 1),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_run_killed_at_a_point_ends_as_an_uninterrupted_one(
    checkpoint: Path, whole: dict[str, bytes], runs: Runs, tmp_path: Path, point: tuple[str, int]
) -> None:
    store, (at, count) = tmp_path / "s", point
    assert runs(checkpoint, store, SPEC, at=at, count=count) == -9
    assert not store.exists()
    with pytest.raises(StoreError, match="not finished yet; run the same `qmix quantize` again and it goes on"):
        open_store(store)
    assert runs(checkpoint, store, SPEC) == 0
    assert files_of(store) == whole


def test_a_run_killed_between_the_rename_and_the_end_left_a_whole_store(
    checkpoint: Path, whole: dict[str, bytes], runs: Runs, tmp_path: Path, reads: list[str]
) -> None:
    store = tmp_path / "s"
    assert runs(checkpoint, store, SPEC, at="after the rename") == -9
    assert files_of(store).keys() == whole.keys() | {"journal.jsonl"}
    assert open_store(store).directory == store
    make_store(checkpoint, store, SPEC)
    assert files_of(store) == whole
    assert not reads


@pytest.mark.parametrize("after", [1, 10, 37, 80])
def test_weights_that_were_finished_are_not_read_again(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, reads: list[str], after: int
) -> None:
    opened, store = open_checkpoint(LocalSource(checkpoint)), tmp_path / "s"
    layout, calls = layout_for(opened, SPEC, None), iter(range(1, 10**6))

    def interrupt(progress: Progress) -> None:
        if next(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantizing.quantize(opened, store, layout, interrupt)
    assert not store.exists()
    first, done = set(reads), journaled(store)
    assert done <= first
    assert len(first - done) <= 2 * max(2, os.cpu_count() or 2) + 1  # what was in flight
    reads.clear()
    seen: list[Progress] = []
    quantizing.quantize(opened, store, layout, seen.append)
    assert set(reads) == opened.weights.keys() - done
    assert files_of(store) == whole
    finished = sum(opened.weights[key].rows * opened.weights[key].cols * 2 for key in done)
    assert seen[0].done > finished
    assert seen[-1].done == seen[-1].total


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
        assert refusal(checkpoint, store, SPEC) == f"{store}: Input/output error"
        make_store(checkpoint, store, SPEC)
        assert files_of(store) == whole


@pytest.mark.parametrize("lost", [b"", b'{"unit": "0.1", "xx', b'{"weight": "model.norm.weight"}', b"\0" * 300])
def test_a_torn_last_line_of_the_journal_is_dropped(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, runs: Runs, lost: bytes
) -> None:
    store = tmp_path / "s"
    assert runs(checkpoint, store, SPEC, at="digest", count=20) == -9
    with (tmp_path / "s.partial" / "journal.jsonl").open("ab") as file:
        file.write(lost)
    make_store(checkpoint, store, SPEC)
    assert files_of(store) == whole


@pytest.fixture
def begun(checkpoint: Path, runs: Runs, tmp_path: Path) -> Path:
    """A store of which a part is written."""
    assert runs(checkpoint, tmp_path / "s", SPEC, at="digest", count=20) == -9
    return tmp_path / "s"


@pytest.mark.parametrize("damage", ["{broken}\n", "[1]\n", "5\n", "\0\0\0\n"])
def test_a_damaged_journal_is_named(checkpoint: Path, begun: Path, damage: str) -> None:
    journal = begun.with_name("s.partial") / "journal.jsonl"
    first, *rest = journal.read_text().splitlines(keepends=True)
    journal.write_text(first + damage + "".join(rest))
    assert refusal(checkpoint, begun, SPEC) == (
        f"{journal}: damaged; delete the directory {journal.parent} and start again"
    )


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_files_that_changed_between_two_runs_are_named(checkpoint: Path, begun: Path, change: str) -> None:
    file = begun.with_name("s.partial") / "experts-00001.safetensors"
    if change == "gone":
        file.unlink()
    else:
        os.truncate(file, 5000)
    assert refusal(checkpoint, begun, SPEC) == (
        f"{file}: not as an earlier run left it; delete {file.parent} and start again"
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
        f"{partial}: begun with another {differs}; delete that directory, or choose another name"
    )
    assert files_of(partial) == before


def test_the_same_checkpoint_elsewhere_goes_on_with_a_store(
    checkpoint: Path, begun: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy" / "m")
    make_store(tmp_path / "copy" / "m", begun, SPEC)
    assert files_of(begun) == whole


SLOW_COMMAND = """
import sys, time
from qmix import quantize, store_writer
import cli
quantize.CHUNK_WEIGHTS, store_writer.FLUSH_SECONDS = 2048, 0
rows = quantize.WeightFile.rows
quantize.WeightFile.rows = lambda *args: time.sleep(0.1) or rows(*args)
cli.main()
"""


def test_the_command_that_was_killed_goes_on_when_given_again(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    arguments = ["quantize", str(checkpoint), str(tmp_path / "s"), "--precision", SPEC]
    journal = tmp_path / "s.partial" / "journal.jsonl"
    with subprocess.Popen([sys.executable, "-c", SLOW_COMMAND, *arguments], stderr=subprocess.PIPE) as command:
        while not (journal.exists() and len(journal.read_text().splitlines()) > 5):
            assert command.poll() is None
            time.sleep(0.01)
        command.kill()
    done = journaled(tmp_path / "s")
    assert 0 < len(done) < 40
    assert not (tmp_path / "s").exists()
    again = subprocess.run([sys.executable, "-m", "cli", *arguments], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    assert files_of(tmp_path / "s") == whole
