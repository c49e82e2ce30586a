"""The pool as a model sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn, Protocol

import torch

from qmix.errors import UsageError
from qmix.pool.eviction import Key
from qmix.precision.expert import Expert
from qmix.store.opened import Store


class Pool(Protocol):
    """Serves the experts of a store, except for those `elsewhere`. `qmix.pool.experts.ExpertPool` is one.

    If `invariant`, an expert's result for a token does not depend on the tokens beside it.
    """

    store: Store
    invariant: bool
    elsewhere: frozenset[Key]

    @property
    def holds_all(self) -> bool:
        """True if every expert served has a slot."""

    @property
    def memory(self) -> torch.Tensor:
        """The memory of all slots, uint8."""

    def get(self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()) -> Iterator[tuple[int, Expert]]:
        """Yield each of a layer's `experts` once, in any order; `coming` is what later layers will probably need."""

    def groups(
        self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()
    ) -> Iterator[list[tuple[int, Expert]]]:
        """Yield the same experts as `get`, in lists of experts that are in memory together."""

    def prefetch(self, layer: int, coming: Sequence[Key]) -> None:
        """Begin to read experts that later layers will probably need, soonest first."""

    def check_running(self) -> None:
        """Raise Cancelled after a request to stop, and UsageError after the pool was closed."""

    def holds(self, layer: int, expert: int) -> bool:
        """Return whether a record is in memory."""

    def record(self, layer: int, expert: int) -> torch.Tensor:
        """Return the bytes, uint8, of a record in memory."""

    def exchange(self, layer: int, arriving: int, leaving: int) -> None:
        """Note that the slot of an expert has got the record, of the same size, of one that was elsewhere."""

    def pass_through(self, keys: Sequence[Key]) -> Iterator[tuple[Key, torch.Tensor]]:
        """Yield the bytes of each record once, in order; they are valid until the next is requested."""


def refuse_copy() -> NoReturn:
    """Raise UsageError for a copy or a pickle of a pool, or of a model over one."""
    raise UsageError(
        "a model whose experts lie in a pool cannot be copied or pickled; save it with save_pretrained(DIRECTORY), "
        "or open its store once more with qmix.load"
    )
