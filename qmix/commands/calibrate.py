"""`qmix calibrate`: how often a model uses each expert, and what quantising it costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.options import dtype_option, ram_option
from qmix.commands.parameters import Size
from qmix.commands.shared import hold_to, load_libraries
from qmix.commands.texts import passages_of, text_options, window_of
from qmix.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from calibration.measure import Calibration
    from calibration.report import PoolSize

BUDGET_HELP = "bytes of all experts, such as 60GB: choose the precisions with the least error that fit"
PLOT_HELP = "also write the charts to a .png or .svg file"
NAMED = 6  # experts that a sentence lists; more are only counted


@click.command()
@click.argument("model")
@click.argument("profile", type=click.Path(path_type=Path, dir_okay=False))
@text_options
@click.option("--budget", type=Size(), metavar="SIZE", help=BUDGET_HELP)
@ram_option
@dtype_option
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help=PLOT_HELP)
def calibrate(model: str, profile: Path, budget: int | None, plot: Path | None, **options: Any) -> None:
    """Measure expert use and quantisation error on text.

    The text runs through the checkpoint MODEL layer by layer, so the model may be larger than memory, and each expert
    is read once. PROFILE holds how often each expert is used, the error of quantising it, and the best cache policy.
    `plan`, `quantize` and `compare` read it with --profile; a store made with it keeps a copy.
    """
    from qmix.checkpoint import open_checkpoint
    from qmix.store.sources import open_source

    _check_outputs(profile, plot)
    checkpoint = open_checkpoint(open_source(model))
    window = window_of(checkpoint.geometry, options["window"])
    load_libraries()
    from calibration.measure import bytes_needed
    from calibration.measure import calibrate as run
    from calibration.report import draw, report
    from calibration.routing import ENOUGH
    from qmix.machine.found import default_budget, interpreter_memory
    from qmix.plan.memory import check_memory
    from qmix.store.profile import check_budget, write_profile
    from qmix.store.sources import layout_for
    from qmix.terminal.progress import ProgressDisplay
    from qmix.terminal.tables import print_table, say

    dtype = layout_for(checkpoint, None, options["dtype"]).dtype
    if budget is not None:
        check_budget(budget, checkpoint.geometry, dtype)
    passages = passages_of(checkpoint, options["texts"], window, options["tokens"])
    tokens = sum(len(passage.ids) for passage in passages)
    needed = interpreter_memory(kernels=True) + bytes_needed(checkpoint, dtype, tokens, window)
    ceiling = options["ram"] or default_budget()
    check_memory(needed, ceiling, tokens)
    hold_to(ceiling)
    with ProgressDisplay(f"calibrating {model}") as display:
        found = run(checkpoint, dtype, passages, budget, display)
    write_profile(profile, found.to_json())
    if scarce := found.routing.scarce:
        say(f"fewer than {ENOUGH} tokens went to {_named(scarce)}: their figures are rough; give more text")
    print_table(*report(found, _pool(found, options["ram"])))
    if plot is not None:
        draw(found, plot)
    say(f"{profile}: written; use it with `qmix plan {model} --profile {profile}`")


def _check_outputs(profile: Path, plot: Path | None) -> None:
    """Raise UsageError where a result could not be written, before hours of work."""
    if plot is not None:
        from qmix.terminal.figure import check_target

        check_target(plot, "calibration")
    for path in filter(None, (profile, plot)):
        if not os.access(path.absolute().parent, os.W_OK):
            raise UsageError(f"{path}: its directory does not exist or is not writable; choose another path")


def _named(keys: Sequence[tuple[int, int]]) -> str:
    """Return the names of some experts, and their number if there are many."""
    if len(keys) > NAMED:
        return f"{len(keys)} experts, such as {_named(keys[:NAMED])}"
    return ", ".join(f"{layer}.{expert}" for layer, expert in keys)


def _pool(found: Calibration, ram: int | None) -> PoolSize | None:
    """Return the slots that fit this machine's memory, None where no plan fits."""
    from calibration.report import PoolSize
    from qmix.plan.here import plan_for, this_machine

    try:
        plan = plan_for(found.layout, None, None, machine=this_machine(ram, gpus=()), use=found.profile.use)
    except DoesNotFitError:
        return None
    return PoolSize(plan.ram, plan.slots)
