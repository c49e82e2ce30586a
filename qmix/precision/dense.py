"""Linear layers that stay in half precision: the projections of attention, and the head."""

from __future__ import annotations

import torch
from torch import nn

from qmix.precision.matmul import half_product


class HalfLinear(nn.Linear):
    """A linear layer without bias, whose products with few rows take little longer than reading the weight.

    The parameter is `weight`, [out_features, in_features], as in nn.Linear; its memory is used in place. With
    `invariant`, a token's product does not depend on the other tokens of the batch.
    """

    invariant = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., out_features] for [..., in_features], in the weight's type."""
        return half_product(input, self.weight, self.invariant)


def use_half_linear(model: nn.Module, invariant: bool = False) -> None:
    """Replace every nn.Linear without bias in main memory by a HalfLinear with the same parameter."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and layer.bias is None and layer.weight.device.type == "cpu":
                half = HalfLinear(layer.in_features, layer.out_features, bias=False, device="meta")
                half.weight, half.invariant = layer.weight, invariant
                setattr(parent, name, half)
