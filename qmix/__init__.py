"""Mixtral on one workstation: experts quantised tensor by tensor, held in RAM and on disk under a budget.

import qmix

with qmix.load("tiny", ram="2GiB") as runner:
    for piece in runner.generate("To install a package,", temperature=0):
        print(piece.text, end="", flush=True)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qmix.errors import DoesNotFitError, QmixError, UsageError
from qmix.version import __version__

if TYPE_CHECKING:
    from qmix.engine.completion import Piece, Result
    from qmix.engine.load import load
    from qmix.engine.sampling import Sampling
    from qmix.engine.stream import Runner

__all__ = ["DoesNotFitError", "Piece", "QmixError", "Result", "Runner", "Sampling", "UsageError", "__version__", "load"]

_LAZY = {
    "Piece": "engine.completion",
    "Result": "engine.completion",
    "Runner": "engine.stream",
    "Sampling": "engine.sampling",
    "load": "engine.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name that needs torch when it is first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'qmix' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"qmix.{_LAZY[name]}"), name)
