"""Measure what `--clip` changes on given texts: KL from half precision and perplexity, token by token.

    python benchmarks/clip_unseen.py texts/*.txt          # from unseen_texts.py; files KIND-*.txt count together

Differences are paired: both variants see the same tokens. Neighbouring tokens are not independent, so the standard
errors are those of sums over blocks of 256 tokens. They describe how texts vary for this model's weights, not how
models vary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from qmix.checkpoint import open_checkpoint
from qmix.commands.texts import WINDOW, passages_of
from qmix.compare.fidelity import Scores, score
from qmix.engine.checkpoint_weights import CheckpointWeights
from qmix.engine.variants import Quantised
from qmix.store.sources import layout_for, open_source
from qmix.terminal.progress import ProgressDisplay

BLOCK = 256  # tokens that are taken as one draw
KINDS = ("nf4", "fp4")


def blocks(values: torch.Tensor) -> torch.Tensor:
    """Sums over consecutive blocks; a shorter last one is dropped."""
    whole = len(values) // BLOCK * BLOCK
    return values[:whole].reshape(-1, BLOCK).sum(1)


def relative(plain: torch.Tensor, clipped: torch.Tensor) -> tuple[float, float]:
    """(sum of clipped / sum of plain) - 1 over all tokens, and its standard error (delta method over blocks)."""
    change = (clipped.sum() / plain.sum()).item() - 1
    rest = blocks(clipped) - (1 + change) * blocks(plain)
    return change, (rest.std() * math.sqrt(len(rest)) / blocks(plain).sum()).item()


def perplexity_change(plain: torch.Tensor, clipped: torch.Tensor) -> tuple[float, float]:
    """Return the perplexities' ratio - 1, and its standard error."""
    difference = clipped - plain
    ratio = math.exp(difference.mean().item())
    each = blocks(difference) / BLOCK
    return ratio - 1, ratio * each.std().item() / math.sqrt(len(each))


def measure(model: str, texts: Sequence[Path], tokens: int | None) -> dict[str, list[Scores]]:
    """Return the scores of each variant by the kind of text, from one pass of all texts."""
    checkpoint = open_checkpoint(open_source(model))
    variants = []
    for kind, clip in [("half", False), *((kind, clip) for kind in KINDS for clip in (False, True))]:
        layout = layout_for(checkpoint, kind, None, clip)
        variants.append(Quantised(f"{kind}{' --clip' * clip}", layout.geometry, layout.precisions, layout.dtype, clip))
    passages = {path: passages_of(checkpoint, [path], WINDOW, tokens) for path in sorted(texts, key=kind_of)}
    sequences = [passage.ids for each in passages.values() for passage in each]
    with CheckpointWeights(checkpoint, layout.dtype, variants, ProgressDisplay(f"comparing {model}")) as weights:
        scores = score(weights, sequences)
    found, start = {"all": scores}, 0
    for name, paths in groupby(passages, key=kind_of):
        end = start + sum(len(passage.ids) - 1 for path in paths for passage in passages[path])
        found[name] = [part(each, slice(start, end)) for each in scores]
        start = end
    return found


def kind_of(path: Path) -> str:
    return path.stem.partition("-")[0]


def part(scores: Scores, tokens: slice) -> Scores:
    columns = (scores.divergences, scores.surprises, scores.agreed)
    return Scores(scores.name, scores.expert_bytes, *(column[tokens] for column in columns))


def row(kind: str, plain: Scores, clipped: Scores, name: str) -> dict[str, object]:
    kl, kl_error = relative(plain.divergences, clipped.divergences)
    perplexity, perplexity_error = perplexity_change(plain.surprises, clipped.surprises)
    before, after = plain.fidelity(), clipped.fidelity()
    found = {"kind": kind, "texts": name, "tokens": len(plain.divergences), "kl_plain": before.kl_mean}
    found |= {"kl_clip": after.kl_mean, "kl_change": kl, "kl_error": kl_error}
    found |= {"perplexity_plain": before.perplexity, "perplexity_clip": after.perplexity}
    return found | {"perplexity_change": perplexity, "perplexity_error": perplexity_error}


def show(rows: Sequence[dict[str, object]]) -> None:
    table = Table(title=f"--clip against plain, paired, errors over blocks of {BLOCK} tokens")
    for name in (
        "texts",
        "experts",
        "tokens",
        "mean KL",
        "with --clip",
        "change",
        "perplexity",
        "with --clip",
        "change",
    ):
        table.add_column(name, justify="left" if name in ("texts", "experts") else "right")
    for each in rows:
        change = "{:+.1f}% ± {:.1f}".format(*(100 * each[key] for key in ("kl_change", "kl_error")))  # type: ignore[operator]
        moved = [100 * each[key] for key in ("perplexity_change", "perplexity_error")]  # type: ignore[operator]
        table.add_row(
            *(str(each[key]) for key in ("texts", "kind", "tokens")),
            *(f"{each[key]:.5f}" for key in ("kl_plain", "kl_clip")), change,
            *(f"{each[key]:.3f}" for key in ("perplexity_plain", "perplexity_clip")),
            "{:+.2f}% ± {:.2f}".format(*moved),
        )  # fmt: skip
    Console(width=140).print(table)


@click.command()
@click.argument("texts", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--model", default="tiny", show_default=True)
@click.option("--tokens", type=int, help="of each file at most [all]")
def main(texts: tuple[Path, ...], model: str, tokens: int | None) -> None:
    """Print a table, then one JSON line."""
    rows = []
    for name, (_, *variants) in measure(model, texts, tokens).items():
        for kind, plain, clipped in zip(KINDS, variants[::2], variants[1::2], strict=True):
            rows.append(row(kind, plain, clipped, name))
    show(rows)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
