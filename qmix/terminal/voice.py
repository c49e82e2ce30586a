"""Write lines for people to stderr."""

from __future__ import annotations

import logging
from typing import ClassVar

import click


class Voice:
    """The lines and progress for people, shown or not; `logger` is the log's name of what is said."""

    quiet: ClassVar[bool] = False
    logger: ClassVar[str] = "qmix.terminal"


def say(line: str) -> None:
    """Write one line to stderr, unless the user wants quiet, and to the log."""
    logging.getLogger(Voice.logger).info("%s", line)
    if not Voice.quiet:
        click.echo(line, err=True)
