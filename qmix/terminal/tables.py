"""What commands show beside their answer: progress on a terminal or in a log, tables, statistics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import click
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from qmix.progress import Progress
from qmix.units import format_bytes

if TYPE_CHECKING:  # it imports torch, which a plan does without
    pass

LINE_SECONDS = 10.0  # between plain lines where stderr is no terminal
THINKING_PATIENCE = 0.5  # seconds without a first token before a line says what is going on


class _Words(TextColumn):
    """Text as it is, on one line; cut where the terminal has no room beside the numbers."""

    def __init__(self, text_format: str) -> None:
        super().__init__(text_format, markup=False, table_column=Column(overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap = True
        return text


class ProgressDisplay:
    """A bar with bytes, rate and time left where stderr is a terminal, plain lines elsewhere.

    Called with each Progress; appears with the first one, or with one that comes `patience` seconds after the first.
    """

    def __init__(self, title: str, patience: float = 0.0) -> None:
        self._title = title
        self._patience = patience
        self._called = 0.0
        self._console = Console(stderr=True)
        self._bar: RichProgress | None = None
        self._started = self._printed = 0.0
        self._first = self._last = self._shown = Progress(0, 0)

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._last != self._shown:
            self._line(self._last)

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if not self._started:
            self._called = self._called or now
            if now < self._called + self._patience:
                return
            self._started, self._first = now, progress
            if self._console.file.isatty():  # not rich's `is_terminal`: FORCE_COLOR in a log makes no terminal
                self._start_bar(progress)
        self._last = progress
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.done, total=progress.total, note=progress.note)
        elif now - self._printed >= LINE_SECONDS or progress.done == progress.total:
            self._line(progress)

    def _start_bar(self, progress: Progress) -> None:
        columns = (
            _Words("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(table_column=Column(no_wrap=True)),
            TransferSpeedColumn(table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            _Words("{task.fields[note]}"),
        )
        self._bar = RichProgress(*columns, console=self._console, transient=False)
        self._task = self._bar.add_task(self._title, total=progress.total, completed=progress.done, note="")
        self._bar.start()

    def _line(self, progress: Progress) -> None:
        now = time.monotonic()
        self._printed, self._shown = now, progress
        share = 100 * progress.done / max(1, progress.total)
        parts = [f"{format_bytes(progress.done)} of {format_bytes(progress.total)}", f"{share:.0f}%"]
        rate = (progress.done - self._first.done) / max(now - self._started, 1e-9)
        if rate:
            parts.append(f"{format_bytes(rate)}/s")
        if rate and progress.done < progress.total:
            parts.append(f"{(progress.total - progress.done) / rate:.0f} s left")
        note = f" ({progress.note})" if progress.note else ""
        say(f"{self._title}: {', '.join(parts)}{note}")


class ThinkingLine:
    """A line on a terminal's stderr that says where the work is, until the block is left; then it is gone.

    Shown after `THINKING_PATIENCE` seconds. `describe` is asked a few times a second, from another thread.
    """

    def __init__(self, describe: Callable[[], str]) -> None:
        self._describe = describe
        self._console = Console(stderr=True)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="qmix-thinking", daemon=True)

    def __enter__(self) -> ThinkingLine:
        if self._console.file.isatty():
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _show(self) -> None:
        if self._over.wait(THINKING_PATIENCE):
            return
        with Live(
            console=self._console,
            get_renderable=lambda: Text(self._describe(), style="dim", no_wrap=True, overflow="ellipsis"),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            self._over.wait()


def say(line: str) -> None:
    """One line to stderr."""
    click.echo(line, err=True)


def format_seconds(seconds: float) -> str:
    """Three digits: 12.3 s, 4.56 ms."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def print_table(*tables: RenderableType) -> None:
    """Tables to stdout, as wide as the terminal, or as wide as they need where there is none."""
    console = Console()
    if not console.file.isatty():
        console = Console(width=120, force_terminal=False)
    for table in tables:
        console.print(table)
