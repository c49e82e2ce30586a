"""Runs of the quantiser that are killed (SIGKILL), at random moments and at the worst ones, and given again."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import TINY_CONFIG, random_weights, write_mistral
from killed_batches import lines_of
from killed_runs import Runs
from stores import files_of, journaled, make_store

from qmix.errors import StoreError
from qmix.store import weight_run
from qmix.store.opened import open_store

SPEC = "nf4,0.*=int8,*.2=half"
CONFIG = TINY_CONFIG | {"intermediate_size": 96}


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


def test_runs_killed_at_random_moments_end_as_an_uninterrupted_one(
    checkpoint: Path, whole: dict[str, bytes], runs: Runs, tmp_path: Path
) -> None:
    rng, kills, noted = random.Random(20), 0, []
    store, journal = tmp_path / "s", tmp_path / "s.partial" / "journal.jsonl"
    while kills < 20:
        done = journaled(store) if journal.exists() else set()
        lines = rng.randint(0, 1) and lines_of(journal) + rng.randint(1, 8)  # or before it notes anything
        status = runs(checkpoint, store, SPEC, lines=lines, after=rng.uniform(0, 0.02))
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
    *(("small file", count) for count in (1, 2)),
    ("before the rename", 1),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_run_killed_at_a_point_ends_as_an_uninterrupted_one(
    checkpoint: Path, whole: dict[str, bytes], runs: Runs, tmp_path: Path, point: tuple[str, int]
) -> None:
    store, (at, count) = tmp_path / "s", point
    assert runs(checkpoint, store, SPEC, at=at, count=count) == -9
    assert not store.exists()
    with pytest.raises(StoreError, match="unfinished; run the same `qmix quantize` again to continue"):
        open_store(store)
    assert runs(checkpoint, store, SPEC) == 0
    assert files_of(store) == whole


def test_a_run_killed_between_the_rename_and_the_end_left_a_whole_store(
    checkpoint: Path, whole: dict[str, bytes], runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "s"
    assert runs(checkpoint, store, SPEC, at="after the rename") == -9
    assert files_of(store).keys() == whole.keys() | {"journal.jsonl"}
    assert open_store(store).directory == store
    monkeypatch.setattr(weight_run, "WeightFile", None)  # nothing is read again
    make_store(checkpoint, store, SPEC)
    assert files_of(store) == whole


@pytest.mark.parametrize("lost", [b"", b'{"unit": "0.1", "xx', b'{"weight": "model.norm.weight"}', b"\0" * 300])
def test_a_torn_last_line_of_the_journal_is_dropped(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, runs: Runs, lost: bytes
) -> None:
    store = tmp_path / "s"
    assert runs(checkpoint, store, SPEC, at="digest", count=8) == -9
    with (tmp_path / "s.partial" / "journal.jsonl").open("ab") as file:
        file.write(lost)
    assert runs(checkpoint, store, SPEC, at="journal", count=2) == -9  # it had put its own lines behind
    make_store(checkpoint, store, SPEC)
    assert files_of(store) == whole


SLOW_COMMAND = """
import sys, time
from pathlib import Path
from qmix.store import weight_run
from qmix.store import writer as store_writer
import cli
weight_run.CHUNK_WEIGHTS, store_writer.FLUSH_SECONDS = 2048, 0
rows, journal = weight_run.WeightFile.rows, Path(sys.argv[-3] + ".partial") / "journal.jsonl"

def slow(*args):
    while journal.exists() and len(journal.read_text().splitlines()) > 5:
        time.sleep(0.1)  # to be killed
    time.sleep(0.01)  # so that the journal is written between two of them
    return rows(*args)

weight_run.WeightFile.rows = slow
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
