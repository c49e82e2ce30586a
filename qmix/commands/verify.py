"""`qmix verify`: check a store against its checksums."""

from __future__ import annotations

import json
import shlex

import click

from qmix.commands.shared import out, quiet_libraries, store_named
from qmix.errors import REMAKE, StoreError
from qmix.units import format_bytes, plural


@click.command()
@click.argument("store")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object instead of lines")
def verify(store: str, as_json: bool) -> None:
    """Check every byte of a store against its checksums.

    STORE is a store's path, or its id or model as `qmix ls` shows them. Prints a line for each damaged part: file,
    part, bytes, and what is wrong. Exit code 1 if there is damage; `qmix quantize STORE` repairs it.
    """
    quiet_libraries()
    from qmix.store.verify import verify_store
    from qmix.terminal.progress import ProgressDisplay

    directory = store_named(store)
    with ProgressDisplay(f"verifying {directory}") as display:
        found = verify_store(directory, display)
    if as_json:
        out(json.dumps(found.to_json()) + "\n")
    else:
        for damage in found.damages:
            out(f"{damage}\n")
        for name in found.unchecked:
            out(f"{name}: not checked: the store has no checksum of it\n")
    if found.damages:
        advice = REMAKE if found.is_lost else f"repair it with `qmix quantize {shlex.quote(str(directory))}`"
        raise StoreError(f"{directory}: {plural(len(found.damages), 'damaged part')}; {advice}")
    if not as_json:
        out(
            f"{directory}: no damage found, {format_bytes(found.nbytes)} in {plural(found.parts, 'part')} and "
            f"{plural(found.small_files, 'small file')}, read at {format_bytes(found.rate)}/s\n"
        )
