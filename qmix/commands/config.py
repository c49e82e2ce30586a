"""`qmix config`: show and edit the config file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from qmix.commands.settings import CACHE, SECRET, ConfigFile, keys_of, meant, parsed, read_config, set_by, variable
from qmix.commands.shared import out
from qmix.disk.places import config_file
from qmix.errors import QmixError, UsageError
from qmix.files import written_whole
from qmix.terminal.voice import say

PRIVATE = 0o600  # the file may hold an API key
KEY_HELP = "KEY is an option's name, such as ram, for all commands, or with a command before it, such as chat.ram."


@click.group(invoke_without_command=True)
@click.pass_context
def config(context: click.Context) -> None:
    """Show or edit the config file.

    Without a subcommand, show the settings of the file, and those of the environment, which take their place. The
    command line comes first, then the environment (QMIX_RAM), then the file's table of the command ([chat]), then the
    top of the file, then the default.
    """
    if context.invoked_subcommand is not None:
        return
    path, found = config_file(), read_config(config_file())
    found.check(_commands())
    for key, value in found.items():
        out(f"{key} = {_shown(key, value)}\n")
    for key in sorted({CACHE, *(key for command in _commands().values() for key in keys_of(command))}):
        if text := set_by(os.environ, key):
            out(f"{key} = {_shown(key, text)}  # {variable(key)}\n")
    say(f"{path}{'' if path.exists() else ': not there yet; `qmix config set KEY VALUE` makes it'}")


@config.command()
@click.argument("key")
def get(key: str) -> None:
    """Print the value of KEY in the file.

    The exit code is 1 if it has none.
    """
    _parameter(key)
    for name, value in read_config(config_file()).items():
        if name == key:
            values = value if isinstance(value, list) else [value]
            out("".join(f"{str(each).lower() if isinstance(each, bool) else each}\n" for each in values))
            return
    raise click.exceptions.Exit(1)


@config.command("set")
@click.argument("key")
@click.argument("values", metavar="VALUE...", nargs=-1, required=True)
def set_(key: str, values: tuple[str, ...]) -> None:
    """Set KEY in the file, after checking the value.

    KEY is an option's name, such as ram, for all commands, or with a command before it, such as chat.temperature.
    An option that can be repeated takes several values. Comments in the file are kept.
    """
    value = _checked(key, values)

    def change(document: Any) -> None:
        import tomlkit

        command, _, name = key.rpartition(".")
        _check_kind(document, command, name)
        if command and command not in document:
            document[command] = tomlkit.table()
        (document[command] if command else document)[name] = value

    _edit(change)


@config.command()
@click.argument("key")
def unset(key: str) -> None:
    """Remove KEY from the file."""

    def change(document: Any) -> None:
        command, _, name = key.rpartition(".")
        _check_kind(document, command, name)
        table = document.get(command, {}) if command else document
        if name not in table:
            raise UsageError(f"{config_file()}: has no {key}; `qmix config` shows what it has")
        del table[name]
        if command and not table:
            del document[command]

    _edit(change)


@config.command()
def path() -> None:
    """Print the path of the file."""
    out(f"{config_file()}\n")


@config.command()
def keys() -> None:
    """List all keys, with their variables and commands."""
    commands = _commands()
    names = {key: [name for name, each in commands.items() if key in keys_of(each)] for key in _keys(commands)}
    for key, users in names.items():
        shown = "all commands" if len(users) == len(commands) or key == CACHE else ", ".join(users)
        out(f"{key:<20} {variable(key):<26} {shown}\n")


def _check_kind(document: Any, command: str, name: str) -> None:
    """Raise UsageError where the file has an option's value in the place of a command's table, or the reverse."""
    if command and not isinstance(document.get(command, {}), Mapping):
        raise UsageError(f"{config_file()}: {command} is an option there, not a command; `qmix config unset {command}`")
    if not command and isinstance(document.get(name), Mapping):
        raise UsageError(f"{config_file()}: [{name}] is the table of a command there; unset its keys first")


def _commands() -> dict[str, click.Command]:
    from qmix.commands import Commands

    return Commands("qmix").every()


def _keys(commands: dict[str, click.Command]) -> list[str]:
    return sorted({CACHE, *(key for command in commands.values() for key in keys_of(command))})


def _shown(key: str, value: Any) -> str:
    import tomlkit

    return '"(not shown)"' if key.rpartition(".")[2] in SECRET else str(tomlkit.item(value).as_string())


def _parameter(key: str) -> click.Parameter | None:
    """Return the parameter of a key, None for one of no command. Raises UsageError where there is no such key."""
    commands = _commands()
    command, dot, name = key.rpartition(".")
    if dot and command not in commands:
        raise UsageError(f"{key}: no such command{meant(command, commands)}")
    if key == CACHE:
        return None
    for each in [commands[command]] if dot else commands.values():
        if name in keys_of(each):
            return keys_of(each)[name]
    known = keys_of(commands[command]) if dot else _keys(commands)
    raise UsageError(f"{key}: not an option of {command or 'any command'}{meant(name, known)}")


def _checked(key: str, values: tuple[str, ...]) -> Any:
    """Return the value for the file, as TOML has it. Raises UsageError where the option does not take it."""
    parameter = _parameter(key)
    if parameter is None:
        return str(Path(values[0]).expanduser().absolute())
    several = isinstance(parameter, click.Option) and parameter.multiple
    if len(values) > 1 and not several:
        raise UsageError(f"{key}: takes one value; quote a value with spaces")
    context = click.Context(click.Command("config"))
    try:
        converted = [parameter.type.convert(value, parameter, context) for value in values]
    except click.ClickException as error:
        raise UsageError(f"{key}: {error.message}") from None
    plain = [
        new if type(new) in (bool, int, float) and _reads_back(old, new) else old
        for old, new in zip(values, converted, strict=True)
    ]
    return plain if several else plain[0]


def _reads_back(text: str, value: Any) -> bool:
    """Return True if a number says all that its text said: 12GiB is kept as text."""
    with suppress(ValueError):
        return isinstance(value, bool) or float(text) == value
    return False


def _edit(change: Callable[[Any], None]) -> None:
    """Change the file in one step, also beside another process that does. Raises QmixError."""
    import tomlkit

    path = config_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        mode = path.stat().st_mode & 0o777 if path.exists() else PRIVATE
        with written_whole(path) as file:
            document = parsed(path) if path.exists() else tomlkit.document()
            change(document)
            text = tomlkit.dumps(document)
            ConfigFile(path, tomlkit.parse(text).unwrap()).check(_commands())
            os.fchmod(file.fileno(), mode)
            file.write(text.encode())
    except OSError as error:
        raise QmixError(f"{path}: {error.strerror}; change its permissions, or those of its directory") from None
