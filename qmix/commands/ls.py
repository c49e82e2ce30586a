"""`qmix ls`: the stores in the user's cache, or in other directories."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qmix.commands.shared import out
from qmix.errors import UsageError
from qmix.units import format_bytes, plural

if TYPE_CHECKING:
    from rich.table import Table

    from qmix.store.listing import StoreEntry


@click.command()
@click.argument("directories", metavar="[DIRECTORY]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print one JSON object instead of a table")
def ls(directories: tuple[Path, ...], as_json: bool) -> None:
    """List stores: model, precision, size and last use.

    Lists the user's cache, or each DIRECTORY. `show`, `rm` and `verify` take the id of a store, its model, or its path.
    A store that is not finished is marked `partial`: the command that began it continues it.
    """
    from qmix.disk.places import cache_directory
    from qmix.store.listing import stores_in

    for directory in directories:
        if not directory.expanduser().is_dir():
            raise UsageError(f"{directory}: directory not found")
    places = [directory.expanduser() for directory in directories] or [cache_directory()]
    found = [entry for place in places for entry in stores_in(place)]
    if as_json:
        out(json.dumps({"schema": "qmix-stores-1", "stores": [entry.to_json() for entry in found]}) + "\n")
        return
    from qmix.terminal.tables import print_table, say

    where = ", ".join(map(str, places))
    if not found:
        say(f"no stores in {where}; `qmix pull MODEL` makes one")
        return
    print_table(_table(found))
    say(f"{plural(len(found), 'store')}, {format_bytes(sum(entry.nbytes for entry in found))} in {where}")


def _table(found: list[StoreEntry]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="")
    table.add_column("MODEL", overflow="fold")
    for name in ("PRECISION", "SIZE", "LAST USE"):
        table.add_column(name, no_wrap=True)
    table.add_column("ID", overflow="fold")
    for entry in found:
        state = "" if entry.state == "whole" else f", {entry.state}"
        table.add_row(
            entry.model,
            entry.precision + state,
            format_bytes(entry.nbytes),
            used(entry.last_use, entry.in_use),
            entry.id,
        )
    return table


def used(last_use: float | None, in_use: bool) -> str:
    """Return when a store was last used, in words."""
    from qmix.terminal.tables import ago

    return "in use" if in_use else "never" if last_use is None else ago(max(0.0, time.time() - last_use))
