"""`qmix quantize`: make a store from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qmix.commands.options import budget_option, clip_option, dtype_option, precision_option, profile_option
from qmix.commands.shared import load_libraries, quiet_libraries, read_profile_option, refuse, warn_of_drive
from qmix.errors import UsageError
from qmix.units import format_bytes, plural

FROM_HELP = "when repairing: the checkpoint of the store [where it was]"


@click.command()
@click.argument("model")
@click.argument("store", type=click.Path(path_type=Path), required=False)
@precision_option
@clip_option
@profile_option
@budget_option
@dtype_option
@click.option("--evict", is_flag=True, help="with a model on the Hub: delete each shard after use")
@click.option("--from", "source", metavar="MODEL", help=FROM_HELP)
def quantize(model: str, store: Path | None, source: str | None, **options: Any) -> None:
    """Make a store from a checkpoint, or repair a store.

    MODEL is the checkpoint, STORE the directory to make. Run the same command again to continue an interrupted run.
    With a store as MODEL and no STORE, check all of it and make its damaged parts again from its checkpoint.

    With --profile and no --precision, the experts get the precisions that the profile chose, or those with the least
    error within --budget. The store keeps the profile, so that runs know from the start which experts are used most.
    """
    from qmix.store.opened import is_store

    if store is not None:
        if source is not None:
            raise UsageError("--from: only for repairing a store; leave it out")
        _make(model, store, **options)
    elif is_store(Path(model).expanduser()):
        refuse(options, "a store is repaired as it was made")
        _mend(Path(model).expanduser(), source)
    else:
        raise UsageError(f"{model}: not a store; give a store to repair, or a checkpoint and a path for its store")


def _mend(store: Path, source: str | None) -> None:
    from qmix.store.mend import mend
    from qmix.terminal.progress import ProgressDisplay
    from qmix.terminal.voice import say

    with ProgressDisplay(f"verifying {store}") as reading, ProgressDisplay(f"repairing {store}") as mending:
        done = mend(store, source, reading, mending)
    for damage in done.found.damages:
        say(str(damage))
    if not done.found.damages:
        say(f"{store}: no damage found")
    else:
        from_where = f" from {done.source}" if done.source else ""
        say(f"{store}: repaired {plural(len(done.found.damages), 'part')}{from_where}")


def _make(
    model: str, store: Path, precision: str | None, clip: bool, dtype: str | None, evict: bool, **options: Any
) -> None:
    quiet_libraries()
    from qmix.checkpoint import open_checkpoint
    from qmix.checkpoint.source import LocalSource
    from qmix.engine.resolve import fingerprint_of
    from qmix.store.child import INTERRUPTED
    from qmix.store.opened import SHARDS, is_store, partial_directory
    from qmix.store.quantize import quantize as run
    from qmix.store.sources import layout_for, open_source
    from qmix.terminal.progress import ProgressDisplay
    from qmix.terminal.voice import say

    profile = read_profile_option(options["profile"], precision, options["budget"])
    there = is_store(store)
    warn_of_drive(store)
    scratch = partial_directory(store) / SHARDS if evict else None
    source = open_source(model, scratch)
    if evict and isinstance(source, LocalSource):
        raise UsageError(f"--evict: {model} is not on the hub; your own files are never deleted")
    checkpoint = open_checkpoint(source)
    if profile is not None:
        from qmix.store.profile import check_profile

        with ProgressDisplay(f"reading {model}") as display:
            fingerprint = fingerprint_of(checkpoint, display)
        check_profile(profile, options["profile"], checkpoint.geometry, fingerprint)
        precision = profile.spec(precision, options["budget"], checkpoint.geometry, dtype or checkpoint.half_dtype)
    layout = layout_for(checkpoint, precision, dtype, clip)
    if not (store.exists() or store.is_symlink()):
        load_libraries()
        from qmix.engine.usable import check_usable

        check_usable(checkpoint, layout.dtype)
    with ProgressDisplay(f"quantizing {model}") as display:
        try:
            made = run(checkpoint, store, layout, display, profile)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(INTERRUPTED) from None
    say(f"{made.directory}: {'already there, ' if there else ''}{format_bytes(made.layout.total_bytes)}")
