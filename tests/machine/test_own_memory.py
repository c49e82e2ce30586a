"""Python's own part of a budget: measured again when anything installed changes, and reported when it was wrong."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

from qmix.machine import found as machine
from qmix.machine import measured as machine_profile
from qmix.machine.rates import Rates

ODD = {
    "a list": b"[1, 2]",
    "text for a number": b'{"bytes": "x", "rates": {"disk_read": "x"}}',
    "beyond a float": b'{"bytes": 1e999, "rates": {"disk_read": 1e999}}',
    "5000 digits": b'{"bytes": %s, "rates": {"disk_read": %s}}' % (b"9" * 5000, b"9" * 5000),
    "below zero": b'{"bytes": -1, "rates": {"disk_read": -1}}',
    "not a number": b'{"bytes": NaN, "rates": {"disk_read": NaN}}',
    "null": b"null",
    "deep": b"[" * 100_000,
    "deep in a field": b'{"bytes": 5, "x": ' + b"[" * 100_000,
    "not UTF-8": b'{"bytes": 300000000, "x": "\xff\xfe"}',
    "cut short": b'{"bytes": 30',
    "empty": b"",
    "zeros": bytes(64),
}


@pytest.fixture
def measured(monkeypatch) -> list[list[str]]:
    """Collect the commands that measure; each finds 300 MB."""
    commands = []

    def run(command, **options):
        commands.append(command)
        return type("Done", (), {"returncode": 0, "stdout": "300000000\n"})

    monkeypatch.setattr(machine.subprocess, "run", run)
    return commands


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_damaged_measurement_is_set_aside_and_made_anew(tmp_path, measured, content):
    path = machine.interpreter_path(tmp_path)
    path.write_bytes(content)
    for _ in range(2):
        assert machine.interpreter_memory(tmp_path) == 300_000_000
    assert len(measured) == 1
    assert json.loads(path.read_bytes()) == {"bytes": 300_000_000}
    assert sorted(tmp_path.iterdir()) == sorted([path, path.with_name(f"{path.name}.unreadable")])


def test_a_directory_in_the_measurements_place_is_set_aside(tmp_path, measured):
    path = machine.interpreter_path(tmp_path)
    (path / "deep").mkdir(parents=True)
    for _ in range(2):
        assert machine.interpreter_memory(tmp_path) == 300_000_000
    assert len(measured) == 1


def test_a_cache_that_cannot_be_written_costs_a_measurement(tmp_path, measured):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert machine.interpreter_memory(tmp_path / "file" / "cache") == 300_000_000
    assert len(measured) == 2


@pytest.mark.parametrize("content", ODD.values(), ids=ODD)
def test_a_damaged_machine_profile_is_set_aside_and_made_anew(tmp_path, content):
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    assert machine_profile.measured_rates(path) == Rates()
    assert [each.name for each in tmp_path.iterdir()] == ["machine.json.unreadable"]
    machine_profile.keep({"disk_read": 1e9}, path=path)
    assert machine_profile.measured_rates(path).disk_read == 1e9
    assert {each.name for each in tmp_path.iterdir()} == {"machine.json", "machine.json.unreadable"}


@pytest.mark.parametrize("rate", ["0", "-1", "1e999", "1e300", "1e-300", "9" * 5000, '"x"', "null", "[]", "true"])
def test_one_rate_that_is_none_sets_the_profile_aside(tmp_path, rate):
    """A plan divides by rates, so only positive numbers will do."""
    path = tmp_path / "machine.json"
    machine_profile.keep({"disk_read": 123456789.0}, path=path)
    path.write_text(path.read_text().replace("123456789.0", rate))
    assert machine_profile.measured_rates(path) == Rates()
    assert not path.exists()


def test_what_is_installed_later_is_measured_again(tmp_path, measured, monkeypatch):
    """Each change in a directory of packages gives another key, and undoing it the first one."""
    packages, cache = tmp_path / "packages", tmp_path / "cache"
    (packages / "first-1.0.dist-info").mkdir(parents=True)
    (packages / "first.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    keys = {machine.interpreter_path(cache)}

    def changed() -> None:
        before = len(keys)
        keys.add(machine.interpreter_path(cache))
        assert len(keys) == before + 1

    (packages / "extra-2.0.dist-info").mkdir()
    changed()
    (packages / "extra-2.0.dist-info").rename(packages / "extra-2.1.dist-info")
    changed()
    os.utime(packages / "extra-2.1.dist-info", (1, 1))  # the same version, installed again
    changed()
    (packages / "hook.pth").write_text("import first\n")
    changed()
    (packages / "sitecustomize.py").write_text("")
    changed()
    (packages / "notes.txt").write_text("")
    (packages / "first.py").touch()
    assert machine.interpreter_path(cache) in keys
    for name in ("hook.pth", "sitecustomize.py"):
        (packages / name).unlink()
    (packages / "extra-2.1.dist-info").rmdir()
    (packages / "notes.txt").unlink()
    assert machine.interpreter_path(cache) in keys
    machine.interpreter_memory(cache)
    (packages / "extra-3.0.dist-info").mkdir()
    machine.interpreter_memory(cache)
    assert len(measured) == 2


def test_kernels_are_compiled_beforehand_for_each_processor_and_state_of_the_sources(tmp_path, monkeypatch):
    """Otherwise a run would compile them within its budget. Without kernels nothing depends on either."""
    without, keys = machine.interpreter_path(tmp_path), {machine.interpreter_path(tmp_path, kernels=True)}
    monkeypatch.setattr(machine, "source_digest", lambda: "edited")
    keys.add(machine.interpreter_path(tmp_path, kernels=True))
    monkeypatch.setattr(machine, "cpu_name", lambda: "another processor")
    keys.add(machine.interpreter_path(tmp_path, kernels=True))
    assert len(keys) == 3
    assert machine.interpreter_path(tmp_path) == without not in keys


@pytest.mark.slow
def test_a_python_that_has_grown_is_measured_again_in_a_real_process(tmp_path, monkeypatch):
    """Install a package that takes 80 MB when Python starts."""
    cache, packages = tmp_path / "cache", tmp_path / "packages"
    packages.mkdir()
    before = machine.interpreter_memory(cache)
    (packages / "sitecustomize.py").write_text("held = bytearray(b'x') * 80_000_000\n")
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.syspath_prepend(str(packages))
    assert machine.interpreter_memory(cache) >= before + 70_000_000
    assert len(list(cache.iterdir())) == 2


@pytest.fixture
def believed_small(first_use, tmp_path, monkeypatch):
    """Make a cache in which Python takes 2 MiB, so that any budget seems large enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "transformers_is_whole", lambda: False)  # as in a command
    for kernels in (False, True):
        path = machine.interpreter_path(kernels=kernels)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"bytes": 2097152}')
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt": "Click the"}\n')
    return first_use.store


