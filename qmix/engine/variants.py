"""Variants of a model by how its experts are held: quantised in memory from a checkpoint, or read from a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from qmix.checkpoint import Checkpoint
from qmix.checkpoint.fingerprint import checkpoint_fingerprint
from qmix.errors import StoreError
from qmix.geometry import Geometry
from qmix.pool.experts import ExpertPool
from qmix.precision.encode import encoded
from qmix.precision.expert import Expert
from qmix.precision.record import record_layout
from qmix.store.opened import Store
from qmix.store.use import StoreUse


class Variant(Protocol):
    """A model with its experts held in one way."""

    @property
    def name(self) -> str:
        """Name in reports."""

    @property
    def nbytes(self) -> int:
        """Bytes of all expert records."""

    @property
    def held(self) -> int:
        """Bytes that `expert` keeps in memory."""

    def expert(self, layer: int, index: int, matrices: Mapping[str, torch.Tensor]) -> Expert:
        """Return an expert, given the checkpoint's half-precision `matrices`; valid until the next call."""

    def close(self) -> None:
        """Close files and release memory."""


@dataclass(frozen=True)
class Quantised:
    """Experts quantised in memory, bit for bit those of a store with these `precisions` [layer][expert] and `clip`."""

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
    """Experts of a store that was made from the checkpoint. Raises StoreError if it was made from other weights."""

    def __init__(self, name: str, store: Store, checkpoint: Checkpoint) -> None:
        if store.fingerprint != checkpoint_fingerprint(checkpoint):
            raise StoreError(f"{store.directory}: was made from other weights ({store.source_name}); compare its own")
        self.name, self.store = name, store
        self._use: StoreUse | None = None
        self._pool: ExpertPool | None = None  # made on first use, after the budget was checked

    @property
    def nbytes(self) -> int:
        return sum(self.store.layout.expert_bytes.values())

    @property
    def held(self) -> int:
        return sum(self.store.layout.record_counts)  # one slot of each record size

    def expert(self, layer: int, index: int, matrices: Mapping[str, torch.Tensor]) -> Expert:
        if self._pool is None:
            self._use = self._use or StoreUse(self.store.directory)
            self._pool = ExpertPool(self.store, dict.fromkeys(self.store.layout.record_counts, 1))
        return next(expert for _, expert in self._pool.get(layer, [index]))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        if self._use is not None:
            self._use.close()
