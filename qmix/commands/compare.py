"""`qmix compare`: how quantisation changes a model's predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.options import PRECISION_HELP, dtype_option, profile_option, ram_option
from qmix.commands.parameters import Size
from qmix.commands.shared import hold_to, load_libraries, model_or_default, out, read_profile_option
from qmix.commands.texts import passages_of, text_options, window_of
from qmix.errors import UsageError
from qmix.units import format_bytes

if TYPE_CHECKING:
    from qmix.checkpoint import Checkpoint
    from qmix.compare.fidelity import Fidelity

BUDGETS_HELP = "bytes of all experts: compare the profile's precisions with the least error that fit; repeatable"
CLIP_TOO_HELP = "compare each 4-bit --precision also as `quantize --clip` makes it"


@click.command()
@click.argument("model", required=False)
@click.argument("stores", metavar="[STORE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--precision", "precisions", metavar="SPEC", multiple=True, help=f"{PRECISION_HELP}; repeatable")
@profile_option
@click.option("--budget", "budgets", type=Size(), metavar="SIZE", multiple=True, help=BUDGETS_HELP)
@click.option("--clip", is_flag=True, help=CLIP_TOO_HELP)
@click.option("--against", metavar="SPEC", default="half", show_default=True, help="reference precision")
@text_options
@ram_option
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="print one JSON object instead of a table")
def compare(model: str | None, stores: tuple[Path, ...], against: str, as_json: bool, **options: Any) -> None:
    """Measure how quantisation changes next-token predictions.

    The next-token distributions of the checkpoint MODEL in each --precision are compared with those in the reference
    precision. All are computed in memory, layer by layer: the model may be larger than memory, and each weight is read
    once for all precisions. A STORE made from MODEL is compared as it is.
    """
    name = model_or_default(model)
    from qmix.checkpoint import open_checkpoint
    from qmix.store.sources import open_source

    checkpoint = open_checkpoint(open_source(name))
    window = window_of(checkpoint.geometry, options["window"])
    load_libraries()
    from qmix.compare.fidelity import compare as run
    from qmix.compare.table import fidelity_table
    from qmix.engine.checkpoint_weights import CheckpointWeights
    from qmix.engine.resolve import fingerprint_of
    from qmix.store.sources import DEFAULT_PRECISION, layout_for
    from qmix.terminal.progress import ProgressDisplay
    from qmix.terminal.tables import print_table, say

    if stores or options["profile"]:  # their weights must be the same
        with ProgressDisplay(f"reading {name}") as display:
            fingerprint_of(checkpoint, display)
    dtype = layout_for(checkpoint, against, options["dtype"], argument="against").dtype
    specs = _specs(checkpoint, dtype, options["precisions"], options["profile"], options["budgets"])
    if not specs and not stores:
        specs = {DEFAULT_PRECISION: DEFAULT_PRECISION}
    variants = _variants(checkpoint, dtype, against, specs, options["clip"], stores)
    passages = passages_of(checkpoint, options["texts"], window, options["tokens"])
    sequences = [passage.ids for passage in passages]
    tokens = sum(map(len, sequences))
    _keep_to(options["ram"], checkpoint, tokens, window, variants)
    progress = ProgressDisplay(f"comparing {name}")
    with progress as display, CheckpointWeights(checkpoint, dtype, variants, display) as weights:
        found = run(weights, sequences)
        fingerprint = weights.fingerprint() if as_json else ""
    predicted = tokens - len(sequences)
    if as_json:
        out(json.dumps(_content(name, fingerprint, predicted, window, found)) + "\n")
        return
    print_table(fidelity_table(found))
    say(f"{predicted} predicted tokens, windows of {window}, reference {against}; KL in nats +/- standard error")


def _keep_to(ram: int | None, checkpoint: Checkpoint, tokens: int, window: int, variants: Sequence[Any]) -> None:
    """Hold the process to its budget. Raises DoesNotFitError where it is too small for the tokens."""
    from qmix.machine.found import default_budget
    from qmix.plan.here import python_bytes
    from qmix.plan.memory import check_memory, layerwise_bytes

    budget = ram or default_budget()
    needed = layerwise_bytes(checkpoint, tokens, window, [variant.held for variant in variants])
    check_memory(needed + python_bytes(checkpoint.geometry), budget, tokens)
    hold_to(budget)


def _content(name: str, fingerprint: str, predicted: int, window: int, found: Sequence[Fidelity]) -> dict[str, Any]:
    model = {"name": name, "fingerprint": fingerprint}
    rows = [row.to_json() for row in found]
    return {"schema": "qmix-compare-fidelity-1", "model": model, "tokens": predicted, "window": window, "rows": rows}


def _specs(
    checkpoint: Checkpoint, dtype: str, precisions: Sequence[str], path: Path | None, budgets: Sequence[int]
) -> dict[str, str]:
    """Return the precisions to compare by the names of their rows: as typed, or chosen by a profile."""
    from qmix.checkpoint.fingerprint import checkpoint_fingerprint
    from qmix.store.profile import AUTO, check_profile

    profile = read_profile_option(path, AUTO if AUTO in precisions else None, min(budgets, default=None))
    if profile is None or path is None:
        return {spec: spec for spec in precisions}
    if AUTO not in precisions and not budgets:
        raise UsageError(f"--profile: not used without --precision {AUTO} or --budget; give one, or leave it out")
    check_profile(profile, path, checkpoint.geometry, checkpoint_fingerprint(checkpoint))
    asked = checkpoint.geometry, dtype
    typed = {spec: profile.auto(None, *asked) if spec == AUTO else spec for spec in precisions}
    return typed | {f"{AUTO} in {format_bytes(budget)}": profile.auto(budget, *asked) for budget in budgets}


def _variants(
    checkpoint: Checkpoint, dtype: str, against: str, specs: Mapping[str, str], clip: bool, stores: Sequence[Path]
) -> list[Any]:
    """Return the reference, each of `specs` (with `clip` also its clipped form, if it has blocks) and the stores."""
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
