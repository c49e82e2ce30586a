"""Stand-ins for hardware and data when a plan is verified under FakeTensorMode.

Fake tensors have shapes, types and devices, but no values. The parts of a run that need more are handed stand-ins from
here: GPUs (a pretend backend that torch calls "gpu"), memory, the pool and its records, the prefetcher and the
router's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from qmix.pool.eviction import Key
from qmix.pool.prefetch import Prefetcher
from qmix.pool.slots import all_have_slots
from qmix.store.opened import Store

KIND = "gpu"  # torch's name for the pretend backend

Choose = Callable[[int, int], list[list[int]]]  # a layer and a number of tokens to experts [T][k]


def register() -> None:
    """Make the pretend backend known to torch until the process ends; harmless to repeat."""
    if torch._C._get_privateuse1_backend_name() != KIND:
        _setup_privateuseone_for_python_backend(KIND)


def allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    """Return `nbytes` of memory, uint8, from torch on every device."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class PretendPool:
    """A pool of fake memory, see `qmix.pool.protocol.Pool`; every record is in memory."""

    def __init__(self, store: Store, slots: Mapping[int, int], elsewhere: frozenset[Key] = frozenset()) -> None:
        self.store, self.invariant, self.elsewhere = store, False, elsewhere
        self.memory = torch.empty(sum(nbytes * count for nbytes, count in slots.items()), dtype=torch.uint8)
        self.holds_all = all_have_slots(store.layout, slots, elsewhere)
        self._computes = PretendExpert(store.geometry.intermediate_size)

    def check_running(self) -> None:
        pass

    def holds(self, layer: int, expert: int) -> bool:
        return True

    def record(self, layer: int, expert: int) -> torch.Tensor:
        return self.memory[: self.store.layout.record(layer, expert).nbytes]

    def exchange(self, layer: int, arriving: int, leaving: int) -> None:
        self.elsewhere = self.elsewhere - {(layer, arriving)} | {(layer, leaving)}

    def pass_through(self, keys: Sequence[Key]) -> Iterator[tuple[Key, torch.Tensor]]:
        for key in keys:
            yield key, self.record(*key)

    def get(self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()) -> Iterator[tuple[int, Any]]:
        for expert in experts:
            yield expert, self._computes

    def groups(self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()) -> Iterator[list[tuple[int, Any]]]:
        yield list(self.get(layer, experts))

    def prefetch(self, layer: int, coming: Sequence[Key]) -> None:
        pass


class BlindPrefetcher(Prefetcher):
    """A prefetcher that takes its memory but guesses nothing, because guesses need values."""

    def coming(self, layer: int, hidden: torch.Tensor) -> list[Key]:
        return []


class PretendExpert:
    """An expert in main memory: its forward allocates what a real one does."""

    def __init__(self, intermediate: int) -> None:
        self.intermediate = intermediate

    def __call__(self, x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if x.device.type != "cpu":
            raise RuntimeError(f"an expert in main memory was given x on {x.device}")
        gate, up = (x.new_empty(len(x), self.intermediate) for _ in range(2))
        activation(gate).mul_(up)
        return torch.empty_like(x)


class GivenIndex:
    """The router's choice with its values, among fake tensors: PooledExperts computes on real numbers.

    The results of torch's functions are fake again.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.shape = values, values.shape

    def tolist(self) -> list[Any]:
        numbers: list[Any] = self.values.tolist()
        return numbers

    def __getitem__(self, index: Any) -> GivenIndex:
        with unset_fake_temporarily():
            return GivenIndex(self.values[index])

    def __eq__(self, other: Any) -> Any:
        with unset_fake_temporarily():
            return GivenIndex(torch.eq(self.values, other))

    __hash__ = None  # type: ignore[assignment]

    def unique(self) -> GivenIndex:
        with unset_fake_temporarily():
            return GivenIndex(self.values.unique())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with unset_fake_temporarily():
            real = func(*(arg.values if isinstance(arg, GivenIndex) else arg for arg in args), **(kwargs or {}))
            numbers = [tensor.tolist() for tensor in real]
        return tuple(map(torch.tensor, numbers))


def read_routing(layer: int, choose: Choose) -> Callable[[Any], list[list[int]]]:
    """Return a function that reads a router's choice: the one given by `given_routing`, or one for fake numbers."""

    def read(index: Any) -> list[list[int]]:
        return index.tolist() if isinstance(index, GivenIndex) else choose(layer, len(index))

    return read


def given_routing(layer: int, choose: Choose) -> Callable[..., Any]:
    """Return a forward hook that replaces a router's choice after all has been computed."""

    def hook(module: object, args: object, output: tuple[Any, Any, torch.Tensor]) -> tuple[Any, Any, GivenIndex]:
        logits, weights, index = output
        numbers = choose(layer, len(index))
        with unset_fake_temporarily():
            return logits, weights, GivenIndex(torch.tensor(numbers))

    return hook
