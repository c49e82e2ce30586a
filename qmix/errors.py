"""Errors meant for the user: what happened, in which file or argument, and what to do.

Each class has the exit code that the command line ends with. A message is one line. It names arguments with `arg`, so
that a caller from Python reads `context` and a user of the command line `--context`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

EXIT_CODES = {
    0: "done",
    1: "failed",
    2: "wrong usage",
    3: "does not fit the budget; the message names the smallest that does",
    4: "done, except for some lines of a batch; each of these says why",
    130: "interrupted",
}
LONGEST = 1500  # characters of a message
REMAKE = "delete the store and quantize the model again"  # when not even the manifest can be trusted
ARGUMENT = re.compile("⟪([a-z_]+)(?:=([^⟪⟫]*))?⟫")


def mending(store: Path) -> str:
    """Return the advice for a store that is damaged but has a good manifest."""
    return f"repair it with `qmix quantize {shlex.quote(str(store))}` (`qmix verify` shows all damage)"


def arg(name: str, value: str | None = None) -> str:
    """Return an argument as a message marks it, with a value where the user should give one.

    UsageError(f"give a larger {arg('context')}, or {arg('ram', '9GiB')}")
      as text                give a larger context, or ram='9GiB'
      on the command line    give a larger --context, or --ram 9GiB
    """
    return f"⟪{name}⟫" if value is None else f"⟪{name}={value}⟫"


class QmixError(Exception):
    """Base of all errors that qmix reports without a traceback.

    Its text is one printable line whatever it quotes: control characters, line ends and lone surrogates in the names
    of files, tokens or tensors are escaped, so that they neither break the line nor steer a terminal. A long text loses
    its middle: it begins with what happened and ends with what to do.
    """

    exit_code = 1

    @property
    def message(self) -> str:
        """The text with its arguments still marked, to become a part of another error's."""
        message = super().__str__()
        if not message.isprintable():
            message = "".join(char if char.isprintable() else _escaped(char) for char in message)
        return message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} … {message[-LONGEST // 2 + 3 :]}"

    def __str__(self) -> str:
        return self._with(lambda name, value: name if value is None else f"{name}={value!r}")

    def for_command(self, options: Mapping[str, str]) -> str:
        """Return the text with options in place of arguments: that of `options`, else the name with dashes."""

        def option(name: str, value: str | None) -> str:
            flag = options.get(name) or f"--{name.replace('_', '-')}"
            return flag if value is None else f"{flag} {value}"

        return self._with(option)

    def _with(self, shown: Callable[[str, str | None], str]) -> str:
        return ARGUMENT.sub(lambda found: shown(found[1], found[2]), self.message)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


class CheckpointError(QmixError):
    """The published weights cannot be used: a file is missing, damaged, or not a Mixtral."""


class StoreError(QmixError):
    """A store is damaged, incomplete, or belongs to something else."""


class HubError(QmixError):
    """The Hugging Face Hub did not answer as expected."""


class DataError(QmixError):
    """The data of an evaluation task is missing, or cannot be read."""


class SessionError(QmixError):
    """A saved conversation cannot be read or written."""


class DiskError(QmixError):
    """A file cannot be written: the disk is full, or fails."""


class UsageError(QmixError):
    """An argument has a value that cannot be used."""

    exit_code = 2


class DoesNotFitError(QmixError):
    """The budget cannot hold what must be in memory. `smallest` is the smallest budget that works, in bytes."""

    exit_code = 3

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest

    def __reduce__(self) -> tuple[type[DoesNotFitError], tuple[str, int]]:
        return type(self), (self.message, self.smallest)  # for a worker's parent


class Cancelled(Exception):
    """The caller stopped the work; not an error."""
