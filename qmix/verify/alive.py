"""Count the bytes alive on each device, and their peak, in computations on fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHT = 2**20  # least numbers of an operand that counts as a matrix of weights


class AliveBytes(TorchDispatchMode):
    """Counts storages by device from their first tensor to their last; enter it inside a FakeTensorMode.

    `alive` and `peak` are in bytes by device ("gpu:0", "cpu"). `wide` collects products with a matrix that was not in
    half precision.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.wide: list[str] = []
        self._storages: dict[int, weakref.ref[Any]] = {}

    def forget_peak(self) -> None:
        """Start a new peak from the bytes alive now."""
        self.peak = self.alive.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            self.wide += [f"{func}: {arg.dtype} {list(arg.shape)} on {arg.device}" for arg in args if _is_wide(arg)]
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                leaf.constant = None  # a single number, with which torch would compute for real on devices not there
                self._see(leaf)
        return result

    def _see(self, tensor: FakeTensor) -> None:
        storage = tensor.untyped_storage()
        key, device, nbytes = storage._cdata, str(tensor.device), storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = weakref.ref(storage, partial(self._gone, key, device, nbytes))
        self.alive[device] += nbytes
        self.peak[device] = max(self.peak[device], self.alive[device])

    def _gone(self, key: int, device: str, nbytes: int, reference: object) -> None:
        del self._storages[key]
        self.alive[device] -= nbytes


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default)


def _is_wide(operand: Any) -> bool:
    return isinstance(operand, FakeTensor) and operand.numel() >= WEIGHT and operand.dtype.itemsize > 2
