"""Every test has a cache and a home of its own, and no network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
TINY = Path(__file__).parent.parent / "qmix" / "models" / "tiny"


@pytest.fixture(autouse=True)
def isolated_home(tmp_path_factory, monkeypatch):
    """The user's cache directory is a fresh one; what Python itself takes is measured once for all tests."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    return home


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The embedded checkpoint."""
    return TINY
