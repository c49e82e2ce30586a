"""The user's directories for files of qmix, by the conventions of the system."""

from __future__ import annotations

from pathlib import Path

import platformdirs


class _Chosen:
    """The cache directory that this process uses in place of the system's."""

    cache: Path | None = None


def use_cache_directory(path: Path) -> None:
    """Make `path` the cache directory of this process."""
    _Chosen.cache = path


def cache_directory() -> Path:
    """Return the user's cache directory for qmix: stores made from checkpoints, and measurements."""
    return _Chosen.cache or Path(platformdirs.user_cache_dir("qmix"))


def state_directory() -> Path:
    """Return the user's directory for what qmix measured on this machine."""
    return Path(platformdirs.user_state_dir("qmix"))


def config_file() -> Path:
    """Return the path of the user's config file, which need not exist."""
    return Path(platformdirs.user_config_dir("qmix")) / "config.toml"
