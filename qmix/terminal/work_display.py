"""How far a job of many requests is: on a terminal as a bar, in a log as lines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from qmix.terminal.tables import LINE_SECONDS, say

Self = TypeVar("Self", bound="WorkDisplay")


class WorkDisplay:
    """A bar where stderr is a terminal, plain lines elsewhere; use it as a context manager."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._printed = time.monotonic()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, completed: int, total: int, count: str, told: Sequence[str], rate: str, left: str) -> None:
        """`count` is beside the bar, `told` in a line of its own; both are followed by `rate` and `left`."""
        if self._console.file.isatty():
            if self._bar is None:
                self._start()
            assert self._bar is not None
            self._bar.update(self._task, total=total, completed=completed, count=count, rate=rate, left=left)
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            say(f"{self._title}: {', '.join(filter(None, [*told, rate, left]))}")

    def _start(self) -> None:
        one_line = Column(no_wrap=True)
        fields = [TextColumn(f"{{task.fields[{name}]}}", table_column=one_line) for name in ("count", "rate", "left")]
        title = TextColumn("{task.description}", table_column=one_line)
        self._bar = Progress(title, BarColumn(bar_width=None), *fields, console=self._console)
        self._task = self._bar.add_task(self._title, count="", rate="", left="")
        self._bar.start()


def time_left(seconds: float) -> str:
    """Two minutes and more in minutes, two hours and more in hours."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{seconds:.0f} s left" if minutes < 2 else f"{minutes} min left" if hours < 2 else f"{hours} h left"
