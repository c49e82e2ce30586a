"""What it costs to quantise each expert: how far its output moves, for the tokens that it gets and as they use it.

The cost of holding an expert f as f' is estimated from a sample of the N tokens that are routed to it,

    N * mean( w^2 |f'(x) - f(x)|^2 / |h|^2 )

with x what the expert sees of a token, w the weight that the router gives it and h the residual stream that its output
is added to. So an error counts by what it is beside what it is added to, and by how often that happens; costs of
experts add up, as independent errors' squares do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from qmix.engine.layerwise import Observer, RouterOutput
from qmix.geometry import Geometry
from qmix.kernels.packing import BLOCK
from qmix.precision.round_trip import round_trip

SAMPLES = 128  # tokens of an expert: the mean's error is then some percent

Table = list[list[float]]  # [layer][expert]


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to hold weights: a precision, and for 4 bits how many weights share a scale."""

    precision: str
    block: int = BLOCK

    @property
    def name(self) -> str:
        """As `nf4`, or `nf4/32` where the block is not the one that stores have."""
        return self.precision if self.block == BLOCK else f"{self.precision}/{self.block}"

    def nbytes(self, weights: int) -> int:
        """Of so many weights, with their scales; rows' scales of int8 are not counted."""
        return weights if self.precision == "int8" else weights // 2 + 2 * weights // self.block


KINDS = (Kind("nf4"), Kind("fp4"), Kind("int8"), Kind("nf4", 32), Kind("nf4", 128), Kind("nf4", 256))


@dataclass(slots=True)
class _Sample:
    """Some tokens of one expert: what it sees [S, H], and what its output's error is weighted by, [S]."""

    states: torch.Tensor
    scales: torch.Tensor
    stands_for: float  # tokens each


@dataclass
class SensitivityMeter(Observer):
    """An observer of a layer-wise pass that measures every expert in some ways to hold it."""

    geometry: Geometry
    activation: Callable[[torch.Tensor], torch.Tensor]
    kinds: Sequence[Kind] = KINDS
    samples: int = SAMPLES
    errors: dict[str, Table] = field(init=False)
    sampled: list[list[int]] = field(init=False)
    _samples: dict[int, _Sample] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        layers, experts = self.geometry.num_layers, self.geometry.num_experts
        self.errors = {kind.name: [[0.0] * experts for _ in range(layers)] for kind in self.kinds}
        self.sampled = [[0] * experts for _ in range(layers)]

    def routed(self, layer: int, stream: torch.Tensor, states: torch.Tensor, routing: RouterOutput) -> None:
        for index in range(self.geometry.num_experts):
            tokens, place = torch.where(routing.chosen == index)
            if not len(tokens):
                continue
            some = _evenly(len(tokens), self.samples)
            tokens, place = tokens[some], place[some]
            weights = routing.weights[tokens, place].float().square()
            scales = weights / stream[tokens].float().square().sum(-1)
            self._samples[index] = _Sample(states[tokens], scales, float((routing.chosen == index).sum()) / len(some))
            self.sampled[layer][index] = len(some)

    def expert(self, layer: int, index: int, matrices: Mapping[str, torch.Tensor]) -> None:
        sample = self._samples.pop(index)
        exact = self._output(sample.states, matrices.__getitem__)
        for kind in self.kinds:
            output = self._output(sample.states, partial(_held, matrices, kind))
            moved = (output - exact).square().sum(-1) * sample.scales
            self.errors[kind.name][layer][index] = moved.double().sum().item() * sample.stands_for

    def _output(self, states: torch.Tensor, weight: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """An expert's, in fp32, with one matrix at a time made."""
        inner = self.activation(F.linear(states, weight("w1")))
        inner *= F.linear(states, weight("w3"))
        return F.linear(inner, weight("w2")).float()


def _held(matrices: Mapping[str, torch.Tensor], kind: Kind, name: str) -> torch.Tensor:
    """A matrix as it comes back."""
    return round_trip(matrices[name], kind.precision, kind.block)


def _evenly(count: int, most: int) -> torch.Tensor:
    """At most so many of the numbers below `count`, evenly spaced."""
    if count <= most:
        return torch.arange(count)
    return torch.arange(most) * count // most
