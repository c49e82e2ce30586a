"""The command line: runs a command of `qmix.commands` and turns failures into messages and exit codes.

stdout has the answer, stderr the rest. The exit codes are those of `qmix.errors.EXIT_CODES`.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from qmix.commands import Commands, in_options
from qmix.commands.general import show_notices
from qmix.commands.settings import sources_in
from qmix.errors import QmixError
from qmix.kernels.cpu.paths import environment
from qmix.terminal.voice import Voice
from qmix.version import __version__

EXIT_INTERRUPTED = 130
OPENMP_SPINS = (
    "1000"  # then torch's threads sleep: spinning, they would take the cores from qmix's own for milliseconds
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qmix")
def qmix() -> None:
    """Run Mixtral models on one workstation, under a memory budget."""


def _run() -> Any:
    """Run the command in sys.argv; click's own `main` prints an empty line before the message of an interrupt."""
    if "_QMIX_COMPLETE" in os.environ:  # shell completion
        return qmix.main()
    if not sys.argv[1:] and sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        from qmix.commands.names import use_configured_cache
        from qmix.commands.settings import read_config
        from qmix.commands.welcome import welcome
        from qmix.disk.places import config_file

        use_configured_cache(read_config(config_file()))
        click.echo("\n".join(welcome()))
        return None
    with qmix.make_context("qmix", sys.argv[1:]) as context:
        return qmix.invoke(context)


def main(run: Callable[[], Any] = _run) -> None:
    """Run the console command; a failure is one line on stderr and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # do not fail at a character that the locale lacks
    show_notices()
    try:
        _set_environment()
        status = run()
    except click.exceptions.Exit as done:
        status = done.exit_code
    except (KeyboardInterrupt, click.Abort) as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it at once, without a traceback
        if sys.stderr is not None and sys.stderr.isatty():
            click.echo(err=True)  # after the text, and the ^C that the terminal shows
        status = _fail(str(interrupt) or "interrupted", EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        logging.getLogger(Voice.logger).error("%s", error.format_message())
        if told := sources_in(error.format_message(), qmix.settings):
            click.echo(told.strip(" ()"), err=True)
        status = error.exit_code
    except QmixError as error:
        message = in_options(error)
        status = _fail(message + sources_in(message, qmix.settings), error.exit_code)
    except BrokenPipeError:  # the reader of stdout is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 1
    except OSError as error:
        status = _fail(f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except MemoryError:
        status = _fail("out of memory; give a smaller --ram or --context", 1)
    except Exception as error:
        if os.environ.get("QMIX_DEBUG"):
            raise
        status = _fail(_unexpected(error), 1)
    sys.exit(status or 0)


def _unexpected(error: Exception) -> str:
    """Return what to say of an exception that no other handler takes."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "out of memory on a GPU; give a smaller --gpu or --context, or close other programs that use it"
    return f"a bug in qmix: {type(error).__name__}: {error}; QMIX_DEBUG=1 shows the traceback"


def _set_environment() -> None:
    """Set what torch and Numba read when they are loaded, here and in child processes."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)
    if "QMIX_CPU" in os.environ:
        os.environ.update(environment(os.environ["QMIX_CPU"]))


def _fail(message: str, status: int) -> int:
    first, *more = message.splitlines() or [""]
    line = " ".join((first, *more))
    logging.getLogger(Voice.logger).error("%s", line)
    click.echo(f"qmix: {line}", err=True)
    return status


def run() -> None:
    """Run the console command, and end the process without the interpreter's shutdown: half a second with torch."""
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    atexit._run_exitfuncs()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):  # nobody reads, or the disk is full
        status = status or 1
    os._exit(status)


if __name__ == "__main__":
    run()
