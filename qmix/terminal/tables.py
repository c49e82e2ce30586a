"""Write tables for people."""

from __future__ import annotations

from rich.console import Console, RenderableType

from qmix.terminal.voice import say, stdout
from qmix.units import plural

__all__ = ["ago", "format_seconds", "print_table", "say"]


def format_seconds(seconds: float) -> str:
    """Return three digits with their unit: 12.3 s, 4.56 ms."""
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def ago(seconds: float) -> str:
    """Return a time in the past in words: "just now", "5 minutes ago", "3 days ago"."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            return f"{plural(int(seconds // length), unit)} ago"
    return "just now"


def print_table(*tables: RenderableType) -> None:
    """Write tables to stdout, as wide as the terminal; 120 columns where there is none."""
    console = Console(file=stdout())
    if not console.file.isatty():
        console = Console(file=stdout(), width=120, force_terminal=False)
    for table in tables:
        console.print(table)
