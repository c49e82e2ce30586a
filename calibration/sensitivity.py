"""Measure the error of quantising each expert, on the tokens that are routed to it.

The cost of replacing an expert f by a quantised f' is estimated from a sample of the N tokens routed to it,

    N * mean( w^2 |f'(x) - f(x)|^2 / |h|^2 )

with x the expert's input, w the router's weight for it and h the residual stream that the output is added to. An error
thus counts relative to the stream it disturbs, and as often as the expert is used. Costs of several experts add up,
like the squares of independent errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from qmix.engine.layerwise import Observer, RouterOutput
from qmix.geometry import Geometry
from qmix.precision.formats import BLOCK
from qmix.precision.round_trip import round_trip

SAMPLES = 128  # tokens of an expert at most: the mean is then known to some percent

Table = list[list[float]]  # [layer][expert]


@dataclass(frozen=True, slots=True)
class Kind:
    """A format of weights: a precision, and in 4 bits the number of weights that share a scale."""

    precision: str
    block: int = BLOCK

    @property
    def name(self) -> str:
        """The kind's name: `nf4`, or `nf4/32` if the block differs from the one in stores."""
        return self.precision if self.block == BLOCK else f"{self.precision}/{self.block}"

    def nbytes(self, weights: int) -> int:
        """Return the bytes of `weights` weights and their scales, except the row scales of int8."""
        return weights if self.precision == "int8" else weights // 2 + 2 * weights // self.block


KINDS = (Kind("nf4"), Kind("fp4"), Kind("int8"), Kind("nf4", 32), Kind("nf4", 128), Kind("nf4", 256))


@dataclass(slots=True)
class _Sample:
    """Sampled tokens of one expert: its inputs [S, H], and the weights of its output's squared error, [S]."""

    states: torch.Tensor
    scales: torch.Tensor
    stands_for: float  # tokens that one sampled token represents


@dataclass
class SensitivityMeter(Observer):
    """Measures the error of every expert in several formats; `errors` has a table for each."""

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
        """Return an expert's output in fp32; only one matrix exists at a time."""
        inner = self.activation(F.linear(states, weight("w1")))
        inner *= F.linear(states, weight("w3"))
        return F.linear(inner, weight("w2")).float()


def _held(matrices: Mapping[str, torch.Tensor], kind: Kind, name: str) -> torch.Tensor:
    """Return a matrix after its round trip through a format."""
    return round_trip(matrices[name], kind.precision, kind.block)


def _evenly(count: int, most: int) -> torch.Tensor:
    """Return at most `most` evenly spaced numbers below `count`."""
    if count <= most:
        return torch.arange(count)
    return torch.arange(most) * count // most
