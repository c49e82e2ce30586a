"""`qmix compare`: what quantisation does to a model's answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.shared import (
    PRECISION_HELP,
    Size,
    dtype_option,
    hold_to,
    model_or_default,
    out,
    profile_option,
    quiet_libraries,
    ram_option,
    read_profile_option,
)
from qmix.commands.texts import passages_of, text_options, window_of
from qmix.errors import UsageError
from qmix.units import format_bytes

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.compare.fidelity import Fidelity

BUDGETS_HELP = "of all experts: the precisions that by the profile lose least in so many bytes; may be given again"
CLIP_TOO_HELP = "compare each 4-bit --precision also with blocks as `quantize --clip` makes them"


@click.command()
@click.argument("model", required=False)
@click.argument("stores", metavar="[STORE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--precision", "precisions", metavar="SPEC", multiple=True, help=f"{PRECISION_HELP}; may be given again")
@profile_option
@click.option("--budget", "budgets", type=Size(), metavar="SIZE", multiple=True, help=BUDGETS_HELP)
@click.option("--clip", is_flag=True, help=CLIP_TOO_HELP)
@click.option("--against", metavar="SPEC", default="half", show_default=True, help="the precision to measure from")
@text_options
@ram_option
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of a table")
def compare(model: str | None, stores: tuple[Path, ...], against: str, as_json: bool, **options: Any) -> None:
    """Compare the next-token distributions of the checkpoint MODEL, quantised, with those it has in half precision.

    Each --precision is made in memory, layer by layer, and so is the reference: the model may be larger than memory,
    and every weight is read once for all of them. STOREs that were made from MODEL are compared as they are.
    """
    name = model_or_default(model)
    from qmix.checkpoint import open_checkpoint
    from qmix.store.sources import open_source

    checkpoint = open_checkpoint(open_source(name))
    window = window_of(checkpoint.geometry, options["window"])
    quiet_libraries()
    from qmix.compare.fidelity import compare as run
    from qmix.compare.table import fidelity_table
    from qmix.engine.layerwise import LayerwisePass
    from qmix.engine.resolve import fingerprint_of
    from qmix.machine.found import default_budget, interpreter_memory
    from qmix.plan.memory import check_memory, layerwise_bytes
    from qmix.precision.formats import uses_kernels
    from qmix.store.sources import DEFAULT_PRECISION, layout_for
    from qmix.terminal.tables import ProgressDisplay, print_table, say

    if stores or options["profile"]:  # which must be of the same weights
        with ProgressDisplay(f"reading {name}") as display:
            fingerprint_of(checkpoint, display)
    dtype = layout_for(checkpoint, against, options["dtype"], option="--against").dtype
    specs = _specs(checkpoint, dtype, options["precisions"], options["profile"], options["budgets"])
    if not specs and not stores:
        specs = {DEFAULT_PRECISION: DEFAULT_PRECISION}
    variants = _variants(checkpoint, dtype, against, specs, options["clip"], stores)
    passages = passages_of(checkpoint, options["texts"], window, options["tokens"])
    sequences = [passage.ids for passage in passages]
    tokens, budget = sum(map(len, sequences)), options["ram"] or default_budget()
    own = interpreter_memory(kernels=uses_kernels(checkpoint.geometry))
    needed = own + layerwise_bytes(checkpoint, tokens, window, [variant.held for variant in variants])
    check_memory(needed, budget, tokens)
    hold_to(budget)
    with ProgressDisplay(f"comparing {name}") as display, LayerwisePass(checkpoint, dtype, variants, display) as layers:
        found = run(layers, sequences)
        fingerprint = layers.fingerprint() if as_json else ""
    predicted = tokens - len(sequences)
    if as_json:
        out(json.dumps(_content(name, fingerprint, predicted, window, found)) + "\n")
        return
    print_table(fidelity_table(found))
    say(f"{predicted} tokens predicted in windows of {window}, against {against}; KL in nats, +/- its standard error")


def _content(name: str, fingerprint: str, predicted: int, window: int, found: Sequence[Fidelity]) -> dict[str, Any]:
    model = {"name": name, "fingerprint": fingerprint}
    rows = [row.to_json() for row in found]
    return {"schema": "qmix-compare-fidelity-1", "model": model, "tokens": predicted, "window": window, "rows": rows}


def _specs(
    checkpoint: Checkpoint, dtype: str, precisions: Sequence[str], path: Path | None, budgets: Sequence[int]
) -> dict[str, str]:
    """What is to be compared, by the name that its row has: precisions as they were typed, or a profile's."""
    from qmix.store.profile import AUTO, check_profile

    profile = read_profile_option(path, AUTO if AUTO in precisions else None, min(budgets, default=None))
    if profile is None or path is None:
        return {spec: spec for spec in precisions}
    if AUTO not in precisions and not budgets:
        raise UsageError(f"--profile: nothing is asked of it; give --precision {AUTO} or --budget, or leave it out")
    check_profile(profile, path, checkpoint.geometry, checkpoint.fingerprint)
    asked = checkpoint.geometry, dtype
    typed = {spec: profile.auto(None, *asked) if spec == AUTO else spec for spec in precisions}
    return typed | {f"{AUTO} in {format_bytes(budget)}": profile.auto(budget, *asked) for budget in budgets}


def _variants(
    checkpoint: Checkpoint, dtype: str, against: str, specs: Mapping[str, str], clip: bool, stores: Sequence[Path]
) -> list[Any]:
    """The reference, each of `specs` (with `clip` also with clipped blocks, where it has any), and the stores."""
    from qmix.engine.variants import Quantised, Stored
    from qmix.store.layout import has_blocks
    from qmix.store.opened import open_store
    from qmix.store.sources import NOTHING_TO_CLIP, layout_for

    def made(name: str, spec: str, clipped: bool = False) -> Quantised:
        layout = layout_for(checkpoint, spec, dtype, clipped)
        return Quantised(f"{name} --clip" if clipped else name, layout.geometry, layout.precisions, dtype, clipped)

    found = [made(against, against)]
    for name, spec in specs.items():
        found.append(made(name, spec))
        if clip and has_blocks(found[-1].precisions):
            found.append(made(name, spec, clipped=True))
    if clip and not any(variant.clip for variant in found):
        raise UsageError(f"--clip: --precision {NOTHING_TO_CLIP}")
    return [*found, *(Stored(str(path), open_store(path), checkpoint) for path in stores)]
