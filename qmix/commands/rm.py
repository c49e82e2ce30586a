"""`qmix rm`: remove stores."""

from __future__ import annotations

import sys

import click

from qmix.errors import UsageError
from qmix.units import format_bytes, plural


@click.command()
@click.argument("stores", metavar="STORE...", nargs=-1, required=True)
@click.option("-y", "--yes", is_flag=True, help="do not ask")
def rm(stores: tuple[str, ...], yes: bool) -> None:
    """Remove stores from the disk.

    STORE is a store's path, or its id or model as `qmix ls` shows them. On a terminal it asks first, and says how many
    bytes that frees. Without a terminal it removes nothing unless --yes is given. A store that a running qmix uses is
    not removed, and neither is anything that is not a store.
    """
    from qmix.disk.places import cache_directory
    from qmix.store.listing import find_store
    from qmix.store.removal import remove_store
    from qmix.terminal.voice import say

    found = list(
        {
            entry.directory.resolve(): entry for name in stores for entry in [find_store(name, cache_directory())]
        }.values()
    )
    if not yes:
        if not (sys.stdin is not None and sys.stdin.isatty()):
            raise UsageError("rm: asks before it removes, and stdin is not a terminal; give --yes")
        for entry in found:
            say(f"{entry.directory}: {entry.model}, {entry.precision}, {format_bytes(entry.nbytes)}")
        total = format_bytes(sum(entry.nbytes for entry in found))
        if not click.confirm(f"remove {plural(len(found), 'store')} and free {total}?", err=True):
            say("nothing removed")
            return
    for entry in found:
        left = remove_store(entry)
        kept = f"; the directory stays, with {', '.join(left[:5])} in it" if left else ""
        say(f"{entry.directory}: removed, {format_bytes(entry.nbytes)} freed{kept}")
