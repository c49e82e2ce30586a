"""The harness's tasks by name, with their data from a directory, from the hub's cache, or from the hub.

A directory of `--data` holds tasks of the user's own (the harness's YAML, data beside it), and data sets as
`hf download` leaves them: ORG/NAME/CONFIG/SPLIT-*.parquet, or ORG/NAME with a README.md that says what is where.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from huggingface_hub import constants
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind

from qmix.errors import DataError, UsageError
from qmix.evaluate.card import CARD

FORMS = ("json", "csv", "parquet", "text", "arrow")  # of files that a task names itself
SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SEED = 1234  # of the draw of a prompt's examples: the harness's own
THEIR_TASKS = Path(lm_eval.tasks.__file__).parent
FETCH = "hf download --repo-type dataset {path} --local-dir {place}/{path}"


class MissingData(Exception):
    """A task's data set is nowhere; `path` is its name on the hub, if it is there."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path, self.reason = path, reason


def load_tasks(names: Sequence[str], data: Path | None, shots: int | None) -> dict[str, Any]:
    """What the harness evaluates: its `tasks` and `groups` of these names, `card` being the six of the model card.

    `shots` is for tasks that do not fix the number of examples. Raises UsageError, and DataError where data is missing,
    with what to fetch.
    """
    manager = _manager(names, data)
    factory, built, missing = TaskFactory(), [], {}
    for name in _expanded(names):
        entry = manager.task_index[name]
        overrides: dict[str, Any] = {} if entry.kind is Kind.PY_TASK else {"class": _task_class(data)}
        try:
            found = factory.build(entry, overrides=overrides, registry=manager.task_index)
        except MissingData as error:
            missing[name] = error
        except Exception as error:  # whatever a task's own templates and functions do
            raise UsageError(f"{name}: lm-evaluation-harness does not take it ({_reason(error)}); correct it") from None
        else:
            built += found if isinstance(found, list) else [found]
    if missing:
        raise DataError(_what_to_fetch(missing, data))
    try:
        loaded: dict[str, Any] = dict(manager.load(built))
    except ValueError as error:  # a task by itself, and once more in a group
        raise UsageError(f"--tasks: {error}; leave one of them out") from None
    fixed = {known.task: known.shots for known in CARD} if "card" in names else {}
    for item in built:
        for task in _leaves(item):
            _prepare(task, fixed.get(_name(item), shots))
    return loaded


def own_tasks(data: Path) -> list[str]:
    """The names of the tasks whose YAML lies in a directory; a group's tasks by the group's name."""
    manager = TaskManager(include_path=str(data), include_defaults=False)
    grouped = {_name_of(child) for name in manager.all_groups for child in _children(manager, name)}
    return [name for name in (*manager.all_groups, *manager.all_subtasks) if name not in grouped]


@contextmanager
def offline() -> Iterator[None]:
    """Inside, neither datasets nor huggingface_hub reaches for a network."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE = before


def mute() -> None:
    """Leave stderr to what qmix says itself."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()


def find_files(data: Path, path: str, name: str | None) -> tuple[str, dict[str, list[str]]] | None:
    """The form of a data set's files in a directory, and those of each split; None where there are none.

    They are called SPLIT.FORM, or SPLIT-00000-of-00002.FORM, and lie in the folder of their configuration, in `data`
    where there is but one, or beside one another.
    """
    base = data / path
    for folder in (base / (name or "data"), base):
        for suffix, form in SUFFIXES.items():
            splits: dict[str, list[str]] = {}
            for file in sorted(folder.glob(f"*{suffix}")):
                splits.setdefault(file.name.removesuffix(suffix).split("-")[0], []).append(str(file))
            if splits:
                return form, splits
    return None


def _task_class(data: Path | None) -> type[ConfigurableTask]:
    class LocalTask(ConfigurableTask):
        """A task whose data is looked for in `data` first, and that shows no bar of its own."""

        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config={key: value for key, value in config.items() if key != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: object) -> None:
            if callable(self.config.custom_dataset):
                super().download(dataset_kwargs)
                return
            path, name = str(self.DATASET_PATH), self.DATASET_NAME
            try:
                if data is not None and (found := find_files(data, path, name)):
                    self.dataset = datasets.load_dataset(found[0], data_files=found[1])
                elif data is not None and (data / path).is_dir():  # its README.md says what is where
                    self.dataset = datasets.load_dataset(str(data / path), name)
                else:
                    super().download(self._resolved(dataset_kwargs))
            except Exception as error:  # datasets raises whatever its readers and the network do
                raise MissingData(path, _reason(error)) from None

        def _resolved(self, options: dict[str, Any] | None) -> dict[str, Any] | None:
            """Files that a task names itself lie beside its YAML."""
            if data is None or self.DATASET_PATH not in FORMS or not options or "data_files" not in options:
                return options
            beside = Path(self.config.metadata["config_source"]).parent
            return options | {"data_files": _beside(options["data_files"], beside)}

        def build_all_requests(self, **options: Any) -> None:
            with contextlib.redirect_stderr(io.StringIO()):
                super().build_all_requests(**options)

    return LocalTask


def _beside(files: Any, directory: Path) -> Any:
    if isinstance(files, dict):
        return {split: _beside(value, directory) for split, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, directory) for value in files]
    return str(directory / files) if (directory / files).exists() else files


def _expanded(names: Sequence[str]) -> list[str]:
    every = [task for name in names for task in ([known.task for known in CARD] if name == "card" else [name])]
    return list(dict.fromkeys(every))


def _manager(names: Sequence[str], data: Path | None) -> TaskManager:
    """An index that has the names; that of all the harness's tasks, which takes seconds to read, only where needed."""
    own = [] if data is None else [str(data)]
    wanted = _expanded(names)
    places = [str(THEIR_TASKS / known.folder) for known in CARD if known.task in wanted]
    manager = TaskManager(include_path=[*places, *own], include_defaults=False)
    if all(_complete(manager, name) for name in wanted):
        return manager
    manager = TaskManager(include_path=own)
    if unknown := [name for name in wanted if name not in manager.task_index]:
        where = "" if data is None else f", nor in {data}"
        raise UsageError(f"--tasks {','.join(unknown)}: no such task in lm-evaluation-harness{where}")
    return manager


def _prepare(task: Task, shots: int | None) -> None:
    """As the harness's own command prepares a task before it is evaluated."""
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"{name}: runs code that the model writes, which qmix does not; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"{name}: shows the model pictures or sounds, and it reads text only; leave it out")
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
    """Whether the index has a task, or a group and all that is in it."""
    if name not in manager.task_index:
        return False
    return all(_complete(manager, child) for child in _children(manager, name) if isinstance(child, str))


def _reason(error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first}"[:200].removesuffix(": ")


def _what_to_fetch(missing: dict[str, MissingData], data: Path | None) -> str:
    """One line: tasks, data sets, commands."""
    first = next(iter(missing.values()))
    paths = dict.fromkeys(error.path for error in missing.values())
    hub = [path for path in paths if path not in FORMS]
    if not hub:
        return f"{', '.join(missing)}: the data cannot be read ({first.reason})"
    place = data or Path("DATA")
    commands = "; ".join(FETCH.format(path=path, place=place) for path in hub)
    where = f"not in {data}" if data else "not on this machine, and the hub did not give it"
    again = "then the same command again" if data else f"then give --data {place}"
    return f"{', '.join(missing)}: the data is {where} ({first.reason}); fetch it with: {commands}; {again}"
