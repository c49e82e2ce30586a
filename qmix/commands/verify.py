"""`qmix verify`: a whole store read and compared with its checksums."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import click

from qmix.commands.shared import out, quiet_libraries
from qmix.errors import REMAKE, StoreError
from qmix.units import format_bytes


@click.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of lines")
def verify(store: Path, as_json: bool) -> None:
    """Read all of STORE at the disk's speed and say everything that is damaged.

    A line for each damaged part: its file, what it is, its bytes, and what is wrong. Exit code 1: something is damaged;
    `qmix quantize STORE` mends it.
    """
    quiet_libraries()
    from qmix.store.verify import verify_store
    from qmix.terminal.progress import ProgressDisplay

    with ProgressDisplay(f"verifying {store}") as display:
        found = verify_store(store, display)
    if as_json:
        out(json.dumps(found.to_json()) + "\n")
    else:
        for damage in found.damages:
            out(f"{damage}\n")
        for name in found.unchecked:
            out(f"{name}: not checked, for nothing is known of what it should hold\n")
    if found.damages:
        count = len(found.damages)
        advice = REMAKE if found.is_lost else f"mend it with `qmix quantize {shlex.quote(str(store))}`"
        raise StoreError(f"{store}: {count} {'part is' if count == 1 else 'parts are'} damaged; {advice}")
    if not as_json:
        out(
            f"{store}: all well, {format_bytes(found.nbytes)} in {found.parts} parts and {found.small_files} small "
            f"files, read at {format_bytes(found.rate)}/s\n"
        )
