"""The commands of the command line, a module each, named like its command and imported when it is used.

Such a module has the command under its own name, and imports what the command needs when it runs: `--help` loads no
torch.
"""

from __future__ import annotations

from importlib import import_module

import click

from qmix.errors import QmixError

COMMANDS = (
    "generate",
    "chat",
    "batch",
    "quantize",
    "verify",
    "plan",
    "compare",
    "calibrate",
    "eval",
    "bench",
    "doctor",
)
OPTIONS = {"attention": "--attn", "output": "--out", "source": "--from"}  # others have the argument's name


def in_options(error: QmixError) -> str:
    """Return the text of an error with options in place of arguments."""
    return error.for_command(OPTIONS)


class Commands(click.Group):
    """A group that knows its commands' names, and imports a command when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"qmix.commands.{name}"), name)
        return command
