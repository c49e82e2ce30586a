"""Resolve a model's name to its store, made first in the user's cache where there is none yet."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qmix.checkpoint import Checkpoint, hub, open_checkpoint
from qmix.checkpoint.reader import check_tokenizer
from qmix.disk.places import cache_directory
from qmix.errors import REMAKE, HubError, StoreError
from qmix.progress import OnProgress, counted, ignore
from qmix.store.child import quantize_in_child
from qmix.store.layout import StoreLayout
from qmix.store.manifest import MANIFEST, read_manifest
from qmix.store.opened import Store, is_store, open_store
from qmix.store.small_files import bring_small_files
from qmix.store.sources import DEFAULT_PRECISION, layout_for, named_store, open_source

IDENTITY_LENGTH = 12  # digits of the identity in a store's name
SLUG_LENGTH = 100  # characters: a file's name may have 255 bytes, a character at most four
COMPARING = "comparing its weights with the ones read before"


def prepare_store(
    model: str | Path,
    precision: str | None = None,
    dtype: str | None = None,
    on_progress: OnProgress = ignore,
    check: Callable[[StoreLayout], object] = lambda layout: None,
    clip: bool = False,
) -> Store:
    """Return the store of a model. Quantise it first if there is none yet; `check` may refuse its layout before that.

    Without the Hub, the newest store of that name in the cache is returned. Raises QmixError.
    """
    store = named_store(model, precision, dtype, clip)
    if store is not None:
        return store
    cache = cache_directory()
    try:
        checkpoint = open_checkpoint(open_source(model))
    except HubError:
        made = sorted(
            cache.glob(f"{slug_of(model, precision, dtype, clip)}-*/"), key=lambda store: store.stat().st_mtime
        )
        finished = [store for store in made if is_store(store)]
        if not finished:
            raise
        return open_store(finished[-1])
    return made_from(checkpoint, model, precision, dtype, on_progress, check, clip)


def made_from(
    checkpoint: Checkpoint,
    model: str | Path,
    precision: str | None = None,
    dtype: str | None = None,
    on_progress: OnProgress = ignore,
    check: Callable[[StoreLayout], object] = lambda layout: None,
    clip: bool = False,
    evict: bool = False,
) -> Store:
    """Return the store of a checkpoint in the cache, made first if there is none; `model` is the checkpoint's name.

    With `evict`, files from the Hub are deleted one by one after use. Raises what `prepare_store` raises.
    """
    layout = layout_for(checkpoint, precision, dtype, clip)
    directory = _place(checkpoint, slug_of(model, precision, dtype, clip), on_progress)
    if not is_store(directory):
        check(layout)
        check_tokenizer(checkpoint.source)
        from qmix.engine.usable import check_usable  # loads transformers, which a plan does without

        check_usable(checkpoint, layout.dtype)
        quantize_in_child(checkpoint, model, precision, dtype, clip, directory, on_progress, evict)
    known = checkpoint.known_fingerprint
    store = open_store(directory) if known is None else bring_small_files(checkpoint, known, directory)
    if known is not None and store.fingerprint != known:
        raise StoreError(f"{directory}: was not made from {model} as it is now; {REMAKE}")
    assert store.layout == layout
    return store


def _place(checkpoint: Checkpoint, slug: str, on_progress: OnProgress) -> Path:
    """Return the directory in the cache of a checkpoint's store, made or not.

    Its name has the checkpoint's identity. Where no store has it, but there are stores of the same name and precision,
    the checkpoint may be a copy: it is read, and its fingerprint is compared with theirs.
    """
    directory = cache_directory() / f"{slug}-{checkpoint.identity[:IDENTITY_LENGTH]}"
    others = _fingerprints(slug)
    if is_store(directory) or not others:
        return directory
    return others.get(fingerprint_of(checkpoint, on_progress), directory)


def fingerprint_of(checkpoint: Checkpoint, on_progress: OnProgress = ignore) -> str:
    """Return a checkpoint's fingerprint; the whole checkpoint is read where it is not known."""
    known = checkpoint.known_fingerprint
    if known is not None:
        return known
    from qmix.checkpoint.fingerprint import read_fingerprint  # loads torch, which a plan does without

    total = sum(weight.nbytes for weight in checkpoint.weights.values())
    return read_fingerprint(checkpoint, counted(total, on_progress, COMPARING))


def _fingerprints(slug: str) -> dict[str, Path]:
    """Return the stores of this name and precision in the cache, by their checkpoint's fingerprint."""
    found = {}
    for path in cache_directory().glob(f"{slug}-{'[0-9a-f]' * IDENTITY_LENGTH}"):
        with suppress(StoreError):  # a damaged store matches nothing
            if is_store(path):
                found[read_manifest(path / MANIFEST)[1].source.fingerprint] = path
    return found


def slug_of(model: str | Path, precision: str | None, dtype: str | None, clip: bool) -> str:
    """Return the part of a store's directory name that says the model and its options."""
    named = str(model) if hub.parse(str(model)) else Path(model).expanduser().absolute().name
    asked = f"{named.replace('/', '--')}-{precision or DEFAULT_PRECISION}{'-clip' * clip}-{dtype or 'half'}"
    plain = re.sub(r"[^\w.@-]+", "_", asked)
    if plain == asked and len(plain) <= SLUG_LENGTH:
        return plain
    return f"{plain[:SLUG_LENGTH]}-{hashlib.sha256(os.fsencode(asked)).hexdigest()[:8]}"
