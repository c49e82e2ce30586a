"""Refuse, in one line each, uses of a model that need the experts among its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.autograd import forward_ad

from qmix.checkpoint.torch_dtypes import HALF
from qmix.errors import UsageError, arg
from qmix.pool.protocol import Pool

Convert = Callable[[torch.Tensor], torch.Tensor]


class PoolExperts(nn.Module):
    """Base of the modules that replace transformers' MixtralExperts: no parameters, records of a pool.

    An operation on parameters would leave the experts out. It is refused here, at whichever module it began.
    """

    def __init__(self, layer: int, pool: Pool, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.layer, self.pool, self.home = layer, pool, torch.device(device)

    def device_tensors(self) -> Iterator[torch.Tensor]:
        """Yield the tensors of this layer's experts outside the pool."""
        yield from ()

    def check_conversion(self, convert: Convert) -> None:
        """Raise UsageError where `convert` gives tensors another type or device than the experts have."""
        mine = torch.empty(0, dtype=HALF[self.pool.store.layout.dtype], device=self.home)
        other = convert(mine)
        if other.dtype != mine.dtype:
            refuse(f"the model computes in {mine.dtype}, as its store was made, and not in {other.dtype}", CONVERTED)
        if other.device != mine.device:
            refuse("the model's devices are those of its plan", "load it with another plan (`qmix plan --gpu`)")

    def check_caller(self) -> None:
        """Raise UsageError where the forward is traced, compiled or differentiated forward: kernels would be missed."""
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            refuse("the experts' kernels can be neither traced nor exported", "call the model itself")
        if torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None:
            refuse("torch.compile cannot compile the experts' kernels", "call the model itself: they are compiled")
        if forward_ad._current_level >= 0:
            refuse("the experts have no forward-mode derivatives", "use backward()")

    def _apply(self, fn: Convert, recurse: bool = True) -> PoolExperts:
        self.check_conversion(fn)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        refuse(
            "state_dict() would leave out the experts, which are no parameters",
            "use save_pretrained(DIRECTORY), or named_parameters() for the dense weights alone",
        )

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> NoReturn:
        refuse(
            "load_state_dict() cannot replace the experts, which are no parameters",
            "save the other model, and open that with qmix.load(DIRECTORY)",
        )


CONVERTED = f"quantize it with another {arg('dtype')}, or save_pretrained(DIRECTORY) and load that with transformers"


def refuse(reason: str, instead: str) -> NoReturn:
    """Raise UsageError."""
    raise UsageError(f"{reason}; {instead}")
