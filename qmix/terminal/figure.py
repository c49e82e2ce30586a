"""Pictures in files: what a name must be like, and the writing. Imports matplotlib, an optional extra, to write."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from qmix.errors import QmixError, UsageError, arg
from qmix.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
DPI = 150


def check_target(path: Path, example: str) -> Path:
    """Raises UsageError, before any work is done, where matplotlib is missing or the name is not like `example`.png."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{arg('plot')} {path}: write it like {example}.png or {example}.svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{arg('plot')}: matplotlib is not installed; pip install 'qmix-moe[plot]'")
    return path


def save(figure: Figure, path: Path) -> None:
    """Raises QmixError where the file cannot be written. Text in an SVG stays text."""
    from matplotlib import rc_context

    try:
        with rc_context({"svg.fonttype": "none"}), written_whole(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=DPI)
    except OSError as error:
        raise QmixError(f"{path}: {error.strerror}; choose another path for {arg('plot')}") from None
