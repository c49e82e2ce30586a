"""Checksums taken of the bytes on their way to the disk, or read back where they do not come in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from checkpoints import TINY_CONFIG, random_weights, write_checkpoint
from stores import interrupt_store, make_store

from qmix.checkpoint.safetensors_header import TensorInfo
from qmix.store import weight_run
from qmix.store.layout import FileLayout
from qmix.store.opened import Store
from qmix.store.places import RunningDigest, Unit
from qmix.store.writer import StoreWriter

SPEC = "nf4,0.*=int8,*.2=half"
CONFIG = TINY_CONFIG | {"intermediate_size": 96}

# 4096 bytes from 8192 on: 100, 28 of padding, 64, and padding to the end
PARTS = (TensorInfo("codes", "U8", (100,), 8192, 100), TensorInfo("absmax", "U8", (64,), 8320, 64))
UNIT = Unit("0.0", FileLayout("f", b"", {}, 12_288), 8192, 4096, ("w",), PARTS)
CODES, ABSMAX = b"c" * 100, b"a" * 64


def running(*pieces: tuple[bytes, int]) -> str | None:
    digest = RunningDigest(UNIT)
    for data, offset in pieces:
        digest.update(memoryview(data), offset)
    return digest.hexdigest()


def test_a_running_digest_has_the_padding_in_it() -> None:
    whole = xxhash.xxh3_64_hexdigest(CODES + bytes(28) + ABSMAX + bytes(4096 - 192))
    assert running((CODES, 8192), (ABSMAX, 8320)) == whole
    assert running((CODES[:33], 8192), (CODES[33:], 8225), (ABSMAX[:1], 8320), (ABSMAX[1:], 8321)) == whole


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [(CODES, 8192)],  # a part is missing at the end
        [(ABSMAX, 8320)],  # or at the beginning
        [(ABSMAX, 8320), (CODES, 8192)],
        [(CODES[33:], 8225), (CODES[:33], 8192), (ABSMAX, 8320)],
    ],
)
def test_a_running_digest_that_has_not_seen_all_in_order_says_so(pieces: list[tuple[bytes, int]]) -> None:
    assert running(*pieces) is None


@pytest.fixture
def read_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The units that are read back for their checksums."""
    seen: list[str] = []
    digest: Callable[..., str] = StoreWriter.digest
    monkeypatch.setattr(
        StoreWriter, "digest", lambda self, unit, memory: seen.append(unit.name) or digest(self, unit, memory)
    )
    monkeypatch.setattr(weight_run, "CHUNK_WEIGHTS", 2048)
    return seen


def check_checksums(store: Store) -> None:
    """Compare the manifest's checksums with those of the files' bytes."""
    layout = store.layout
    dense = store.path(layout.dense).read_bytes()
    for name, info in layout.dense.tensors.items():
        assert store.dense_checksums[name] == xxhash.xxh3_64_hexdigest(dense[info.offset : info.offset + info.nbytes])
    for layer, row in enumerate(store.record_checksums):
        content = store.path(layout.layer(layer)).read_bytes()
        for expert, checksum in enumerate(row):
            start = layout.record_offset(layer, expert)
            record = content[start : start + layout.record(layer, expert).nbytes]
            assert checksum == xxhash.xxh3_64_hexdigest(record), (layer, expert)


def test_an_uninterrupted_run_reads_nothing_back(tmp_path: Path, read_back: list[str]) -> None:
    """The checkpoint has w1, w2, w3, a record w1, w3, w2."""
    checkpoint = write_checkpoint(tmp_path / "m", random_weights(CONFIG), CONFIG)
    check_checksums(make_store(checkpoint, tmp_path / "s", SPEC))
    assert read_back == []


def test_records_that_lie_in_two_shards_in_another_order_are_read_back(tmp_path: Path, read_back: list[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", random_weights(CONFIG), CONFIG, shards=12)
    check_checksums(make_store(checkpoint, tmp_path / "s", SPEC))
    assert 0 < len(read_back) < 8
    assert len(set(read_back)) == len(read_back)


@pytest.mark.parametrize("after", [20, 37, 60])
def test_a_run_that_goes_on_reads_back_only_what_was_begun(tmp_path: Path, read_back: list[str], after: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "m", random_weights(CONFIG), CONFIG)
    interrupt_store(checkpoint, tmp_path / "s", SPEC, after)
    read_back.clear()
    check_checksums(make_store(checkpoint, tmp_path / "s", SPEC))
    assert len(read_back) <= 1
