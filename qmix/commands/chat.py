"""`qmix chat`: a conversation with a model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click

from qmix.commands import in_options
from qmix.commands.options import draft_option, live_option, loading_options, sampling_options, system_options
from qmix.commands.shared import given, live_screen, loaded, model_or_default, out, system_text, watched
from qmix.disk.places import state_directory
from qmix.errors import UsageError
from qmix.progress import Progress

MAX_HELP = "longest answer [what the context leaves]"
FILE = click.Path(path_type=Path)
COLUMNS = 80  # of a terminal that does not say


@click.command()
@click.argument("model", required=False)
@system_options
@click.option("--resume", type=FILE, metavar="FILE", help="continue a session saved by /save")
@click.option(
    "--no-history", is_flag=True, help="do not read or write the history of typed lines, and do not keep this chat"
)
@click.option("-q", "--quiet", is_flag=True, help="no statistics after the answers")
@loading_options
@click.option("--max-new-tokens", type=int, help=MAX_HELP)
@sampling_options
@draft_option
@live_option
def chat(
    model: str | None,
    system: str | None,
    system_file: Path | None,
    resume: Path | None,
    no_history: bool,
    quiet: bool,
    live: bool,
    **options: Any,
) -> None:
    """Chat with MODEL, in a terminal or through a pipe.

    Each line is a turn; /help lists the commands. A model with a chat template answers, one without continues the text.
    Answers go to stdout, everything else to stderr. If stdin is not a terminal, the exit code is 1 when a line failed.
    """
    from qmix.engine.sampling import Sampling
    from qmix.terminal.progress import LoadingStatus

    name = model_or_default(model)
    names = ("ram", "gpu", "context", "precision", "clip", "dtype", "plan_path")
    loading = {option: options.pop(option) for option in names}
    attention, settings, text = options.pop("attn"), given(options), system_text(system, system_file)
    Sampling(**settings)
    screen = live_screen(live, f"qmix chat: {name}")
    reader, status = _reader(no_history), LoadingStatus(name)
    begin = partial(reader.begin, status.text)

    def follow(progress: Progress) -> None:
        status(progress)
        reader.refresh()

    try:
        with loaded(name, attention, begin=begin, on_load=follow if _at_terminal() else None, **loading) as runner:
            session = _session(runner, settings, text, resume)
            running = _chat(session, reader, no_history, quiet, screen)
            _introduce(session, name, quiet)
            reader.ready(session.most_bytes)
            running.run()
    except BaseException as error:
        if reader.stop() and isinstance(error, KeyboardInterrupt):  # the user left while it was loading
            return
        raise
    if running.failed and not running.keeps_on:
        raise click.exceptions.Exit(1)


def _session(runner: Any, settings: dict[str, Any], system: str | None, resume: Path | None) -> Any:
    """Return a new session, or the one saved in `resume`, with the settings and the system prompt that were given."""
    from qmix.chat import slash
    from qmix.chat.session import Session
    from qmix.terminal.voice import say

    session = Session(runner, settings, system or "")
    if resume is not None:
        for line in slash.load(session, resume.expanduser()).lines:
            say(line)
        session.settings |= settings
        session.conversation.system = session.conversation.system if system is None else system
    return session


def _chat(session: Any, reader: Any, no_history: bool, quiet: bool, live: Any) -> Any:
    """Return the chat of a session, after the notices about chats that were interrupted."""
    from qmix.chat.kept import KeptChat, interrupted
    from qmix.chat.loop import Chat, Screen
    from qmix.engine.completion import Result
    from qmix.terminal.progress import ThinkingLine
    from qmix.terminal.voice import say

    directory = state_directory() / "chats"
    for line in () if no_history else interrupted(directory):
        say(line)
    kept = None if no_history else KeptChat(directory, say)
    show, end = _shower()
    sum_up = None if quiet else lambda result: _folded(Result.summary(result), ", ")

    def tell(line: str) -> None:
        say(_folded(line))

    screen = Screen(show, tell, ThinkingLine, sum_up, in_options, end)
    if live is not None:
        live.write_by(show, tell)
        sum_up = None if quiet else Result.summary
        screen = Screen(
            live.out, live.say, nullcontext, sum_up, in_options, end, partial(watched, live, session.runner)
        )
    return Chat(session, reader, screen, _is_terminal(sys.stdin), kept)


def _introduce(session: Any, name: str, quiet: bool) -> None:
    """Tell once, at the start, what the model can and cannot do."""
    from qmix.terminal.voice import say

    if not session.form.takes_roles:
        say(
            f"{name} has no chat template: a pretrained base model, without any moderation mechanisms; "
            "it continues your text"
        )
    if session.conversation.system and not session.form.takes_system:
        say("the chat template has no system role; the system prompt goes into the first turn")
    if not quiet and _is_terminal(sys.stdin):
        say(f"{name}: /help lists the commands, Ctrl-D leaves")


def _reader(no_history: bool) -> Any:
    """Return prompt_toolkit's reader where stdin and stdout are terminals, else a reader of plain lines."""
    from qmix.chat.reader import InMemoryHistory, PlainReader, TerminalReader, open_history
    from qmix.terminal.voice import say

    if _at_terminal():
        path = state_directory() / "chat-history"
        return TerminalReader(InMemoryHistory() if no_history else open_history(path, say))
    if sys.stdin is None:
        raise UsageError("stdin is closed; give it a terminal or a file")
    asks = _is_terminal(sys.stdin)
    return PlainReader(sys.stdin.buffer, lambda prompt: click.echo(prompt, nl=False, err=True) if asks else None)


def _shower() -> tuple[Callable[[str], None], Callable[[], None]]:
    """Return functions that write an answer's text to stdout and end it.

    On a terminal, words are not split at its edge, and control characters are replaced, which could steer it.
    """
    if not _is_terminal(sys.stdout):
        return out, lambda: None
    from qmix.terminal.wrap import StreamWrap

    wrap = StreamWrap(out, lambda: _columns(sys.stdout))
    return lambda text: wrap.add("".join(_visible(character) for character in text)), wrap.end


def _folded(line: str, between: str = " ") -> str:
    """Return a line for stderr, folded where that is a terminal with less room."""
    if not _is_terminal(sys.stderr):
        return line
    from qmix.terminal.wrap import folded

    return "\n".join(folded(each, _columns(sys.stderr), between) for each in line.splitlines())


def _columns(stream: Any) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    except (OSError, ValueError):
        return COLUMNS


def _visible(character: str) -> str:
    return character if character in "\n\t" or character.isprintable() or ord(character) > 0x9F else "\ufffd"


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _at_terminal() -> bool:
    return _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
