"""Files of running chats, so that no chat is lost with its process or terminal.

Each chat has its own file, written after every turn. While the chat runs, it is called NAME.running; the next start
finds those whose process is gone. The files of the last chats that ended are kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from qmix.chat import record
from qmix.chat.conversation import Turn
from qmix.chat.session import Session
from qmix.errors import SessionError

RUNNING, ENDED = ".running", ".json"
MOST = 20  # ended chats


class KeptChat:
    """A chat's file in `directory`; `notice` is called once where it cannot be written."""

    def __init__(self, directory: Path, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self._path = directory / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}{RUNNING}"
        self._written: tuple[list[Turn], int, str, dict[str, Any]] | None = None
        self._works = True

    def keep(self, session: Session) -> None:
        """Write the session if it has turns and has changed."""
        conversation = session.conversation
        content = (list(conversation.turns), conversation.forgotten, conversation.system, dict(session.settings))
        if not conversation.turns or content == self._written or not self._works:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            record.save(session, self._path)
        except (OSError, SessionError) as error:
            self._works = False
            self._notice(f"this chat is not saved automatically: {error}; save it with /save FILE")
        else:
            self._written = content

    def end(self) -> None:
        """Note that the chat has come to its end, and drop the oldest chats beyond so many."""
        with suppress(OSError):
            if self._path.exists():
                self._path.replace(self._path.with_suffix(ENDED))
            for old in sorted(self._path.parent.glob(f"*{ENDED}"))[:-MOST]:
                old.unlink()


def interrupted(directory: Path) -> list[str]:
    """Return a line about each chat whose process is gone; each is reported once."""
    lines = []
    for path in sorted(directory.glob(f"*{RUNNING}")):
        process = path.stem.rpartition("-")[2]
        if process.isdecimal() and len(process) < 10 and psutil.pid_exists(int(process)):
            continue
        with suppress(OSError):
            kept = path.replace(path.with_suffix(ENDED))
            lines.append(f"a chat was interrupted; to continue it: /load {kept}")
    return lines
