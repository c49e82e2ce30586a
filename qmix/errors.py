"""Errors meant for the user: what happened, in which file or option, and what to do.

Each class carries the exit code that the command line ends with; a message is one line.
"""

from __future__ import annotations

import shlex
from pathlib import Path

EXIT_CODES = {
    0: "done",
    1: "failed",
    2: "wrong usage",
    3: "does not fit the budget; the message names the smallest that does",
    4: "done but for some lines of a batch, each of which says why",
    130: "interrupted",
}
REMAKE = "delete the store and quantize the model again"  # where not even the manifest can be trusted


def mending(store: Path) -> str:
    """Return what to do where something of a store is damaged but its manifest is not."""
    return f"mend it with `qmix quantize {shlex.quote(str(store))}` (`qmix verify` shows all damage)"


LONGEST = 1500  # characters of a message


class QmixError(Exception):
    """Base of all errors that qmix reports without a traceback.

    As text it is one printable line whatever it quotes: control characters, line ends and halves of surrogate pairs in
    the names of files, tokens or tensors are escaped, so that they neither break the line nor steer a terminal. A long
    one loses its middle: what happened is said first, what to do last.
    """

    exit_code = 1

    def __str__(self) -> str:
        message = super().__str__()
        if not message.isprintable():
            message = "".join(char if char.isprintable() else _escaped(char) for char in message)
        return message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 + 3 :]}"


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


class CheckpointError(QmixError):
    """The published weights cannot be used: a file is missing, damaged, or not a Mixtral."""


class StoreError(QmixError):
    """A store is damaged, incomplete, or belongs to something else."""


class HubError(QmixError):
    """The Hugging Face hub did not give what was asked of it."""


class DataError(QmixError):
    """The data of a task to be evaluated is missing, or cannot be read."""


class SessionError(QmixError):
    """A saved conversation cannot be read or written."""


class UsageError(QmixError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class DoesNotFitError(QmixError):
    """The budget cannot hold what must be resident.

    `smallest` is the smallest budget, in bytes, that works.
    """

    exit_code = 3

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest


class Cancelled(Exception):
    """The work was stopped because its caller asked for it; not an error of anything."""
