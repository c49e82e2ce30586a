"""Save figures as PNG or SVG. Imports matplotlib, an optional extra, only to write."""

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
    """Return `path`; raise UsageError if its name does not end in .png or .svg, or matplotlib is not installed.

    Call it before the work. `example` is a name without suffix for the message.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{arg('plot')} {path}: write it like {example}.png or {example}.svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(f"{arg('plot')}: matplotlib is not installed; pip install 'qmix-moe[plot]'")
    return path


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's suffix. Text in an SVG stays text.

    Raises QmixError where the file cannot be written.
    """
    from matplotlib import rc_context

    try:
        with rc_context({"svg.fonttype": "none"}), written_whole(path) as file:
            figure.savefig(file, format=path.suffix[1:].lower(), dpi=DPI)
    except OSError as error:
        raise QmixError(f"{path}: {error.strerror}; choose another path for {arg('plot')}") from None
