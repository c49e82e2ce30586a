"""Wrap text at words for a terminal: while it arrives, and whole lines.

The terminal itself breaks lines in the middle of words. A line end that is written here is a real one, so copied text
has it too: code and words longer than a line, such as URLs, are left to the terminal and are copied whole.
"""

from __future__ import annotations

from collections.abc import Callable

from rich.cells import cell_len

FENCE = "```"
INDENTED = 4  # columns at the start of a line of code
TAB = 8  # columns


class StreamWrap:
    """Text that arrives in pieces, written at once: a word that reaches the edge is erased and begun on the next line.

    `write` takes what is written to the terminal, `columns` returns its width, read at each line's beginning.
    Wide characters, as in Chinese, are words of their own. `wrap.add` returns nothing; call `end` after the last piece.
    """

    def __init__(self, write: Callable[[str], None], columns: Callable[[], int]) -> None:
        self._write, self._columns = write, columns
        self._line = ""  # since the last line end of the text itself
        self._code = False  # between fences
        self._out: list[str] = []
        self._begin()

    def add(self, text: str) -> None:
        """Write more text."""
        for character in text:
            self._add(character)
        self._write("".join(self._out))
        self._out = []

    def end(self) -> None:
        """Write what is held back, and forget the text."""
        self._out.append(self._spaces)
        self._write("".join(self._out))
        self._out, self._line, self._code = [], "", False
        self._begin()

    def _begin(self) -> None:
        self._column, self._word, self._spaces, self._long = 0, "", "", False
        self._width = max(2, self._columns() - 1)  # in the last column, the cursor's place depends on the terminal

    def _add(self, character: str) -> None:
        if character == "\n":
            if self._line.lstrip().startswith(FENCE):
                self._code = not self._code
            self._out.append(self._spaces + "\n")
            self._line = ""
            self._begin()
            return
        self._line += character
        if self._untouched():
            self._out.append(self._spaces + character)
            self._spaces = ""
        elif character in " \t":
            self._spaces, self._word, self._long = self._spaces + character, "", False
        else:
            self._put(character)

    def _untouched(self) -> bool:
        """Return True in a line of code."""
        start = self._line.lstrip()
        indent = cell_len(self._line[: len(self._line) - len(start)].expandtabs(TAB))
        return self._code or indent >= INDENTED or start.startswith(FENCE)

    def _put(self, character: str) -> None:
        cells = cell_len(character)
        if cells == 2 or (self._word and cell_len(self._word[-1]) == 2 and cells):
            self._word = ""
        gap = self._gap()
        if not self._long and self._column + gap + cells > self._width:
            self._break()
            gap = 0
        self._out.append(self._spaces + character)
        self._column += gap + cells
        self._spaces, self._word = "", self._word + character

    def _gap(self) -> int:
        return len((" " * (self._column % TAB) + self._spaces).expandtabs(TAB)) - self._column % TAB

    def _break(self) -> None:
        """Go on with the word on the next line, unless it is longer than a line."""
        word = cell_len(self._word)
        if word and word == self._column:  # it began the line
            self._long = True
            return
        erased = f"\x1b[{word}D\x1b[K" if word else ""
        self._out.append(f"{erased}\n{self._word}")
        self._spaces, self._column = "", word


def folded(line: str, columns: int, between: str = " ") -> str:
    """Return a line with line ends in it so that no part of it is wider than so many columns, if that is possible.

    It is folded at `between`; the text before a fold keeps it, without its last space.
    """
    lines: list[str] = []
    parts = line.split(between)
    for index, part in enumerate(parts):
        piece = part if index == len(parts) - 1 else part + between
        if lines and cell_len((lines[-1] + piece).rstrip()) < columns:
            lines[-1] += piece
        else:
            lines.append(piece)
    return "\n".join(each.rstrip() for each in lines)
