"""A whole store read at the disk's speed and compared with its checksums: all damage is found, not the first of it.

Works on stores that `open_store` refuses: where the config is damaged, the headers of the weight files give the
weights' places. A part that is wrong, or that the disk fails to read, is read a second time by itself before it is
reported.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from qmix.checkpoint.reader import TOKENIZERS
from qmix.errors import CheckpointError, StoreError
from qmix.files import JSON_LIMIT, read_bounded, read_json
from qmix.progress import OnProgress, Progress, ignore
from qmix.store.layout import DENSE_FILE, FileLayout, StoreLayout, layer_file
from qmix.store.manifest import (
    CONFIG,
    EDITABLE,
    MANIFEST,
    SMALL_FILES,
    Manifest,
    layout_of,
    read_manifest,
    small_digest,
    small_digests,
)
from qmix.store.opened import PROFILE, profile_of
from qmix.store.parts import Part, parts_by_header, parts_of, recheck, sweep

MISSING = "missing"
STRANGE = "a file that is not part of the store"


@dataclass(frozen=True, slots=True)
class Damage:
    """Something of a store that is not as it was made. `part` is None where it is not a part of a weight file."""

    file: str
    what: str
    why: str
    part: Part | None = None

    def __str__(self) -> str:
        place = "" if self.part is None else f", bytes {self.part.offset} to {self.part.end - 1}"
        return f"{self.file}: {self.what}{place}: {self.why}"

    def to_json(self) -> dict[str, Any]:
        """Return the damage as `qmix verify --json` prints it; `bytes` are the first and the last."""
        place = None if self.part is None else [self.part.offset, self.part.end - 1]
        return {"file": self.file, "what": self.what, "bytes": place, "why": self.why}


@dataclass(frozen=True)
class Verification:
    """The result. `parts` were compared, `nbytes` in all; nothing is known about the files `unchecked`."""

    directory: Path
    parts: int
    small_files: int
    nbytes: int
    seconds: float
    damages: tuple[Damage, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def is_lost(self) -> bool:
        """Return whether the manifest is damaged: then nothing says what the rest should be."""
        return any(damage.file == MANIFEST for damage in self.damages)

    @property
    def rate(self) -> float:
        """Return bytes/s."""
        return self.nbytes / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the result as `qmix verify --json` writes it."""
        return {
            "schema": "qmix-verify-1",
            "store": str(self.directory),
            "parts": self.parts,
            "small_files": self.small_files,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "bytes_per_second": self.rate,
            "damaged": [damage.to_json() for damage in self.damages],
            "unchecked": list(self.unchecked),
        }


def verify_store(directory: Path, on_progress: OnProgress = ignore, layout: StoreLayout | None = None) -> Verification:
    """Verify a whole store; `layout` replaces the one from its config. Raises StoreError where it is not a store."""
    started = time.perf_counter()
    if not (directory / MANIFEST).is_file():
        raise StoreError(f"{directory}: not a qmix store ({MANIFEST} is missing); name a store's directory")
    try:
        content, found = read_manifest(directory / MANIFEST)
    except StoreError as error:
        unchecked = tuple(sorted(path.name for path in directory.iterdir() if path.name != MANIFEST))
        damage = Damage(MANIFEST, "the manifest", _reason(error, directory / MANIFEST))
        return Verification(directory, 0, 0, 0, time.perf_counter() - started, (damage,), unchecked)
    damages, small = _small_files(directory, content, found)
    if layout is None and all(damage.file != CONFIG for damage in damages):
        try:
            layout = layout_of(directory, found, read_json(directory / CONFIG, dict[str, Any], StoreError, ""))
            damages += _profile(directory, layout, content)
        except StoreError as error:
            damages.append(Damage(MANIFEST, "the manifest", _reason(error, directory / MANIFEST)))
    of_files, parts, unchecked = _weight_files(directory, found, layout)
    damages += of_files + list(_compare(directory, parts, on_progress))
    nbytes = sum(part.nbytes for part in parts)
    seconds = time.perf_counter() - started
    return Verification(directory, len(parts), small, nbytes, seconds, tuple(damages), unchecked)


def _small_files(directory: Path, content: dict[str, Any], found: Manifest) -> tuple[list[Damage], int]:
    """Return the damages of small files, except files that may be edited, and how many files were compared."""
    known, damages = small_digests(content, found), []
    for name, want in known.items():
        path = directory / name
        try:
            data = read_bounded(path, JSON_LIMIT, StoreError, "")
        except StoreError as error:
            if path.exists() or name not in EDITABLE:
                damages.append(Damage(name, "the file", _reason(error, path)))
            continue
        if small_digest(content, data) != want and name not in EDITABLE:
            damages.append(Damage(name, "the file", "changed since the store was made"))
    if content["format_version"] != 1 and not known.keys().isdisjoint(TOKENIZERS):
        beside = [name for name in SMALL_FILES if name not in known and name not in EDITABLE]
        why = "not there when the store was made"
        damages += [Damage(name, STRANGE, why) for name in beside if (directory / name).exists()]
    return damages, len(known)


def _profile(directory: Path, layout: StoreLayout, content: dict[str, Any]) -> list[Damage]:
    path = directory / PROFILE
    try:
        profile_of(path, layout.geometry, content["source"]["fingerprint"], content["format_version"])
    except StoreError as error:
        return [Damage(PROFILE, "the profile", _reason(error, path))]
    return []


def _weight_files(
    directory: Path, found: Manifest, layout: StoreLayout | None
) -> tuple[list[Damage], list[Part], tuple[str, ...]]:
    """Return the damages of whole files, the parts to be compared, and the files whose parts are not known."""
    damages: list[Damage] = []
    parts = [] if layout is None else parts_of(layout, found)
    unchecked: list[str] = []
    known = {} if layout is None else {file.name: file for file in layout.files}
    for index, name in enumerate([DENSE_FILE, *map(layer_file, range(len(found.precisions)))]):
        if not (directory / name).is_file():
            damages.append(Damage(name, "the file", MISSING))
        elif layout is not None:
            damages += _outside(directory / name, known[name])
        else:
            try:
                parts += parts_by_header(directory / name, None if index == 0 else index - 1, found)
            except CheckpointError as error:
                damages.append(Damage(name, "the header", _reason(error, directory / name)))
                unchecked.append(name)
    return damages, parts, tuple(unchecked)


def _outside(path: Path, layout: FileLayout) -> list[Damage]:
    """Return the damages of a file's length and header."""
    damages = []
    size = path.stat().st_size
    if size != layout.size:
        damages.append(Damage(path.name, "the length", f"{size} bytes, {layout.size} expected"))
    length = len(layout.header)
    header = Part(path.name, "", "the header", 0, length, xxhash.xxh3_64_hexdigest(layout.header))
    why = recheck(path, header)
    return damages if why is None else [*damages, Damage(path.name, header.what, why, header)]


def _compare(directory: Path, parts: list[Part], on_progress: OnProgress) -> Iterator[Damage]:
    """Read all parts, the wrong ones twice, and yield what is wrong."""
    there = [part for part in parts if (directory / part.file).is_file()]
    done, total = 0, sum(part.nbytes for part in there)
    for part, well in sweep(directory, there):
        if not well and (why := recheck(directory / part.file, part)) is not None:
            yield Damage(part.file, part.what, why, part)
        done += part.nbytes
        on_progress(Progress(done, total))


def _reason(error: Exception, path: Path) -> str:
    """Return an error's message without the file's name before it and the advice behind it."""
    return str(error).removeprefix(f"{path}: ").split(";")[0]
