"""The places of a model's weights in a store's files, and the checksummed units that they make up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from qmix.checkpoint.naming import expert_key
from qmix.checkpoint.safetensors_header import TensorInfo
from qmix.disk.direct import DirectFile, DirectMemory
from qmix.store.layout import FileLayout, StoreLayout, part_name


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes of a file with one checksum: a dense tensor, or an expert record of three weights.

    Offsets are in `file`. `parts` are in the order of their bytes; bytes between and behind them are zero.
    """

    name: str
    file: FileLayout
    offset: int
    nbytes: int
    keys: tuple[str, ...]
    parts: tuple[TensorInfo, ...]

    @property
    def end(self) -> int:
        """Return the offset behind the last byte."""
        return self.offset + self.nbytes


@dataclass(frozen=True, slots=True)
class Place:
    """The parts of one weight in `unit.file`, and its precision."""

    unit: Unit
    precision: str
    parts: tuple[TensorInfo, ...]


def places(layout: StoreLayout) -> dict[str, Place]:
    """Return the place of every weight of the model, by key."""
    return dict(_places(layout))


def units_of(layout: StoreLayout) -> dict[str, Unit]:
    """Return every unit of a store by name, in the order of its weights."""
    return {place.unit.name: place.unit for _, place in _places(layout)}


def _places(layout: StoreLayout) -> Iterator[tuple[str, Place]]:
    for key, info in layout.dense.tensors.items():
        yield key, Place(Unit(key, layout.dense, info.offset, info.nbytes, (key,), (info,)), "half", (info,))
    matrices = layout.geometry.expert_matrices
    for layer in range(layout.geometry.num_layers):
        file = layout.layer(layer)
        for expert in range(layout.geometry.num_experts):
            record = layout.record(layer, expert)
            keys = tuple(expert_key(layer, expert, matrix) for matrix in matrices)
            parts = tuple(file.tensors[part_name(expert, item.matrix, item.part.name)] for item in record.parts)
            unit = Unit(f"{layer}.{expert}", file, layout.record_offset(layer, expert), record.nbytes, keys, parts)
            for matrix, key in zip(matrices, keys, strict=True):
                mine = (part for item, part in zip(record.parts, parts, strict=True) if item.matrix == matrix)
                yield key, Place(unit, record.precision, tuple(mine))


def read_digest(file: DirectFile, offset: int, nbytes: int, memory: DirectMemory) -> str:
    """Return the checksum of bytes of a file, read piece by piece. Raises OSError, and EOFError where it is shorter."""
    digest, position, end = xxhash.xxh3_64(), offset, offset + nbytes
    while position < end:
        piece = file.read(memory, position, min(memory.nbytes, end - position))
        digest.update(piece)
        position += piece.nbytes
    return digest.hexdigest()


class RunningDigest:
    """The checksum of a unit, computed from its parts' bytes as they are written."""

    def __init__(self, unit: Unit) -> None:
        self._digest = xxhash.xxh3_64()
        self._position, self._end = unit.offset, unit.end
        self._before: dict[int, int] = {}  # zeros before each part, by its offset
        end = unit.offset
        for part in unit.parts:
            self._before[part.offset], end = part.offset - end, part.offset + part.nbytes
        self._parts_end = end

    def update(self, data: memoryview, offset: int) -> None:
        """Add bytes that lie at `offset` of the unit's file; ignored where they do not follow the ones before."""
        padding = self._before.get(offset, 0)
        if offset - padding == self._position:
            self._digest.update(bytes(padding))
            self._digest.update(data)
            self._position = offset + data.nbytes

    def hexdigest(self) -> str | None:
        """Return the checksum, None if the bytes did not all come in order."""
        if self._position != self._parts_end:
            return None
        whole = self._digest.copy()
        whole.update(bytes(self._end - self._position))
        return whole.hexdigest()
