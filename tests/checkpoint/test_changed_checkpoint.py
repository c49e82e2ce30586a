"""A checkpoint that changes: never a store of two versions, nor one version's store under the name of another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import TINY_CONFIG, make_checkpoint, random_weights, write_checkpoint, write_fused, write_mistral
from safetensors.torch import load_file, save_file
from stores import files_of, interrupt_store, make_store

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.fingerprint import checkpoint_fingerprint
from qmix.checkpoint.source import LocalSource
from qmix.engine import resolve as prepare
from qmix.engine.resolve import COMPARING, prepare_store
from qmix.errors import CheckpointError, StoreError
from qmix.progress import Progress
from qmix.store.opened import open_store
from qmix.store.quantize import quantize
from qmix.store.sources import layout_for

SPEC = "nf4,0.*=int8,*.2=half"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: Path) -> Path:
    return write_checkpoint(tmp_path / "m", random_weights(TINY_CONFIG), TINY_CONFIG, shards=3, tokenizer=tiny)


def edited_in_place(path: Path) -> None:
    """One byte of a weight, and the time of the last change put back."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-100, 2)
        byte = file.read(1)[0]
        file.seek(-100, 2)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    """Another version of the file under its name, as old as the first."""
    weights, before = load_file(path), path.stat()
    last = max(weights)
    save_file(weights | {last: weights[last] * 1.25}, path.with_name("new"))
    os.utime(path.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("new").replace(path)


def copied(path: Path) -> None:
    """Put the same bytes into a new file."""
    shutil.copyfile(path, path.with_name("new"))
    path.with_name("new").replace(path)


def touched(path: Path) -> None:
    path.touch()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 64)


@pytest.mark.parametrize("change", [edited_in_place, replaced])
@pytest.mark.parametrize("shard", [1, 2, 3])
def test_a_run_does_not_go_on_with_a_checkpoint_that_changed(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], None], shard: int
) -> None:
    interrupt_store(checkpoint, tmp_path / "s", SPEC, after=30)  # of 39 weights, the last in their files' order
    change(checkpoint / f"model-0000{shard}-of-00003.safetensors")
    with pytest.raises(StoreError, match=r"s\.partial: started with another checkpoint; delete that directory"):
        make_store(checkpoint, tmp_path / "s", SPEC)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("change", [edited_in_place, replaced])
