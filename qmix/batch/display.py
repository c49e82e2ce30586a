"""What a batch shows beside its answers: how far it is, how fast, how long still, and what it came to."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from qmix.batch.run import Summary
from qmix.terminal import LINE_SECONDS, say
from qmix.units import format_bytes


class BatchDisplay:
    """A bar where stderr is a terminal, plain lines elsewhere; called with a summary after each pass."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._printed = time.monotonic()
        self._total = 0

    def __enter__(self) -> BatchDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, summary: Summary) -> None:
        self._total = max(self._total, summary.tokens_left)  # what was left at first
        if self._console.file.isatty():
            if self._bar is None:
                self._start()
            assert self._bar is not None
            self._bar.update(
                self._task,
                total=summary.lines,
                completed=summary.done,
                rate=f"{summary.rate:.1f} tok/s",
                left=self._time_left(summary),
            )
        elif time.monotonic() - self._printed >= LINE_SECONDS:
            self._printed = time.monotonic()
            share = 100 * summary.done // summary.lines
            parts = [f"{summary.done} of {summary.lines} lines", f"{share}%", f"{summary.rate:.1f} tok/s"]
            say(f"{self._title}: {', '.join([*parts, self._time_left(summary)]).removesuffix(', ')}")

    def _start(self) -> None:
        one_line = Column(no_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}", table_column=one_line),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total} lines", table_column=one_line),
            TextColumn("{task.fields[rate]}", table_column=one_line),
            TextColumn("{task.fields[left]}", table_column=one_line),
            console=self._console,
        )
        self._task = self._bar.add_task(self._title, rate="", left="")
        self._bar.start()

    def _time_left(self, summary: Summary) -> str:
        """By what the finished lines could have needed; unknown until there is one."""
        finished = self._total - summary.tokens_left
        if not finished or not summary.tokens_left:
            return ""
        seconds = round(summary.seconds * summary.tokens_left / finished)
        minutes, hours = seconds // 60, seconds // 3600
        return f"{seconds} s left" if minutes < 2 else f"{minutes} min left" if hours < 2 else f"{hours} h left"


def summary_line(summary: Summary, seed: int) -> str:
    """The one line behind a batch."""
    parts = [f"{summary.done} of {summary.lines} lines"]
    if summary.refused:
        parts.append(f"{summary.refused} of them errors")
    if summary.resumed:
        parts.append(f"{summary.resumed} from earlier runs")
    if summary.passes:
        parts += [
            f"{summary.new_tokens} new tokens in {summary.seconds:.2f} s ({summary.rate:.2f} tok/s)",
            f"{summary.prompt_tokens} prompt tokens",
            f"{summary.batch} at once",
            f"{100 * summary.hit_rate:.1f}% of experts in memory",
            f"{format_bytes(summary.bytes_read)} read",
            f"peak {format_bytes(summary.peak_memory)} of {format_bytes(summary.budget)}",
        ]
    return ", ".join([*parts, f"seed {seed}"])
