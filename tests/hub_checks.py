"""Expectations of the Hub tests: names of the model that the stand-in serves, what is told, what is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmix.errors import HubError

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
COMMIT = "c0ffee" + "0" * 34
KEPT = "run the same command again (finished files are kept)"


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def told(call: Callable[[], Any]) -> str:
    """The message of the HubError that `call` raises, which is one line."""
    with pytest.raises(HubError) as raised:
        call()
    message = str(raised.value)
    assert message.strip(), raised
    assert "\n" not in message, message
    return message
