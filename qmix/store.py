"""A store: the directory that a checkpoint is turned into once, opened and checked.

    qmix.json                   manifest: format version, source, precision of every expert, checksums
    dense.safetensors           everything that is not an expert, in half precision
    experts-00000.safetensors   one layer's expert records, aligned for O_DIRECT
    profile.json                how often each expert is used, if it was quantised with a profile
    config.json, tokenizer*     the model's own

Checksums are XXH3 (64 bits) of a record's bytes, of a dense tensor's, and of config.json.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from qmix.errors import REMAKE, CheckpointError, StoreError, UsageError
from qmix.geometry import Geometry
from qmix.layout import FileLayout, StoreLayout
from qmix.precision.formats import DTYPES, PRECISIONS
from qmix.profile import Profile, Table, check_profile, read_profile

MANIFEST = "qmix.json"
PROFILE = "profile.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Store:
    """An opened store. `dense_checksums` is by tensor name, `record_checksums` [layer][expert]."""

    directory: Path
    layout: StoreLayout
    config: dict[str, Any]
    source_name: str
    fingerprint: str
    dense_checksums: dict[str, str]
    record_checksums: tuple[tuple[str, ...], ...]
    profile: Profile | None = None

    @property
    def geometry(self) -> Geometry:
        return self.layout.geometry

    @property
    def use(self) -> Table | None:
        """How often each expert is used, [layer][expert], where that was measured."""
        return None if self.profile is None else self.profile.use

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
    return {
        "format": "qmix-store",
        "format_version": FORMAT_VERSION,
        "source": {"name": source, "fingerprint": fingerprint},
        "dtype": layout.dtype,
        "precisions": [list(row) for row in layout.precisions],
        **({"clip": True} if layout.clip else {}),
        "checksums": checksums,
    }


def open_store(directory: Path) -> Store:
    """Open and check everything but the payload: manifest, config, every file's size and header.

    Raises StoreError naming the file.
    """
    path = directory / MANIFEST
    if not path.is_file():
        if partial_directory(directory).is_dir():
            raise StoreError(f"{directory}: not finished yet; run the same `qmix quantize` again and it goes on")
        raise StoreError(f"{directory}: not a qmix store ({MANIFEST} is missing)")
    content = _json(path)
    version = content.get("format_version")
    if content.get("format") != "qmix-store" or version != FORMAT_VERSION:
        raise StoreError(f"{path}: format version {version!r}, this qmix reads {FORMAT_VERSION}; {REMAKE}")
    config = _json(directory / "config.json")
    try:
        geometry = Geometry.from_config(config, str(directory / "config.json"))
        precisions = tuple(tuple(row) for row in content["precisions"])
        layout = StoreLayout(geometry, precisions, content["dtype"], content.get("clip", False))
        dense = dict(content["checksums"]["dense"])
        records = tuple(tuple(row) for row in content["checksums"]["records"])
        source, fingerprint = content["source"]["name"], content["source"]["fingerprint"]
        known = set(PRECISIONS).issuperset(name for row in precisions for name in row)
        known = known and layout.dtype in DTYPES and layout.clip in (False, True)
    except CheckpointError as error:
        raise StoreError(str(error)) from None
    except (KeyError, TypeError, ValueError):
        raise StoreError(f"{path}: damaged; {REMAKE}") from None
    shape = {len(row) for row in (*precisions, *records)}
    if not known:
        raise StoreError(f"{path}: damaged; {REMAKE}")
    if shape != {geometry.num_experts} or not len(precisions) == len(records) == geometry.num_layers:
        raise StoreError(f"{path}: belongs to another model than {directory / 'config.json'}; {REMAKE}")
    profile = _profile(directory / PROFILE, geometry, fingerprint)
    store = Store(directory, layout, config, source, fingerprint, dense, records, profile)
    for file in layout.files:
        _check_file(store.path(file), file)
    path = directory / "config.json"
    if xxhash.xxh3_64_hexdigest(path.read_bytes()) != content["checksums"].get("config"):
        raise StoreError(f"{path}: changed since the store was made; {REMAKE}")
    return store


def _profile(path: Path, geometry: Geometry, fingerprint: str) -> Profile | None:
    """Of a store that was quantised with one."""
    if not path.exists():
        return None
    try:
        profile = read_profile(path)
        check_profile(profile, path, geometry, fingerprint)
    except UsageError as error:
        raise StoreError(f"{error}; or delete this file, the store works without it") from None
    return profile


def _check_file(path: Path, layout: FileLayout) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(len(layout.header))
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {REMAKE}") from None
    if header != layout.header[: len(header)]:
        raise StoreError(f"{path}: damaged, or of another model than this store; {REMAKE}")
    if size != layout.size:
        raise StoreError(f"{path}: {size} bytes, {layout.size} expected; {REMAKE}")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {REMAKE}") from None
    except ValueError:
        raise StoreError(f"{path}: damaged, not valid JSON; {REMAKE}") from None
    if not isinstance(value, dict):
        raise StoreError(f"{path}: damaged; {REMAKE}")
    return value
