"""Progress, tables and the final line of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from qmix.evaluate.card import CARD, CardRow, card_rows
from qmix.terminal.progress import JobDisplay, time_left
from qmix.units import format_bytes, plural

if TYPE_CHECKING:
    from qmix.evaluate.engine import Work


class EvaluationDisplay(JobDisplay):
    """Called with the work after each layer or pass."""

    def __init__(self, title: str) -> None:
        super().__init__(title)
        self._first: tuple[int, float] | None = None  # tokens and seconds before the first call

    def __call__(self, work: Work) -> None:
        self._first = self._first or (work.tokens, work.seconds)
        tokens, seconds = work.tokens - self._first[0], work.seconds - self._first[1]
        rate = f"{tokens / seconds:.0f} tok/s" if seconds else ""
        left = time_left(work.tokens_left * seconds / tokens) if tokens and work.tokens_left else ""
        count = f"{work.done}/{work.requests} requests"
        told = [f"{work.done} of {plural(work.requests, 'request')}", plural(work.tokens, "token"), rate, left]
        self.show(work.tokens, work.tokens + work.tokens_left, told, count=count, rate=rate, left=left)


def result_tables(content: Mapping[str, Any]) -> list[Table]:
    """Return the table of other tasks than the card's, if any, and the card's table, if the card was evaluated."""
    if "card" not in content:
        return [tasks_table(content)]
    cards = {name for known in CARD for name in _with_children(known.task, content["group_subtasks"])}
    others = {name: values for name, values in content["results"].items() if name not in cards}
    card = card_table(card_rows(content["results"]))
    return [tasks_table({**content, "results": others}), card] if others else [card]


def _with_children(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    return [name, *(below for child in children.get(name, ()) for below in _with_children(child, children))]


def tasks_table(content: Mapping[str, Any]) -> Table:
    """Return a table with a row for each figure of each task and group, in the harness's order."""
    table = _table("task", "figure", right=("shots", "questions", "value", "+/-"))
    for name, values in content["results"].items():
        first = True
        for metric, value in values.items():
            figure, comma, kind = metric.partition(",")
            if not comma or figure.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{figure}_stderr,{kind}")
            shots, questions = content["n-shot"].get(name, ""), values.get("sample_len", "")
            labels = (name, str(shots), str(questions)) if first else ("", "", "")
            shown = figure if kind == "none" else f"{figure}, {kind}"
            table.add_row(labels[0], shown, *labels[1:], f"{value:.4f}", "" if error is None else f"{error:.4f}")
            first = False
    return table


def card_table(rows: Sequence[CardRow]) -> Table:
    """Return a table of each card task's figure and the card's own, in percent."""
    table = _table("task", "figure", right=("shots", "result", "card", "difference", "+/-"))
    for row in rows:
        shots = "" if row.shots is None else str(row.shots)
        error = "" if math.isnan(row.error) else f"{row.error:.2f}"
        cells = (f"{row.figure:.2f}", f"{row.card:.2f}", f"{row.difference:+.2f}", error)
        table.add_row(row.title, row.metric, shots, *cells)
    return table


def work_line(work: Work, budget: int | None) -> str:
    """Return the line that ends an evaluation."""
    parts = [plural(work.done, "request")]
    if work.kept:
        parts.append(f"{work.kept} from earlier runs")
    if work.passes:
        asked = work.hits + work.misses
        parts += [
            f"{plural(work.tokens, 'token')} in {plural(work.passes, 'pass', 'passes')} and {work.seconds:.2f} s",
            f"{100 * work.hits / asked if asked else 100:.1f}% of experts in memory",
            f"{format_bytes(work.bytes_read)} read",
            f"peak {format_bytes(work.peak_memory)}" + (f" of {format_bytes(budget)}" if budget else ""),
        ]
    return ", ".join(parts)


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
