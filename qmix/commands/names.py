"""Names of models and stores as parameters, completed by shells."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from qmix.commands.settings import CACHE, ConfigFile, read_config, variable
from qmix.disk.places import cache_directory, config_file, use_cache_directory
from qmix.errors import QmixError
from qmix.models import EMBEDDED
from qmix.models.published import PUBLISHED


def use_configured_cache(config: ConfigFile) -> None:
    """Use the cache directory of the environment or the config file, where one of them names it."""
    if (cache := os.environ.get(variable(CACHE)) or config.content.get(CACHE)) is not None:
        use_cache_directory(Path(str(cache)).expanduser().absolute())


class ModelName(click.types.StringParamType):
    """A model: the embedded one, one that has a store in the cache, or a file's path; for `plan` published sizes."""

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem[Any]]:
        """Return the names that begin so; shells complete paths where there is none."""
        names = [*EMBEDDED, *(PUBLISHED if context.info_name == "plan" else ()), *_models()]
        return _matching(names, incomplete)


class StoreName(click.types.StringParamType):
    """A store: its model, its id, or its path."""

    def shell_complete(
        self, context: click.Context, parameter: click.Parameter, incomplete: str
    ) -> list[CompletionItem[Any]]:
        """Return the names that begin so; shells complete paths where there is none."""
        return _matching([*_models(), *(entry.id for entry in _stores())] if incomplete else _models(), incomplete)


def _stores() -> list[Any]:
    from qmix.store.listing import stores_in

    with suppress(QmixError):
        use_configured_cache(read_config(config_file()))
    return stores_in(cache_directory())


def _models() -> list[str]:
    return [entry.model for entry in _stores() if entry.state == "whole"]


def _matching(names: list[str], incomplete: str) -> list[CompletionItem[Any]]:
    found = [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


NAMES = {"model": ModelName(), "store": StoreName(), "stores": StoreName()}


def with_names(command: click.Command) -> click.Command:
    """Return a command whose models and stores shells complete."""
    for parameter in command.params:
        if parameter.name in NAMES and isinstance(parameter.type, click.types.StringParamType):
            parameter.type = NAMES[parameter.name]
    return command
