"""Readers of turns: prompt_toolkit's line on a terminal, plain lines elsewhere."""

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
from prompt_toolkit.keys import Keys

from qmix.chat.first_turn import FirstTurn
from qmix.chat.settings import NAMES
from qmix.errors import UsageError
from qmix.text.detokenizer import check_text

PROMPT, CONTINUED = ">>> ", "... "
QUOTES = '"""'
MOST_LIMIT = 2**24  # bytes of a turn while its context is not known
LEAST_LIMIT = 2**16  # bytes of a turn that are always accepted: a command may be longer than a short context
SKIPPED, PART = 2**30, 2**20  # bytes
TAKE_FILES = ("/read", "/save", "/load")


class Reader(Protocol):
    def begin(self, status: Callable[[], str]) -> None:
        """Let the first turn be typed from now on, where that is possible, with `status` below it."""
        ...

    def refresh(self) -> None:
        """Show the status as it is now."""
        ...

    def ready(self, limit: int) -> None:
        """End what `begin` began, because turns can be answered; they have at most `limit` bytes."""
        ...

    def stop(self) -> bool:
        """End what `begin` began, because there will be no answers; return whether the user left meanwhile."""
        ...

    def read(self) -> str:
        """Return the next turn. Raises EOFError after the last, KeyboardInterrupt, UsageError where it is not text."""
        ...

    def left_something(self) -> bool:
        """Return whether the interrupted read had some text."""
        ...


def open_history(path: Path, notice: Callable[[str], None]) -> History:
    """Open the history, a file private to the user; where that fails, use a history of this session only."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        with path.open("ab"):
            return _LastingHistory(path)
    except OSError as error:
        notice(f"history is not saved: {error.filename}: {error.strerror}")
        return InMemoryHistory()


class _LastingHistory(FileHistory):
    """A history in a file; a line that cannot be written is kept in this session only."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


class TerminalReader:
    """A reader for a terminal. Enter ends a turn; Alt-Enter, or Enter after an opening `\"\"\"`, starts a new line.

    Pasted text beyond `limit` bytes is dropped. The first turn can be typed while the model is loaded: between `begin`
    and `ready` it is read by a thread of its own.
    """

    def __init__(self, history: History, limit: int = MOST_LIMIT) -> None:
        self._limit = max(limit, LEAST_LIMIT)
        self._first: FirstTurn | None = None
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            history=history,
            completer=SlashCompleter(),
            complete_while_typing=False,
            multiline=True,
            enable_suspend=True,
            prompt_continuation=CONTINUED,
            key_bindings=_key_bindings(lambda: self._limit),
        )

    def begin(self, status: Callable[[], str]) -> None:
        """Show the prompt, with `status` below it, and read the first turn in another thread.

        To leave there, by Ctrl-D or by Ctrl-C on an empty line, interrupts the main thread with KeyboardInterrupt.
        """
        self._first = FirstTurn(self._session, status)

    def refresh(self) -> None:
        if self._first is not None:
            self._first.refresh()

    def ready(self, limit: int) -> None:
        """Let the first turn be answered as soon as it is entered; turns have at most `limit` bytes."""
        self._limit = max(limit, LEAST_LIMIT)
        if self._first is not None:
            self._first.hide_status()

    def stop(self) -> bool:
        """End the reading of the first turn, where it goes on; return whether its user left by Ctrl-D."""
        first, self._first = self._first, None
        return first is not None and first.stop()

    def read(self) -> str:
        first, self._first = self._first, None
        text = self._session.prompt() if first is None else first.text()
        check_text(text, "this turn")  # bytes that are not UTF-8 arrive as lone surrogates
        if len(text) > self._limit:
            raise UsageError(f"this turn is longer than {self._limit} bytes, more than the context holds; shorten it")
        return unquoted(text)

    def left_something(self) -> bool:
        return bool(self._session.default_buffer.text)


class PlainReader:
    """A reader of plain lines. A line is a turn, and so are the lines between two `\"\"\"`. `before` is called before
    each line. Turns longer than `limit` bytes are skipped.
    """

    def __init__(self, stream: BinaryIO, before: Callable[[str], None], limit: int = MOST_LIMIT) -> None:
        self._stream, self._before, self._limit = stream, before, max(limit, LEAST_LIMIT)
        self._ended = False

    def begin(self, status: Callable[[], str]) -> None:
        """Do nothing: lines wait where they come from."""

    def refresh(self) -> None:
        """Do nothing: no status is shown."""

    def ready(self, limit: int) -> None:
        self._limit = max(limit, LEAST_LIMIT)

    def stop(self) -> bool:
        return False

    def read(self) -> str:
        text = self._line(PROMPT)
        return unquoted(text + self._rest() if is_open(text) else text)

    def _rest(self) -> str:
        """Return the lines up to the closing quotes. Raises UsageError for the first invalid line, after the last."""
        text, room, failure = [""], self._limit, None
        while QUOTES not in text[-1]:
            try:
                line = self._line(CONTINUED)
            except EOFError:
                break
            except UsageError as error:
                failure = failure or error
                continue
            room -= len(line) + 1
            if room < 0:
                failure, text = failure or self._too_long("a turn"), [""]
            text.append(line)
        if failure is not None:
            raise failure
        return "\n".join(text)

    def left_something(self) -> bool:
        return False

    def _line(self, prompt: str) -> str:
        self._before(prompt)
        raw = b"" if self._ended else self._stream.readline(self._limit + 1)
        if not raw:
            raise EOFError
        if len(raw) > self._limit:
            self._skip(raw)
            raise self._too_long("a line")
        try:
            return raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: a line is not UTF-8 text (byte {error.start})") from None

    def _skip(self, raw: bytes) -> None:
        """Skip to the end of a line; one longer than SKIPPED bytes ends the input."""
        for _ in range(SKIPPED // PART):
            if not raw or raw.endswith(b"\n"):
                return
            raw = self._stream.readline(PART)
        self._ended = True

    def _too_long(self, what: str) -> UsageError:
        return UsageError(f"stdin: {what} is longer than {self._limit} bytes, more than the context holds; shorten it")


class SlashCompleter(Completer):
    """Completes commands, files after a command that takes one, and settings after /set."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        from qmix.chat.slash import COMMANDS  # loads torch: the prompt is there before

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
    """Return whether a turn starts with quotes that are not closed yet."""
    start = text.lstrip()
    return start.startswith(QUOTES) and QUOTES not in start[len(QUOTES) :]


def unquoted(text: str) -> str:
    """Return a turn without the quotes around its lines."""
    inner = text.strip()
    if not inner.startswith(QUOTES):
        return text
    return inner[len(QUOTES) :].partition(QUOTES)[0].strip("\n")


def _key_bindings(limit: Callable[[], int]) -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add(Keys.BracketedPaste)
    def _(event: KeyPressEvent) -> None:
        buffer: Buffer = event.current_buffer
        room = limit() + 1 - len(buffer.text)  # one more than accepted, so that the turn is refused
        buffer.insert_text(event.data[: max(0, room)].replace("\r\n", "\n").replace("\r", "\n"))

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
