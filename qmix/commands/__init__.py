"""The commands of the command line, one module each: options, exit codes and streams. May import every room.

A module and its command have the same name. The module is imported when the command is used, and imports the rest when
the command runs: `--help` loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module

import click

from qmix.commands.general import with_general_options
from qmix.commands.names import use_configured_cache, with_names
from qmix.commands.settings import ConfigFile, Setting, SettingsContext, read_config, settings_of
from qmix.disk.places import config_file
from qmix.errors import QmixError

COMMANDS = (
    "generate",
    "chat",
    "batch",
    "serve",
    "pull",
    "quantize",
    "ls",
    "show",
    "rm",
    "verify",
    "export",
    "plan",
    "compare",
    "calibrate",
    "eval",
    "bench",
    "doctor",
    "config",
    "completion",
)
OPTIONS = {"attention": "--attn", "n": "-n", "output": "--out", "source": "--from"}  # others have the argument's name


def in_options(error: QmixError) -> str:
    """Return the text of an error with options in place of arguments."""
    return error.for_command(OPTIONS)


class Commands(click.Group):
    """A group that imports a command when it is used, and gives it the values of environment and config file.

    `settings` are those of the command that runs, by key.
    """

    settings: Mapping[str, Setting] = {}

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context | None, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"qmix.commands.{name}"), name)
        return with_names(with_general_options(command))

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(context, args)
        if command is not None and not context.resilient_parsing:
            command.context_class = SettingsContext
            context.obj = self.settings = self._settings(name or "", command)
        return name, command, rest

    def every(self) -> dict[str, click.Command]:
        """Return all commands by name."""
        return {name: command for name in COMMANDS if (command := self.get_command(None, name)) is not None}

    def _settings(self, name: str, command: click.Command) -> dict[str, Setting]:
        """Return the settings of a command. Raises UsageError where the file has a key that no command has."""
        config = read_config(config_file()) if name != "config" else ConfigFile(config_file())
        if config.content:
            config.check(self.every())
        use_configured_cache(config)
        return settings_of(command, name, config, os.environ)
