"""Messages between a command and the process that quantises for it."""

from __future__ import annotations

import msgspec


class Request(msgspec.Struct, frozen=True):
    """A store to make, of the checkpoint that had this `identity` when it was looked at."""

    model: str
    identity: str
    directory: str
    precision: str | None
    dtype: str | None
    clip: bool


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line: how far it is, as Progress has it, or the error that ended it."""

    done: int = 0
    total: int = 0
    note: str = ""
    error: str = ""
    exit_code: int = 1
