"""The header of a safetensors file: read and checked, or written.

The reader of safetensors hides the offset of a tensor, which is needed to read row chunks past the page cache and to
write each matrix at its final offset. A file is 8 bytes of header length (little-endian), the header as JSON, then the
bytes of the tensors without holes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import msgspec

from qmix.disk.faults import disk_advice
from qmix.errors import CheckpointError
from qmix.files import convert_json, decode_json

DTYPES = {"bf16": "BF16", "fp16": "F16"}  # half precisions: the name for users, the name in safetensors
ITEM_BYTES = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "I32": 4,
    "I64": 8,
    "BOOL": 1,
}
ITEM_BYTES |= {"U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
MAX_HEADER = 100 * 2**20  # the limit of the reference reader
PAD_PREFIX = "__pad__."
GIT_LFS_POINTER = b"version https://git-lfs.github.com/"
AGAIN = "fetch it again"
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct):
    dtype: str
    shape: Annotated[list[Natural], msgspec.Meta(max_length=16)]
    data_offsets: tuple[Natural, Natural]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of one tensor: `offset` is absolute in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the checked tensors of a file. Raises CheckpointError naming it."""
    check_no_pointer(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut short; {AGAIN}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; {disk_advice(error)}") from None
    header = decode_json(raw, dict[str, Any], f"{path}: its header is damaged", CheckpointError, AGAIN)
    return check_header(header, 8 + length, size, str(path))


def check_no_pointer(path: Path) -> None:
    """Raise CheckpointError where a file is a git-lfs pointer."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if pointer:
        raise CheckpointError(
            f"{path}: a git-lfs pointer, the file itself was not fetched; run `git lfs pull` in {path.parent}"
        )


def check_header(header: Any, data_start: int, file_size: int | None, where: str) -> dict[str, TensorInfo]:
    """Return the tensors of a header, which must fill the file exactly, without overlaps or holes.

    `data_start` is the offset of the payload; `file_size` is None if it is not known. Raises CheckpointError.
    """
    damaged = f"{where}: its header is damaged"
    tensors = []
    for name, value in convert_json(header, dict[str, Any], damaged, CheckpointError, AGAIN).items():
        if name == "__metadata__":
            continue
        entry = convert_json(value, _Entry, f"{damaged} at tensor {name!r}", CheckpointError, AGAIN)
        item, shape, (begin, end) = ITEM_BYTES.get(entry.dtype), tuple(entry.shape), entry.data_offsets
        if item is None:
            raise CheckpointError(f"{damaged} at tensor {name!r}: dtype: {entry.dtype[:20]!r} is unknown; {AGAIN}")
        nbytes = prod(shape) * item
        if end - begin != nbytes:
            raise CheckpointError(f"{damaged}: tensor {name!r} does not have the size of its shape; {AGAIN}")
        tensors.append(TensorInfo(name, entry.dtype, shape, data_start + begin, nbytes))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))  # empty tensors come first
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            raise CheckpointError(f"{damaged}: a hole or an overlap before tensor {tensor.name!r}; {AGAIN}")
        position += tensor.nbytes
    if file_size is not None and file_size != position:
        kind = "cut short" if file_size < position else "too long"
        raise CheckpointError(f"{where}: {kind}: {file_size} bytes, its header says {position}; {AGAIN}")
    return {tensor.name: tensor for tensor in tensors}


def aligned(offset: int, alignment: int) -> int:
    """Return the first multiple of `alignment` that is at least `offset`."""
    return -(-offset // alignment) * alignment


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    size: int,
    alignment: int,
    metadata: dict[str, str] | None = None,
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return the header for tensors (name, dtype, shape, offset in the payload), sorted by offset, and their places.

    Holes become U8 tensors named `__pad__.N`, so that the file stays a plain safetensors file. The payload is `size`
    bytes and starts at a multiple of `alignment`.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = pads = 0

    def pad_to(offset: int) -> None:
        nonlocal position, pads
        if offset > position:
            entries[f"{PAD_PREFIX}{pads}"] = {
                "dtype": "U8",
                "shape": [offset - position],
                "data_offsets": [position, offset],
            }
            pads += 1
        position = offset

    for name, dtype, shape, offset in tensors:
        assert offset >= position, f"{name} overlaps what lies before it"
        pad_to(offset)
        position += prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, position]}
    pad_to(size)
    text = json.dumps(entries, separators=(",", ":")).encode()
    data_start = aligned(8 + len(text), alignment)
    text = text.ljust(data_start - 8)
    header = len(text).to_bytes(8, "little") + text
    found = check_header(entries, data_start, data_start + size, "new header")
    return header, {name: info for name, info in found.items() if not name.startswith(PAD_PREFIX)}
