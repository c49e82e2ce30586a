"""Quantise a checkpoint into a store, or go on with a store that was begun."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from qmix.checkpoint.fingerprint import fingerprint_of, read_fingerprint, weight_digests
from qmix.checkpoint.reader import Checkpoint
from qmix.errors import StoreError, arg
from qmix.progress import OnProgress, Progress, counted, ignore
from qmix.store.layout import StoreLayout
from qmix.store.opened import Store, is_store, open_store, put_origin, put_profile
from qmix.store.profile import Profile
from qmix.store.small_files import bring_small_files
from qmix.store.weight_run import WeightRun, source_bytes, write_error
from qmix.store.writer import JOURNAL, StoreWriter


def quantize(
    checkpoint: Checkpoint,
    directory: Path,
    layout: StoreLayout,
    on_progress: OnProgress = ignore,
    profile: Profile | None = None,
) -> Store:
    """Write the store of a checkpoint to `directory`, or go on with one that was begun, and return it opened.

    Where another process writes it, this waits, and goes on from there. A finished store of the same weights and
    precisions is kept; only its `profile`, and small files that differ from the checkpoint's, are replaced. Raises
    CheckpointError, StoreError or HubError; finished weights stay in `directory` + ".partial" for the next run.
    """
    while not (directory.exists() or directory.is_symlink()):
        try:
            with closing(_writer(checkpoint, directory, layout, on_progress)) as writer:
                if writer.superseded:
                    continue
                if directory.exists():  # finished by another process between the look above and the lock
                    shutil.rmtree(writer.partial)
                    break
                put_origin(writer.partial, checkpoint.source.location)  # first: an unfinished store says what it is of
                WeightRun(checkpoint, writer, layout, on_progress).run()
                fingerprint = _fingerprint(checkpoint, writer.read)
                writer.finish(checkpoint.config, checkpoint.tokenizer_files(), fingerprint, profile)
        except OSError as error:
            raise write_error(error, directory, layout) from error
        return open_store(directory)
    return _finished(checkpoint, directory, layout, profile, on_progress)


def _writer(checkpoint: Checkpoint, directory: Path, layout: StoreLayout, on_progress: OnProgress) -> StoreWriter:
    total = source_bytes(checkpoint, checkpoint.weights)

    def still_same(read: Mapping[str, str]) -> bool:
        """Read the weights again that an earlier run read from a checkpoint of another identity."""
        known = [key for key in read if key in checkpoint.weights]
        note = "comparing with what an earlier run read"
        return weight_digests(checkpoint, known, counted(source_bytes(checkpoint, known), on_progress, note)) == read

    return StoreWriter(
        directory,
        layout,
        Path(checkpoint.source.name).absolute().name,
        checkpoint.identity,
        checkpoint.source.space_needed(checkpoint.files),
        still_same,
        lambda: on_progress(Progress(0, total, f"waiting for another qmix process that is writing {directory}")),
    )


def _fingerprint(checkpoint: Checkpoint, read: Mapping[str, str]) -> str:
    """Return the checkpoint's fingerprint, from all weights that this and earlier runs read."""
    known = checkpoint.known_fingerprint
    if checkpoint.source.fingerprint(checkpoint.files):
        assert known is not None
        return known
    found = fingerprint_of(checkpoint.config, read)
    checkpoint.source.remember(checkpoint.identity, found)
    return found


def _finished(
    checkpoint: Checkpoint, directory: Path, layout: StoreLayout, profile: Profile | None, on_progress: OnProgress
) -> Store:
    """Return a store that was finished before, checked to be that of this checkpoint and layout."""
    if not is_store(directory):
        raise StoreError(f"{directory}: exists and is not a qmix store; choose another name")
    if (directory / JOURNAL).exists():  # a run killed in its very last step leaves it
        (directory / JOURNAL).unlink(missing_ok=True)
    note = f"comparing with the weights that {directory} was made from"
    compared = counted(source_bytes(checkpoint, checkpoint.weights), on_progress, note)
    fingerprint = checkpoint.known_fingerprint or read_fingerprint(checkpoint, compared)
    store = bring_small_files(checkpoint, fingerprint, directory)
    if store.fingerprint != fingerprint and not store.small_files:
        raise StoreError(
            f"{directory}: made by an earlier version of qmix, or from another model; choose another name, or delete it"
        )
    if store.fingerprint != fingerprint:
        raise StoreError(f"{directory}: is the store of another model ({store.source_name}); choose another name")
    if (store.layout.precisions, store.layout.dtype) != (layout.precisions, layout.dtype):
        raise StoreError(f"{directory}: is a store of this model in another precision; choose another name")
    if store.layout.clip != layout.clip:
        made = f"made {'with' if store.layout.clip else 'without'} {arg('clip')}"
        raise StoreError(f"{directory}: is a store of this model {made}; choose another name")
    if profile is not None and profile != store.profile:
        put_profile(directory, profile)
        store = replace(store, profile=profile)
    return store
