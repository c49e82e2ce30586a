"""Write docs/commands.md from the help texts of the commands: `python -m qmix.commands.reference`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from qmix.commands import Commands
from qmix.errors import EXIT_CODES

PATH = Path(__file__).parents[2] / "docs" / "commands.md"
HEAD = """\
# Commands

Made by `make reference` from the help texts of the commands; change those, not this file. Brackets hold the default of
an option.
"""


def reference() -> str:
    """The whole page, which depends on nothing but the commands."""
    group = Commands("qmix")
    context = click.Context(group, info_name="qmix", help_option_names=["-h", "--help"])
    sections = [section for name in group.list_commands(context) for section in _sections(context, name)]
    codes = ["## Exit codes", "", "| | |", "|---:|---|", *(f"| {code} | {text} |" for code, text in EXIT_CODES.items())]
    return "\n".join([HEAD, *sections, *codes, ""])


def _sections(group: click.Context, name: str) -> Iterator[str]:
    """Yield the section of a command and those of its own commands."""
    command = group.command.get_command(group, name)  # type: ignore[attr-defined]
    yield _section(group, command, name)
    for inner, each in getattr(command, "commands", {}).items():
        yield _section(group, each, f"{name} {inner}")


def _section(group: click.Context, command: click.Command, name: str) -> str:
    context = click.Context(command, group, name)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    rows = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in records]
    lines = [f"## qmix {name}", "", "```", usage, "```", "", inspect.cleandoc(command.help or ""), ""]
    return "\n".join([*lines, "| option | |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    PATH.write_text(reference())
