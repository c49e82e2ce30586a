"""`qmix verify` finds everything that is damaged; `qmix quantize STORE` brings back the bytes that were there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import pytest
from checkpoints import make_checkpoint
from command import Commands
from faults import Fault
from stores import files_of, make_store

from qmix.checkpoint import rows
from qmix.store.mend import mend
from qmix.store.opened import Store, open_store
from qmix.store.verify import verify_store

SPEC = "nf4,1.*=int8,*.3=half"
LAYER = "experts-00001.safetensors"
DENSE = "dense.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    made = make_checkpoint(tmp_path_factory.mktemp("verify") / "m", shards=3)
    (made / "tokenizer.json").write_text('{"words": ["a", "b"]}')
    (made / "generation_config.json").write_text("{}")
    return made


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory) -> Store:
    return make_store(checkpoint, tmp_path_factory.mktemp("verify") / "s", SPEC)


@pytest.fixture
def store(made: Store, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(made.directory, tmp_path / "s")


@pytest.fixture(scope="module")
def qmix(tmp_path_factory) -> Iterator[Commands]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QMIX_FAULTY_DISK", "1")
        running = Commands(tmp_path_factory.mktemp("commands"), "faults")
    yield running
    running.close()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


def record_place(store: Store, expert: int) -> tuple[int, int]:
    first = store.layout.record_offset(1, expert)
    return first, first + store.layout.record(1, expert).nbytes - 1


def damage_some(directory: Path, store: Store) -> list[str]:
    """Two records, a dense tensor and the tokenizer; returns what verifying is to say of them."""
    lines = []
    for expert, at in ((0, 3), (3, -1)):
        first, last = record_place(store, expert)
        flip(directory / LAYER, first + at if at >= 0 else last)
        lines.append(f"{LAYER}: the record of expert {expert}, bytes {first} to {last}: wrong checksum")
    info = store.layout.dense.tensors["model.norm.weight"]
    flip(directory / DENSE, info.offset + 9)
    place = f"bytes {info.offset} to {info.offset + info.nbytes - 1}"
    lines.insert(0, f"{DENSE}: the tensor model.norm.weight, {place}: wrong checksum")
    (directory / "tokenizer.json").write_text('{"words": ["b", "a"]}')
    return ["tokenizer.json: the file: changed since the store was made", *lines]


def test_a_store_that_is_well_is_one_line_of_figures(qmix, store):
    done = qmix("verify", store)
    assert done.status == 0
    (line,) = done.out.splitlines()
    assert line.startswith(f"{store}: no damage found, ")
    assert " in 25 parts and 3 small files, read at " in line
    found = json.loads(qmix("verify", store, "--json").out)
    whole = sum(part.nbytes for part in verify_store_parts(open_store(store)))
    assert (found["schema"], found["bytes"], found["damaged"]) == ("qmix-verify-1", whole, [])
    assert found["bytes_per_second"] == pytest.approx(found["bytes"] / found["seconds"])


def verify_store_parts(store: Store) -> list:
    layout = store.layout
    return [*layout.dense.tensors.values(), *(layout.record(*key) for key in layout.experts)]


def test_everything_damaged_is_told_with_file_and_bytes(qmix, store, made):
    expected = damage_some(store, made)
    done = qmix("verify", store)
    assert (done.status, done.out.splitlines()) == (1, expected)
    assert done.lines[-1] == f"qmix: {store}: 4 damaged parts; repair it with `qmix quantize {store}`"
    content = qmix("verify", store, "--json")
    assert content.status == 1
    damaged = json.loads(content.out)["damaged"]
    assert [each["file"] for each in damaged] == ["tokenizer.json", DENSE, LAYER, LAYER]
    assert damaged[2]["bytes"] == list(record_place(made, 0))


def read_of_checkpoint(monkeypatch) -> list[str]:
    """The names of the tensors that are read from checkpoints from now on."""
    names: list[str] = []
    real = rows.WeightFile.rows

    def noting(self, weight, *arguments, **options):
        names.append(weight.key)
        return real(self, weight, *arguments, **options)

    monkeypatch.setattr(rows.WeightFile, "rows", noting)
    return names


def test_only_what_is_damaged_is_made_anew_and_the_bytes_are_those_that_were_there(store, made, monkeypatch):
    expected = damage_some(store, made)
    names = read_of_checkpoint(monkeypatch)
    done = mend(store)
    experts = [f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight" for e in (0, 3) for w in ("w1", "w2", "w3")]
    assert set(names) == {"model.norm.weight", *experts}
    assert [str(damage) for damage in done.found.damages] == expected
    assert done.units == 3
    assert files_of(store) == files_of(made.directory)


def test_the_command_mends_and_says_what_it_did(qmix, store, made, checkpoint):
    expected = damage_some(store, made)
    done = qmix("quantize", store)
    assert (done.status, done.out) == (0, "")
    assert done.lines[-5:] == [*expected, f"{store}: repaired 4 parts from {checkpoint}"]
    assert files_of(store) == files_of(made.directory)
    again = qmix("quantize", store)
    assert (again.status, again.lines[-1]) == (0, f"{store}: no damage found")


def cut(path: Path, size: int) -> None:
    os.truncate(path, size)


WHOLE_FILES: dict[str, Callable[[Path], object]] = {
    "a layer is missing": lambda store: (store / LAYER).unlink(),
    "the dense weights are missing": lambda store: (store / DENSE).unlink(),
    "a layer is cut short": lambda store: cut(store / LAYER, 70_001),
    "a layer is cut to nothing": lambda store: cut(store / LAYER, 0),
    "the dense weights are cut short": lambda store: cut(store / DENSE, 9_000),
    "a layer is too long": lambda store: cut(store / LAYER, (store / LAYER).stat().st_size + 5),
    "a header": lambda store: flip(store / LAYER, 100),
    "the config is missing": lambda store: (store / "config.json").unlink(),
    "the config is another": lambda store: (store / "config.json").write_text("{}"),
    "a digit of the config": lambda store: (store / "config.json").write_text(
        (store / "config.json").read_text().replace("128", "129")
    ),
    "config and a record": lambda store: ((store / "config.json").unlink(), flip(store / LAYER, 5000)),
    "config and a header": lambda store: ((store / "config.json").unlink(), flip(store / LAYER, 9)),
    "the tokenizer is missing": lambda store: (store / "tokenizer.json").unlink(),
    "all at once": lambda store: (
        (store / "config.json").unlink(), (store / DENSE).unlink(), cut(store / LAYER, 70_001),
        flip(store / "experts-00000.safetensors", 5000), (store / "tokenizer.json").unlink(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", WHOLE_FILES)
def test_what_does_not_even_open_is_told_as_far_as_possible_and_mended(qmix, store, made, fault):
    WHOLE_FILES[fault](store)
    told = qmix("verify", store)
    assert told.status == 1, told.err
    assert told.out
    done = qmix("quantize", store)
    assert done.status == 0, done.err
    assert files_of(store) == files_of(made.directory)
    assert qmix("verify", store).status == 0


def test_a_missing_config_does_not_hide_a_damaged_record(qmix, store, made):
    expected = damage_some(store, made)
    (store / "config.json").unlink()
    assert qmix("verify", store).out.splitlines()[1:] == expected


def test_a_damaged_manifest_is_told_and_what_cannot_be_checked(qmix, store):
    text = (store / "qmix.json").read_text()
    (store / "qmix.json").write_text(text.replace("int8", "half", 1))
    done = qmix("verify", store)
    assert done.status == 1
    first, *rest = done.out.splitlines()
    assert first.startswith("qmix.json: the manifest: damaged, or changed")
    assert f"{LAYER}: not checked: the store has no checksum of it" in rest
    assert done.lines[-1].endswith("delete the store and quantize the model again")
    assert qmix("quantize", store).status == 1


def test_a_file_that_is_none_of_the_stores_is_set_aside(qmix, store, made):
    (store / "added_tokens.json").write_text("{}")
    (store / "profile.json").write_text("{}")
    assert len(qmix("verify", store).out.splitlines()) == 2
    assert qmix("quantize", store).status == 0
    assert files_of(store).keys() - files_of(made.directory).keys() == {"added_tokens.json.aside", "profile.json.aside"}
    assert open_store(store)


@pytest.mark.parametrize("seed", range(5))
def test_any_flipped_bits_are_found_and_mended(store, made, seed):
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 6)):
        path = store / draw.choice([DENSE, LAYER, "experts-00000.safetensors"])
        flip(path, draw.randrange(path.stat().st_size))
    before = files_of(store)
    found = mend(store).found
    after = files_of(store)
    assert verify_store(store).damages == ()
    whole = files_of(made.directory)
    changed = [name for name in whole if before[name] != whole[name]]
    assert {damage.file for damage in found.damages} <= set(changed)
    for file in made.layout.files:  # padding has no checksum
        for name, info in file.tensors.items():
            span = slice(info.offset, info.offset + info.nbytes)
            assert after[file.name][span] == whole[file.name][span], name


def test_bytes_that_the_disk_cannot_read_are_told_and_nothing_else(qmix, store, made):
    first, last = record_place(made, 2)
    fault = Fault("preadv", LAYER, errno.EIO, offset=first + 4096)
    done = qmix("verify", store, **faults.environment(fault))
    assert done.status == 1
    assert done.out.splitlines() == [
        f"{LAYER}: the record of expert 2, bytes {first} to {last}: "
        f"Input/output error at bytes {first} to {last}, read twice"
    ]
    once = Fault("preadv", LAYER, 0, times=1, offset=first + 4096)
    assert qmix("verify", store, **faults.environment(once)).status == 0


def test_a_checkpoint_that_is_gone_or_another_is_one_line_and_its_new_place_does(qmix, store, made, tmp_path):
    moved = make_checkpoint(tmp_path / "there", shards=3)
    (moved / "tokenizer.json").write_text('{"words": ["a", "b"]}')
    origin = store / "source.json"
    origin.write_text(json.dumps({"location": str(tmp_path / "gone")}))
    damage_some(store, made)
    gone = qmix("quantize", store)
    assert gone.status == 1
    assert gone.lines[-1].startswith(f"qmix: {store}: the checkpoint that it was made from, {tmp_path}/gone, cannot be")
    assert gone.lines[-1].endswith("give the checkpoint with --from")
    other = make_checkpoint(tmp_path / "other", shards=3, seed=1)
    (other / "tokenizer.json").write_text('{"words": ["a", "b"]}')
    refused = qmix("quantize", store, "--from", other)
    assert refused.status == 1
    assert "its weights are not the ones that" in refused.lines[-1]
    assert len(qmix("verify", store).out.splitlines()) == 3  # the tokenizer was copied, the weights are no worse
    assert qmix("quantize", store, "--from", moved).status == 0
    whole = files_of(made.directory) | {"source.json": origin.read_bytes()}
    assert files_of(store) == whole


@pytest.mark.parametrize("expert", [0, 3])
def test_a_run_that_is_stopped_leaves_the_store_no_worse(qmix, store, made, expert):
    damage_some(store, made)
    fault = Fault("pwrite", LAYER, errno.ENOSPC, offset=record_place(made, expert)[0])
    bad = {damage.part for damage in verify_store(store).damages if damage.part}
    stopped = qmix("quantize", store, **faults.environment(fault))
    assert stopped.status == 1
    assert "disk is full" in stopped.lines[-1]
    assert {damage.part for damage in verify_store(store).damages} <= bad
    assert qmix("quantize", store).status == 0
    assert files_of(store) == files_of(made.directory)


def test_options_that_mending_has_no_use_for_are_refused(qmix, store):
    for option in (("--precision", "int8"), ("--clip",), ("--dtype", "bf16"), ("--evict",)):
        done = qmix("quantize", store, *option)
        assert (done.status, done.lines[-1]) == (
            2, f"qmix: {option[0]}: a store is repaired as it was made; leave it out"
        )  # fmt: skip
    assert qmix("quantize", store, "elsewhere", "--from", "x").status == 2
    assert qmix("quantize", "nowhere").status == 2
