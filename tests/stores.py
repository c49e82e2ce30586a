"""Stores and models made from checkpoints, for tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.engine.batch import BatchRunner
from qmix.engine.stream import Runner
from qmix.errors import StoreError
from qmix.model.build import build_model
from qmix.plan import Plan, make_plan
from qmix.pool.experts import ExpertPool
from qmix.progress import Progress
from qmix.store.opened import Store, partial_directory
from qmix.store.quantize import quantize
from qmix.store.sources import layout_for
from qmix.store.writer import JOURNAL


def make_store(
    checkpoint: Path, directory: Path, precision: str = "nf4", dtype: str | None = None, clip: bool = False
) -> Store:
    opened = open_checkpoint(LocalSource(checkpoint))
    return quantize(opened, directory, layout_for(opened, precision, dtype, clip))


def interrupt_store(checkpoint: Path, directory: Path, precision: str, after: int, clip: bool = False) -> None:
    """Begin a store, and stop as a user does after so many chunks."""
    opened, calls = open_checkpoint(LocalSource(checkpoint)), iter(range(1, 10**6))

    def stop(progress: Progress) -> None:
        if next(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(opened, directory, layout_for(opened, precision, None, clip), stop)


def journaled(directory: Path) -> set[str]:
    """The weights that runs have noted as finished in a store that is not."""
    journal = partial_directory(directory) / JOURNAL
    entries = map(json.loads, journal.read_text().splitlines())
    return {entry["weight"] for entry in entries if "weight" in entry}


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file of a store, whole."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def make_pool(store: Store, slots: int, *arguments, **options) -> ExpertPool:
    """With so many slots for records of each size in the store."""
    return ExpertPool(store, dict.fromkeys(store.layout.record_counts, slots), *arguments, **options)


def make_model(store: Store, slots: int | None = None, attention: str = "sdpa"):
    """transformers' model over a pool of `slots` slots, by default one for every expert."""
    return build_model(store, make_pool(store, slots or store.geometry.num_records), attention)


def refusal(*arguments) -> str:
    """The one line with which `make_store` refuses these arguments."""
    with pytest.raises(StoreError) as caught:
        make_store(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def one_prompt(store: Store, context: int) -> Runner:
    """A runner with every expert in memory."""
    return Runner(store, _resident(store, context, 1))


def many_prompts(store: Store, context: int, batch: int) -> BatchRunner:
    """A batch runner with every expert in memory."""
    return BatchRunner(store, _resident(store, context, batch))


def _resident(store: Store, context: int, batch: int) -> Plan:
    plan = make_plan(store.layout, 2**40, context, 2**28, batch=batch)
    return plan.with_slots(store.geometry.num_records)
