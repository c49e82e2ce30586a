"""How far a long piece of work is; what shows it is up to the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of the checkpoint done and in all; `note` says what is being waited for, if anything."""

    done: int
    total: int
    note: str = ""


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Shows nothing."""


def counted(total: int, on_progress: OnProgress, note: str) -> Callable[[int], None]:
    """Return what adds up the bytes that it is told of, and reports them."""
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(Progress(done, total, note))

    return count
