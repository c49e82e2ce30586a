"""Values of options from the environment and the config file.

The option `--max-new-tokens` is the variable QMIX_MAX_NEW_TOKENS and the key `max-new-tokens`: at the top of the file
for every command that has it, in a table named like a command for that one. The command line comes first, then the
environment, then the command's table, then the top of the file, then the default. Imports tomlkit only where there is
a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from qmix.errors import UsageError
from qmix.files import TEXT_LIMIT, read_bounded

PREFIX = "QMIX_"
CACHE = "cache"  # a setting of no command: the directory of the stores
ONCE = {  # parameters that say what one command does, not how commands run
    *("help", "version", "as_json", "yes", "output", "resume", "plot", "compare", "verify", "self_test", "no_measure"),
    *("source", "prompt_file", "directories", "keep", "full", "as_jsonl", "shard", "order", "max_shard_size"),
}
SECRET = ("api-key",)
EXCLUDED = {  # an option of a higher source takes the place of these
    "plan": ("ram", "gpu", "context"),
    "ram": ("plan",),
    "gpu": ("plan",),
    "context": ("plan",),
    "system": ("system-file",),
    "system-file": ("system",),
    "budget": ("precision",),
    "precision": ("budget",),
    "quiet": ("verbose",),
    "verbose": ("quiet",),
}
SERVICE_LINK = re.compile(r"(tcp|udp|sctp)://")  # Kubernetes sets QMIX_PORT in pods beside a service called qmix
ENVIRONMENT, TABLE, TOP = 3, 2, 1  # ranks of sources; the command line's is above them


@dataclass(frozen=True)
class Setting:
    """A value that was not typed: its `source` for messages, such as "QMIX_RAM" or "config.toml, key chat.ram"."""

    value: Any
    source: str
    rank: int


def key_of(parameter: click.Parameter) -> str | None:
    """Return the key of a parameter that can be set; None for one that cannot."""
    if isinstance(parameter, click.Argument):
        return "model" if parameter.name == "model" and not parameter.required else None
    names = [name for name in parameter.opts if name.startswith("--")]
    return names[0][2:] if names and parameter.name not in ONCE else None


def keys_of(command: click.Command) -> dict[str, click.Parameter]:
    """Return the parameters of a command that can be set, by key."""
    return {key: parameter for parameter in command.params if (key := key_of(parameter)) is not None}


def variable(key: str) -> str:
    """Return the environment variable of a key."""
    return PREFIX + key.upper().replace("-", "_")


def set_by(environment: Mapping[str, str], key: str) -> str:
    """Return the value of a key's variable, "" where it is not set or where Kubernetes set it."""
    text = environment.get(variable(key), "")
    return "" if key == "port" and SERVICE_LINK.match(text) else text


@dataclass(frozen=True)
class ConfigFile:
    """The content of the config file, by key; tables of commands are mappings in it."""

    path: Path
    content: Mapping[str, Any] = field(default_factory=dict)

    def check(self, commands: Mapping[str, click.Command]) -> None:
        """Raise UsageError at a key that no command has."""
        known = {key for command in commands.values() for key in keys_of(command)} | {CACHE}
        for key, value in self.content.items():
            if isinstance(value, Mapping):
                if key not in commands:
                    raise UsageError(f"{self.path}: [{key}]: no such command{meant(key, commands)}")
                for inner in value:
                    if inner not in keys_of(commands[key]):
                        near = meant(inner, keys_of(commands[key]))
                        raise UsageError(f"{self.path}: {inner} in [{key}]: not an option of {key}{near}")
            elif key not in known:
                raise UsageError(f"{self.path}: {key}: not an option of any command{meant(key, known)}")

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield every key, with its command before it (`chat.temperature`), and its value."""
        for key, value in self.content.items():
            if isinstance(value, Mapping):
                yield from ((f"{key}.{inner}", each) for inner, each in value.items())
            else:
                yield key, value


def meant(name: str, known: Any) -> str:
    """Return `; did you mean X?`, or nothing where no name is close."""
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else "; `qmix config keys` lists them"


def read_config(path: Path) -> ConfigFile:
    """Return the config file, empty where there is none. Raises UsageError where it cannot be read."""
    if not path.exists():
        return ConfigFile(path)
    return ConfigFile(path, parsed(path).unwrap())


def parsed(path: Path) -> Any:
    """Return a TOML file with its comments, as tomlkit's document. Raises UsageError naming the line."""
    import tomlkit
    from tomlkit.exceptions import ParseError

    remedy = "correct it, or delete the file"
    data = read_bounded(path, TEXT_LIMIT, UsageError, remedy)
    try:
        return tomlkit.parse(data.decode())
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start}); {remedy}") from None
    except (ParseError, ValueError) as error:
        raise UsageError(f"{path}: invalid TOML: {error}; {remedy}") from None


def settings_of(
    command: click.Command, name: str, config: ConfigFile, environment: Mapping[str, str]
) -> dict[str, Setting]:
    """Return what environment and file set for a command's parameters, by key."""
    found: dict[str, Setting] = {}
    table = config.content.get(name)
    table = table if isinstance(table, Mapping) else {}  # `batch` is a command, and an option of others
    for key, parameter in keys_of(command).items():
        text = set_by(environment, key)
        if text:
            several = isinstance(parameter, click.Option) and parameter.multiple
            value = [part.strip() for part in text.split(",")] if several else text
            found[key] = Setting(value, variable(key), ENVIRONMENT)
        elif key in table:
            found[key] = Setting(_typed(table[key], parameter), f"{config.path}, key {name}.{key}", TABLE)
        elif key in config.content and not isinstance(config.content[key], Mapping):
            found[key] = Setting(_typed(config.content[key], parameter), f"{config.path}, key {key}", TOP)
    return found


def _typed(value: Any, parameter: click.Parameter) -> Any:
    """Return a value of the file as click takes it: a list for a repeatable option, else as it is, or as text."""
    if isinstance(parameter, click.Option) and parameter.multiple:
        return [str(each) for each in (value if isinstance(value, list) else [value])]
    return value if isinstance(value, bool) else str(value)


class SettingsContext(click.Context):
    """The context of a command that takes values from `obj`, its settings by key, where none were typed.

    A setting is left out where an option that excludes it comes from a higher source.
    """

    def lookup_default(self, name: str, call: bool = True) -> Any:
        """Return the value of a parameter that was not typed; click has processed the typed ones."""
        keys, settings = keys_of(self.command), self.obj
        key = next((key for key in settings if key in keys and keys[key].name == name), None)
        if key is None:
            return None
        rivals = [other for other in EXCLUDED.get(key, ()) if other in keys]
        return None if any(self._rank(keys, other) > settings[key].rank for other in rivals) else settings[key].value

    def _rank(self, keys: Mapping[str, click.Parameter], key: str) -> int:
        if self.get_parameter_source(keys[key].name or "") is click.core.ParameterSource.COMMANDLINE:
            return ENVIRONMENT + 1
        return self.obj[key].rank if key in self.obj else 0


def sources_in(message: str, settings: Mapping[str, Setting]) -> str:
    """Return the sources of the options in a message that were not typed, to be put behind it; empty for none."""
    words = set(re.findall(r"--[a-z0-9-]+", message))
    told = [
        f"{'model' if key == 'model' else f'--{key}'} is set by {setting.source}"
        for key, setting in settings.items()
        if f"--{key}" in words or (key == "model" and str(setting.value) in message)
    ]
    return f" ({'; '.join(told)})" if told else ""
