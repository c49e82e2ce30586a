"""Every test has a cache and a home of its own, and no network."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Commands, FirstUse
from hypothesis import HealthCheck, settings

from cli import OPENMP_SPINS
from qmix.machine import found
from qmix.units import UnitSystem

os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a loaded machine
settings.load_profile("suite")
for name in ("COLUMNS", "LINES"):  # the size of the terminal that runs the tests
    os.environ.pop(name, None)
os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)  # torch's threads sleep while they wait, as in a command
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process would compile all of qmix again
STORE = re.compile(r"-[0-9a-f]{12}(\.partial)?$")  # the end of the name of a store in the cache
TINY = Path(__file__).parent.parent / "qmix" / "models" / "tiny"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, pytestconfig) -> Callable[[str, Callable[[Path], object]], Path]:
    """Returns a directory of this name that one worker fills, by `make`, and all only read."""
    own = tmp_path_factory.getbasetemp()
    shared = own.parent if hasattr(pytestconfig, "workerinput") else own  # a pytest in a test is no worker

    def made_once(name: str, make: Callable[[Path], object]) -> Path:
        directory, complete = shared / name, shared / f"{name}.complete"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(directory, ignore_errors=True)  # of a worker that was killed
                directory.mkdir()
                make(directory)
                complete.touch()
        return directory

    return made_once


@pytest.fixture(scope="session")
def python_once(made_once) -> Callable[..., str]:
    """Measures Python's own memory as `found` does, but once for all tests that put nothing in its place."""
    measure, run = found._python, subprocess.run

    def python_once(*arguments: str) -> str:
        if subprocess.run is not run:
            return measure(*arguments)
        key = json.dumps([arguments, os.environ.get("PYTHONPATH")])
        name = f"python-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        made = made_once(name, lambda directory: (directory / "out").write_text(measure(*arguments)))
        return (made / "out").read_text()

    return python_once


@pytest.fixture(scope="session")
def homes(tmp_path_factory) -> Path:
    """Contains the homes of thousands of tests: beside the tests' own directories each would take longer to number."""
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(autouse=True)
def isolated_home(homes, monkeypatch, python_once):
    """The user's cache directory is a fresh one; what Python itself takes is measured once for all tests."""
    home = Path(tempfile.mkdtemp(dir=homes))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setattr(found, "_python", python_once)
    monkeypatch.setattr(UnitSystem, "binary", False)  # of commands that a test runs in its own process
    return home


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded checkpoint."""
    return TINY


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Iterator[Commands]:
    """Runs `qmix` commands; what they find in the user's cache is up to each test."""
    running = Commands(tmp_path_factory.mktemp("commands"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def first_use(made_once, tmp_path_factory) -> FirstUse:
    """The first command on a new machine; what it left is this worker's own copy."""
    made = made_once("first-use", FirstUse.make)
    return FirstUse.read(shutil.copytree(made, tmp_path_factory.mktemp("used") / "first-use"))


@pytest.fixture(scope="session")
def measurements(made_once) -> list[Path]:
    """The files with the measured memory of Python. Do not change them."""
    return [*FirstUse.read(made_once("first-use", FirstUse.make)).cache.glob("qmix/interpreter-*.json")]


@pytest.fixture
def measured(measurements, isolated_home) -> Path:
    """The user's fresh cache has the measurements of Python's memory, which would take each command seconds."""
    cache = isolated_home / "cache" / "qmix"
    cache.mkdir(parents=True)
    for path in measurements:
        shutil.copy(path, cache)
    return cache


@pytest.fixture
def qmix(commands, first_use, measurements, monkeypatch) -> Commands:
    """`qmix` commands of a user who has used it before: the embedded model lies ready in the cache."""
    for path in measurements:  # a command that went over its budget has them made again
        shutil.copy(path, first_use.cache / "qmix")
    monkeypatch.setenv("XDG_CACHE_HOME", str(first_use.cache))
    return commands


@pytest.fixture
def tiny_cache(first_use, tmp_path, monkeypatch) -> Path:
    """A cache with the embedded model's store alone, and Python's memory measured."""

    def others(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if STORE.search(name) and not name.startswith("tiny-nf4-half-")]

    shutil.copytree(first_use.cache, tmp_path / "cache", ignore=others)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qmix"
