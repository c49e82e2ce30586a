"""Memory and limits of a machine, from files made for the test and from a real process."""

from __future__ import annotations

import pytest

from qmix.machine import found as machine


@pytest.fixture
def free_memory(monkeypatch):
    """Make a machine with 10,000 free bytes."""
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10_000}))


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_without_a_cgroup_the_systems_memory_counts(tmp_path, free_memory):
    assert machine.available_memory(tmp_path) == 10_000


@pytest.mark.parametrize(
    ("limit", "room"),
    [("max", 10_000), ("4000", 4000 - 1500 + 700), ("90000", 10_000), ("1000", 200)],
)
def test_a_version_2_limit_counts_less_what_cannot_be_reclaimed(tmp_path, free_memory, limit, room):
    write(tmp_path, "proc/self/cgroup", "0::/user/me\n")
    group = "sys/fs/cgroup/user/me/"
    write(tmp_path, group + "memory.max", limit + "\n")
    write(tmp_path, group + "memory.current", "1500\n")
    write(tmp_path, group + "memory.stat", "anon 800\ninactive_file 600\nactive_file 100\n")
    assert machine.available_memory(tmp_path) == room


def test_a_limit_further_up_counts_too(tmp_path, free_memory):
    write(tmp_path, "proc/self/cgroup", "0::/user/me\n")
    for group, limit in (("user/me", "max"), ("user", "5000")):
        write(tmp_path, f"sys/fs/cgroup/{group}/memory.max", limit)
        write(tmp_path, f"sys/fs/cgroup/{group}/memory.current", "2000")
        write(tmp_path, f"sys/fs/cgroup/{group}/memory.stat", "inactive_file 0")
    assert machine.available_memory(tmp_path) == 3000


def test_a_version_1_limit_counts(tmp_path, free_memory):
    write(tmp_path, "proc/self/cgroup", "5:memory:/job\n3:cpu,cpuacct:/job\n")
    group = "sys/fs/cgroup/memory/job/"
    write(tmp_path, group + "memory.limit_in_bytes", "6000")
    write(tmp_path, group + "memory.usage_in_bytes", "1000")
    write(tmp_path, group + "memory.stat", "cache 900\ninactive_file 300\nactive_file 200")
    assert machine.available_memory(tmp_path) == 5500


def test_pythons_own_memory_is_measured_once_and_kept(tmp_path, monkeypatch):
    first = machine.interpreter_memory(tmp_path)
    assert 100e6 < first < 4e9
    monkeypatch.setattr(machine.subprocess, "run", lambda *a, **k: pytest.fail("measured again"))
    assert machine.interpreter_memory(tmp_path) == first


def test_the_peak_is_at_least_what_is_held():
    held = machine.own_memory()
    block = bytearray(50_000_000)
    assert machine.peak_memory() >= held + 40_000_000
    del block
