"""`qmix calibrate`: where a model routes text, and what quantising each of its experts costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.shared import Size, dtype_option, hold_to, quiet_libraries, ram_option
from qmix.commands.texts import passages_of, text_options, window_of
from qmix.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from calibration.report import Pool
    from calibration.run import Calibration

BUDGET_HELP = "of all experts, as 60GB: choose the precisions that lose least in so many bytes"
PLOT_HELP = "draw what was found into FILE.png or .svg"
NAMED = 6  # experts in a sentence; of more it gives the number


@click.command()
@click.argument("model")
@click.argument("profile", type=click.Path(path_type=Path, dir_okay=False))
@text_options
@click.option("--budget", type=Size(), metavar="SIZE", help=BUDGET_HELP)
@ram_option
@dtype_option
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help=PLOT_HELP)
def calibrate(model: str, profile: Path, budget: int | None, plot: Path | None, **options: Any) -> None:
    """Run text through the checkpoint MODEL once, and write what it shows to PROFILE.

    The text goes through layer by layer, so the model may be larger than memory, and every expert is read once. The
    profile says how often each expert is used, what quantising it costs, and how well caches do; `plan` and
    `quantize` take it with --profile, and a store carries it to the runs that read it.
    """
    from qmix.checkpoint import open_checkpoint
    from qmix.store.sources import open_source

    if plot is not None:
        from qmix.terminal.figure import check_target

        check_target(plot, "calibration")
    for path in filter(None, (profile, plot)):
        if not os.access(path.absolute().parent, os.W_OK):  # known now, and not after hours
            raise UsageError(f"{path}: its directory is not there, or cannot be written; name another place")
    checkpoint = open_checkpoint(open_source(model))
    window = window_of(checkpoint.geometry, options["window"])
    quiet_libraries()
    from calibration.report import draw, report
    from calibration.routing import ENOUGH
    from calibration.run import calibrate as run
    from calibration.run import half
    from calibration.sensitivity import SAMPLES
    from qmix.machine.found import default_budget, interpreter_memory
    from qmix.plan.memory import calibration_bytes, check_memory, layerwise_bytes
    from qmix.pool.prefetch import DEPTH
    from qmix.store.profile import check_budget, write_profile
    from qmix.store.sources import layout_for
    from qmix.terminal.tables import ProgressDisplay, print_table, say

    dtype = layout_for(checkpoint, None, options["dtype"]).dtype
    if budget is not None:
        check_budget(budget, checkpoint.geometry, dtype)
    passages = passages_of(checkpoint, options["texts"], window, options["tokens"])
    tokens = sum(len(passage.ids) for passage in passages)
    needed = interpreter_memory(kernels=True) + calibration_bytes(checkpoint.geometry, tokens, SAMPLES, DEPTH)
    needed += layerwise_bytes(checkpoint, tokens, window, [half(checkpoint, dtype).held])
    ceiling = options["ram"] or default_budget()
    check_memory(needed, ceiling, tokens)
    hold_to(ceiling)
    with ProgressDisplay(f"calibrating {model}") as display:
        found = run(checkpoint, dtype, passages, budget, display)
    write_profile(profile, found.to_json())
    if scarce := found.routing.scarce:
        say(f"fewer than {ENOUGH} tokens went to {_named(scarce)}: what is measured of them is rough; give more text")
    print_table(*report(found, _pool(found, options["ram"])))
    if plot is not None:
        draw(found, plot)
    say(f"{profile}: written; `qmix plan {model} --profile {profile}` shows what it is good for")


def _named(keys: Sequence[tuple[int, int]]) -> str:
    """Some experts, or how many there are."""
    if len(keys) > NAMED:
        return f"{len(keys)} experts, {_named(keys[:NAMED])} among them"
    return ", ".join(f"{layer}.{expert}" for layer, expert in keys)


def _pool(found: Calibration, ram: int | None) -> Pool | None:
    """What this machine's memory holds of the store; None where it is too small for any."""
    from calibration.report import Pool
    from qmix.plan.here import plan_for, this_machine

    try:
        plan = plan_for(found.layout, None, None, machine=this_machine(ram, gpus=()), use=found.profile.use)
    except DoesNotFitError:
        return None
    return Pool(plan.ram, plan.slots)
