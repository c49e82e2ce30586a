"""Options that every command has: how much it says, and where it logs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import click

from qmix.errors import UsageError
from qmix.terminal.voice import Voice

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
SECRETS = ("QMIX_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # variables whose values never reach a log
LEAST_SECRET = 6  # characters: a shorter text is part of other words


def _quiet(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        Voice.quiet = True
        _notices().setLevel(logging.WARNING)


def _verbose(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        logging.getLogger("qmix").setLevel(logging.DEBUG)
        _notices().setLevel(logging.DEBUG)
        for key, setting in context.obj.items():
            shown = "(not shown)" if "key" in key else setting.value
            logging.getLogger("qmix").debug("%s = %s, set by %s", key, shown, setting.source)


def _log_file(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is None or context.resilient_parsing:
        return
    try:
        handler = logging.FileHandler(value.expanduser(), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--log-file {value}: {error.strerror}; choose another file") from None
    handler.setFormatter(logging.Formatter(LOG_FORMAT))
    handler.addFilter(Redacted(context))
    logging.getLogger("qmix").addHandler(handler)
    logging.getLogger("qmix").info("%s, process %d", context.command_path, os.getpid())


class Redacted(logging.Filter):
    """Replaces secrets in a log's lines: API keys and tokens, wherever they came from."""

    def __init__(self, context: click.Context) -> None:
        super().__init__()
        self._context = context

    def filter(self, record: logging.LogRecord) -> bool:
        secrets = [os.environ.get(name) for name in SECRETS] + [self._context.params.get("api_key")]
        text = record.getMessage()
        for secret in secrets:
            if secret and len(secret) >= LEAST_SECRET:
                text = text.replace(secret, "***")
        record.msg, record.args = text, None
        return True


class Notices(logging.Handler):
    """Write what the library tells of slow work that happens once, a line each, to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if not record.name.startswith(Voice.logger):  # said already
            click.echo(record.getMessage(), err=True)


def _notices() -> logging.Handler:
    """Return the handler of the command line, made once."""
    log = logging.getLogger("qmix")
    for handler in log.handlers:
        if isinstance(handler, Notices):
            return handler
    handler = Notices()
    log.addHandler(handler)
    return handler


def show_notices() -> None:
    """Show what the library tells while it works."""
    logging.getLogger("qmix").setLevel(logging.INFO)
    _notices().setLevel(logging.INFO)


GENERAL: tuple[click.Option, ...] = (
    click.Option(["-q", "--quiet"], is_flag=True, expose_value=False, callback=_quiet, help="only results and errors"),
    click.Option(
        ["-v", "--verbose"],
        is_flag=True,
        expose_value=False,
        callback=_verbose,
        help="also tell what is decided, and why",
    ),
    click.Option(
        ["--log-file"],
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        expose_value=False,
        callback=_log_file,
        help="append what is told to a file, with the time",
    ),
)


def with_general_options(command: click.Command) -> click.Command:
    """Return a command with the options of every command, except for the ones that it has itself."""
    taken: set[Any] = {option for parameter in command.params for option in parameter.opts}
    command.params += [option for option in GENERAL if taken.isdisjoint(option.opts)]
    return command
