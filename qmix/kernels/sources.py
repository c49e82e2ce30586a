"""A digest of the kernels' source files: compiled code of another one is of no use. Loads neither torch nor Numba."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def source_digest() -> str:
    """Return a digest of the names and contents of all files of `qmix.kernels`."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
