"""The stores of a directory: what each was made from, its size and its last use. Loads no torch."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qmix.errors import QmixError, StoreError, UsageError
from qmix.files import read_json
from qmix.models import EMBEDDED
from qmix.store.journal import JOURNAL, read_subject
from qmix.store.manifest import MANIFEST, read_manifest
from qmix.store.opened import ORIGIN, Origin, is_store, partial_directory
from qmix.store.use import in_use, last_use

PARTIAL = ".partial"
IDENTITY = re.compile(r"-([0-9a-f]{12})$")  # of a checkpoint, at the end of a store's name in the cache
BLOCK = 512  # bytes: the unit of st_blocks


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """A store as it is listed. `model` is the place of its checkpoint, or an embedded model's name.

    `precision` names the precisions of its experts, "nf4" or "nf4+int8". `state` is "whole", "partial" (being made, or
    interrupted) or "damaged" (its manifest cannot be read). `last_use` is in seconds since 1970, None if never used.
    """

    directory: Path
    model: str
    precision: str
    dtype: str
    nbytes: int
    state: str
    last_use: float | None
    in_use: bool

    @property
    def name(self) -> str:
        """Return the directory's name, that of the finished store where it is partial."""
        return self.directory.name.removesuffix(PARTIAL) if self.state == "partial" else self.directory.name

    @property
    def id(self) -> str:
        """Return the short name: the checkpoint's identity for stores of the cache, else the directory's name."""
        found = IDENTITY.search(self.name)
        return found[1] if found else self.name

    def to_json(self) -> dict[str, Any]:
        """Return the entry with its time in ISO 8601."""
        used = None if self.last_use is None else datetime.fromtimestamp(self.last_use, timezone.utc)
        return {
            "id": self.id,
            "directory": str(self.directory),
            "model": self.model,
            "precision": self.precision,
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "state": self.state,
            "last_use": None if used is None else used.isoformat(timespec="seconds"),
            "in_use": self.in_use,
        }


def stores_in(directory: Path) -> list[StoreEntry]:
    """Return the stores directly in a directory, whole or not, those used last first."""
    paths: list[Path] = []
    found: list[StoreEntry] = []
    with suppress(OSError):
        paths = sorted(directory.iterdir())
    for path in paths:
        with suppress(OSError):  # of a directory that cannot be looked into
            if (entry := entry_of(path)) is not None:
                found.append(entry)
    return sorted(found, key=lambda entry: -(entry.last_use or 0))


def entry_of(directory: Path) -> StoreEntry | None:
    """Return the entry of a directory, None where it is not a store."""
    if directory.name.endswith(PARTIAL) and (directory / JOURNAL).is_file():
        subject = read_subject(directory / JOURNAL)
        if subject is None and not any(directory.glob("*.safetensors")):
            return None  # anything else may have a file of this name
        precision, dtype = ("?", "?") if subject is None else (precision_name(subject.precision), subject.dtype)
        return _entry(directory, "", precision, dtype, "partial")
    if not is_store(directory):
        return None
    try:
        content, found = read_manifest(directory / MANIFEST)
    except StoreError:
        weights = any(directory.glob("experts-*.safetensors"))  # or anything else may have a file of this name
        return _entry(directory, "", "?", "?", "damaged") if weights else None
    clip = "+clip" if content.get("clip") else ""
    return _entry(directory, found.source.name, precision_name(found.precisions) + clip, found.dtype, "whole")


def _entry(directory: Path, source: str, precision: str, dtype: str, state: str) -> StoreEntry:
    model = model_of(directory, source)
    return StoreEntry(
        directory, model, precision, dtype, taken(directory), state, last_use(directory), in_use(directory)
    )


def precision_name(precisions: Iterable[Iterable[str]]) -> str:
    """Return the precisions of experts, [layer][expert], as one word: the most frequent first."""
    counts = Counter(name for row in precisions for name in row)
    return "+".join(name for name, _ in counts.most_common())


def model_of(directory: Path, source: str) -> str:
    """Return the place of a store's checkpoint, or the embedded model's name; `source` where that is not known."""
    if source in EMBEDDED:
        return source
    place = source
    with suppress(QmixError):
        place = read_json(directory / ORIGIN, Origin, StoreError, "").location
    return next((name for name, path in EMBEDDED.items() if str(path) == place), place or directory.name)


def taken(directory: Path) -> int:
    """Return the bytes that a directory takes on the disk, with everything in it."""
    total = 0
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            with suppress(OSError):
                whole = entry.is_dir(follow_symlinks=False)
                total += taken(Path(entry.path)) if whole else entry.stat(follow_symlinks=False).st_blocks * BLOCK
    return total


def find_store(name: str, cache: Path) -> StoreEntry:
    """Return the store that `name` names: a directory, or in the cache an id, a model, or the beginning of a name.

    Raises UsageError where there is none, or several.
    """
    path = Path(name).expanduser() if name else Path(os.devnull)
    entry = entry_of(path) or entry_of(partial_directory(path))
    if entry is not None:
        return entry
    known = stores_in(cache)
    for matches in (
        [each for each in known if name in (each.id, each.name, each.directory.name)],
        [each for each in known if each.model == name or each.model.partition("@")[0] == name],
        [each for each in known if name and each.name.startswith(name)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            choices = ", ".join(f"{each.id} ({each.precision}, {each.dtype}, {each.state})" for each in matches[:8])
            raise UsageError(f"{name}: names {len(matches)} stores; give one of {choices}")
    raise UsageError(f"{name}: not found: expected a store's directory or a name that `qmix ls` shows")
