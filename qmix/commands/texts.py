"""Options for the text that a command runs through a checkpoint, and its passages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qmix.commands.options import together
from qmix.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calibration.corpus import Passage
    from qmix.checkpoint import Checkpoint
    from qmix.geometry import Geometry

WINDOW = 1024
TEXT_HELP = "UTF-8 text in place of the bundled one, with --- lines between documents; repeatable"
TOKENS_HELP = "use at most so many tokens of the text; memory grows with them [all]"

text_options = together(
    click.option("--text", "texts", type=click.Path(path_type=Path), metavar="FILE", multiple=True, help=TEXT_HELP),
    click.option("--tokens", type=click.IntRange(min=2), help=TOKENS_HELP),
    click.option(
        "--window", type=click.IntRange(min=2), help="tokens of context [1024, or the model's longest if less]"
    ),
)


def window_of(geometry: Geometry, asked: int | None) -> int:
    """Return the window: `asked`, or the default. Raises UsageError where the model's context is shorter."""
    longest = min(geometry.max_position, geometry.sliding_window or geometry.max_position)
    if asked is None:
        return min(WINDOW, longest)
    if asked > longest:
        raise UsageError(f"--window {asked}: must be at most {longest}, the model's longest")
    return asked


def passages_of(checkpoint: Checkpoint, paths: Sequence[Path], window: int, tokens: int | None) -> list[Passage]:
    """Return windows of the documents in these files, or of the bundled ones, which alternate between languages.

    Files are read one after another and tokenised only as far as `tokens` reach.
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
        left -= len(ids) - (len(ids) % window == 1)  # too short for a window
        if left <= 0:
            break
    return windows(found, window, tokens)


def tokenizer_of(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint. Raises CheckpointError where it has none."""
    from qmix.checkpoint.reader import TOKENIZERS, check_tokenizer
    from qmix.text.tokenizer import load_tokenizer

    check_tokenizer(checkpoint.source)
    return load_tokenizer(next(path.parent for path in checkpoint.tokenizer_files() if path.name in TOKENIZERS))
