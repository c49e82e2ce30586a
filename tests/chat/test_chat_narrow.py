"""A chat on a narrow terminal: no word is split, and statistics are folded."""

from __future__ import annotations

import pytest
from test_chat_terminal import ASK, ESCAPES, Typist

LONG = ("chat", "tiny", "--temperature", "0", "--max-new-tokens", "120", "--ignore-eos")


class Screen:
    """The rows that a terminal shows after text, line ends and the two escapes with which words are moved."""

    def __init__(self, columns: int) -> None:
        self.columns, self.rows, self.column = columns, [""], 0

    def feed(self, text: str) -> None:
        at = 0
        while at < len(text):
            if found := ESCAPES.match(text, at):
                at = found.end()
                if found[0].endswith("D"):
                    self.column -= int(found[0][2:-1])
                elif found[0].endswith("K"):
                    self.rows[-1] = self.rows[-1][: self.column]
                continue
            self._put(text[at])
            at += 1

    def _put(self, character: str) -> None:
        if character == "\n":
            self.rows.append("")
            self.column = 0
        elif character != "\r":
            if self.column == self.columns:
                self.rows.append("")
                self.column = 0
            self.rows[-1] = self.rows[-1][: self.column] + character
            self.column += 1


@pytest.mark.parametrize("columns", [80, 30])
def test_words_are_whole_and_statistics_folded(qmix, columns):
    piped = qmix(*LONG, stdin=ASK.encode()).out
    typist = Typist(qmix, *LONG, columns=columns)
    try:
        typist.terminal.send(f"{ASK}\r")
        typist.terminal.expect_exact("\x1b[?2004l")
        typist.terminal.expect(r"seed \d+\r\n")
        shown = typist.terminal.before + typist.terminal.after
        screen = Screen(columns)
        screen.feed(shown.lstrip("\r\n"))
        rows = [row.rstrip() for row in screen.rows if row.strip()]
        start = next(at for at, row in enumerate(rows) if "prompt tokens in" in row)
        answer, statistics = rows[:start], rows[start:]
        assert " ".join(" ".join(answer).split()).endswith(" ".join(piped.split())[-40:])
        words = piped.split()
        assert len(words) > 10
        assert set(" ".join(answer).split()) >= {word for word in words if len(word) < columns}
        assert len(statistics) > 1
        assert all(len(row) < columns for row in statistics)
        assert columns < 80 or all(row.endswith(",") for row in statistics[:-1])
    finally:
        typist.terminal.close(force=True)
