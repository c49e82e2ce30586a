"""The manifest of a store, qmix.json: what the store was made from and the checksums of all of it.

Checksums are XXH3 (64 bits) for an expert record and for a dense tensor, SHA-256 for the model's own small files. The
manifest ends with its own SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from qmix.checkpoint.reader import TOKENIZER_FILES
from qmix.checkpoint.safetensors_header import DTYPES
from qmix.errors import REMAKE, CheckpointError, StoreError, mending
from qmix.files import JSON_LIMIT, decode_json, read_bounded, write_whole
from qmix.geometry import Geometry
from qmix.precision.formats import PRECISIONS
from qmix.store.layout import StoreLayout

MANIFEST = "qmix.json"
CONFIG = "config.json"
SMALL_FILES = (CONFIG, *TOKENIZER_FILES)  # answers depend on them as on the weights
EDITABLE = ("generation_config.json", "chat_template.jinja")  # small files that people adapt in a store
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1 has no checksums of small files but the config's, and no digest of the manifest


class Source(msgspec.Struct, frozen=True):
    """The checkpoint of a store."""

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


def manifest(layout: StoreLayout, source: str, fingerprint: str, checksums: dict[str, Any]) -> dict[str, Any]:
    """Return the content of qmix.json; a function of the weights alone, so that two runs write the same bytes."""
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
    """Return a manifest or a store's profile with the digest of its content added or renewed."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return {**rest, "digest": digest_of(rest)}


def digest_of(content: Any) -> str:
    """Return the SHA-256 of a JSON value; spaces and the order of keys do not change it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(data: bytes) -> str:
    """Return the checksum of a small file in a manifest of today's version."""
    return hashlib.sha256(data).hexdigest()


def small_digest(content: Mapping[str, Any], data: bytes) -> str:
    """Return the checksum of a small file in a manifest of this content's version."""
    return xxhash.xxh3_64_hexdigest(data) if content["format_version"] == 1 else file_digest(data)


def small_digests(content: Mapping[str, Any], found: Manifest) -> dict[str, str | None]:
    """Return the checksums that a manifest has of small files, by name."""
    if content["format_version"] == 1:
        return {CONFIG: content["checksums"].get("config")}
    return dict(found.checksums.files)


def read_manifest(path: Path) -> tuple[dict[str, Any], Manifest]:
    """Return a manifest's content, as it is and typed. Raises StoreError where its version or its digest is wrong."""
    data = read_bounded(path, JSON_LIMIT, StoreError, REMAKE)
    content = decode_json(data, dict[str, Any], str(path), StoreError, REMAKE)
    version = content.get("format_version")
    if content.get("format") != "qmix-store" or version not in READABLE_VERSIONS:
        raise StoreError(f"{path}: format version {version!r}, this qmix reads {FORMAT_VERSION}; {REMAKE}")
    if version != 1 and content != sealed(content):
        raise StoreError(f"{path}: damaged, or changed since the store was made; {REMAKE}")
    return content, decode_json(data, Manifest, str(path), StoreError, REMAKE)


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Write qmix.json of a store that is being made. Raises OSError."""
    (directory / MANIFEST).write_bytes(_bytes(content))


def replace_manifest(directory: Path, content: dict[str, Any]) -> None:
    """Replace qmix.json of a finished store in one step. Raises OSError."""
    write_whole(directory / MANIFEST, _bytes(content))


def _bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def layout_of(directory: Path, found: Manifest, config: dict[str, Any]) -> StoreLayout:
    """Return the layout of a store. Raises StoreError where manifest and config do not fit each other."""
    path = directory / MANIFEST
    if found.dtype not in DTYPES or not set(PRECISIONS).issuperset(name for row in found.precisions for name in row):
        raise StoreError(f"{path}: unknown precision or dtype; {REMAKE}")
    try:
        geometry = Geometry.from_config(config, str(directory / CONFIG))
    except CheckpointError as error:
        raise StoreError(error.message) from None
    tables = found.precisions, found.checksums.records
    if any(
        (len(table), {len(row) for row in table}) != (geometry.num_layers, {geometry.num_experts}) for table in tables
    ):
        raise StoreError(f"{path}: belongs to another model than {directory / CONFIG}; {mending(directory)}")
    return StoreLayout(geometry, found.precisions, found.dtype, found.clip)
