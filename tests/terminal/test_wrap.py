"""Text that arrives in pieces is wrapped at words, as a terminal then shows it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from qmix.terminal.wrap import StreamWrap, folded


class Terminal:
    """The lines that a terminal of so many columns shows; it knows "go left" and "erase to the end of the line"."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.column = columns, [""], 0

    def write(self, text: str) -> None:
        for left, erase, other in re.findall(r"\x1b\[(\d+)D|(\x1b\[K)|([\s\S])", text):
            if left:
                at = self._cut(self.column - int(left))
                assert cell_len(self.lines[-1][:at]) == self.column - int(left)
                self.column -= int(left)
            elif erase:
                self.lines[-1] = self.lines[-1][: self._cut(self.column)]
            elif other == "\n":
                self.lines.append("")
                self.column = 0
            else:
                if self.column + cell_len(other) > self.columns:
                    self.lines.append("")
                    self.column = 0
                self.lines[-1] += other
                self.column += cell_len(other)

    def _cut(self, column: int) -> int:
        return next(at for at in range(len(self.lines[-1]) + 1) if cell_len(self.lines[-1][:at]) == column)


def shown(text: str, columns: int, size: int = 1) -> list[str]:
    terminal = Terminal(columns)
    wrap = StreamWrap(terminal.write, lambda: columns)
    for start in range(0, len(text), size):
        wrap.add(text[start : start + size])
    wrap.end()
    return [line.rstrip() for line in terminal.lines]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_no_word_is_split(size):
    assert shown("The quick brown fox jumps", 11, size) == ["The quick", "brown fox", "jumps"]
    assert shown("one two\nthree four", 9, size) == ["one two", "three", "four"]


def test_a_word_longer_than_the_line_is_left_to_the_terminal_whole():
    assert shown("see https://example.org/a/long/path now", 12) == [
        "see",
        "https://exam",
        "ple.org/a/lo",
        "ng/path",
        "now",
    ]


def test_wide_characters_are_two_columns_and_break_anywhere():
    assert shown("你好世界你好", 8) == ["你好世", "界你好"]
    assert shown("go 你好", 6) == ["go 你", "好"]


def test_combining_characters_stay_with_their_letter():
    assert shown("ab cafe\u0301 d", 9) == ["ab cafe\u0301", "d"]


def test_code_is_left_as_it_is():
    code = "```\nx = call(first, second)\n```\n"
    terminal = Terminal(10)
    wrap = StreamWrap(terminal.write, lambda: 10)
    wrap.add(code + "    indented code line\nand words again")
    wrap.end()
    lines = [line.rstrip() for line in terminal.lines]
    assert lines[:5] == ["```", "x = call(f", "irst, seco", "nd)", "```"]
    assert lines[5:] == ["    indent", "ed code li", "ne", "and words", "again"]


WORDS = st.text("ab é中 \n", max_size=60)


@given(WORDS, st.integers(8, 30), st.integers(1, 7))
def test_all_text_is_shown_in_lines_that_fit_and_the_pieces_do_not_matter(text, columns, size):
    lines = shown(text, columns, size)
    assert lines == shown(text, columns, 1)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(cell_len(line) <= columns for line in lines)


@given(st.lists(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=12), st.integers(9, 30))
def test_words_that_fit_a_line_are_whole_in_some_line(words, columns):
    lines = shown(" ".join(words), columns)
    assert [word for line in lines for word in line.split()] == words


def test_a_line_of_statistics_is_folded_between_its_parts():
    line = "3 prompt tokens in 0.09 s (33 tok/s), 5 new tokens, peak 1 GB of 2 GB, seed 7"
    assert folded(line, 38, ", ").splitlines() == [
        "3 prompt tokens in 0.09 s (33 tok/s),",
        "5 new tokens, peak 1 GB of 2 GB,",
        "seed 7",
    ]
    assert folded(line, 200, ", ") == line
