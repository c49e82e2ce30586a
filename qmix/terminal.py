"""What commands show beside their answer: progress on a terminal or in a log, tables, statistics."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from qmix.plan import Plan
from qmix.progress import Progress
from qmix.units import format_bytes

if TYPE_CHECKING:  # it imports torch, which a plan does without
    from qmix.generate import Result

LINE_SECONDS = 10.0  # between plain lines where stderr is no terminal


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


def say(line: str) -> None:
    """One line to stderr."""
    click.echo(line, err=True)


def statistics(result: Result) -> str:
    """The one line behind an answer."""
    return (
        f"{result.prompt_tokens} prompt tokens in {result.ttft_s:.2f} s ({result.prompt_rate:.1f} tok/s), "
        f"{result.completion_tokens} new at {result.rate:.2f} tok/s, "
        f"{100 * result.hit_rate:.1f}% of experts in memory, "
        f"{format_bytes(result.bytes_read)} read, peak {format_bytes(result.peak_memory)} "
        f"of {format_bytes(result.budget)}, seed {result.seed}"
    )


def plan_table(plan: Plan, title: str) -> Table:
    """What lies where, in bytes."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column("what")
    table.add_column("where")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)

    def row(what: str, where: str, count: int) -> None:
        table.add_row(what, where, f"{count:,}", format_bytes(count))

    row("Python with its imports", "RAM", plan.interpreter)
    row("dense weights, half precision", "RAM", plan.dense)
    row(f"KV cache, {plan.context} tokens", "RAM", plan.kv_cache)
    row("work space", "RAM", plan.work)
    row(f"expert pool, {plan.slots} of {plan.num_records} experts", "RAM", plan.pool)
    table.add_section()
    row("total, predicted peak", "RAM", plan.total)
    row("headroom", "RAM", plan.headroom)
    table.add_section()
    for precision, count in plan.expert_bytes.items():
        row(f"all experts in {precision}", "store", count)
    row("experts read when routed to", "disk", plan.on_disk)
    row("the whole store", "disk", plan.store_bytes)
    return table


def print_table(table: Table) -> None:
    """A table to stdout, as wide as the terminal, or as wide as it needs where there is none."""
    console = Console()
    if not console.file.isatty():
        console = Console(width=120, force_terminal=False)
    console.print(table)