def test_a_run_goes_on_where_only_what_it_had_not_read_has_changed(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    interrupt_store(checkpoint, tmp_path / "s", SPEC, after=12)
    change(checkpoint / "model-00003-of-00003.safetensors")
    make_store(checkpoint, tmp_path / "s", SPEC)
    assert files_of(tmp_path / "s") == files_of(make_store(checkpoint, tmp_path / "fresh", SPEC).directory)


@pytest.mark.parametrize("change", [touched, copied])
def test_a_run_goes_on_with_a_checkpoint_that_has_the_same_bytes(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    whole = files_of(make_store(checkpoint, tmp_path / "whole", SPEC).directory)
    interrupt_store(checkpoint, tmp_path / "s", SPEC, after=30)
    for shard in checkpoint.glob("*.safetensors"):
        change(shard)
    make_store(checkpoint, tmp_path / "s", SPEC)
    assert files_of(tmp_path / "s") == whole


def test_a_run_does_not_go_on_with_a_truncated_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    interrupt_store(checkpoint, tmp_path / "s", SPEC, after=30)
    truncated(checkpoint / SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD}: cut short"):
        make_store(checkpoint, tmp_path / "s", SPEC)


@pytest.mark.parametrize("change", [edited_in_place, replaced, touched, copied])
@pytest.mark.parametrize("moment", [1, 20, 39])
def test_a_checkpoint_that_changes_while_it_is_read_makes_no_store(
    checkpoint: Path, tmp_path: Path, change: Callable[[Path], None], moment: int
) -> None:
    opened, calls = open_checkpoint(LocalSource(checkpoint)), iter(range(1, 10**6))

    def meanwhile(progress: Progress) -> None:
        if next(calls) == moment:
            change(checkpoint / SHARD)

    with pytest.raises(CheckpointError, match=f"{SHARD} changed while it was read; run the same command again"):
        quantize(opened, tmp_path / "s", layout_for(opened, SPEC, None), meanwhile)
    assert not (tmp_path / "s").exists()


def test_the_process_that_quantises_refuses_another_checkpoint_than_was_looked_at(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looked_at = prepare.quantize_in_child, {}

    def swapped(opened, *rest) -> None:
        looked_at.update(opened.seen)
        make_checkpoint(tmp_path / "other", shards=3, seed=1)
        for shard in (tmp_path / "other").glob("*.safetensors"):
            shard.replace(checkpoint / shard.name)
        real(opened, *rest)

    monkeypatch.setattr(prepare, "quantize_in_child", swapped)
    with pytest.raises(Exception, match="changed while qmix was starting; run the same command again"):
        prepare_store(checkpoint, SPEC)
    assert looked_at
    monkeypatch.setattr(prepare, "quantize_in_child", real)
    assert prepare_store(checkpoint, SPEC).fingerprint == checkpoint_fingerprint(
        open_checkpoint(LocalSource(checkpoint))
    )


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The quantiser runs here, which is sooner; the stores that it makes."""
    made = []

    def here(opened, model, precision, dtype, clip, directory, on_progress, evict) -> None:
        made.append(directory)
        quantize(opened, directory, layout_for(opened, precision, dtype, clip), on_progress)

    monkeypatch.setattr(prepare, "quantize_in_child", here)
    return made


def test_a_store_is_found_again_by_what_is_unchanged_since(
    checkpoint: Path, in_this_process: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepare_store(checkpoint, SPEC)
    monkeypatch.setattr("qmix.checkpoint.fingerprint.WeightFile", None)  # no weight is read
    assert prepare_store(checkpoint, SPEC) == store
    assert len(in_this_process) == 1


@pytest.mark.parametrize("change", [touched, copied])
def test_a_copy_is_compared_once_and_uses_the_store_that_is_there(
    checkpoint: Path, in_this_process: list[Path], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    store, notes = prepare_store(checkpoint, SPEC), set()
    change(checkpoint / SHARD)
    assert prepare_store(checkpoint, SPEC, on_progress=lambda progress: notes.add(progress.note)) == store
    assert notes == {COMPARING}
    monkeypatch.setattr("qmix.checkpoint.fingerprint.WeightFile", None)
    assert prepare_store(checkpoint, SPEC) == store
    assert len(in_this_process) == 1


@pytest.mark.parametrize("change", [edited_in_place, replaced])
def test_a_changed_checkpoint_gets_a_store_of_its_own(
    checkpoint: Path, in_this_process: list[Path], change: Callable[[Path], None]
) -> None:
    """One changed byte of 29,000: the sampled pages of a file would not have shown it."""
    first = prepare_store(checkpoint, SPEC)
    change(checkpoint / SHARD)
    second = prepare_store(checkpoint, SPEC)
    assert first.directory != second.directory
    assert first.fingerprint != second.fingerprint
    assert open_store(first.directory) == first
    assert len(in_this_process) == 2


def test_a_store_under_the_name_of_another_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, in_this_process: list[Path]
) -> None:
    store = prepare_store(checkpoint, SPEC).directory
    other = write_checkpoint(tmp_path / "other", random_weights(TINY_CONFIG, 1), TINY_CONFIG, tokenizer=checkpoint)
    shutil.rmtree(store)
    make_store(other, store, SPEC)
    with pytest.raises(StoreError, match=r"was not made from .*m as it is now; delete the store"):
        prepare_store(checkpoint, SPEC)


def test_a_fingerprint_is_of_the_weights_whatever_their_files(tmp_path: Path) -> None:
    weights = random_weights(TINY_CONFIG)
    places = [
        write_checkpoint(tmp_path / "one", weights, TINY_CONFIG),
        write_checkpoint(tmp_path / "three", weights, TINY_CONFIG, shards=3),
        write_fused(tmp_path / "fused", weights, TINY_CONFIG),
    ]
    found = [open_checkpoint(LocalSource(place)) for place in places]
    assert len({checkpoint_fingerprint(checkpoint) for checkpoint in found}) == 1
    assert len({checkpoint.identity for checkpoint in found}) == 3
    assert {make_store(place, place.with_suffix(".q"), SPEC).fingerprint for place in places} == {
        checkpoint_fingerprint(found[0])
    }


@pytest.mark.parametrize("precision", ["nf4", "half"])
def test_what_is_read_in_passing_is_what_is_read_for_it(tmp_path: Path, precision: str) -> None:
    """Rows of q and k change places on their way out of a Mistral release; dtypes differ."""
    config = TINY_CONFIG | {"intermediate_size": 96}
    place = write_mistral(tmp_path / "m", random_weights(config), config)
    assert make_store(place, tmp_path / "s", precision).fingerprint == checkpoint_fingerprint(
        open_checkpoint(LocalSource(place))
    )


def test_a_fingerprint_is_remembered_for_files_that_are_as_they_were(checkpoint: Path, tmp_path: Path) -> None:
    known = tmp_path / "known"
    fingerprint = checkpoint_fingerprint(open_checkpoint(LocalSource(checkpoint, known)))
    again = open_checkpoint(LocalSource(checkpoint, known))
    assert again.known_fingerprint == fingerprint
    (file,) = known.iterdir()
    file.write_bytes(b"{")
    assert open_checkpoint(LocalSource(checkpoint, known)).known_fingerprint is None
    edited_in_place(checkpoint / SHARD)
    changed = open_checkpoint(LocalSource(checkpoint, known))
    assert changed.known_fingerprint is None
    assert checkpoint_fingerprint(changed) != fingerprint


def test_a_tokenizer_that_was_damaged_in_a_store_is_brought_back(checkpoint: Path, tmp_path: Path) -> None:
    store = make_store(checkpoint, tmp_path / "s", SPEC)
    (store.directory / "generation_config.json").write_text('{"temperature": 0.5}')
    (store.directory / "tokenizer.json").write_text("{}")
    (store.directory / "tokenizer_config.json").unlink()
    again = make_store(checkpoint, tmp_path / "s", SPEC)
    assert again.small_files == store.small_files
    assert (store.directory / "generation_config.json").read_text() == '{"temperature": 0.5}'  # it is its user's


def test_a_store_takes_what_changed_of_its_checkpoints_small_files(
    checkpoint: Path, in_this_process: list[Path]
) -> None:
    """A corrected tokenizer or template is used without quantising anew."""
    before = prepare_store(checkpoint, SPEC)
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.5}')
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    after = prepare_store(checkpoint, SPEC)
    assert (after.directory / "chat_template.jinja").read_text() == template.read_text()
    assert (after.directory / "generation_config.json").is_file()
    assert after.digest != before.digest
    assert after.parts["weights"] == before.parts["weights"]
    template.unlink()
    assert not (prepare_store(checkpoint, SPEC).directory / "chat_template.jinja").exists()
    assert len(in_this_process) == 1
