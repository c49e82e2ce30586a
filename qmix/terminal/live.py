"""Show a running model on one screen of the terminal: its experts, its speed, its memory, and what limits it.

The screen is the terminal's second one, drawn on stderr: when it ends, by whatever, the terminal is as before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from qmix.engine.figures import Figures
from qmix.errors import UsageError, arg
from qmix.terminal.expert_map import ExpertMap
from qmix.terminal.job_control import JobControl
from qmix.units import format_bytes, plural

REFRESHES = 4  # a second
NAME, VALUE = 8, 18  # columns of a figure
LAST_PIECES = 4000  # of an answer, more than a screen holds
LEAST_ANSWER = 3  # lines of an answer before there is room for the map


def check_live() -> None:
    """Raise UsageError where `--live` cannot be shown: it takes a terminal on stderr."""
    if sys.stderr is None or not sys.stderr.isatty():
        raise UsageError(f"{arg('live')}: stderr is not a terminal; run it in one, or leave {arg('live')} out")
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        raise UsageError(f"{arg('live')}: the terminal cannot move its cursor (TERM); leave {arg('live')} out")


class LiveScreen:
    """A screen that shows figures while a block runs.

    Write through it meanwhile: `out` for the answer, `say` for lines beside it. What would go to the terminal is held
    until the screen ends, and its end is shown there; other streams get it at once.
    """

    def __init__(self, title: str, out: Callable[[str], None], say: Callable[[str], None]) -> None:
        """`out` writes to stdout, `say` writes a line to stderr."""
        self._title, self._out, self._say = title, out, say
        self._console = Console(stderr=True, force_terminal=True)
        self._holds_answer = sys.stdout is not None and sys.stdout.isatty()
        self._held: list[tuple[Callable[[str], None], str]] = []
        self._live: Live | None = None
        self._note = ""

    def write_by(self, out: Callable[[str], None], say: Callable[[str], None]) -> None:
        """Write the answer and lines beside it by other functions."""
        self._out, self._say = out, say

    def note(self, text: str) -> None:
        """Show a line on the screen, in place of the one before."""
        self._note = text

    def out(self, text: str) -> None:
        """Write a piece of the answer."""
        self._write(self._out, text, held=self._holds_answer)

    def say(self, line: str) -> None:
        """Write a line beside the answer."""
        self._note = line
        self._write(self._say, line, held=True)

    @contextmanager
    def showing(self, figures: Callable[[], Figures]) -> Iterator[None]:
        """Show figures, taken by another thread, while the block runs.

        Ctrl-Z gives the terminal back until the process goes on. A SIGTERM ends the process as without the screen.
        """

        def draw() -> LiveView:
            return LiveView(self._title, figures(), self._answer(), self._note)

        self._live = live = Live(
            console=self._console,
            screen=True,
            get_renderable=draw,
            refresh_per_second=REFRESHES,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with JobControl(lambda: live, self._end) as control:
            try:
                with control.undisturbed():
                    live.start(refresh=True)
                yield
            finally:
                with control.undisturbed():
                    self._end()

    def _write(self, write: Callable[[str], None], text: str, held: bool) -> None:
        if held and self._live is not None:
            self._held.append((write, text))
        else:
            write(text)

    def _answer(self) -> str:
        """Return the end of the answer, as far as it is held."""
        pieces = [text for write, text in self._held[-LAST_PIECES:] if write == self._out]
        return "".join(pieces)

    def _end(self) -> None:
        """Give the terminal back, and write what was held."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        held, self._held = self._held, []
        self._note = ""  # the next screen begins without it
        for write, text in held:
            write(text)


class LiveView:
    """One screen: figures, the map where it fits, and the end of the answer in what is left."""

    def __init__(self, title: str, figures: Figures, answer: str = "", note: str = "") -> None:
        self.title, self.figures, self.answer, self.note = title, figures, answer, note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, options.height or console.height
        lines = [self._heading(width), *self._table(width), *self._limits()]
        if self.note:
            lines.append(_line(self.note, "dim"))
        placed = ExpertMap(self.figures.tiers, self.figures.use)
        left = height - len(lines)
        yield from lines
        if placed.height(width) + (LEAST_ANSWER if self.answer else 0) <= left:
            yield placed
            left -= placed.height(width)
        if self.answer and left > 1:
            yield ""
            yield from _tail(console, self.answer, width, left - 1)

    def _heading(self, width: int) -> Text:
        minutes, seconds = divmod(int(self.figures.seconds), 60)
        clock = f"{minutes}:{seconds:02}"
        line = _line(self.title, "bold")
        line.truncate(max(1, width - len(clock) - 1), overflow="ellipsis", pad=True)
        return line.append(f" {clock}", "dim")

    def _table(self, width: int) -> Iterator[Text]:
        """Yield the figures, as many in a line as fit."""
        cells = list(self._cells())
        columns = max(1, (width + 1) // (NAME + VALUE + 1))
        for start in range(0, len(cells), columns):
            line = _line()
            for name, value in cells[start : start + columns]:
                line.append(f"{name:<{NAME}}", "dim").append(f"{value:<{VALUE}} ")
            line.rstrip()
            yield line

    def _cells(self) -> Iterator[tuple[str, str]]:
        figures, requests = self.figures, self.figures.requests
        yield "decode", rate_text(figures.decode)
        yield "prefill", rate_text(figures.prefill)
        yield "tokens", f"{figures.new_tokens}"
        yield "hits", f"{100 * figures.hit_rate:.1f}% of experts"
        yield "disk", f"{format_bytes(figures.read_rate)}/s"
        yield "read", format_bytes(figures.bytes_read)
        for memory in figures.memory:
            yield memory.name, f"{format_bytes(memory.used)} of {format_bytes(memory.budget)}"
        if requests.places > 1:
            yield "running", f"{requests.running} of {requests.places}"
            yield "waiting", f"{requests.waiting}"

    def _limits(self) -> Iterator[Text]:
        """Yield what takes the most time, with the other parts behind it, and the prompt that is being read."""
        line = _line(f"{'limit':<{NAME}}", "dim")
        for index, (name, share) in enumerate(self.figures.limits):
            if index == 0 or share >= 0.005:
                line.append(f"{', ' if index else ''}{name} {100 * share:.0f}%", "" if index else "bold")
        yield line
        if self.figures.prompt:
            layers = len(self.figures.tiers)
            state = f"{plural(self.figures.prompt, 'token')}, layer {self.figures.layer + 1} of {layers}"
            yield _line(f"{'prompt':<{NAME}}", "dim").append(state)


def rate_text(rate: float) -> str:
    """Return tokens/s, or a dash before the first."""
    return f"{rate:.3g} tok/s" if 0 < rate < 1000 else f"{rate:.0f} tok/s" if rate else "–"


def _line(text: str = "", style: str = "") -> Text:
    line = Text(no_wrap=True, overflow="ellipsis", end="\n")
    return line.append(text, style)


def _tail(console: Console, answer: str, width: int, lines: int) -> list[Text]:
    """Return the last lines of an answer, without characters that could steer the terminal."""
    last = answer[-width * lines :].split("\n")[-lines:]
    visible = "\n".join("".join(c if c.isprintable() else "\ufffd" for c in line.expandtabs()) for line in last)
    return list(Text(visible).wrap(console, width))[-lines:]
