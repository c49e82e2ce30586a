"""Turns as they are typed: a line of prompt_toolkit's on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from qmix.chat.settings import NAMES
from qmix.chat.slash import COMMANDS
from qmix.errors import UsageError
from qmix.text import check_text

PROMPT, CONTINUED = ">>> ", "... "
QUOTES = '"""'
TAKE_FILES = ("/read", "/save", "/load")


class Reader(Protocol):
    def read(self) -> str:
        """The next turn. Raises EOFError after the last; KeyboardInterrupt; UsageError where it is no text."""
        ...

    def left_something(self) -> bool:
        """Whether the read that was interrupted had some text already."""
        ...


def open_history(path: Path, notice: Callable[[str], None]) -> History:
    """The history in a file that nobody else can read, or only this session's where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        with path.open("ab"):
            return _LastingHistory(path)
    except OSError as error:
        notice(f"no history: {error.filename}: {error.strerror}")
        return InMemoryHistory()


class _LastingHistory(FileHistory):
    """A history in a file; what cannot be written there is in this session's only, and no reason to end it."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


class TerminalReader:
    """Enter ends a turn, Alt-Enter begins a new line in it; so does Enter after an opening `\"\"\"`."""

    def __init__(self, history: History) -> None:
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=history,
            completer=SlashCompleter(),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=CONTINUED,
            key_bindings=_key_bindings(),
        )

    def read(self) -> str:
        text = self._session.prompt()
        check_text(text, "this turn")  # a terminal's bytes that are not UTF-8 come as halves of surrogate pairs
        return unquoted(text)

    def left_something(self) -> bool:
        return bool(self._session.default_buffer.text)


class PlainReader:
    """A line is a turn, and so are the lines between two `\"\"\"`. `before` is called ahead of each line."""

    def __init__(self, stream: BinaryIO, before: Callable[[str], None]) -> None:
        self._stream, self._before = stream, before

    def read(self) -> str:
        text = self._line(PROMPT)
        while is_open(text):
            try:
                text += "\n" + self._line(CONTINUED)
            except EOFError:
                break
        return unquoted(text)

    def left_something(self) -> bool:
        return False

    def _line(self, prompt: str) -> str:
        self._before(prompt)
        raw = self._stream.readline()
        if not raw:
            raise EOFError
        try:
            return raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: a line is not UTF-8 text (byte {error.start})") from None


class SlashCompleter(Completer):
    """Names of commands, the files behind those that take one, and the settings behind /set."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        name, space, rest = text.partition(" ")
        if not text.startswith("/"):
            return
        if not space:
            yield from (Completion(known, -len(name)) for known in COMMANDS if known.startswith(name))
        elif name in TAKE_FILES:
            yield from self._paths.get_completions(Document(rest), complete_event)
        elif name == "/set":
            yield from (Completion(known, -len(rest)) for known in NAMES if known.startswith(rest))


def is_open(text: str) -> bool:
    """Whether a turn has begun with quotes that nothing has ended yet."""
    start = text.lstrip()
    return start.startswith(QUOTES) and QUOTES not in start[len(QUOTES) :]


def unquoted(text: str) -> str:
    """A turn without the quotes around its lines."""
    inner = text.strip()
    if not inner.startswith(QUOTES):
        return text
    return inner[len(QUOTES) :].partition(QUOTES)[0].strip("\n")


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer: Buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
