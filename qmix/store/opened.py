"""A store: the directory that a checkpoint is turned into once, opened and checked.

    qmix.json                   manifest: format version, source, precision of every expert, checksums, its own digest
    dense.safetensors           everything that is not an expert, in half precision
    experts-00000.safetensors   one layer's expert records, aligned for O_DIRECT
    source.json                 where the checkpoint was that it is made from
    profile.json                how often each expert is used, if it was quantised with a profile
    config.json, tokenizer*     the model's own

Checksums are XXH3 (64 bits) of a record's bytes and of a dense tensor's, SHA-256 of the model's own small files. All of
these files but the weights are checked whenever a store is opened. generation_config.json and the chat template may be
edited: they count as they are (`Store.digest`). The profile decides nothing but speed and has a checksum of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from qmix.checkpoint.reader import TOKENIZER_FILES, TOKENIZERS
from qmix.checkpoint.safetensors_header import DTYPES
from qmix.errors import REMAKE, CheckpointError, StoreError, UsageError, mending
from qmix.files import JSON_LIMIT, decode_json, read_bounded, read_json
from qmix.geometry import Geometry
from qmix.precision.formats import PRECISIONS
from qmix.store.layout import FileLayout, StoreLayout
from qmix.store.profile import Profile, Table, check_profile, read_profile, write_profile

MANIFEST = "qmix.json"
PROFILE = "profile.json"
ORIGIN = "source.json"
CONFIG = "config.json"
SMALL_FILES = (CONFIG, *TOKENIZER_FILES)  # what answers depend on besides the weights
EDITABLE = ("generation_config.json", "chat_template.jinja")  # of them, those that people adapt in a store
WEIGHTS = "weights"  # the part of a store's digest that is not a small file
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 has no checksums of small files but the config's, and no digest of the manifest
RESTORE = "run `qmix quantize` on its checkpoint and this store to restore it"
WITHOUT = "delete this file, the store works without it"


class Source(msgspec.Struct, frozen=True):
    name: str
    fingerprint: str


class Checksums(msgspec.Struct, frozen=True):
    """`dense` by tensor name, `records` [layer][expert], `files` by file name; version 1 has `config` for `files`."""

    dense: dict[str, str]
    records: tuple[tuple[str, ...], ...]
    files: dict[str, str] = {}


class Manifest(msgspec.Struct, frozen=True):
    """The content of qmix.json; `precisions` is [layer][expert]."""

    source: Source
    dtype: str
    precisions: tuple[tuple[str, ...], ...]
    checksums: Checksums
    clip: bool = False


@dataclass(frozen=True)
class Store:
    """An opened store. `dense_checksums` is by tensor name, `record_checksums` [layer][expert].

    `small_files` are the SHA-256 of the model's own small files as the store was made with them, by name. `parts` are
    those of all that answers depend on, as it is now: WEIGHTS for the manifest, then small files by name.
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
        return self.layout.geometry

    @property
    def use(self) -> Table | None:
        """How often each expert is used, [layer][expert], where that was measured."""
        return None if self.profile is None else self.profile.use

    @property
    def digest(self) -> str:
        """The SHA-256 of all that answers depend on; two stores with the same one give the same answers."""
        return digest_of(self.parts)

    def path(self, file: FileLayout) -> Path:
        return self.directory / file.name


