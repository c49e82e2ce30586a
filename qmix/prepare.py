"""From whatever names a model to an opened store, quantising a checkpoint once into the user's cache directory.

The quantiser runs in a process of its own: its compiler and buffers would otherwise stay in the memory of the run
that follows, and count against its budget.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

from qmix import hub
from qmix.checkpoint import Checkpoint, open_checkpoint
from qmix.checkpoint.source import HubSource, LocalSource, Source
from qmix.errors import HubError, QmixError, UsageError
from qmix.layout import StoreLayout, parse_precisions
from qmix.machine import cache_directory, default_budget, interpreter_memory
from qmix.models import EMBEDDED
from qmix.plan import Plan, default_context, make_plan
from qmix.precision.formats import DTYPES
from qmix.progress import OnProgress, Progress, ignore
from qmix.store import Store, is_store, open_store, partial_directory
from qmix.units import parse_bytes

DEFAULT_PRECISION = "nf4"


def open_source(model: str | Path, scratch: Path | None = None) -> Source:
    """The files of a checkpoint: an embedded model, a directory, or `org/name[@revision]` on the hub.

    With `scratch`, weight files from the hub pass through there and are deleted when used. Raises UsageError where
    the name is none of these.
    """
    embedded = EMBEDDED.get(str(model))
    path = embedded or Path(model).expanduser()
    if path.is_dir():
        return LocalSource(path)
    if hub.parse(str(model)) is None:
        raise UsageError(f"{model}: no such directory, nor a hub id (org/name), nor one of {', '.join(EMBEDDED)}")
    return HubSource(hub.HubRepo.open(str(model)), scratch)


def layout_for(checkpoint: Checkpoint, precision: str | None, dtype: str | None) -> StoreLayout:
    """The layout of a checkpoint's store. Raises UsageError for a precision or dtype that is none."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"{dtype!r} is not a half precision; choose one of {', '.join(DTYPES)}")
    precisions = parse_precisions(precision or DEFAULT_PRECISION, checkpoint.geometry)
    return StoreLayout(checkpoint.geometry, precisions, dtype or checkpoint.half_dtype)


def prepare_store(
    model: str | Path, precision: str | None = None, dtype: str | None = None, on_progress: OnProgress = ignore
) -> Store:
    """The store of a model, made first if there is none yet."""
    path = Path(model).expanduser()
    if str(model) not in EMBEDDED and (is_store(path) or partial_directory(path).is_dir()):
        return _as_asked(open_store(path), precision, dtype)
    cache = cache_directory()
    try:
        checkpoint = open_checkpoint(open_source(model))
    except HubError:
        made = sorted(cache.glob(f"{_slug(model, precision, dtype)}-*/"), key=lambda store: store.stat().st_mtime)
        finished = [store for store in made if is_store(store)]
        if not finished:
            raise
        return open_store(finished[-1])
    layout = layout_for(checkpoint, precision, dtype)
    directory = cache / f"{_slug(model, precision, dtype)}-{checkpoint.fingerprint[:12]}"
    if not is_store(directory):
        _quantize_in_child(model, precision, dtype, directory, on_progress)
    store = open_store(directory)
    assert store.layout == layout
    return store


def _as_asked(store: Store, precision: str | None, dtype: str | None) -> Store:
    wanted = precision and parse_precisions(precision, store.geometry)
    if wanted and wanted != store.layout.precisions:
        raise UsageError(f"--precision {precision}: the store {store.directory} has another; quantize its checkpoint")
    if dtype and dtype != store.layout.dtype:
        raise UsageError(f"--dtype {dtype}: the store {store.directory} is {store.layout.dtype}")
    return store


def _slug(model: str | Path, precision: str | None, dtype: str | None) -> str:
    named = str(model) if hub.parse(str(model)) else Path(model).expanduser().absolute().name
    parts = (named.replace("/", "--"), precision or DEFAULT_PRECISION, dtype or "half")
    return "-".join(re.sub(r"[^\w.@-]+", "_", part) for part in parts)


def _quantize_in_child(
    model: str | Path, precision: str | None, dtype: str | None, directory: Path, on_progress: OnProgress
) -> None:
    request = {"model": str(model), "precision": precision, "dtype": dtype, "directory": str(directory)}
    command = [sys.executable, "-m", "qmix.quantize_child", json.dumps(request)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        try:
            for line in child.stdout:
                message = json.loads(line)
                if "error" in message:
                    error = QmixError(message["error"])
                    error.exit_code = message["exit_code"]
                    raise error
                on_progress(Progress(**message))
        except BaseException:
            child.send_signal(signal.SIGINT)  # it notes what it has finished, and ends
            raise
        complaint = child.stderr.read().strip().splitlines()[-1:]
    if child.returncode != 0:
        raise QmixError(f"quantizing {model} ended with status {child.returncode}: {''.join(complaint)}")


def layout_of(model: str | Path, precision: str | None, dtype: str | None) -> StoreLayout:
    """The layout that a model has or would have as a store, from config and headers alone."""
    path = Path(model).expanduser()
    if str(model) not in EMBEDDED and is_store(path):
        return _as_asked(open_store(path), precision, dtype).layout
    return layout_for(open_checkpoint(open_source(model)), precision, dtype)


def plan_for(layout: StoreLayout, ram: int | str | None, context: int | None, attention: str = "sdpa") -> Plan:
    """The plan of a store on this machine, with the defaults that `qmix.load` has."""
    longest = layout.geometry.max_position
    if context is not None and not 1 <= context <= longest:
        raise UsageError(f"--context {context}: must be 1 to {longest}, the model's longest")
    budget = default_budget() if ram is None else parse_bytes(ram)
    tokens = context or default_context(layout.geometry)
    return make_plan(layout, budget, tokens, interpreter_memory(), attention)
