"""A session as a JSON file: who said what, the token ids of it, and the settings.

    {"schema": "qmix-chat-1",
     "model": {"name": ..., "fingerprint": ..., "template": ...},
     "system": "...", "settings": {"temperature": 0.7}, "forgotten": 0,
     "turns": [{"user": "...", "answer": "...", "kept": 0, "opening": [1, 3, ...], "answer_ids": [...]}]}

`fingerprint` is that of the weights, `template` a digest of the chat template (null for a base model). Where a reader
has the same of both, it goes on from the ids; another takes the texts. `kept` and `opening` are as in `Turn`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from qmix.chat.conversation import Turn, ids_of
from qmix.chat.session import Session
from qmix.chat.settings import restored_settings, saved_settings
from qmix.disk import write_advice, written_whole
from qmix.errors import QmixError, SessionError
from qmix.runner import Runner
from qmix.sampling import Sampling

SCHEMA = "qmix-chat-1"
ELSEWHERE = "give another name"
KV_SUFFIX = ".kv.safetensors"


def save(session: Session, path: Path) -> None:
    """Write the session; the file is replaced at once or not at all. Raises SessionError."""
    conversation = session.conversation
    rendered = all(turn.system == conversation.system for turn in conversation.turns)
    turns = conversation.turns if rendered else [_text_alone(turn) for turn in conversation.turns]
    content = {
        "schema": SCHEMA,
        "model": {"name": session.runner.store.source_name, **_identity(session.runner)},
        "system": conversation.system,
        "settings": saved_settings(session.settings),
        "forgotten": conversation.forgotten,
        "turns": [
            {name: getattr(turn, name) for name in ("user", "answer", "kept", "opening", "answer_ids")}
            for turn in turns
        ],
    }
    try:
        with written_whole(path) as file:
            file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")
    except (OSError, UnicodeEncodeError) as error:
        advice = write_advice(error, ELSEWHERE) if isinstance(error, OSError) else "take that text back"
        raise SessionError(f"{path}: cannot be written ({_reason(error)}); {advice}") from None


def load(session: Session, path: Path) -> str | None:
    """Put a saved conversation and its settings into the session; a notice where ids could not be used.

    Raises SessionError, and leaves the session as it is, where the file is none of ours.
    """
    content = _read(path)
    try:
        turns = [_turn(entry, content["system"]) for entry in content["turns"]]
        settings, forgotten = restored_settings(content["settings"]), content["forgotten"]
        Sampling(**settings)
        same = {name: content["model"][name] for name in ("fingerprint", "template")} == _identity(session.runner)
        if not isinstance(content["system"], str) or type(forgotten) is not int:
            raise TypeError("of another type than it must be")
        if not 0 <= forgotten <= len(turns):
            raise ValueError("more turns forgotten than there are")
        if same:
            _check_ids(turns, session.runner.store.geometry.vocab_size)
    except (KeyError, TypeError, ValueError, QmixError) as error:
        raise SessionError(f"{path}: damaged or changed ({_reason(error)})") from None
    conversation = session.conversation
    conversation.system, conversation.forgotten = content["system"], forgotten
    conversation.turns = turns if same else [_text_alone(turn) for turn in turns]
    session.settings = settings
    return None if same else f"{path}: saved with {content['model'].get('name')}; its texts are taken, all is read anew"


def save_cache(session: Session, path: Path) -> int:
    """Write the KV cache of the conversation beside its session file; returns how many tokens. Raises SessionError."""
    try:
        return session.runner.save_cache(kv_path(path))
    except OSError as error:
        advice = write_advice(error, ELSEWHERE)
        raise SessionError(f"{kv_path(path)}: cannot be written ({_reason(error)}); {advice}") from None


def load_cache(session: Session, path: Path) -> str | None:
    """Read the KV cache beside a session file, if there is one; what to say about it."""
    path = kv_path(path)
    if not path.is_file():
        return None
    try:
        tokens = session.runner.load_cache(path)
    except SessionError as error:
        return f"{error}; the conversation is read anew with the next turn"
    except (OSError, EOFError) as error:
        return f"{path}: cannot be read ({_reason(error)}); the conversation is read anew with the next turn"
    if session.runner.held != session.conversation.ids[:tokens]:
        return f"{path}: of another conversation; what differs is read anew with the next turn"
    return f"{tokens} tokens read back into the KV cache"


def kv_path(path: Path) -> Path:
    return path.with_name(path.name + KV_SUFFIX)


def _identity(runner: Runner) -> dict[str, str | None]:
    template = runner.tokenizer.chat_template
    digest = None if not template else xxhash.xxh3_64_hexdigest(json.dumps(template, sort_keys=True).encode())
    return {"fingerprint": runner.store.fingerprint, "template": digest}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SessionError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise SessionError(f"{path}: not a saved chat (no valid JSON)") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise SessionError(f"{path}: not a chat that this qmix reads (schema {schema!r}, not {SCHEMA!r})")
    return dict(content)


def _turn(entry: Any, system: str) -> Turn:
    texts = [entry["user"], entry["answer"]]
    ids = [*entry["opening"], *entry["answer_ids"], entry["kept"]]
    if not all(isinstance(text, str) for text in texts) or not all(type(token) is int and token >= 0 for token in ids):
        raise TypeError("a turn is not text and token ids")
    user, answer = texts
    return Turn(user, answer, system, entry["kept"], list(entry["opening"]), list(entry["answer_ids"]))


def _check_ids(turns: list[Turn], vocab_size: int) -> None:
    for count, turn in enumerate(turns):
        if turn.kept > len(ids_of(turns[:count])) or max([*turn.opening, *turn.answer_ids], default=0) >= vocab_size:
            raise ValueError(f"the token ids of turn {count + 1}")


def _text_alone(turn: Turn) -> Turn:
    return replace(turn, kept=0, opening=[], answer_ids=[])


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"no {error}" if isinstance(error, KeyError) else str(error)
