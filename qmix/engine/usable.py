"""Check that transformers accepts a checkpoint's small files, before anything is quantised."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from qmix.checkpoint import Checkpoint
from qmix.checkpoint.reader import TOKENIZERS, check_tokenizer
from qmix.engine.generation_config import model_generation_config
from qmix.errors import CheckpointError, StoreError
from qmix.model.build import check_frequencies, empty_mixtral
from qmix.text.tokenizer import load_tokenizer


def check_usable(checkpoint: Checkpoint, dtype: str) -> None:
    """Build what a run builds besides weights: the empty model, its generation config, and the tokenizer if any.

    They are built from the files that the store would hold. Raises CheckpointError naming the checkpoint's own file.
    """
    check_tokenizer(checkpoint.source, required=False)
    with TemporaryDirectory(prefix="qmix-") as scratch:
        directory = Path(scratch)
        config = directory / "config.json"
        config.write_text(json.dumps(checkpoint.config))
        for path in checkpoint.tokenizer_files():
            (directory / path.name).symlink_to(path.absolute())
        try:
            model = empty_mixtral(checkpoint.config, dtype, where=config)
            check_frequencies(model.config, config)
            model_generation_config(directory, checkpoint.config)
            if any((directory / name).exists() for name in TOKENIZERS):
                load_tokenizer(directory)
        except StoreError as error:
            own = Path(checkpoint.config_file)
            told = error.message.replace(str(config), str(own)).replace(scratch, str(own.parent))
            raise CheckpointError(told) from None
