"""Two processes that make the same store at once: one waits for the other, says so, and uses what it leaves."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from stores import files_of, journaled, make_store

SPEC = "nf4,0.*=int8,*.2=half"
LIMIT_SECONDS = 120
HELD = """
import sys, time
from pathlib import Path
from qmix.store import weight_run
from qmix.store import writer as store_writer
import cli
weight_run.CHUNK_WEIGHTS, store_writer.FLUSH_SECONDS = 2048, 0
rows, calls, gate = weight_run.WeightFile.rows, iter(range(10**9)), Path(sys.argv.pop(1))

def held(*args):
    while next(calls) > 40 and not gate.exists():
        time.sleep(0.01)
    return rows(*args)

weight_run.WeightFile.rows = held
"""
COMMAND = HELD + "cli.main()"
FIRST_USE = """
import sys
from qmix.engine.resolve import prepare_store
store = prepare_store(sys.argv[1], sys.argv[2], on_progress=lambda progress: print(progress.note, file=sys.stderr))
print(store.directory)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny: Path) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "m"
    return write_checkpoint(directory, random_weights(TINY_CONFIG), TINY_CONFIG, shards=3, tokenizer=tiny)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory) -> dict[str, bytes]:
    return files_of(make_store(checkpoint, tmp_path_factory.mktemp("whole") / "s", SPEC).directory)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts Python with arguments; its stderr goes to a file of that name."""
    running = []

    def start(name: str, *argv: str | Path) -> subprocess.Popen:
        with (tmp_path / name).open("wb") as log:
            running.append(subprocess.Popen([sys.executable, *argv], stderr=log, stdout=subprocess.PIPE, text=True))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + LIMIT_SECONDS
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.02)


def noted(store: Path) -> int:
    journal = store.with_name(store.name + ".partial") / "journal.jsonl"
    return len(journaled(store)) if journal.exists() else 0


@pytest.mark.parametrize("ending", ["done", "killed"])
def test_a_second_command_waits_for_the_first_and_says_so(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, start: Callable, ending: str
) -> None:
    store, gate = tmp_path / "s", tmp_path / "gate"
    arguments = ["quantize", checkpoint, store, "--precision", SPEC]
    first = start("first", "-c", COMMAND, gate, *arguments)
    wait_for(lambda: noted(store) > 3)
    second = start("second", "-m", "cli", *arguments)
    wait_for(lambda: f"waiting for another qmix process that is writing {store}" in (tmp_path / "second").read_text())
    assert second.poll() is None
    if ending == "killed":
        first.kill()  # what it noted is gone on from
    else:
        gate.touch()
        assert first.wait(LIMIT_SECONDS) == 0
    assert second.wait(LIMIT_SECONDS) == 0, (tmp_path / "second").read_text()
    assert files_of(store) == whole
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["s"]


def test_two_first_uses_of_a_model_make_one_store(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path, start: Callable, isolated_home: Path
) -> None:
    first = start("first", "-c", FIRST_USE, checkpoint, SPEC)
    second = start("second", "-c", FIRST_USE, checkpoint, SPEC)
    places = {process.communicate(timeout=LIMIT_SECONDS)[0].strip() for process in (first, second)}
    assert (first.returncode, second.returncode) == (0, 0), (tmp_path / "second").read_text()
    (place,) = places
    assert files_of(Path(place)) == whole
    caches = [path for path in (isolated_home / "cache" / "qmix").iterdir() if path.name != "checkpoints"]
    assert caches == [Path(place)]


def test_a_qmix_that_lies_in_the_working_directory_is_not_taken(tmp_path, tiny, monkeypatch):
    """A user who installs from a checkout runs the first command in it: the child is of the qmix that was installed."""
    from qmix.engine.resolve import prepare_store

    package = tmp_path / "qmix"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('another qmix')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert prepare_store("tiny").directory.is_dir()
