"""Run tasks on a model, and write the results to a file."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate

from qmix.disk.faults import write_advice
from qmix.errors import QmixError, arg
from qmix.evaluate.card import card_rows
from qmix.evaluate.engine import StoreEngine
from qmix.evaluate.harness import QmixLM
from qmix.files import write_whole
from qmix.store.layout import precision_of
from qmix.version import __version__

SCHEMA = "qmix-eval-1"
RESULTS = "results.json"
RESAMPLES = 1000  # bootstrap samples, for standard errors of figures that are not means
SEEDS = (0, 1234)  # of random and numpy, for tasks that draw at random: the harness's own


def run_tasks(lm: QmixLM, loaded: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Return the harness's results of loaded tasks on the first `limit` questions of each.

    Raises DoesNotFitError before anything is computed, naming a budget that fits all tasks.
    """
    lm.coming = lambda: [request for task in loaded["tasks"].values() for request in task.instances]
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    with contextlib.redirect_stdout(io.StringIO()):  # it reports its resampling there
        found = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False)
    return dict(found or {})


def report(lm: QmixLM, found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of results.json; `settings` are the command's, with the names of the tasks."""
    assert isinstance(lm.engine, StoreEngine)
    store = lm.engine.store
    model = {
        "name": store.source_name,
        "fingerprint": store.fingerprint,
        "precision": precision_of(store.layout),
        "dtype": store.layout.dtype,
    }
    content = {
        "schema": SCHEMA,
        "model": model,
        "settings": dict(settings) | {"max_length": lm.max_length},
        "versions": {"qmix": __version__, **{name: version(name) for name in ("lm_eval", "torch", "transformers")}},
        "results": {name: _plain(values) for name, values in found["results"].items()},
        **{name: found[name] for name in ("n-shot", "n-samples", "group_subtasks")},
        "task_versions": found["versions"],
        "work": lm.engine.work.to_json(),
    }
    if "card" in settings["tasks"]:
        content["card"] = [row.to_json() for row in card_rows(found["results"])]
    return content


def write_report(directory: Path, content: Mapping[str, Any]) -> Path:
    """Write results.json into a directory, atomically, and return its path. Raises QmixError."""
    path = directory / RESULTS
    try:
        write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        advice = write_advice(error, f"choose another {arg('output')}")
        raise QmixError(f"{path}: {error.strerror}; {advice}. The results so far are kept in it") from None
    return path


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures as JSON values; None if the harness gives no number."""
    return {name: _number(value) for name, value in values.items() if name not in ("name", "alias", " ")}


def _number(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if value == "N/A" or (isinstance(value, float) and not math.isfinite(value)) else value
