"""Stores and models made from checkpoints, for tests."""

from __future__ import annotations

from pathlib import Path

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.model import build_model
from qmix.pool import ExpertPool
from qmix.prepare import layout_for
from qmix.quantize import quantize
from qmix.store import Store


def make_store(checkpoint: Path, directory: Path, precision: str = "nf4", dtype: str | None = None) -> Store:
    opened = open_checkpoint(LocalSource(checkpoint))
    return quantize(opened, directory, layout_for(opened, precision, dtype))


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file of a store, whole."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def make_model(store: Store, slots: int | None = None, attention: str = "sdpa"):
    """transformers' model over a pool of `slots` slots, by default one for every expert."""
    return build_model(store, ExpertPool(store, slots or store.geometry.num_records), attention)
