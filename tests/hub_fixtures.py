"""Fixtures of the hub tests, which load them by `pytest_plugins`: a stand-in that serves a model, and a cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hub_checks import SHARDS
from hub_server import HubServer
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.numpy import save_file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of its own for huggingface_hub, which reads the environment only once; the cache in it."""
    home = tmp_path / "home"
    for name, value in {
        "HF_HOME": home,
        "HF_HUB_CACHE": home / "hub",
        "HF_TOKEN_PATH": home / "token",
        "HF_STORED_TOKENS_PATH": home / "stored_tokens",
        "AGENT_HARNESSES_PATH": home / "agents.json",
    }.items():
        monkeypatch.setattr(constants, name, str(value), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # connections to an earlier stand-in
    yield home / "hub"
    close_session()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two shards of about 1.2 MB, and what goes with them."""
    root = tmp_path / "model"
    (root / "extra").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, name in enumerate(SHARDS):
        weights = rng.standard_normal((300, 1000), np.float32)
        tensors: dict[str, np.ndarray] = {f"w{index}": weights, f"b{index}": np.zeros(3, np.float16)}
        save_file(tensors, root / name, {"format": "pt"})
    (root / "config.json").write_text('{"model_type": "mixtral"}')
    (root / "extra" / "notes.txt").write_text("notes")
    return root


@pytest.fixture
def hub(cache: Path, model: Path) -> Iterator[HubServer]:
    with HubServer(model) as server:
        yield server


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries without the seconds between them."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "into"