COMMANDS = {
    "generate": ("generate", "Click the", "-m", "STORE", "--max-new-tokens", "2"),
    "chat": ("chat", "STORE", "--max-new-tokens", "2"),
    "batch": ("batch", "in.jsonl", "-m", "STORE", "-o", "out.jsonl", "--max-new-tokens", "2"),
    "bench": ("bench", "STORE", "-p", "0", "-n", "4", "-r", "1"),
    "compare": ("compare", "tiny", "--tokens", "600", "--window", "64"),
    "calibrate": ("calibrate", "tiny", "profile.json", "--tokens", "600", "--window", "64"),
}


def _often(name: str) -> object:
    """Return a command to run whenever the suite does, or with the slow tests: they share one mechanism."""
    marks = () if name in ("generate", "batch") else (pytest.mark.slow,)
    return pytest.param(COMMANDS[name], marks=marks)


OVER = re.compile(
    r"peak memory (\d+) MiB is above the budget of (\d+) MiB: run the command again, it will measure .* again.*"
)


@pytest.mark.parametrize("argv", [_often(name) for name in COMMANDS], ids=COMMANDS)
def test_a_peak_above_the_budget_is_said_and_python_measured_again(commands, believed_small, tmp_path, argv):
    argv = tuple(str(believed_small) if each == "STORE" else each for each in argv)
    ram = "330MiB" if argv[0] in ("compare", "calibrate") else "250MiB"  # these two reckon with 256 MiB of slack
    done = commands(*argv, "--ram", ram, stdin=b"Click the\n", cwd=tmp_path)
    assert done.status == 0, done.err
    told = [match for line in done.lines if (match := OVER.fullmatch(line))]
    assert len(told) == 1, done.err
    assert int(told[0][1]) > int(told[0][2])
    assert not list((tmp_path / "cache" / "qmix").glob("interpreter-*.json"))  # the advice works: it is measured anew
    if argv[0] == "generate":  # by then the budget is known to be too small
        again = commands(*argv, "--ram", ram, cwd=tmp_path)
        assert again.status == 3, again.err
        assert "above the budget" not in again.err


def test_a_peak_within_the_budget_is_not_said(qmix):
    assert "above the budget" not in qmix("generate", "Click the", "--ram", "2GiB", "--max-new-tokens", "2").err
