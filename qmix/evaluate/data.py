"""The data sets of tasks, from a local directory, or as the harness finds them in the Hub's cache or on the Hub.

The local directory holds data sets as `hf download` writes them: ORG/NAME/CONFIG/SPLIT-*.parquet, or ORG/NAME with a
README.md that lists the files. Files that a user's own task names lie beside its YAML.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import constants
from lm_eval.api.task import ConfigurableTask

from qmix.errors import arg

FORMS = ("json", "csv", "parquet", "text", "arrow")  # builders of `datasets` for files that a task names itself
SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}
FETCH = "hf download --repo-type dataset {path} --local-dir {place}/{path}"


class MissingData(Exception):
    """A task's data set cannot be read; `path` is its name on the Hub, or one of FORMS."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.path, self.reason = path, reason


def task_class(data: Path | None) -> type[ConfigurableTask]:
    """Return a class of tasks that looks for data sets in `data` first."""

    class LocalTask(ConfigurableTask):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config={key: value for key, value in config.items() if key != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: object) -> None:
            if callable(self.config.custom_dataset):
                super().download(dataset_kwargs)
                return
            path, name = str(self.DATASET_PATH), self.DATASET_NAME
            if path in FORMS and "data_files" not in (dataset_kwargs or {}):  # would take the whole directory
                raise ValueError(f"{path} without data_files under dataset_kwargs")
            local = None if data is None or path in FORMS else data / path
            try:
                if local is None or not local.is_dir():
                    super().download(self._resolved(dataset_kwargs))
                elif found := find_files(local, name):
                    self.dataset = datasets.load_dataset(found[0], data_files=found[1])
                else:  # its README.md lists the files
                    self.dataset = datasets.load_dataset(str(local), name)
            except Exception as error:  # `datasets` passes on the exceptions of its readers and of the network
                raise MissingData(path, reason_of(error)) from None

        def _resolved(self, options: dict[str, Any] | None) -> dict[str, Any] | None:
            """Return loading options with the files that a task names itself resolved beside its YAML."""
            if data is None or self.DATASET_PATH not in FORMS or not options or "data_files" not in options:
                return options
            beside = Path(self.config.metadata["config_source"]).parent
            return options | {"data_files": _beside(options["data_files"], beside)}

    return LocalTask


def find_files(base: Path, name: str | None) -> tuple[str, dict[str, list[str]]] | None:
    """Return the format of a data set's files and the files of each split, or None if the directory has none.

    Files are named SPLIT.FORMAT or SPLIT-00000-of-00002.FORMAT. They lie in a folder named like the configuration, in
    `data` if the configuration has no name, or directly in `base`.
    """
    for folder in (base / (name or "data"), base):
        for suffix, form in SUFFIXES.items():
            splits: dict[str, list[str]] = {}
            for file in sorted(folder.glob(f"*{suffix}")):
                splits.setdefault(file.name.removesuffix(suffix).split("-")[0], []).append(str(file))
            if splits:
                return form, splits
    return None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep datasets and huggingface_hub off the network inside the context."""
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, datasets.config.HF_DATASETS_OFFLINE = before


def what_to_fetch(missing: Mapping[str, MissingData], data: Path | None) -> str:
    """Return a message in one line: the tasks without data, the reason, and the commands that fetch the data sets."""
    first = next(iter(missing.values()))
    paths = dict.fromkeys(error.path for error in missing.values())
    hub = [path for path in paths if path not in FORMS]
    if not hub:
        return f"{', '.join(missing)}: the data cannot be read ({first.reason})"
    place = data or Path("DATA")
    commands = "; ".join(FETCH.format(path=path, place=place) for path in hub)
    where = f"not in {data}" if data else "not on this machine, and the Hub did not provide it"
    again = "then run the same command again" if data else f"then give {arg('data', str(place))}"
    return f"{', '.join(missing)}: the data is {where} ({first.reason}); fetch it with: {commands}; {again}"


def reason_of(error: Exception) -> str:
    """Return a library's exception as part of a one-line message."""
    first = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {first}"[:200].removesuffix(": ")


def _beside(files: Any, directory: Path) -> Any:
    """Return `data_files` with each relative path that exists in `directory` resolved there."""
    if isinstance(files, dict):
        return {split: _beside(value, directory) for split, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, directory) for value in files]
    return str(directory / files) if (directory / files).exists() else files
