"""The layout of an expert record: the parts of three matrices, one after another. Arithmetic only, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from qmix.checkpoint.safetensors_header import aligned
from qmix.disk import PAGE
from qmix.geometry import Geometry
from qmix.precision.formats import Part, parts

LINE = 64  # bytes of a cache line and of a kernel's vector


@dataclass(frozen=True, slots=True)
class PlacedPart:
    """One part of one matrix, at `offset` bytes from the start of its record."""

    matrix: str
    part: Part
    offset: int


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """The layout of an expert record in one precision; `nbytes` is a multiple of 4096."""

    precision: str
    parts: tuple[PlacedPart, ...]
    nbytes: int


def record_layout(geometry: Geometry, precision: str, dtype: str) -> RecordLayout:
    """Return the layout of a record: w1, w3, w2, each with its codes before its scales."""
    placed, position = [], 0
    for matrix, (rows, cols) in geometry.expert_matrices.items():
        for part in parts(precision, dtype, rows, cols):
            position = aligned(position, LINE)
            placed.append(PlacedPart(matrix, part, position))
            position += part.nbytes
    return RecordLayout(precision, tuple(placed), aligned(position, PAGE))
