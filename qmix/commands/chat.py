"""`qmix chat`: a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qmix.commands import in_options
from qmix.commands.shared import draft_option, given, loaded, loading_options, model_or_default, out, sampling_options
from qmix.disk.places import state_directory
from qmix.errors import UsageError
from qmix.files import read_text
from qmix.text.detokenizer import check_text

MAX_HELP = "of an answer [what the context leaves]"
FILE = click.Path(path_type=Path)


@click.command()
@click.argument("model", required=False)
@click.option("-s", "--system", metavar="TEXT", help="a text that stands before the conversation")
@click.option("--system-file", type=FILE, metavar="FILE", help="the same from a file")
@click.option("--resume", type=FILE, metavar="FILE", help="go on with a session that /save wrote")
@click.option("--no-history", is_flag=True, help="neither read nor keep what is typed, in this session or others")
@click.option("-q", "--quiet", is_flag=True, help="no statistics behind the answers")
@loading_options
@click.option("--max-new-tokens", type=int, help=MAX_HELP)
@sampling_options
@draft_option
def chat(
    model: str | None,
    system: str | None,
    system_file: Path | None,
    resume: Path | None,
    no_history: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Talk with MODEL, a turn a line; /help says what else can be typed.

    A model with a chat template answers, one without continues the text. Where stdin is no terminal, each of its
    lines is a turn; the answers go to stdout, everything else to stderr, and the exit code is 1 where a line failed.
    """
    from qmix.engine.sampling import Sampling

    name = model_or_default(model)
    loading = {option: options.pop(option) for option in ("ram", "context", "precision", "clip", "dtype", "plan_path")}
    attention, settings, text = options.pop("attn"), given(options), _system_text(system, system_file)
    Sampling(**settings)
    with loaded(name, attention, **loading) as runner:
        from qmix.chat import slash
        from qmix.chat.kept import KeptChat, interrupted
        from qmix.chat.loop import Chat, Screen
        from qmix.chat.session import Session
        from qmix.engine.statistics import statistics
        from qmix.terminal.tables import ThinkingLine, say

        session = Session(runner, settings, text or "")
        if resume is not None:
            for line in slash.load(session, resume.expanduser()).lines:
                say(line)
            session.settings |= settings
            session.conversation.system = session.conversation.system if text is None else text
        _introduce(session, name, quiet)
        directory = state_directory() / "chats"
        for line in () if no_history else interrupted(directory):
            say(line)
        kept = None if no_history else KeptChat(directory, say)
        screen = Screen(_shown, say, ThinkingLine, None if quiet else statistics, in_options)
        reader = _reader(no_history, session.most_bytes)
        running = Chat(session, reader, screen, _is_terminal(sys.stdin), kept)
        running.run()
    if running.failed and not running.keeps_on:
        raise click.exceptions.Exit(1)


def _system_text(text: str | None, path: Path | None) -> str | None:
    if text is not None and path is not None:
        raise UsageError("--system and --system-file: give one of them")
    if path is None:
        check_text(text or "", "--system")
        return text
    return read_text(path.expanduser(), f"--system-file {path}").rstrip("\n")


def _introduce(session: Any, name: str, quiet: bool) -> None:
    """What is to be known beforehand, once."""
    from qmix.terminal.tables import say

    if not session.form.takes_roles:
        say(
            f"{name} has no chat template: a pretrained base model, without any moderation mechanisms; "
            "it continues what you write"
        )
    if session.conversation.system and not session.form.takes_system:
        say("no system role here: the system text goes into the first turn")
    if not quiet and _is_terminal(sys.stdin):
        say(f"{name}: /help says what can be typed, Ctrl-D leaves")


def _reader(no_history: bool, limit: int) -> Any:
    """prompt_toolkit's line where a terminal is on both sides, plain lines elsewhere."""
    from qmix.chat.reader import InMemoryHistory, PlainReader, TerminalReader, open_history
    from qmix.terminal.tables import say

    if _is_terminal(sys.stdin) and _is_terminal(sys.stdout):
        path = state_directory() / "chat-history"
        return TerminalReader(InMemoryHistory() if no_history else open_history(path, say), limit)
    if sys.stdin is None:
        raise UsageError("stdin is closed; there is nobody to talk with")
    asks = _is_terminal(sys.stdin)
    return PlainReader(sys.stdin.buffer, lambda prompt: click.echo(prompt, nl=False, err=True) if asks else None, limit)


def _shown(text: str) -> None:
    """An answer's text to stdout; on a terminal without the control characters that would move it."""
    out("".join(_visible(character) for character in text) if _is_terminal(sys.stdout) else text)


def _visible(character: str) -> str:
    return character if character in "\n\t" or character.isprintable() or ord(character) > 0x9F else "\ufffd"


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()
