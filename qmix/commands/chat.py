"""`qmix chat`: a conversation with a model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click

from qmix.commands import in_options
from qmix.commands.shared import (
    draft_option,
    given,
    live_option,
    live_screen,
    loaded,
    loading_options,
    model_or_default,
    out,
    sampling_options,
    watched,
)
from qmix.disk.places import state_directory
from qmix.errors import UsageError
from qmix.files import read_text
from qmix.progress import Progress
from qmix.text.detokenizer import check_text

MAX_HELP = "longest answer [what the context leaves]"
FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", required=False)
@click.option("-s", "--system", metavar="TEXT", help="system prompt")
@click.option("--system-file", type=FILE, metavar="FILE", help="system prompt from a file")
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
    attention, settings, text = options.pop("attn"), given(options), _system_text(system, system_file)
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
    from qmix.terminal.tables import say

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
    from qmix.terminal.tables import say

    directory = state_directory() / "chats"
    for line in () if no_history else interrupted(directory):
        say(line)
    kept = None if no_history else KeptChat(directory, say)
    sum_up = None if quiet else Result.summary
    screen = Screen(_shown, say, ThinkingLine, sum_up, in_options)
    if live is not None:
        show, watching = partial(_shown, write=live.out), partial(watched, live, session.runner)
        screen = Screen(show, live.say, nullcontext, sum_up, in_options, watching)
    return Chat(session, reader, screen, _is_terminal(sys.stdin), kept)


def _system_text(text: str | None, path: Path | None) -> str | None:
    if text is not None and path is not None:
        raise UsageError("--system and --system-file: give only one of them")
    if path is None:
        check_text(text or "", "--system")
        return text
    return read_text(path.expanduser(), f"--system-file {path}").rstrip("\n")


def _introduce(session: Any, name: str, quiet: bool) -> None:
    """Tell once, at the start, what the model can and cannot do."""
    from qmix.terminal.tables import say

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
    from qmix.terminal.tables import say

    if _at_terminal():
        path = state_directory() / "chat-history"
        return TerminalReader(InMemoryHistory() if no_history else open_history(path, say))
    if sys.stdin is None:
        raise UsageError("stdin is closed; give it a terminal or a file")
    asks = _is_terminal(sys.stdin)
    return PlainReader(sys.stdin.buffer, lambda prompt: click.echo(prompt, nl=False, err=True) if asks else None)


def _shown(text: str, write: Callable[[str], None] = out) -> None:
    """Write an answer's text to stdout; on a terminal, replace control characters, which could steer it."""
    write("".join(_visible(character) for character in text) if _is_terminal(sys.stdout) else text)


def _visible(character: str) -> str:
    return character if character in "\n\t" or character.isprintable() or ord(character) > 0x9F else "\ufffd"


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _at_terminal() -> bool:
    return _is_terminal(sys.stdin) and _is_terminal(sys.stdout)
