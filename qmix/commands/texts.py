"""The text that a command runs a checkpoint on: options, and the passages that they name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qmix.commands.shared import together
from qmix.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calibration.corpus import Passage
    from qmix.checkpoint import Checkpoint
    from qmix.geometry import Geometry

WINDOW = 1024
TEXT_HELP = "UTF-8 text in place of the bundled one, documents apart by lines of ---; may be given again"
TOKENS_HELP = "of the text at most; memory grows with them [all]"

text_options = together(
    click.option("--text", "texts", type=click.Path(path_type=Path), metavar="FILE", multiple=True, help=TEXT_HELP),
    click.option("--tokens", type=click.IntRange(min=2), help=TOKENS_HELP),
    click.option(
        "--window", type=click.IntRange(min=2), help="tokens seen together [1024, or all that the model sees]"
    ),
)


def window_of(geometry: Geometry, asked: int | None) -> int:
    """At most what the model sees at once."""
    longest = min(geometry.max_position, geometry.sliding_window or geometry.max_position)
    if asked is None:
        return min(WINDOW, longest)
    if asked > longest:
        raise UsageError(f"--window {asked}: the model sees {longest} tokens at once; take so many or fewer")
    return asked


def passages_of(checkpoint: Checkpoint, paths: Sequence[Path], window: int, tokens: int | None) -> list[Passage]:
    """Windows of the files' documents, or of the bundled ones, whose first few are of every language.

    Files are read one after another, and tokenised only as far as `tokens` go.
    """
    from calibration.corpus import Passage, alternating, bundled, from_file, windows
    from qmix.text.prompt import encoded_pieces

    tokenizer, left = tokenizer_of(checkpoint), math.inf if tokens is None else tokens
    found: list[Passage] = []
    for document in (document for path in paths for document in from_file(path)) if paths else alternating(bundled()):
        ids: list[int] = []
        for piece in encoded_pieces(tokenizer, document.text):
            ids += piece
            if len(ids) >= left + window:
                break
        found.append(Passage(document.language, ids))
        left -= len(ids) - (len(ids) % window == 1)  # which is no window
        if left <= 0:
            break
    return windows(found, window, tokens)


def tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint. Raises CheckpointError where it has none."""
    from qmix.checkpoint.reader import TOKENIZERS, check_tokenizer
    from qmix.text.tokenizer import load_tokenizer

    check_tokenizer(checkpoint.source)
    return load_tokenizer(next(path.parent for path in checkpoint.tokenizer_files() if path.name in TOKENIZERS))
