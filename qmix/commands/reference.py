"""Write docs/commands.md from the help texts of the commands: `python -m qmix.commands.reference`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from qmix.commands import Commands
from qmix.commands.general import GENERAL
from qmix.errors import EXIT_CODES

PATH = Path(__file__).parents[2] / "docs" / "commands.md"
HEAD = """\
# Commands

Made by `make reference` from the help texts of the commands; change those, not this file. Brackets hold the default of
an option.
"""


def reference() -> str:
    """Return the whole page, which depends on nothing but the commands."""
    group = Commands("qmix")
    context = click.Context(group, info_name="qmix", help_option_names=["-h", "--help"])
    sections = [section for name in group.list_commands(context) for section in _sections(context, name)]
    rows = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in map(_record, GENERAL)]
    general = ["## Options of every command", "", "| option | |", "|---|---|", *rows, ""]
    codes = ["## Exit codes", "", "| | |", "|---:|---|", *(f"| {code} | {text} |" for code, text in EXIT_CODES.items())]
    return "\n".join([HEAD, *sections, *general, *codes, ""])


def _sections(group: click.Context, name: str) -> Iterator[str]:
    """Yield the section of a command, and the sections of commands whose names take the place of an argument."""
    command = group.command.get_command(group, name)  # type: ignore[attr-defined]
    yield _section(group, command, name)
    within = {} if isinstance(command, click.Group) else getattr(command, "commands", {})
    for inner, each in within.items():
        yield _section(group, each, f"{name} {inner}")


def _section(group: click.Context, command: click.Command, name: str) -> str:
    context = click.Context(command, group, name)
    own = [parameter for parameter in command.get_params(context) if parameter not in GENERAL]
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    options = [option for option in own if isinstance(option, click.Option) and option.name != "help"]
    rows = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in map(_record, options)]
    if isinstance(command, click.Group):
        inner = [command.commands[each] for each in command.list_commands(context)]
        rows += [f"| `{_usage(each, context)}` | {_cell(each.get_short_help_str(300))} |" for each in inner]
    lines = [f"## qmix {name}", "", "```", usage, "```", "", inspect.cleandoc(command.help or ""), ""]
    return "\n".join([*lines, *(["| option | |", "|---|---|", *rows, ""] if rows else [])])


def _record(option: click.Option) -> tuple[str, str]:
    """Return an option's names and help, as click shows them."""
    record = option.get_help_record(click.Context(click.Command("qmix")))
    assert record is not None
    return record


def _usage(command: click.Command, group: click.Context) -> str:
    """Return a subcommand with its arguments."""
    context = click.Context(command, group, command.name)
    return _cell(" ".join([command.name or "", *(each for each in command.collect_usage_pieces(context)[1:])]))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    PATH.write_text(reference())
