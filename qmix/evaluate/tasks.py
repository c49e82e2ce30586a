"""The harness's tasks by name, and the user's own tasks: YAML files in a local directory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind

from qmix.checkpoint.hub_calls import muted
from qmix.errors import DataError, UsageError, arg
from qmix.evaluate.card import CARD
from qmix.evaluate.data import MissingData, offline, reason_of, task_class, what_to_fetch

YAML_LIMIT = 2**20  # bytes of a task's file; the harness's largest has 63 kB
SEED = 1234  # of the choice of a prompt's examples: the harness's own
THEIR_TASKS = Path(lm_eval.tasks.__file__).parent


def load_tasks(names: Sequence[str], data: Path | None, shots: int | None) -> dict[str, Any]:
    """Return the harness's `tasks` and `groups` of these names; `card` stands for the six tasks of the model card.

    `shots` applies to tasks that do not fix the number of examples. Raises UsageError, and DataError if data is
    missing, naming what to fetch.
    """
    if data is not None:
        _check_sizes(data)
    manager = _manager(names, data)
    with muted():
        built = _built(manager, _expanded(names), data)
    try:
        loaded: dict[str, Any] = dict(manager.load(built))
    except ValueError as error:  # a task by itself, and once more in a group
        raise UsageError(f"{arg('tasks')}: {error}; leave one of them out") from None
    fixed = {known.task: known.shots for known in CARD} if "card" in names else {}
    for item in built:
        for task in _leaves(item):
            _prepare(task, fixed.get(_name(item), shots))
    return loaded


def _built(manager: TaskManager, names: Sequence[str], data: Path | None) -> list[Task | Group]:
    factory, index = TaskFactory(), manager.task_index
    built: list[Task | Group] = []
    missing: dict[str, MissingData] = {}
    with contextlib.ExitStack() as after_a_failure:
        for name in names:
            overrides: dict[str, Any] = {} if index[name].kind is Kind.PY_TASK else {"class": task_class(data)}
            try:
                found = factory.build(index[name], overrides=overrides, registry=index)
            except MissingData as error:
                if not missing:  # do not wait for the Hub again
                    after_a_failure.enter_context(offline())
                missing[name] = error
            except Exception as error:  # whatever a task's own templates and functions do
                raise UsageError(f"{name}: the harness rejects it ({reason_of(error)}); correct it") from None
            else:
                built += found if isinstance(found, list) else [found]
    if missing:
        raise DataError(what_to_fetch(missing, data))
    return built


def own_tasks(data: Path) -> list[str]:
    """Return the names of the tasks in a directory; a group stands for its tasks."""
    _check_sizes(data)
    manager = TaskManager(include_path=str(data), include_defaults=False)
    grouped = {_name_of(child) for name in manager.all_groups for child in _children(manager, name)}
    return [name for name in (*manager.all_groups, *manager.all_subtasks) if name not in grouped]


def _check_sizes(data: Path) -> None:
    """Raise UsageError if a YAML file is too large: the harness takes a hundred times its size in memory."""
    for path in data.rglob("*.yaml"):
        if path.is_file() and path.stat().st_size > YAML_LIMIT:
            raise UsageError(f"{path}: larger than {YAML_LIMIT} bytes; is it a task? Move it out of {data}")


def mute() -> None:
    """Silence the harness and datasets on stderr."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()


def _expanded(names: Sequence[str]) -> list[str]:
    """Return the names without repetition, `card` replaced by its tasks."""
    every = [task for name in names for task in ([known.task for known in CARD] if name == "card" else [name])]
    return list(dict.fromkeys(every))


def _manager(names: Sequence[str], data: Path | None) -> TaskManager:
    """Return an index with the names. The harness's full index takes seconds to read, and is used only if needed."""
    own = [] if data is None else [str(data)]
    wanted = _expanded(names)
    places = [str(THEIR_TASKS / known.folder) for known in CARD if known.task in wanted]
    manager = TaskManager(include_path=[*places, *own], include_defaults=False)
    if all(_complete(manager, name) for name in wanted):
        return manager
    manager = TaskManager(include_path=own)
    if unknown := [name for name in wanted if name not in manager.task_index]:
        where = "" if data is None else f" or in {data}"
        raise UsageError(f"{arg('tasks')} {','.join(unknown)}: not found in lm-evaluation-harness{where}")
    return manager


def _prepare(task: Task, shots: int | None) -> None:
    """Prepare a task as the harness's own command does. Raises UsageError if qmix cannot run it."""
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"{name}: runs code that the model writes, which qmix does not; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"{name}: has images or audio, and the model reads text only; leave it out")
    fixed = task.get_config("num_fewshot")
    if fixed is None or (shots is not None and fixed != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=SEED)


def _leaves(item: Task | Group) -> list[Task]:
    return list(item.get_all_tasks()) if isinstance(item, Group) else [item]


def _name(item: Task | Group) -> str:
    return str(item.name if isinstance(item, Group) else item.task_name)


def _children(manager: TaskManager, group: str) -> list[Any]:
    entry = manager.task_index[group]
    return list((entry.cfg or {}).get("task") or ()) if entry.kind is Kind.GROUP else []


def _name_of(child: Any) -> str:
    return str(child if isinstance(child, str) else child.get("task", child.get("group")))


def _complete(manager: TaskManager, name: str) -> bool:
    """Return whether the index has a task, or a group with all of its tasks."""
    if name not in manager.task_index:
        return False
    return all(_complete(manager, child) for child in _children(manager, name) if isinstance(child, str))
