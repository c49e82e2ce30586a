"""`qmix compare`: what quantisation does to a model's answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qmix.commands.shared import PRECISION_HELP, dtype_option, model_or_default, out, quiet_libraries, ram_option
from qmix.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qmix.checkpoint import Checkpoint
    from qmix.fidelity import Fidelity

WINDOW = 1024
CLIP_TOO_HELP = "compare each 4-bit --precision also with blocks as `quantize --clip` makes them"
TEXT_HELP = "UTF-8 text to compare on, documents apart by lines of ---; may be given again"
TOKENS_HELP = "of the text at most; memory grows with them [all]"


@click.command()
@click.argument("model", required=False)
@click.argument("stores", metavar="[STORE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option("--precision", "precisions", metavar="SPEC", multiple=True, help=f"{PRECISION_HELP}; may be given again")
@click.option("--clip", is_flag=True, help=CLIP_TOO_HELP)
@click.option("--against", metavar="SPEC", default="half", show_default=True, help="the precision to measure from")
@click.option("--text", "texts", type=click.Path(path_type=Path), metavar="FILE", multiple=True, help=TEXT_HELP)
@click.option("--tokens", type=click.IntRange(min=2), help=TOKENS_HELP)
@click.option("--window", type=click.IntRange(min=2), help="tokens seen together [1024, or all that the model sees]")
@ram_option
@dtype_option
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of a table")
def compare(model: str | None, stores: tuple[Path, ...], against: str, as_json: bool, **options: Any) -> None:
    """Compare the next-token distributions of the checkpoint MODEL, quantised, with those it has in half precision.

    Each --precision is made in memory, layer by layer, and so is the reference: the model may be larger than memory,
    and every weight is read once for all of them. STOREs that were made from MODEL are compared as they are.
    """
    name = model_or_default(model)
    if options["precisions"] == () and not stores:
        options["precisions"] = ("nf4",)
    from qmix.checkpoint import open_checkpoint
    from qmix.prepare import open_source

    checkpoint = open_checkpoint(open_source(name))
    window = _window(checkpoint, options["window"])
    quiet_libraries()
    from qmix.fidelity import compare as run
    from qmix.fidelity import windows
    from qmix.layerwise import LayerwisePass, check_memory, memory_needed
    from qmix.machine import default_budget, interpreter_memory
    from qmix.precision.formats import uses_kernels
    from qmix.prepare import layout_for
    from qmix.terminal import ProgressDisplay, fidelity_table, print_table, say

    dtype = layout_for(checkpoint, against, options["dtype"], option="--against").dtype
    variants = _variants(checkpoint, dtype, against, options["precisions"], options["clip"], stores)
    documents = _documents(options["texts"], _tokenizer(checkpoint))
    sequences = windows(documents, window, options["tokens"])
    tokens, budget = sum(map(len, sequences)), options["ram"] or default_budget()
    own = interpreter_memory(kernels=uses_kernels(checkpoint.geometry))
    with LayerwisePass(checkpoint, dtype, variants) as layers:
        check_memory(memory_needed(checkpoint, tokens, window, variants, own), budget, tokens)
        with ProgressDisplay(f"comparing {name}") as display:
            found = run(layers, sequences, display)
    predicted = tokens - len(sequences)
    if as_json:
        out(json.dumps(_content(name, checkpoint.fingerprint, predicted, window, found)) + "\n")
        return
    print_table(fidelity_table(found))
    say(f"{predicted} tokens predicted in windows of {window}, against {against}; KL in nats, +/- its standard error")


def _content(name: str, fingerprint: str, predicted: int, window: int, found: Sequence[Fidelity]) -> dict[str, Any]:
    model = {"name": name, "fingerprint": fingerprint}
    rows = [row.to_json() for row in found]
    return {"schema": "qmix-compare-fidelity-1", "model": model, "tokens": predicted, "window": window, "rows": rows}


def _window(checkpoint: Checkpoint, asked: int | None) -> int:
    """At most what the model sees at once."""
    geometry = checkpoint.geometry
    longest = min(geometry.max_position, geometry.sliding_window or geometry.max_position)
    if asked is None:
        return min(WINDOW, longest)
    if asked > longest:
        raise UsageError(f"--window {asked}: the model sees {longest} tokens at once; take so many or fewer")
    return asked


def _variants(
    checkpoint: Checkpoint, dtype: str, against: str, specs: Sequence[str], clip: bool, stores: Sequence[Path]
) -> list[Any]:
    """The reference, each of `specs` (with `clip` also with clipped blocks, where it has any), and the stores."""
    from qmix.layerwise import Quantised, Stored
    from qmix.layout import has_blocks
    from qmix.prepare import NOTHING_TO_CLIP, layout_for
    from qmix.store import open_store

    def made(spec: str, clipped: bool = False) -> Quantised:
        layout = layout_for(checkpoint, spec, dtype, clipped)
        return Quantised(f"{spec} --clip" if clipped else spec, layout.geometry, layout.precisions, dtype, clipped)

    found = [made(against)]
    for spec in specs:
        found.append(made(spec))
        if clip and has_blocks(found[-1].precisions):
            found.append(made(spec, clipped=True))
    if clip and not any(variant.clip for variant in found):
        raise UsageError(f"--clip: --precision {NOTHING_TO_CLIP}")
    return [*found, *(Stored(str(path), open_store(path), checkpoint) for path in stores)]


def _tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    from qmix.checkpoint.reader import TOKENIZERS
    from qmix.runner import load_tokenizer

    for path in checkpoint.tokenizer_files():
        if path.name in TOKENIZERS:
            return load_tokenizer(path.parent)
    raise CheckpointError(f"{checkpoint.source.name}: has no {' or '.join(TOKENIZERS)}; put the model's own there")


def _documents(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each document, of the bundled texts where no file is named; the first few are of every language."""
    from calibration.corpus import alternating, bundled, from_file

    documents = [document for path in paths for document in from_file(path)] or alternating(bundled())
    return [tokenizer(document.text, verbose=False)["input_ids"] for document in documents]
