"""The user's directories for files of qmix, by the conventions of the system."""

from __future__ import annotations

from pathlib import Path

import platformdirs


def cache_directory() -> Path:
    """Return the user's cache directory for qmix: stores made from checkpoints, and measurements."""
    return Path(platformdirs.user_cache_dir("qmix"))


def state_directory() -> Path:
    """Return the user's directory for what qmix measured on this machine."""
    return Path(platformdirs.user_state_dir("qmix"))
