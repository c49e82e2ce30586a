"""The probes of this machine: the bytes that they read and their results, not its speed."""

from __future__ import annotations

import math

import pytest
import torch
from checkpoints import make_checkpoint
from stores import make_store

from qmix.disk.reads import Reader
from qmix.machine import ceilings, probes
from qmix.machine.probes import DiskProbe, MemoryProbe, Rate


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("probes")
    return make_store(make_checkpoint(directory / "checkpoint"), directory / "store")


def sane(rate: Rate) -> bool:
    slowest, fastest = rate.spread
    return 0 < slowest <= rate.median <= fastest < math.inf and bool(rate.how)


def test_median_and_spread():
    rate = Rate((3.0, 1.0, 2.0), "a way")
    assert (rate.median, rate.spread) == (2.0, (1.0, 3.0))
    assert rate.to_json() == {"median": 2.0, "rounds": (3.0, 1.0, 2.0), "how": "a way"}


def test_memory_and_matmul_rates():
    assert sane(probes.memory_read(2**22, rounds=3))
    assert sane(probes.matmul(rounds=2, sizes=(64, 128)))
    memory = MemoryProbe(torch.zeros(2**20, dtype=torch.uint8))
    best = [memory.slice() for _ in range(3)]
    assert sane(memory.rate())
    assert memory.rate().spread[1] <= max(best)


def test_a_product_that_would_take_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(probes, "LONGEST_PRODUCT", 0.0)
    assert probes.matmul(rounds=1, sizes=(32, 10**9)).how == "bf16, 32 x 32"


@pytest.mark.parametrize("memory_limit", [4 * 8192, 2**20])
def test_a_slice_reads_whole_pages_inside_records(store, monkeypatch, memory_limit):
    """A slice reads the requested bytes from the whole store, in reads that fit the memory limit."""
    submitted, submit = [], Reader.submit

    def noted(self, read, ahead=False):
        submitted.append((read.file.path, read.offset, len(read.view)))
        return submit(self, read, ahead)

    monkeypatch.setattr(Reader, "submit", noted)
    layout = store.layout
    with DiskProbe.of_store(store, memory_limit) as disk:
        assert 4 * disk.slot_bytes <= memory_limit
        assert disk.slice(10**5) > 0
        assert disk.slice(10**5) > 0
        assert len(disk.rate().rounds) == 2
        assert sane(disk.rate())
    assert 2 * 10**5 <= sum(nbytes for *_, nbytes in submitted) < 2 * (10**5 + disk.slot_bytes)
    assert len({path for path, *_ in submitted}) > 1
    records = [
        (store.path(layout.layer(layer)), layout.record_offset(layer, expert), layout.record(layer, expert).nbytes)
        for layer in range(store.geometry.num_layers)
        for expert in range(store.geometry.num_experts)
    ]
    for path, offset, nbytes in submitted:
        assert offset % 4096 == nbytes % 4096 == 0
        assert any(
            path == file and start <= offset and offset + nbytes <= start + size for file, start, size in records
        )


def test_a_small_store_is_not_read_forever(store, monkeypatch):
    read = []
    monkeypatch.setattr(probes, "Read", lambda file, buffer, *rest: read.append(len(buffer)) or Done(buffer))
    monkeypatch.setattr(Reader, "submit", lambda self, read: read)
    with DiskProbe.of_store(store) as disk:
        disk.slice(10**15)
    assert disk.total * 8 <= sum(read) < disk.total * 8 + disk.slot_bytes


class Done:
    """A read that takes no time."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.view, self.done = buffer, self

    def result(self) -> None:
        pass


def test_all_three_in_one_call(store, monkeypatch):
    memory_read, matmul = probes.memory_read, probes.matmul
    monkeypatch.setattr(ceilings, "memory_read", lambda: memory_read(2**22))
    monkeypatch.setattr(ceilings, "matmul", lambda: matmul(sizes=(64,)))
    found = ceilings.probe(store)
    assert found.disk_read is not None
    assert all(map(sane, (found.memory_read, found.disk_read, found.matmul)))


def test_a_process_of_its_own_gives_what_needs_no_store():
    found = ceilings.probe_in_child()
    assert found.disk_read is None
    assert sane(found.memory_read)
    assert sane(found.matmul)
