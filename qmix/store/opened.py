"""A store, the directory that a checkpoint is turned into once, opened and checked.

    qmix.json                   manifest: format version, source, precision of every expert, checksums, its own digest
    dense.safetensors           everything that is not an expert, in half precision
    experts-00000.safetensors   one layer's expert records, aligned for O_DIRECT
    source.json                 the place of the checkpoint that it was made from
    profile.json                how often each expert is used, if it was quantised with a profile
    config.json, tokenizer*     the model's own

All of these files but the weights are checked whenever a store is opened. generation_config.json and the chat template
may be edited: they count as they are (`Store.digest`). The profile affects speed only and has a checksum of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qmix.checkpoint.reader import TOKENIZERS
from qmix.errors import StoreError, UsageError, mending
from qmix.files import JSON_LIMIT, read_bounded, read_json
from qmix.geometry import Geometry
from qmix.store.layout import FileLayout, StoreLayout
from qmix.store.manifest import (
    CONFIG,
    EDITABLE,
    MANIFEST,
    SMALL_FILES,
    digest_of,
    file_digest,
    layout_of,
    read_manifest,
    sealed,
    small_digest,
)
from qmix.store.profile import Profile, Table, check_profile, read_profile, write_profile

PROFILE = "profile.json"
ORIGIN = "source.json"
SHARDS = "shards"  # in an unfinished store: weight files from the Hub, on their way
WEIGHTS = "weights"  # the part of a store's digest that is not a small file
RESTORE = "run `qmix quantize` on its checkpoint and this store to restore it"
WITHOUT = "delete this file, the store works without it"


@dataclass(frozen=True)
class Store:
    """An opened store. `dense_checksums` is by tensor name, `record_checksums` [layer][expert].

    `small_files` are the SHA-256 of the model's own small files by name, as the store was made with them. `parts` are
    the digests of everything that answers depend on, as it is now: WEIGHTS for the manifest, then small files by name.
    """

    directory: Path
    layout: StoreLayout
    config: dict[str, Any]
    source_name: str
    fingerprint: str
    dense_checksums: dict[str, str]
    record_checksums: tuple[tuple[str, ...], ...]
    small_files: dict[str, str]
    parts: dict[str, str]
    profile: Profile | None = None

    @property
    def geometry(self) -> Geometry:
        """Return the model's sizes."""
        return self.layout.geometry

    @property
    def use(self) -> Table | None:
        """Return how often each expert is used, [layer][expert], where that was measured."""
        return None if self.profile is None else self.profile.use

    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything that answers depend on: stores with the same one give the same answers."""
        return digest_of(self.parts)

    def path(self, file: FileLayout) -> Path:
        """Return where a weight file lies."""
        return self.directory / file.name


def is_store(directory: Path) -> bool:
    """Return whether a directory is a finished store, by its manifest."""
    return (directory / MANIFEST).is_file()


def partial_directory(directory: Path) -> Path:
    """Return where a store is built before it has its final name; beside it, also for `.` and `..`."""
    whole = Path(os.path.abspath(directory))  # noqa: PTH100 -- resolves no links: the name is the one given
    return whole.parent / f"{whole.name}.partial"


def open_store(directory: Path) -> Store:
    """Open a store and check everything but the payload: manifest, small files, every weight file's size and header.

    Raises StoreError naming the file.
    """
    path = directory / MANIFEST
    if not path.is_file():
        if partial_directory(directory).is_dir():
            raise StoreError(f"{directory}: unfinished; run the same `qmix quantize` again to continue")
        raise StoreError(f"{directory}: not a qmix store ({MANIFEST} is missing)")
    content, found = read_manifest(path)
    config = read_json(directory / CONFIG, dict[str, Any], StoreError, mending(directory))
    layout = layout_of(directory, found, config)
    store = Store(
        directory=directory,
        layout=layout,
        config=config,
        source_name=found.source.name,
        fingerprint=found.source.fingerprint,
        dense_checksums=found.checksums.dense,
        record_checksums=found.checksums.records,
        small_files=found.checksums.files,
        parts=_parts(directory, content),
        profile=profile_of(directory / PROFILE, layout.geometry, found.source.fingerprint, content["format_version"]),
    )
    for file in layout.files:
        _check_file(store.path(file), file)
    _check_small_files(store, content)
    return store


def _parts(directory: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests that `Store.parts` has; the manifest's is without small files, which have their own."""
    weights = {name: value for name, value in content.items() if name != "digest"}
    if isinstance(checksums := weights.get("checksums"), dict):
        weights["checksums"] = {name: value for name, value in checksums.items() if name != "files"}
    there = {name: directory / name for name in SMALL_FILES if (directory / name).is_file()}
    files = {name: file_digest(read_bounded(path, JSON_LIMIT, StoreError, RESTORE)) for name, path in there.items()}
    return {WEIGHTS: digest_of(weights), **files}


def _check_file(path: Path, layout: FileLayout) -> None:
    """Compare a weight file's size and header with the layout."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(len(layout.header))
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {mending(path.parent)}") from None
    if header != layout.header[: len(header)]:
        raise StoreError(f"{path}: damaged, or belongs to another model; {mending(path.parent)}")
    if size != layout.size:
        raise StoreError(f"{path}: {size} bytes, {layout.size} expected; {mending(path.parent)}")


def _check_small_files(store: Store, content: Mapping[str, Any]) -> None:
    """Compare small files with the manifest, except files that may be edited."""
    known = store.small_files
    if content["format_version"] == 1:
        config = small_digest(content, (store.directory / CONFIG).read_bytes())
        if config != content["checksums"].get("config"):
            raise StoreError(f"{store.directory / CONFIG}: changed since the store was made; {RESTORE}")
        return
    for name in SMALL_FILES:
        path, want, found = store.directory / name, known.get(name), store.parts.get(name)
        if want == found or name in EDITABLE:
            continue
        if want is None and known.keys().isdisjoint(TOKENIZERS):
            continue  # it was made without a tokenizer, and may be given one
        if want is None:
            raise StoreError(f"{path}: was not there when the store was made; delete it")
        raise StoreError(f"{path}: {'changed since the store was made' if found else 'missing'}; {RESTORE}")


class Origin(msgspec.Struct, frozen=True):
    """The place of a store's checkpoint when the store was made; nothing else depends on it."""

    location: str


def put_origin(directory: Path, location: str) -> None:
    """Write the place of a store's checkpoint into the store. Raises OSError."""
    (directory / ORIGIN).write_bytes(msgspec.json.encode(Origin(location)) + b"\n")


def put_profile(directory: Path, profile: Profile) -> None:
    """Write a profile into a store. Raises QmixError naming the file."""
    write_profile(directory / PROFILE, sealed(profile.to_json()))


def profile_of(path: Path, geometry: Geometry, fingerprint: str, version: int) -> Profile | None:
    """Return the profile that a store was quantised with, None where it has none. Raises StoreError."""
    if not path.exists():
        return None
    try:
        content = read_json(path, dict[str, Any], StoreError, WITHOUT)
        profile = read_profile(path)
        check_profile(profile, path, geometry, fingerprint)
    except UsageError as error:
        raise StoreError(f"{error.message}; or {WITHOUT}") from None
    if version != 1 and content != sealed(content):
        raise StoreError(f"{path}: damaged, or changed since it was put there; {WITHOUT}")
    return profile
