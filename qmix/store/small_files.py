"""The small files of a store, its config and tokenizer, copied from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qmix.checkpoint.reader import TOKENIZERS, Checkpoint
from qmix.errors import CheckpointError
from qmix.files import JSON_LIMIT, read_bounded, write_whole
from qmix.store.manifest import (
    CONFIG,
    EDITABLE,
    MANIFEST,
    SMALL_FILES,
    file_digest,
    read_manifest,
    replace_manifest,
    sealed,
)
from qmix.store.opened import Store, open_store


def small_files(config: dict[str, Any], tokenizer_files: Iterable[Path]) -> dict[str, bytes]:
    """Return the content of a store's small files by name. Raises CheckpointError."""
    files = {path.name: read_bounded(path, JSON_LIMIT, CheckpointError, "fetch it again") for path in tokenizer_files}
    return {CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(), **files}


def bring_small_files(checkpoint: Checkpoint, fingerprint: str, directory: Path) -> Store:
    """Give a finished store the small files that its checkpoint has now, and return it opened.

    A file that may be edited stays as it is in the store, unless the checkpoint's own has changed. `fingerprint` is the
    checkpoint's; a store of another checkpoint is left alone. Raises StoreError.
    """
    content, found = read_manifest(directory / MANIFEST)
    known = dict(found.checksums.files)
    if found.source.fingerprint == fingerprint and known:
        files = small_files(checkpoint.config, checkpoint.tokenizer_files())
        given = known.keys().isdisjoint(TOKENIZERS)  # the store's user may have given it a tokenizer
        for name in SMALL_FILES:
            path, data = directory / name, files.get(name)
            theirs = None if data is None else file_digest(data)
            if theirs == known.get(name) and (name in EDITABLE or (given and data is None)):
                continue
            _replace(path, data)
            known = {**known, name: theirs} if theirs else {each: known[each] for each in known if each != name}
        if known != found.checksums.files:
            content["checksums"]["files"] = known
            replace_manifest(directory, sealed(content))
    return open_store(directory)


def _replace(path: Path, data: bytes | None) -> None:
    """Give a file this content, or delete it where that is None."""
    if data is None:
        path.unlink(missing_ok=True)
    elif not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)
