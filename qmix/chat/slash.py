"""The commands of a chat, which begin with a slash."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qmix.chat import record
from qmix.chat.session import Session
from qmix.chat.settings import parse_setting
from qmix.errors import UsageError
from qmix.files import read_text
from qmix.machine.found import peak_memory
from qmix.units import format_bytes, plural


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a command: lines to show, and perhaps a turn to ask or the end of the chat.

    With `again` the turn replaces the last one.
    """

    lines: tuple[str, ...] = ()
    ask: str | None = None
    again: bool = False
    leave: bool = False


@dataclass(frozen=True, slots=True)
class SlashCommand:
    """A command. `takes` names its arguments, in brackets where they are optional."""

    takes: str
    help: str
    run: Callable[[Session, str], Outcome]


def run(line: str, session: Session) -> Outcome:
    """Run the command of a line that begins with a slash. Raises QmixError where it fails."""
    name, _, rest = line.strip().partition(" ")
    command = COMMANDS.get(name.lower())
    if command is None:
        near = difflib.get_close_matches(name.lower(), COMMANDS, 1, 0.0)[0]
        raise UsageError(
            f"{name}: unknown command; did you mean {near}? (To send text that begins with /, put a space first)"
        )
    if rest.strip() and not command.takes:
        raise UsageError(f"{name}: takes no argument")
    if not rest.strip() and command.takes and not command.takes.startswith("["):
        raise UsageError(f"{name}: needs {command.takes}")
    return command.run(session, rest.strip())


def _help(session: Session, rest: str) -> Outcome:
    width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
    lines = [f"{f'{name} {command.takes}':{width}}  {command.help}" for name, command in COMMANDS.items()]
    return Outcome((*lines, '"""  starts and ends a turn of several lines; Alt-Enter starts a new line, too'))


def _clear(session: Session, rest: str) -> Outcome:
    session.conversation.clear()
    return Outcome(("cleared",))


def _regen(session: Session, rest: str) -> Outcome:
    if not session.conversation.turns:
        raise UsageError("/regen: nothing has been said yet")
    return Outcome(ask=session.conversation.turns[-1].user, again=True)


def _undo(session: Session, rest: str) -> Outcome:
    turn = session.conversation.take_back()
    first = (turn.user.strip().splitlines() or [""])[0]
    return Outcome((f"removed: {first[:60]}{'…' if len(first) > 60 else ''}",))


def _system(session: Session, rest: str) -> Outcome:
    if rest:
        session.conversation.system = "" if rest in {'""', "''"} else rest
    return Outcome((f"system: {session.conversation.system or 'none'}",))


def _set(session: Session, rest: str) -> Outcome:
    if rest:
        name, value = parse_setting(rest)
        try:
            session.set(name, value)
        except UsageError as error:
            raise UsageError(f"/set {error}") from None
    shown = ", ".join(f"{name} {value}" for name, value in record.saved_settings(session.settings).items())
    return Outcome((f"settings: {shown or 'the defaults of the model'}",))


def _save(session: Session, rest: str) -> Outcome:
    words = _words("/save", rest)
    with_cache = "--cache" in words
    path = _path("/save", [word for word in words if word != "--cache"])
    record.save(session, path)
    lines = [f"saved {plural(len(session.conversation.turns), 'turn')} to {path}"]
    if with_cache:
        tokens = record.save_cache(session, path)
        size = format_bytes(record.kv_path(path).stat().st_size)
        lines.append(f"saved the KV cache ({plural(tokens, 'token')}, {size}) to {record.kv_path(path)}")
    return Outcome(tuple(lines))


def load(session: Session, path: Path) -> Outcome:
    """Load a saved session into this one."""
    notices = [record.load(session, path), record.load_cache(session, path)]
    told = f"loaded {plural(len(session.conversation.turns), 'turn')} from {path}"
    return Outcome((told, *(notice for notice in notices if notice)))


def _load(session: Session, rest: str) -> Outcome:
    return load(session, _path("/load", _words("/load", rest)))


def _read(session: Session, rest: str) -> Outcome:
    name, *question = _words("/read", rest)
    path = _path("/read", [name])
    text = read_text(path, f"/read {path}")
    if not text.strip():
        raise UsageError(f"/read {path}: is empty")
    return Outcome(ask="\n\n".join([text.rstrip("\n"), *([" ".join(question)] if question else [])]))


def _stats(session: Session, rest: str) -> Outcome:
    totals, pool = session.totals, session.runner.pool.counters
    conversation, plan = session.conversation, session.runner.plan
    used = len(conversation.ids)
    return Outcome(
        (
            f"{plural(len(conversation.turns), 'turn')} ({conversation.forgotten} dropped from the context), "
            f"{used} of {plan.context} tokens used",
            f"{plural(totals.answers, 'whole answer')}: {plural(totals.prefilled, 'new prompt token')} "
            f"({totals.reused} cached), {plural(totals.generated, 'new token')}",
            f"{100 * pool.hit_rate:.1f}% of experts in memory, {format_bytes(pool.bytes_read)} read, "
            f"peak {format_bytes(peak_memory())} of {format_bytes(plan.ram)}",
        )
    )


def _model(session: Session, rest: str) -> Outcome:
    store, plan = session.runner.store, session.runner.plan
    precisions = ", ".join(plan.expert_bytes)
    roles = "answers by its chat template" if session.form.takes_roles else "continues text (no chat template)"
    return Outcome(
        (
            f"{store.source_name} in {store.directory}, {roles}",
            f"experts in {precisions}, {plan.slots} of {plan.num_records} in memory; dense weights in "
            f"{store.layout.dtype}; context {plan.context}, {format_bytes(plan.ram)} of RAM",
            "for another model: /save FILE, then `qmix chat MODEL --resume FILE`",
        )
    )


def _exit(session: Session, rest: str) -> Outcome:
    return Outcome(leave=True)


def _words(command: str, rest: str) -> list[str]:
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise UsageError(f"{command} {rest}: {str(error).lower()}; quote names with spaces") from None


def _path(command: str, words: list[str]) -> Path:
    if len(words) != 1 or not words[0]:
        raise UsageError(f"{command}: give one file; quote a name with spaces")
    try:
        return Path(words[0]).expanduser()
    except RuntimeError as error:  # ~nobody
        raise UsageError(f"{command} {words[0]}: {error}") from None


COMMANDS = {
    "/help": SlashCommand("", "show this help", _help),
    "/clear": SlashCommand("", "forget the conversation", _clear),
    "/regen": SlashCommand("", "answer the last turn again", _regen),
    "/undo": SlashCommand("", "remove the last turn and its answer", _undo),
    "/system": SlashCommand("[TEXT]", 'show or set the system prompt; "" removes it', _system),
    "/set": SlashCommand("[NAME VALUE]", "show the settings, or change one, such as temperature 0.7", _set),
    "/save": SlashCommand("FILE [--cache]", "save the session; --cache also saves the KV cache", _save),
    "/load": SlashCommand("FILE", "continue a saved session", _load),
    "/read": SlashCommand("FILE [QUESTION]", "send a file's text as a turn, then the question", _read),
    "/stats": SlashCommand("", "show the tokens and memory used so far", _stats),
    "/model": SlashCommand("", "show the model that is running", _model),
    "/exit": SlashCommand("", "leave (also Ctrl-D)", _exit),
}
