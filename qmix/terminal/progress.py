"""Show the progress of a job: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from qmix.progress import Progress
from qmix.terminal.job_control import JobControl
from qmix.terminal.voice import Voice, say
from qmix.units import UnitSystem, format_bytes

LINE_SECONDS = 10.0  # between plain lines where stderr is no terminal
BAR_COLUMNS = 20  # of a LoadingStatus
THINKING_PATIENCE = 0.5  # seconds before a ThinkingLine is shown

Self = TypeVar("Self", bound="JobDisplay")


class _Words(TextColumn):
    """Plain text on one line, cut where the terminal has no room for it beside the numbers."""

    def __init__(self, text_format: str) -> None:
        super().__init__(text_format, markup=False, table_column=Column(overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap = True
        return text


class JobDisplay:
    """A bar with `columns` behind it where stderr is a terminal, a plain line every LINE_SECONDS elsewhere.

    The default columns are the fields `count`, `rate` and `left`. With `whole`, a log also gets a line for the first
    call, for the last one, and for each with all work done. Use it as a context manager.
    """

    def __init__(self, title: str, *columns: ProgressColumn, whole: bool = False) -> None:
        self._title, self._columns, self._whole = title, columns or _fields("count", "rate", "left"), whole
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._control = JobControl(lambda: self._bar.live if self._bar else None)
        self._printed = 0.0 if whole else time.monotonic()
        self._last: tuple[Any, ...] = ()
        self._shown: tuple[Any, ...] = ()
        self._told: Sequence[str] = ()

    def __enter__(self: Self) -> Self:
        if self._console.file.isatty():
            self._control.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._bar is not None:
                with self._control.undisturbed():
                    self._bar.stop()
            elif kind is None and self._whole and self._last != self._shown:
                self._say()
        finally:
            self._control.__exit__()

    def show(self, done: int, total: int, told: Sequence[str], **fields: Any) -> None:
        """Show `done` of `total` units of work: with `fields` for the bar's columns, or with all of `told` in a log."""
        if Voice.quiet:
            return
        if self._console.file.isatty():  # not rich's `is_terminal`: FORCE_COLOR in a log makes no terminal
            if self._bar is None:
                self._start(done, total, fields)
            assert self._bar is not None
            self._bar.update(self._task, completed=done, total=total, **fields)
            return
        self._last, self._told = (done, total, fields), told
        if time.monotonic() - self._printed >= LINE_SECONDS or (self._whole and done == total):
            self._say()

    def _start(self, done: int, total: int, fields: dict[str, Any]) -> None:
        self._bar = Bar(_Words("{task.description}"), BarColumn(bar_width=None), *self._columns, console=self._console)
        self._task = self._bar.add_task(self._title, completed=done, total=total, **fields)
        with self._control.undisturbed():
            self._bar.start()

    def _say(self) -> None:
        self._printed, self._shown = time.monotonic(), self._last
        say(f"{self._title}: {', '.join(filter(None, self._told))}")


class ProgressDisplay(JobDisplay):
    """Bytes, rate and time left. Call it with each Progress.

    It appears with the first call, or with the first one `patience` seconds later.
    """

    def __init__(self, title: str, patience: float = 0.0) -> None:
        size = DownloadColumn(binary_units=UnitSystem.binary, table_column=Column(no_wrap=True))
        left = TimeRemainingColumn(table_column=Column(no_wrap=True))
        super().__init__(title, size, *_fields("rate"), left, _Words("{task.fields[note]}"), whole=True)
        self._patience = patience
        self._called: float | None = None
        self._first: tuple[float, int] | None = None  # time and bytes when it appeared

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._called is None:
            self._called = now
        if self._first is None:
            if now < self._called + self._patience:
                return
            self._first = now, progress.done
        told = _told(progress, now, *self._first)
        rate = next((part for part in told if part.endswith("/s")), "")
        self.show(progress.done, progress.total, told, note=progress.note, rate=rate)


class LoadingStatus:
    """The progress of a load in one line, for a place that shows it: call it with each Progress."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._progress: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        self._progress = progress

    def text(self) -> str:
        """Return the line: a bar and the bytes, once there are some."""
        if self._progress is None:
            return f"loading {self._name}"
        done, total = self._progress.done, max(1, self._progress.total)
        bar = "━" * (BAR_COLUMNS * done // total)
        return f"loading {self._name} {bar:╌<{BAR_COLUMNS}} {format_bytes(done)} of {format_bytes(total)}"


class ThinkingLine:
    """A line on a terminal's stderr that shows the state of the work until the block is left, and then disappears.

    It appears after THINKING_PATIENCE seconds. `describe` is called a few times a second, from another thread.
    """

    def __init__(self, describe: Callable[[], str]) -> None:
        self._console = Console(stderr=True)
        self._live = Live(
            console=self._console,
            get_renderable=lambda: Text(describe(), style="dim", no_wrap=True, overflow="ellipsis"),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._control = JobControl(lambda: self._live)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="qmix-thinking", daemon=True)

    def __enter__(self) -> ThinkingLine:
        if self._console.file.isatty() and not Voice.quiet:
            self._control.__enter__()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
            with self._control.undisturbed():
                self._live.stop()
            self._control.__exit__()

    def _show(self) -> None:
        if self._over.wait(THINKING_PATIENCE):
            return
        with self._control.undisturbed():
            self._live.start()
        self._over.wait()


def time_left(seconds: float) -> str:
    """Return seconds as words: two minutes and more in minutes, two hours and more in hours."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    return f"{seconds:.0f} s left" if minutes < 2 else f"{minutes} min left" if hours < 2 else f"{hours} h left"


def _fields(*names: str) -> tuple[ProgressColumn, ...]:
    return tuple(TextColumn(f"{{task.fields[{name}]}}", table_column=Column(no_wrap=True)) for name in names)


def _told(progress: Progress, now: float, started: float, first: int) -> list[str]:
    """Return the parts of a log's line; the rate is the mean since `started`, when `first` bytes were done."""
    share = 100 * progress.done / max(1, progress.total)
    parts = [f"{format_bytes(progress.done)} of {format_bytes(progress.total)}", f"{share:.0f}%"]
    rate = (progress.done - first) / max(now - started, 1e-9)
    if rate:
        parts.append(f"{format_bytes(rate)}/s")
    if rate and progress.done < progress.total:
        parts.append(time_left((progress.total - progress.done) / rate))
    if progress.note:
        parts[-1] += f" ({progress.note})"
    return parts
