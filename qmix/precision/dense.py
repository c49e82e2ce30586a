"""Dense projections in half precision, which stay as they are published: attention and the head."""

from __future__ import annotations

import torch
from torch import nn

from qmix.precision.matmul import half_product


class HalfLinear(nn.Linear):
    """A linear layer without bias whose products with few rows run at the speed of reading the weight.

    The parameter is `weight`, [out_features, in_features], as in nn.Linear, and lies in memory as it was loaded.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features], in the weight's type."""
        return half_product(input, self.weight)


def use_half_linear(model: nn.Module) -> None:
    """Put a HalfLinear, with the same parameter, in place of every nn.Linear without bias in main memory."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and layer.bias is None and layer.weight.device.type == "cpu":
                half = HalfLinear(layer.in_features, layer.out_features, bias=False, device="meta")
                half.weight = layer.weight
                setattr(parent, name, half)
