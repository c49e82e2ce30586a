"""Turns as they are read: how much of what is piped, typed or pasted is taken."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qmix.chat import reader
from qmix.chat.reader import LEAST_LIMIT, PlainReader, TerminalReader
from qmix.errors import UsageError

TOO_LONG = f"is longer than {LEAST_LIMIT} bytes, more than the context holds; shorten it"


def turns(stream: bytes | BinaryIO, limit: int = 0) -> list[str]:
    """Every turn, and every error in its place."""
    plain = PlainReader(io.BytesIO(stream) if isinstance(stream, bytes) else stream, lambda _: None, limit)
    found = []
    while True:
        try:
            found.append(plain.read())
        except UsageError as error:
            found.append(f"error: {error}")
        except EOFError:
            return found


@pytest.mark.parametrize("length", [LEAST_LIMIT, 3 * LEAST_LIMIT, 3 * 2**20])
def test_a_line_that_is_too_long_is_read_over(length):
    assert turns(b"a\n" + b"x" * length + b"\nb\n") == ["a", f"error: stdin: a line {TOO_LONG}", "b"]
    assert turns(b"x" * length + b"\n", limit=4 * 2**20) == ["x" * length]


def test_a_line_without_an_end_ends_the_input():
    with Path("/dev/zero").open("rb") as zeros:
        assert turns(zeros) == [f"error: stdin: a line {TOO_LONG}"]


def test_lines_between_quotes_are_bounded_together_and_read_over_together():
    block = b'"""\n' + b"0123456789\n" * (LEAST_LIMIT // 10) + b'"""\n'
    assert turns(block + b"b\n") == [f"error: stdin: a turn {TOO_LONG}", "b"]
    assert turns(b'"""a\nb\n\nc"""\nd\n"""e') == ["a\nb\n\nc", "d", "e"]
    assert turns(b'"""a\n\xff\nc"""\nd\n') == ["error: stdin: a line is not UTF-8 text (byte 0)", "d"]
    assert turns(b'"""a\n' + b"x" * LEAST_LIMIT + b'\nc"""\nd\n') == [f"error: stdin: a line {TOO_LONG}", "d"]


def test_many_lines_between_quotes_take_no_more_than_each_once():
    lines = [f"{number}" for number in range(100_000)]
    assert turns(b'"""' + "\n".join(lines).encode() + b'"""', limit=2**20) == ["\n".join(lines)]


@pytest.mark.parametrize("length", [2000, 2001, 10_000])
def test_what_is_pasted_is_bounded(length, monkeypatch):
    monkeypatch.setattr(reader, "LEAST_LIMIT", 2000)  # a terminal shows some thousand characters in seconds
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        typed = TerminalReader(InMemoryHistory(), 0)
        keys.send_text(f"\x1b[200~{'x' * length}\x1b[201~\r")
        if length <= 2000:
            assert typed.read() == "x" * length
        else:
            with pytest.raises(UsageError, match="this turn is longer than 2000 bytes"):
                typed.read()
            assert len(typed._session.default_buffer.text) <= 2001