def is_store(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def partial_directory(directory: Path) -> Path:
    """Where a store is built before it carries its final name; beside it, `.` and `..` included."""
    whole = Path(os.path.abspath(directory))  # noqa: PTH100 -- resolves no links: the name is the one given
    return whole.parent / f"{whole.name}.partial"


def manifest(layout: StoreLayout, source: str, fingerprint: str, checksums: dict[str, Any]) -> dict[str, Any]:
    """The contents of qmix.json; a function of the weights alone, so that two runs write the same bytes."""
    return sealed(
        {
            "format": "qmix-store",
            "format_version": FORMAT_VERSION,
            "source": {"name": source, "fingerprint": fingerprint},
            "dtype": layout.dtype,
            "precisions": [list(row) for row in layout.precisions],
            **({"clip": True} if layout.clip else {}),
            "checksums": checksums,
        }
    )


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest or a store's profile with the digest of its content added, or renewed."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return {**rest, "digest": digest_of(rest)}


def digest_of(content: Any) -> str:
    """Return the SHA-256 of a JSON value, whatever its spaces and the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(data: bytes) -> str:
    """Return the checksum by which a manifest knows a small file."""
    return hashlib.sha256(data).hexdigest()


def open_store(directory: Path) -> Store:
    """Open and check everything but the payload: manifest, small files, every weight file's size and header.

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


def read_manifest(path: Path) -> tuple[dict[str, Any], Manifest]:
    """Return what a manifest says, as it is and typed. Raises StoreError where its version or its digest is wrong."""
    data = read_bounded(path, JSON_LIMIT, StoreError, REMAKE)
    content = decode_json(data, dict[str, Any], str(path), StoreError, REMAKE)
    version = content.get("format_version")
    if content.get("format") != "qmix-store" or version not in READABLE_VERSIONS:
        raise StoreError(f"{path}: format version {version!r}, this qmix reads {FORMAT_VERSION}; {REMAKE}")
    if version != 1 and content != sealed(content):
        raise StoreError(f"{path}: damaged, or changed since the store was made; {REMAKE}")
    return content, decode_json(data, Manifest, str(path), StoreError, REMAKE)


def layout_of(directory: Path, found: Manifest, config: dict[str, Any]) -> StoreLayout:
    path = directory / MANIFEST
    if found.dtype not in DTYPES or not set(PRECISIONS).issuperset(name for row in found.precisions for name in row):
        raise StoreError(f"{path}: has an unknown precision or dtype; {REMAKE}")
    try:
        geometry = Geometry.from_config(config, str(directory / CONFIG))
    except CheckpointError as error:
        raise StoreError(str(error)) from None
    tables = found.precisions, found.checksums.records
    if any(
        (len(table), {len(row) for row in table}) != (geometry.num_layers, {geometry.num_experts}) for table in tables
    ):
        raise StoreError(f"{path}: belongs to another model than {directory / CONFIG}; {mending(directory)}")
    return StoreLayout(geometry, found.precisions, found.dtype, found.clip)


def _parts(directory: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """Return the digests of all that answers depend on; the manifest's is without small files, which have their own."""
    weights = {name: value for name, value in content.items() if name != "digest"}
    if isinstance(checksums := weights.get("checksums"), dict):
        weights["checksums"] = {name: value for name, value in checksums.items() if name != "files"}
    there = {name: directory / name for name in SMALL_FILES if (directory / name).is_file()}
    files = {name: file_digest(read_bounded(path, JSON_LIMIT, StoreError, RESTORE)) for name, path in there.items()}
    return {WEIGHTS: digest_of(weights), **files}


def _check_small_files(store: Store, content: Mapping[str, Any]) -> None:
    """Compare what the manifest knows of small files with what is there, but for those that may be edited."""
    known = store.small_files
    if content["format_version"] == 1:
        config = xxhash.xxh3_64_hexdigest((store.directory / CONFIG).read_bytes())
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
    """The place of a store's checkpoint when it was made; nothing else depends on it."""

    location: str


def put_origin(directory: Path, location: str) -> None:
    """Let a store say where its checkpoint is. Raises OSError."""
    (directory / ORIGIN).write_bytes(msgspec.json.encode(Origin(location)) + b"\n")


def put_profile(directory: Path, profile: Profile) -> None:
    """Let a store carry a profile. Raises QmixError naming the file."""
    write_profile(directory / PROFILE, sealed(profile.to_json()))


def profile_of(path: Path, geometry: Geometry, fingerprint: str, version: int) -> Profile | None:
    """Return the profile that a store was quantised with, None where it has none."""
    if not path.exists():
        return None
    try:
        content = read_json(path, dict[str, Any], StoreError, WITHOUT)
        profile = read_profile(path)
        check_profile(profile, path, geometry, fingerprint)
    except UsageError as error:
        raise StoreError(f"{error}; or {WITHOUT}") from None
    if version != 1 and content != sealed(content):
        raise StoreError(f"{path}: damaged, or changed since it was put there; {WITHOUT}")
    return profile


def _check_file(path: Path, layout: FileLayout) -> None:
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
