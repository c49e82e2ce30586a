"""Progress of a long piece of work, reported to a callback that the caller chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes done and bytes in all; `note` names what the work waits for, if anything."""

    done: int
    total: int
    note: str = ""


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Show nothing."""


def counted(total: int, on_progress: OnProgress, note: str = "") -> Callable[[int], None]:
    """Return a function that adds the bytes it is given to a sum and reports the sum."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(Progress(done, total, note))

    return count
