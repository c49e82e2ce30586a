"""`qmix pull`: fetch a model and make its store in the cache, after saying what it takes and how it will run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.options import (
    MODEL_HELP,
    clip_option,
    context_option,
    dtype_option,
    gpu_option,
    precision_option,
    ram_option,
)
from qmix.commands.shared import load_libraries, quiet_libraries, warn_of_drive
from qmix.errors import DoesNotFitError, UsageError
from qmix.units import format_bytes

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.store.layout import StoreLayout

KEEP_HELP = "with a model on the Hub: keep its shards in the Hub's cache, in place of deleting each after use"


@click.command()
@click.argument("model")
@precision_option
@clip_option
@dtype_option
@ram_option
@gpu_option
@context_option
@click.option("--keep", is_flag=True, help=KEEP_HELP)
def pull(model: str, precision: str | None, clip: bool, dtype: str | None, keep: bool, **limits: Any) -> None:
    """Fetch MODEL and make its store in the cache.

    First it says how large the store becomes, what disk space that takes, and how the model will run here, as `qmix
    plan` does for --ram, --gpu and --context; a model that cannot run in them is refused. Then each shard is fetched,
    quantised and deleted. Run the same command again to continue an interrupted run. The other commands find the store
    by MODEL and its precision.
    """
    quiet_libraries()
    from qmix.checkpoint import open_checkpoint
    from qmix.disk.places import cache_directory
    from qmix.engine.resolve import made_from
    from qmix.store.opened import is_store
    from qmix.store.sources import named_store, open_source
    from qmix.terminal.progress import ProgressDisplay
    from qmix.terminal.voice import say

    named = named_store(model, precision, dtype, clip)
    if named is not None:
        raise UsageError(f"{model}: is a store already; give {MODEL_HELP.partition(', ')[2]}")
    checkpoint = open_checkpoint(open_source(model))
    advised = []
    warn_of_drive(cache_directory())

    def advise(layout: StoreLayout) -> None:
        for line in advice(model, checkpoint, layout, precision, keep, **limits):
            advised.append(line)
            say(line)
        load_libraries()

    with ProgressDisplay(f"pulling {model}") as display:
        store = made_from(checkpoint, model, precision, dtype, display, advise, clip, evict=not keep)
    assert is_store(store.directory)
    there = "" if advised else "already there, "
    how = "".join(f" --{name} {value}" for name, value in (("precision", precision), ("dtype", dtype)) if value)
    line = f"qmix chat {shlex.quote(model)}{how}{' --clip' * clip}"
    say(f"{store.directory}: {there}{format_bytes(store.layout.total_bytes)}; run it with `{line}`")


def advice(
    model: str,
    checkpoint: Checkpoint,
    layout: StoreLayout,
    precision: str | None,
    keep: bool,
    ram: int | None,
    gpu: tuple[str, ...],
    context: int | None,
) -> list[str]:
    """Return what a store takes and how it will run here, a line each. Raises DoesNotFitError where it cannot run."""
    from qmix.checkpoint.source import LocalSource
    from qmix.disk.places import cache_directory
    from qmix.machine.found import free_disk
    from qmix.plan.here import this_machine
    from qmix.plan.target import PlanTarget
    from qmix.planner.planned import plan_on
    from qmix.planner.view import outlook
    from qmix.store.listing import precision_name

    sizes = checkpoint.source.files()
    weights = sum(sizes[name] or 0 for name in checkpoint.files)
    local = isinstance(checkpoint.source, LocalSource)
    largest = max(sizes[name] or 0 for name in checkpoint.files)
    needed = layout.total_bytes + (0 if local else weights if keep else largest)
    free = free_disk(cache_directory())
    kinds = f"experts in {precision_name(layout.precisions)}, the rest in {layout.dtype}"
    lines = [
        f"{model}: {format_bytes(weights)} to {'read' if local else 'fetch'}, the store takes "
        f"{format_bytes(layout.total_bytes)} ({kinds})",
        f"disk: {format_bytes(needed)} needed while it is made, {format_bytes(free)} free in {cache_directory()}",
    ]
    try:
        planned = plan_on(PlanTarget(model, layout, None), this_machine(ram, gpu or None), context, precision=precision)
    except DoesNotFitError as error:
        raise DoesNotFitError(
            f"{error.message}; for another machine, make the store with `qmix quantize`", error.smallest
        ) from None
    return [*lines, f"here: {outlook(planned)}"]
