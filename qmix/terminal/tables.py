"""Write lines and tables for people."""

from __future__ import annotations

import click
from rich.console import Console, RenderableType


def say(line: str) -> None:
    """Write one line to stderr."""
    click.echo(line, err=True)


def format_seconds(seconds: float) -> str:
    """Return three digits with their unit: 12.3 s, 4.56 ms."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def print_table(*tables: RenderableType) -> None:
    """Write tables to stdout, as wide as the terminal; 120 columns where there is none."""
    console = Console()
    if not console.file.isatty():
        console = Console(width=120, force_terminal=False)
    for table in tables:
        console.print(table)
