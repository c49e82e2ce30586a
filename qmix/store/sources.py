"""Resolve what names a model: a store, an embedded model, a directory, or `org/name[@revision]` on the Hub.

Loads no torch, so that a plan and a refusal come at once.
"""

from __future__ import annotations

from pathlib import Path

from qmix.checkpoint import Checkpoint, hub
from qmix.checkpoint.foreign import check_file, hub_snapshot
from qmix.checkpoint.safetensors_header import DTYPES
from qmix.checkpoint.source import HubSource, LocalSource, Source
from qmix.disk.places import cache_directory
from qmix.errors import UsageError, arg
from qmix.geometry import Geometry
from qmix.models import EMBEDDED
from qmix.models.published import PUBLISHED
from qmix.precision.formats import FOUR_BITS
from qmix.store.layout import StoreLayout, has_blocks, parse_precisions
from qmix.store.opened import Store, is_store, open_store, partial_directory

DEFAULT_PRECISION = "nf4"
CHECKPOINTS = "checkpoints"  # in the cache: fingerprints of checkpoints that were read
AS_IT_IS = "leave it out, or make another store from its checkpoint"
NOTHING_TO_CLIP = f"has no 4-bit experts ({', '.join(FOUR_BITS)}); leave it out"


def open_source(model: str | Path, scratch: Path | None = None) -> Source:
    """Open the files of a checkpoint: an embedded model, a directory, or `org/name[@revision]` on the Hub.

    With `scratch`, weight files from the Hub pass through that directory and are deleted once used. Raises UsageError
    where the name is none of these.
    """
    if not str(model):
        raise UsageError("the model's name is empty; leave it out to use the embedded model")
    embedded = EMBEDDED.get(str(model))
    path = embedded or Path(model).expanduser()
    if is_store(path):
        raise UsageError(f"{model}: is a store; give the checkpoint that it was made from")
    if path.is_dir():
        return LocalSource(hub_snapshot(path), cache_directory() / CHECKPOINTS)
    check_file(path)
    if str(model) in PUBLISHED:
        known = PUBLISHED[str(model)].hub_id
        raise UsageError(f"{model}: only usable with `plan`; to run it, use {known}")
    if hub.parse(str(model)) is None:
        embedded_names = " or ".join(f"`{name}`" for name in EMBEDDED)
        raise UsageError(f"{model}: not found: expected a directory, a Hub id (org/name) or {embedded_names}")
    return HubSource(hub.HubRepo.open(str(model)), scratch)


def layout_for(
    checkpoint: Checkpoint, precision: str | None, dtype: str | None, clip: bool = False, argument: str = "precision"
) -> StoreLayout:
    """Return the layout of a checkpoint's store.

    Raises UsageError for an unknown precision (the value of `argument`) or dtype, and for `clip` without 4-bit experts.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{dtype!r} is not a half precision; choose one of {', '.join(DTYPES)}")
    precisions = precisions_of(DEFAULT_PRECISION if precision is None else precision, checkpoint.geometry, argument)
    if clip and not has_blocks(precisions):
        raise UsageError(f"{arg('clip')}: {precision} {NOTHING_TO_CLIP}")
    return StoreLayout(checkpoint.geometry, precisions, dtype or checkpoint.half_dtype, clip)


def precisions_of(spec: str, geometry: Geometry, argument: str = "precision") -> tuple[tuple[str, ...], ...]:
    """Return the precision of every expert, [layer][expert]. Raises UsageError naming `argument`."""
    try:
        return parse_precisions(spec, geometry)
    except UsageError as error:
        raise UsageError(f"{arg(argument)}: {error.message}") from None


def named_store(model: str | Path, precision: str | None, dtype: str | None, clip: bool = False) -> Store | None:
    """Return the store that `model` names, None where it names none.

    Raises StoreError if it is unfinished, UsageError if it has another precision, dtype or no clipping.
    """
    path = Path(model).expanduser()
    if not str(model) or str(model) in EMBEDDED or not (is_store(path) or partial_directory(path).is_dir()):
        return None
    store = open_store(path)
    if precision is not None and precisions_of(precision, store.geometry) != store.layout.precisions:
        raise UsageError(f"{arg('precision')} {precision}: not that of the store {store.directory}; {AS_IT_IS}")
    if dtype and dtype != store.layout.dtype:
        raise UsageError(f"{arg('dtype')} {dtype}: the store {store.directory} has {store.layout.dtype}; {AS_IT_IS}")
    if clip and not store.layout.clip:
        raise UsageError(f"{arg('clip')}: the store {store.directory} was made without it; {AS_IT_IS}")
    return store
