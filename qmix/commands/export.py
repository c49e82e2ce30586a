"""`qmix export`: write a store as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from qmix.commands.shared import load_libraries, store_named
from qmix.units import format_bytes, plural

SHARD_HELP = "most bytes of a weight file, unless one tensor has more"


@click.command()
@click.argument("store")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE", help=SHARD_HELP)
def export(store: str, directory: Path, max_shard_size: str) -> None:
    """Write a store as a checkpoint in half precision.

    STORE is a path, or a name as `qmix ls` shows it.
    DIRECTORY gets safetensors files under the published names, the config and the tokenizer, for programs that read
    Mixtral from Hugging Face. Every quantised weight is rounded to the store's half precision. Memory holds two experts
    and one other tensor at a time. An earlier checkpoint in DIRECTORY is replaced.
    """
    load_libraries()
    from qmix.model.checkpoint_writer import export_store
    from qmix.store.opened import open_store
    from qmix.terminal.progress import ProgressDisplay
    from qmix.terminal.voice import say

    with ProgressDisplay(f"exporting {store}") as display:
        files = export_store(open_store(store_named(store)), directory, max_shard_size, display)
    say(f"{directory}: {format_bytes(sum(files.values()))} of weights in {plural(len(files), 'file')}")
