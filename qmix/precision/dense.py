"""Dense projections in half precision, which stay as they are published: attention and the head."""

from __future__ import annotations

import torch
from torch import nn

from qmix.precision.matmul import half_product


class HalfLinear(nn.Linear):
    """A linear layer without bias whose products with few rows run at the speed of reading the weight.

    The parameter is `weight`, [out_features, in_features], as in nn.Linear, and lies in memory as it was loaded.
    With `invariant`, a token's product does not depend on the tokens beside it.
    """

    invariant = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the weight's type."""
        return half_product(input, self.weight, self.invariant)


def use_half_linear(model: nn.Module, invariant: bool = False) -> None:
    """Put a HalfLinear, with the same parameter, in place of every nn.Linear without bias in main memory."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and layer.bias is None and layer.weight.device.type == "cpu":
                half = HalfLinear(layer.in_features, layer.out_features, bias=False, device="meta")
                half.weight, half.invariant = layer.weight, invariant
                setattr(parent, name, half)
