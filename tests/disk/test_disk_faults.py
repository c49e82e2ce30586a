"""A disk that fails: every read is tried twice, and what fails twice is told with its file and bytes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import faults
import pytest
from checkpoints import make_checkpoint
from faults import Fault
from stores import make_pool, make_store

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.fingerprint import checkpoint_fingerprint
from qmix.checkpoint.source import LocalSource
from qmix.engine.checkpoint_weights import CheckpointWeights
from qmix.errors import CheckpointError, QmixError, StoreError, mending
from qmix.model.dense import read_dense
from qmix.model.gpu.devices import open_devices
from qmix.store.opened import Store, open_store
from qmix.store.profile import write_profile

LAYER = "experts-00001.safetensors"
DENSE = "dense.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("disk-faults") / "m")


@pytest.fixture(scope="module")
def store(checkpoint: Path, tmp_path_factory) -> Store:
    return make_store(checkpoint, tmp_path_factory.mktemp("disk-faults") / "s")


@pytest.fixture
def befall(monkeypatch):
    """Let faults befall the calls of this process."""
    faults.install(monkeypatch)
    monkeypatch.setattr(faults, "installed", [])

    def begin(*those: Fault) -> None:
        faults.installed.extend(those)

    return begin


def use(store: Store, layer: int, expert: int) -> None:
    pool = make_pool(store, 2)
    try:
        list(pool.get(layer, [expert]))
    finally:
        pool.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ETIMEDOUT, 0])
def test_a_record_that_could_not_be_read_or_was_wrong_once_is_read_once_more(store, befall, code):
    fault = Fault("preadv", LAYER, code, times=1, offset=store.layout.record_offset(1, 2) + 5)
    befall(fault)
    use(store, 1, 2)
    assert fault.seen == 2


def test_a_record_that_the_disk_fails_twice_is_told_with_its_bytes(store, befall):
    first = store.layout.record_offset(1, 2)
    last = first + store.layout.record(1, 2).nbytes - 1
    fault = Fault("preadv", LAYER, errno.EIO, offset=first)
    befall(fault)
    with pytest.raises(StoreError) as caught:
        use(store, 1, 2)
    assert fault.seen == 2
    assert str(caught.value) == (
        f"{store.directory / LAYER}: Input/output error at bytes {first} to {last}, read twice; "
        f"the disk failed there: see `dmesg`; {mending(store.directory)}"
    )


def test_a_record_that_is_wrong_twice_is_told_with_its_bytes(store, befall):
    first = store.layout.record_offset(1, 2)
    last = first + store.layout.record(1, 2).nbytes - 1
    fault = Fault("preadv", LAYER, 0, offset=first + 77)
    befall(fault)
    with pytest.raises(StoreError) as caught:
        use(store, 1, 2)
    assert fault.seen == 2
    assert str(caught.value) == (
        f"{store.directory / LAYER}: the record of expert 2 (bytes {first} to {last}) is damaged; "
        f"{mending(store.directory)}"
    )


def read_to_device(store: Store) -> None:
    host = open_devices([])["cpu"]
    read_dense(store, lambda name: host)


@pytest.mark.parametrize("read", [read_dense, read_to_device])
@pytest.mark.parametrize("code", [errno.EIO, 0])
def test_dense_weights_are_read_once_more(store, befall, read, code):
    info = store.layout.dense.tensors["model.norm.weight"]
    fault = Fault("preadv", DENSE, code, times=1, offset=info.offset + 1)
    befall(fault)
    read(store)
    assert fault.seen >= 2
    befall(Fault("preadv", DENSE, code, offset=info.offset + 1))
    with pytest.raises(StoreError) as caught:
        read(store)
    assert str(caught.value).startswith(f"{store.directory / DENSE}: ")
    assert str(caught.value).endswith(mending(store.directory))
    if not code:
        assert f"model.norm.weight (bytes {info.offset} to {info.offset + info.nbytes - 1})" in str(caught.value)


@pytest.mark.parametrize("left", [0, 4096, 5000])
def test_a_file_cut_short_while_it_is_in_use_says_where_it_ends(store, tmp_path, left):
    copy = shutil.copytree(store.directory, tmp_path / "s")
    opened = open_store(copy)
    first = store.layout.record_offset(1, 3)
    os.truncate(copy / LAYER, first + left)
    with pytest.raises(StoreError) as caught:
        use(opened, 1, 3)
    assert f"{copy / LAYER}: cut short, ends at byte {first + left}" in str(caught.value)
    assert mending(copy) in str(caught.value)


def quantise(checkpoint: Path, directory: Path) -> None:
    make_store(checkpoint, directory / "s")


def run_layerwise(checkpoint: Path, directory: Path) -> None:
    with CheckpointWeights(open_checkpoint(LocalSource(checkpoint)), "bf16", []) as weights:
        weights.routers()


def fingerprint(checkpoint: Path, directory: Path) -> None:
    assert checkpoint_fingerprint(open_checkpoint(LocalSource(checkpoint)))


@pytest.mark.parametrize("work", [quantise, run_layerwise, fingerprint])
def test_a_checkpoint_that_cannot_be_read_is_blamed_by_its_file(checkpoint, tmp_path, befall, work):
    weights = open_checkpoint(LocalSource(checkpoint)).weights
    place = weights["model.layers.1.block_sparse_moe.gate.weight"].offset
    once = Fault("preadv", "model.safetensors", errno.EIO, times=1, offset=place)
    befall(once)
    work(checkpoint, tmp_path)
    assert once.seen >= 2
    befall(Fault("preadv", "model.safetensors", errno.EIO, offset=place))
    with pytest.raises(CheckpointError) as caught:
        work(checkpoint, tmp_path / "again")
    message = str(caught.value)
    assert message.startswith(f"{checkpoint / 'model.safetensors'}: Input/output error at bytes ")
    assert message.count(str(checkpoint)) == 1
    assert "dmesg" in message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "ftruncate"])
def test_a_full_disk_leaves_no_store_and_the_same_call_goes_on(checkpoint, tmp_path, befall, code, call):
    fault = Fault(call, LAYER, code, times=1)
    befall(fault)
    with pytest.raises(QmixError, match=r"s: the disk is full; .*Free some space and run the same command"):
        quantise(checkpoint, tmp_path)
    assert fault.seen >= 1
    assert not (tmp_path / "s").exists()
    quantise(checkpoint, tmp_path)
    assert open_store(tmp_path / "s")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_answers_on_a_full_disk_are_whole_lines_and_what_to_do_is_told(tmp_path, befall, code):
    from qmix.files import LineFile

    with LineFile(tmp_path / "out", "") as file:
        assert list(file.lines()) == []
        file.append([b"first\n"])
        befall(Fault("fsync", "out", code, times=1))
        with pytest.raises(QmixError, match=r"out: .*; free some space\. Run the same command again to continue"):
            file.append([b"second\n"])
        assert (tmp_path / "out").read_bytes() == b"first\n"
        file.append([b"second\n"])
    assert (tmp_path / "out").read_bytes() == b"first\nsecond\n"


def test_a_profile_on_a_full_disk_leaves_the_one_that_was_there(tmp_path, befall):
    (tmp_path / "profile.json").write_text("before")
    befall(Fault("fsync", "", errno.ENOSPC))
    with pytest.raises(
        QmixError, match=r"profile\.json: No space left on device; .* free some space, or choose another path"
    ):
        write_profile(tmp_path / "profile.json", {"schema": "x"})
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    assert (tmp_path / "profile.json").read_text() == "before"
