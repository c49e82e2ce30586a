"""A session as a JSON file: turns, their token ids, and the settings.

    {"schema": "qmix-chat-1",
     "model": {"name": ..., "parts": {"weights": ..., "tokenizer.json": ...}},
     "system": "...", "settings": {"temperature": 0.7}, "forgotten": 0,
     "turns": [{"user": "...", "answer": "...", "kept": 0, "opening": [1, 3, ...], "answer_ids": [...]}]}

`parts` are the checksums of the files that a store's answers depend on. With the same parts a session continues from
the ids, else from the texts. `kept` and `opening` are as in `Turn`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from qmix.chat.conversation import Turn, ids_of
from qmix.chat.session import Session
from qmix.chat.settings import restored_settings, saved_settings
from qmix.disk.faults import write_advice
from qmix.engine.sampling import Sampling
from qmix.errors import QmixError, SessionError
from qmix.files import JSON_LIMIT, decode_json, read_bounded, written_whole
from qmix.units import plural

SCHEMA = "qmix-chat-1"
ELSEWHERE = "give another name"
KV_SUFFIX = ".kv.safetensors"


Count = Annotated[int, msgspec.Meta(ge=0)]


class SavedTurn(msgspec.Struct):
    """A turn, as in `Turn` without the system prompt."""

    user: str
    answer: str
    kept: Count
    opening: list[Count]
    answer_ids: list[Count]


class SavedModel(msgspec.Struct):
    """The model of a saved session."""

    name: str | None
    parts: dict[str, str] = {}  # empty in files of earlier versions


class SavedSession(msgspec.Struct):
    """The content of a session file."""

    schema: str
    model: SavedModel
    system: str
    settings: dict[str, Any]
    forgotten: Count
    turns: list[SavedTurn]


def save(session: Session, path: Path) -> None:
    """Write the session to a private file, replaced in one step. Raises SessionError."""
    conversation = session.conversation
    rendered = all(turn.system == conversation.system for turn in conversation.turns)
    turns = conversation.turns if rendered else [_text_alone(turn) for turn in conversation.turns]
    content = SavedSession(
        SCHEMA,
        SavedModel(session.runner.store.source_name, session.runner.store.parts),
        conversation.system,
        saved_settings(session.settings),
        conversation.forgotten,
        [SavedTurn(turn.user, turn.answer, turn.kept, turn.opening, turn.answer_ids) for turn in turns],
    )
    try:
        with written_whole(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")
    except (OSError, ValueError) as error:  # ValueError: a lone surrogate, a NUL in the name
        advice = write_advice(error, ELSEWHERE) if isinstance(error, OSError) else "remove that text"
        raise SessionError(f"{path}: cannot be written ({_reason(error)}); {advice}") from None


def load(session: Session, path: Path) -> str | None:
    """Load a saved conversation and its settings into the session. Returns a notice where its ids cannot be used.

    Raises SessionError, and leaves the session unchanged, where the file cannot be used.
    """
    saved = _read(path)
    turns = [
        Turn(turn.user, turn.answer, saved.system, turn.kept, turn.opening, turn.answer_ids) for turn in saved.turns
    ]
    same = saved.model.parts == session.runner.store.parts
    try:
        settings = restored_settings(saved.settings)
        Sampling(**settings)
        if saved.forgotten > len(turns):
            raise ValueError("more turns dropped than there are")
        if same:
            _check_ids(turns, session.runner.store.geometry.vocab_size)
    except (ValueError, QmixError) as error:
        raise SessionError(f"{path}: damaged or changed ({_reason(error)})") from None
    conversation = session.conversation
    conversation.system, conversation.forgotten = saved.system, saved.forgotten
    conversation.turns = turns if same else [_text_alone(turn) for turn in turns]
    session.settings = settings
    if same:
        return None
    now, was = session.runner.store.parts, saved.model.parts
    others = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    what = f"{saved.model.name} with other {' and '.join(others)}"
    return f"{path}: saved with {what}; only its texts are used, and the next turn computes them again"


def save_cache(session: Session, path: Path) -> int:
    """Write the KV cache beside the session file and return its tokens. Raises SessionError."""
    try:
        return session.runner.save_cache(kv_path(path))
    except OSError as error:
        advice = write_advice(error, ELSEWHERE)
        raise SessionError(f"{kv_path(path)}: cannot be written ({_reason(error)}); {advice}") from None


def load_cache(session: Session, path: Path) -> str | None:
    """Read the KV cache beside a session file, if there is one, and return a notice about it."""
    path = kv_path(path)
    if not path.is_file():
        return None
    try:
        tokens = session.runner.load_cache(path)
    except SessionError as error:
        return f"{error}; the next turn computes the conversation again"
    except (OSError, EOFError) as error:
        return f"{path}: cannot be read ({_reason(error)}); the next turn computes the conversation again"
    if session.runner.held != session.conversation.ids[:tokens]:
        return f"{path}: of another conversation; the next turn computes what differs"
    return f"loaded {plural(tokens, 'token')} into the KV cache"


def kv_path(path: Path) -> Path:
    return path.with_name(path.name + KV_SUFFIX)


def _read(path: Path) -> SavedSession:
    remedy = "give a file that /save wrote"
    data = read_bounded(path, JSON_LIMIT, SessionError, remedy)
    schema = decode_json(data, dict[str, Any], str(path), SessionError, remedy, unique=True).get("schema")
    if schema != SCHEMA:
        raise SessionError(f"{path}: not a chat of this qmix version (schema {str(schema)[:40]!r}, not {SCHEMA!r})")
    return decode_json(data, SavedSession, str(path), SessionError, remedy)


def _check_ids(turns: list[Turn], vocab_size: int) -> None:
    for count, turn in enumerate(turns):
        if turn.kept > len(ids_of(turns[:count])) or max([*turn.opening, *turn.answer_ids], default=0) >= vocab_size:
            raise ValueError(f"the token ids of turn {count + 1}")


def _text_alone(turn: Turn) -> Turn:
    return replace(turn, kept=0, opening=[], answer_ids=[])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
