"""Places where a store may be written: not over something else, not by two at once, not on a disk that is too small."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoints import make_checkpoint
from stores import files_of, interrupt_store, make_store, refusal

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.errors import StoreError
from qmix.progress import Progress
from qmix.store.opened import open_store, partial_directory
from qmix.store.quantize import quantize
from qmix.store.sources import layout_for
from qmix.units import format_bytes

SPEC = "nf4,0.*=int8,*.2=half"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "m", shards=3)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory) -> dict[str, bytes]:
    """The files of a store of the checkpoint."""
    return files_of(make_store(checkpoint, tmp_path_factory.mktemp("whole") / "s", SPEC).directory)


def test_a_finished_store_is_left_as_it_is(checkpoint: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    store = make_store(checkpoint, tmp_path / "s", SPEC).directory
    before = {path: path.stat() for path in store.iterdir()}
    make_store(checkpoint, store, SPEC)
    assert {path: path.stat() for path in store.iterdir()} == before
    other = make_checkpoint(tmp_path / "other", seed=1)
    assert refusal(other, store) == f"{store}: is the store of another model (m); choose another name"
    another = f"{store}: is a store of this model in another precision; choose another name"
    assert refusal(checkpoint, store, "nf4") == another
    assert refusal(checkpoint, store, SPEC, "fp16") == another
    assert files_of(store) == whole


def test_a_path_that_ends_in_dots_has_its_partial_directory_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "outer" / "inner")
    assert partial_directory(Path()) == tmp_path / "outer" / "inner.partial"
    assert partial_directory(Path("..")) == tmp_path / "outer.partial"
    assert partial_directory(Path("../s")) == tmp_path / "outer" / "s.partial"
    with pytest.raises(StoreError, match=r"^\.: not a qmix store \(qmix.json is missing\)"):
        open_store(Path())


def test_what_passed_through_the_partial_directory_is_not_in_the_store(
    checkpoint: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt_store(checkpoint, tmp_path / "s", SPEC, after=20)
    shards = tmp_path / "s.partial" / "shards" / "deep"
    shards.mkdir(parents=True)
    (shards / "model-00001-of-00003.safetensors").write_bytes(b"left by a killed run")
    make_store(checkpoint, tmp_path / "s", SPEC)
    assert files_of(tmp_path / "s") == whole


@pytest.mark.parametrize("kind", ["directory", "file", "broken link"])
def test_what_is_no_store_is_not_overwritten(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "s"
    if kind == "directory":
        target.mkdir()
        (target / "letter.txt").write_text("dear")
    elif kind == "file":
        target.write_text("dear")
    else:
        target.symlink_to(tmp_path / "nowhere")
    assert refusal(checkpoint, target) == f"{target}: exists and is not a qmix store; choose another name"
    assert {path.name for path in tmp_path.iterdir()} == {"s"}


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_store(checkpoint, tmp_path / "begun", SPEC, after=20)
    needed = layout_for(open_checkpoint(LocalSource(checkpoint)), SPEC, None).total_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    target = tmp_path / "new" / "deep" / "store"
    assert refusal(checkpoint, target, SPEC) == (
        f"{target}: needs {format_bytes(needed)} more on its disk, {format_bytes(needed - 1)} are free; "
        "free some space or choose another disk"
    )
    assert not (tmp_path / "new").exists()
    make_store(checkpoint, tmp_path / "begun", SPEC)  # a part of it is there already, and counts
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    make_store(checkpoint, target, SPEC)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=1m", "qmix-test", str(mount)]
    try:
        subprocess.run(["mount", *options], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not allowed here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("left", [0, 60_000, 150_000])
def test_a_disk_that_fills_up_on_the_way_stops_the_run_and_loses_nothing(
    checkpoint: Path, whole: dict[str, bytes], small_disk: Path, left: int
) -> None:
    opened, store, filler = open_checkpoint(LocalSource(checkpoint)), small_disk / "s", small_disk / "filler"
    layout = layout_for(opened, SPEC, None)

    def fill(progress: Progress) -> None:
        """Someone else takes the disk as soon as the run has begun."""
        if not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))

    with pytest.raises(StoreError) as caught:
        quantize(opened, store, layout, fill)
    assert str(caught.value) == (
        f"{store}: the disk is full; the store takes {layout.total_bytes / 1000:.0f} kB in all. "
        "Free some space and run the same command again to continue"
    )
    assert not store.exists()
    filler.unlink()
    make_store(checkpoint, store, SPEC)
    assert files_of(store) == whole


@pytest.mark.parametrize("target", ["file/s", "file/deeper/s", "/proc/s", "/proc/self/s"])
def test_a_target_that_cannot_be_written_is_named(checkpoint: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("")
    message = refusal(checkpoint, tmp_path / target)
    assert str(tmp_path / target).removesuffix("/s") in message
