"""Ways to hold experts: quantised in memory from a checkpoint as they are asked for, or as a store has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from qmix.checkpoint import Checkpoint
from qmix.errors import StoreError
from qmix.geometry import Geometry
from qmix.pool.experts import ExpertPool
from qmix.precision.encode import encoded
from qmix.precision.matmul import Expert
from qmix.precision.record import record_layout
from qmix.store.opened import Store


class Variant(Protocol):
    """The model with its experts held in some way."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def nbytes(self) -> int:
        """All of its expert records."""

    @property
    def held(self) -> int:
        """Bytes in memory for the expert that is computed."""

    def expert(self, layer: int, index: int, matrices: Mapping[str, torch.Tensor]) -> Expert:
        """One of its experts, from the checkpoint's half-precision `matrices`; good until the next is asked for."""

    def close(self) -> None:
        """Let go of what it has opened."""


@dataclass(frozen=True)
class Quantised:
    """Experts quantised in memory as a store would hold them; `precisions` is [layer][expert], `clip` as a store's."""

    name: str
    geometry: Geometry
    precisions: tuple[tuple[str, ...], ...]
    dtype: str
    clip: bool = False

    @property
    def nbytes(self) -> int:
        sizes = {kind: record_layout(self.geometry, kind, self.dtype).nbytes for row in self.precisions for kind in row}
        return sum(sizes[kind] for row in self.precisions for kind in row)

    @property
    def held(self) -> int:
        return max(record_layout(self.geometry, kind, self.dtype).nbytes for row in self.precisions for kind in row)

    def expert(self, layer: int, index: int, matrices: Mapping[str, torch.Tensor]) -> Expert:
        precision = self.precisions[layer][index]
        name = f"layers.{layer}.experts.{index}"
        return encoded(matrices, self.geometry, precision, self.dtype, name, self.clip)

    def close(self) -> None:
        pass


class Stored:
    """Experts as they lie in a store of the same weights. Raises StoreError where it is of others."""

    def __init__(self, name: str, store: Store, checkpoint: Checkpoint) -> None:
        if store.fingerprint != checkpoint.fingerprint:
            raise StoreError(f"{store.directory}: was made from other weights ({store.source_name}); compare its own")
        self.name, self.store = name, store
        self._pool: ExpertPool | None = None  # takes its memory when it is first used: a budget is checked before

    @property
    def nbytes(self) -> int:
        return sum(self.store.layout.expert_bytes.values())

    @property
    def held(self) -> int:
        return sum(self.store.layout.record_counts)  # a record of each size

    def expert(self, layer: int, index: int, matrices: Mapping[str, torch.Tensor]) -> Expert:
        self._pool = self._pool or ExpertPool(self.store, dict.fromkeys(self.store.layout.record_counts, 1))
        return next(expert for _, expert in self._pool.get(layer, [index]))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
