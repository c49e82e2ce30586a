"""A chart of lines and marks in a terminal: braille dots in colour, letters where there is no colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

ROWS = 17  # so that quarters are as far from each other
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, four rows of two
Cell = tuple[str, str]  # a character and its style


@dataclass(frozen=True, slots=True)
class Axis:
    """From `low` to `high`; `ticks` are places and what is written there."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def place(self, value: float, steps: int) -> int:
        """The step, of so many, that a value falls on."""
        share = (value - self.low) / (self.high - self.low)
        return min(max(round(share * (steps - 1)), 0), steps - 1)


@dataclass(frozen=True, slots=True)
class Line:
    """Points from left to right; `letter` draws it without colours. A line given later lies on top."""

    name: str
    letter: str
    colour: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Mark:
    """One point, with its name beside it where there is room; the first has the first choice, and lies on top."""

    name: str
    sign: str
    colour: str
    at: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Chart:
    """As wide as the terminal, with a legend of its lines below. Lines and marks are clipped to the axes."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    rows: int = ROWS

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        plain = console.color_system is None or console.no_color
        margin = max(cell_len(text) for _, text in self.y.ticks) + 1
        columns = max(10, options.max_width - margin - 1)
        cells: dict[tuple[int, int], Cell] = {}
        for line in self.lines:
            self._trace(line, columns, plain, cells)
        self._put_marks(columns, cells)
        yield Text(self.title, style="bold", overflow="fold")
        names = {self.rows - 1 - self.y.place(value, self.rows): text for value, text in self.y.ticks}
        yield Text(self.y.label, style="dim")
        for row in range(self.rows):
            axis = f"{names[row]:>{margin - 1}} ┤" if row in names else " " * margin + "│"
            yield from _segments([(axis, "dim"), *(cells.get((row, column), (" ", "")) for column in range(columns))])
        yield from _segments([(rule, "dim") for rule in self._scale(margin, columns)], lines=True)
        yield from self._legend(plain, options.max_width)

    def _trace(self, line: Line, columns: int, plain: bool, cells: dict[tuple[int, int], Cell]) -> None:
        """A line's dots into cells; of a cell that several lines cross, the last has the colour."""
        height = 4 * self.rows
        for across, down in _dots(line.points, self.x, self.y, 2 * columns, height):
            at = (down // 4, across // 2)
            if plain:
                cells[at] = line.letter, ""
                continue
            before = ord(cells[at][0]) if at in cells else 0x2800
            cells[at] = chr(before | DOTS[down % 4][across % 2]), line.colour

    def _put_marks(self, columns: int, cells: dict[tuple[int, int], Cell]) -> None:
        """All signs, then the names that find a free place."""
        places = [
            (self.rows - 1 - self.y.place(mark.at[1], self.rows), self.x.place(mark.at[0], columns))
            for mark in self.marks
        ]
        for mark, at in reversed(list(zip(self.marks, places, strict=True))):
            cells[at] = mark.sign, f"bold {mark.colour}"
        for mark, (row, column) in zip(self.marks, places, strict=True):
            width = cell_len(mark.name)
            beside, left = [(down, column + 1) for down in (-1, 1, -2, 2)], (0, column - 1 - width)
            for down, start in ((0, column + 2), *beside, left):
                around = [(row + down, start + offset) for offset in range(-1, width + 1)]
                inside = 0 <= row + down < self.rows and start >= 0 and start + width <= columns
                if inside and not any(at in cells and at != (row, column) for at in around):
                    cells |= {(row + down, start + i): (letter, mark.colour) for i, letter in enumerate(mark.name)}
                    break

    def _scale(self, margin: int, columns: int) -> list[str]:
        """The horizontal axis, its numbers, its name."""
        rule, numbers, free = ["─"] * columns, [" "] * (columns + margin + 1), 0
        for value, text in self.x.ticks:
            column = self.x.place(value, columns)
            rule[column] = "┴"
            start = max(0, min(margin + 1 + column - len(text) // 2, len(numbers) - len(text)))
            if start >= free:
                numbers[start : start + len(text)] = text
                free = start + len(text) + 1
        return [" " * margin + "└" + "".join(rule), "".join(numbers).rstrip(), " " * (margin + 1) + self.x.label]

    def _legend(self, plain: bool, width: int) -> Iterator[Text]:
        """As many names to a line as there is room for."""
        text = Text()
        for line in self.lines:
            entry = Text(f"{line.letter} {line.name}") if plain else Text(f"━━ {line.name}", style=line.colour)
            if text.cell_len and text.cell_len + 3 + entry.cell_len > width:
                yield text
                text = Text()
            text = text.append("   ").append_text(entry) if text.cell_len else Text().append_text(entry)
        yield text


def _dots(
    points: Sequence[tuple[float, float]], x: Axis, y: Axis, width: int, height: int
) -> Iterator[tuple[int, int]]:
    """Across and down, of the straight lines from point to point."""
    places = [(x.place(a, width), height - 1 - y.place(b, height)) for a, b in points]
    yield from places
    for (across, down), (to_across, to_down) in pairwise(places):
        steps = max(abs(to_across - across), abs(to_down - down))
        for step in range(1, steps):
            share = step / steps
            yield round(across + share * (to_across - across)), round(down + share * (to_down - down))


def _segments(cells: Sequence[Cell], lines: bool = False) -> Iterator[Segment]:
    for text, style in cells:
        yield Segment(text, Style.parse(style))
        if lines:
            yield Segment.line()
    if not lines:
        yield Segment.line()
