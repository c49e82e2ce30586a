"""What stands in for hardware and data that are not there, when a plan is verified under FakeTensorMode.

Fake tensors have shapes, types and devices, and no values. Three things of a run need more, and have their stand-ins
here and nowhere else: GPUs (a pretend backend that torch calls "gpu"), the pool's records and the CPU's kernels, which
take addresses (shapes only), and the router's choice (given).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from qmix.pool.counters import PoolCounters
from qmix.pool.eviction import Key
from qmix.pool.experts import ExpertPool
from qmix.store.opened import Store

KIND = "gpu"  # torch's name for the pretend backend

Choose = Callable[[int, int], list[list[int]]]  # layer and tokens to [T][k] experts


def register() -> None:
    """Make the pretend backend known to torch; harmless to repeat, and for as long as the process lives."""
    if torch._C._get_privateuse1_backend_name() != KIND:
        _setup_privateuseone_for_python_backend(KIND)


class PretendPool(ExpertPool):
    """A pool of fake memory whose records are all there."""

    def __init__(self, store: Store, slots: Mapping[int, int], elsewhere: frozenset[Key] = frozenset()) -> None:
        self.store, self.slots, self.invariant, self.elsewhere = store, slots, False, elsewhere
        self._memory = torch.empty(sum(nbytes * count for nbytes, count in slots.items()), dtype=torch.uint8)
        self.counters, self.cancelled = PoolCounters(), False
        self._computes = PretendExpert(store.geometry.intermediate_size)

    @property
    def memory(self) -> torch.Tensor:
        return self._memory

    def record(self, layer: int, expert: int) -> torch.Tensor:
        return self.memory[: self.store.layout.record(layer, expert).nbytes]

    def pass_through(self, keys: Sequence[Key]) -> Iterator[tuple[Key, torch.Tensor]]:
        for key in keys:
            yield key, self.record(*key)

    def get(self, layer: int, experts: Sequence[int], coming: Sequence[Key] = ()) -> Iterator[tuple[int, Any]]:
        for expert in experts:
            yield expert, self._computes

    def prefetch(self, layer: int, coming: Sequence[Key]) -> None:
        pass


class PretendExpert:
    """An expert in main memory: what its forward allocates there."""

    def __init__(self, intermediate: int) -> None:
        self.intermediate = intermediate

    def __call__(self, x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if x.device.type != "cpu":
            raise RuntimeError(f"an expert in main memory was given x on {x.device}")
        gate, up = (x.new_empty(len(x), self.intermediate) for _ in range(2))
        activation(gate).mul_(up)
        return torch.empty_like(x)


class GivenIndex:
    """The router's choice with its values, among fakes: what PooledExperts does with top_k_index is done for real.

    What torch's functions make of it is fake again.
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


def given_routing(layer: int, choose: Choose) -> Callable[..., Any]:
    """A forward hook for a router: all that it computes is computed, then the choice is replaced."""

    def hook(module: object, args: object, output: tuple[Any, Any, torch.Tensor]) -> tuple[Any, Any, GivenIndex]:
        logits, weights, index = output
        numbers = choose(layer, len(index))
        with unset_fake_temporarily():
            return logits, weights, GivenIndex(torch.tensor(numbers))

    return hook


def gemm_4bit(
    x: torch.Tensor, codes: torch.Tensor, shape: Sequence[int], absmax: torch.Tensor, block: int, kind: str
) -> torch.Tensor:
    """bitsandbytes' product where it takes the most memory: its kernel for few tokens aside, a matrix dequantised."""
    return F.linear(x, torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, block, kind, shape, x.dtype))


def _half_product(x: torch.Tensor, weight: torch.Tensor, invariant: bool = False) -> torch.Tensor:
    return F.linear(x, weight)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Inside the block, kernels and mappings that take addresses in main memory are replaced by torch's operators."""
    with ExitStack() as stack:
        for name, replacement in (
            ("qmix.precision.dense.half_product", _half_product),
            ("qmix.model.attention._kernel_takes", lambda *_: False),
            ("qmix.pool.prefetch.Prefetcher.coming", lambda *_: []),  # guesses are of values
            ("qmix.model.kv.anonymous_memory", _memory),
            ("qmix.model.dense.anonymous_memory", _memory),
        ):
            stack.enter_context(patch(name, replacement))
        yield


def _memory(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)
