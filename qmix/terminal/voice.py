"""Write lines for people to stderr, and results to stdout."""

from __future__ import annotations

import logging
import sys
from typing import ClassVar, TextIO

import click

from qmix.errors import QmixError


class Voice:
    """The lines and progress for people, shown or not; `logger` is the log's name of what is said."""

    quiet: ClassVar[bool] = False
    logger: ClassVar[str] = "qmix.terminal"


def say(line: str) -> None:
    """Write one line to stderr, unless the user wants quiet, and to the log."""
    logging.getLogger(Voice.logger).info("%s", line)
    if not Voice.quiet:
        click.echo(line, err=True)


def stdout() -> TextIO:
    """Return stdout, for a result. Raises QmixError where the process was started without one."""
    if sys.stdout is None:
        raise QmixError("stdout: is closed; redirect it to a file, or to /dev/null")
    return sys.stdout
