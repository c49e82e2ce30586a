"""The commands of the command line, one module each: options, exit codes and streams. May import every room.

A module and its command have the same name. The module is imported when the command is used, and imports the rest when
the command runs: `--help` loads no torch.
"""

from __future__ import annotations

from importlib import import_module

import click

from qmix.errors import QmixError

COMMANDS = (
    "generate",
    "chat",
    "batch",
    "serve",
    "quantize",
    "verify",
    "export",
    "plan",
    "compare",
    "calibrate",
    "eval",
    "bench",
    "doctor",
)
OPTIONS = {"attention": "--attn", "n": "-n", "output": "--out", "source": "--from"}  # others have the argument's name


def in_options(error: QmixError) -> str:
    """Return the text of an error with options in place of arguments."""
    return error.for_command(OPTIONS)


class Commands(click.Group):
    """A group that imports a command when it is used."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"qmix.commands.{name}"), name)
        return command
