"""The place of every byte of a store: a pure function of geometry, precisions and dtype.

Any matrix can therefore be written at its final offset as soon as it is read, in whatever order the shards come. An
expert record is three matrices' parts, each aligned to 64 bytes (a cache line, the kernels' vectors); records and the
payload itself are aligned to 4096, so that O_DIRECT reads a record in one piece.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from qmix.checkpoint.safetensors_header import DTYPES, TensorInfo, aligned, build_header
from qmix.disk import PAGE
from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.precision.formats import FOUR_BITS, Part, check_precision
from qmix.precision.record import LINE, RecordLayout, record_layout
from qmix.units import quoted

DENSE_FILE = "dense.safetensors"


@dataclass(frozen=True, slots=True)
class FileLayout:
    """One file of a store: its header bytes, the place of each tensor, and its whole size in bytes."""

    name: str
    header: bytes
    tensors: dict[str, TensorInfo]
    size: int


def layer_file(layer: int) -> str:
    """Return the name of a layer's file of expert records."""
    return f"experts-{layer:05d}.safetensors"


def parse_precisions(spec: str, geometry: Geometry) -> tuple[tuple[str, ...], ...]:
    """Return the precision of every expert, [layer][expert], from `nf4` or `nf4,0.*=int8,*.3=half`.

    The first item applies to all experts. Each further one is LAYER.EXPERT=PRECISION, where `*` matches any; later
    items override earlier ones. Raises UsageError.
    """
    default, *rules = [item.strip() for item in spec.split(",")]
    check_precision(default)
    table = [[default] * geometry.num_experts for _ in range(geometry.num_layers)]
    for rule in rules:
        pattern, equals, precision = rule.partition("=")
        if not equals:
            raise UsageError(f"{quoted(rule)} is not a rule; write LAYER.EXPERT=PRECISION, for example 0.*=int8")
        check_precision(precision)
        hits = [
            (layer, expert)
            for layer in range(geometry.num_layers)
            for expert in range(geometry.num_experts)
            if fnmatch.fnmatchcase(f"{layer}.{expert}", pattern)
        ]
        if not hits:
            raise UsageError(f"{quoted(rule)} matches no expert; write LAYER.EXPERT=PRECISION, for example 0.*=int8")
        for layer, expert in hits:
            table[layer][expert] = precision
    return tuple(map(tuple, table))


def has_blocks(precisions: Sequence[Sequence[str]]) -> bool:
    """Return whether any expert, [layer][expert], has a precision with one scale for each block of weights."""
    return any(precision in FOUR_BITS for row in precisions for precision in row)


@dataclass(frozen=True)
class StoreLayout:
    """The layout of all files of a store. `precisions` is [layer][expert], `dtype` "bf16" or "fp16".

    `clip` selects how scales of 4-bit blocks are chosen (see `blocks`); it moves no byte.
    """

    geometry: Geometry
    precisions: tuple[tuple[str, ...], ...]
    dtype: str
    clip: bool = False

    @cached_property
    def experts(self) -> list[tuple[int, int]]:
        """Return (layer, expert) of all experts, first layer first."""
        return [(layer, expert) for layer, row in enumerate(self.precisions) for expert in range(len(row))]

    @cached_property
    def records(self) -> dict[str, RecordLayout]:
        """Return the record layout of each precision in use."""
        used = sorted({precision for row in self.precisions for precision in row})
        return {precision: record_layout(self.geometry, precision, self.dtype) for precision in used}

    def record(self, layer: int, expert: int) -> RecordLayout:
        """Return the record layout of one expert."""
        return self.records[self.precisions[layer][expert]]

    def record_offset(self, layer: int, expert: int) -> int:
        """Return the offset of a record in its layer's file, in bytes."""
        before = sum(self.record(layer, other).nbytes for other in range(expert))
        return len(self.layer(layer).header) + before

    @cached_property
    def dense(self) -> FileLayout:
        """Return the layout of the file of dense weights."""
        placed, position = [], 0
        for name, shape in self.geometry.dense_tensors.items():
            position = aligned(position, LINE)
            part = Part(name, DTYPES[self.dtype], shape)
            placed.append((name, part.dtype, shape, position))
            position += part.nbytes
        return _file(DENSE_FILE, placed, aligned(position, PAGE))

    @cached_property
    def _layers(self) -> dict[int, FileLayout]:
        return {}

    def layer(self, layer: int) -> FileLayout:
        """Return the layout of a layer's file of expert records."""
        if layer not in self._layers:
            placed, start = [], 0
            for expert in range(self.geometry.num_experts):
                record = self.record(layer, expert)
                for item in record.parts:
                    name = part_name(expert, item.matrix, item.part.name)
                    placed.append((name, item.part.dtype, item.part.shape, start + item.offset))
                start += record.nbytes
            self._layers[layer] = _file(layer_file(layer), placed, start)
        return self._layers[layer]

    @property
    def files(self) -> list[FileLayout]:
        """Return all weight files, the dense one first."""
        return [self.dense, *(self.layer(layer) for layer in range(self.geometry.num_layers))]

    @property
    def total_bytes(self) -> int:
        """Return the bytes of all weight files."""
        return sum(file.size for file in self.files)

    @property
    def expert_bytes(self) -> dict[str, int]:
        """Return the bytes of all records by precision."""
        totals = dict.fromkeys(self.records, 0)
        for row in self.precisions:
            for precision in row:
                totals[precision] += self.records[precision].nbytes
        return totals

    @cached_property
    def record_counts(self) -> dict[int, int]:
        """Return how many records there are of each size in bytes, the smallest first."""
        return dict(sorted(Counter(self.records[name].nbytes for row in self.precisions for name in row).items()))


def part_name(expert: int, matrix: str, part: str) -> str:
    """Return the name of a part in its layer's file, such as `experts.3.w1.codes`."""
    return f"experts.{expert}.{matrix}.{part}"


def _file(name: str, placed: Sequence[tuple[str, str, tuple[int, ...], int]], size: int) -> FileLayout:
    header, tensors = build_header(placed, size, PAGE)
    return FileLayout(name, header, tensors, len(header) + size)


def precision_of(layout: StoreLayout) -> str:
    """Return the experts' precisions for people: `nf4`, or `nf4 (40 experts), int8 (8 experts)`."""
    counts = Counter(precision for row in layout.precisions for precision in row)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{precision} ({count} experts)" for precision, count in counts.most_common())
