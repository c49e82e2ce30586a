"""Record the routing of text during a layer-wise pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qmix.engine.layerwise import CHUNK, Observer, RouterOutput
from qmix.geometry import Geometry
from qmix.pool.prefetch import DEPTH, EMBEDDING, Prefetcher

ENOUGH = 200  # tokens of an expert from which its measurements are reliable

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RoutingStatistics:
    """The routing of T tokens in L layers of E experts, k a token.

    tokens      by language: number of tokens
    counts      by language [L, E]: tokens routed to an expert
    mass        by language [L, E]: the router's probabilities over all experts, summed over tokens
    repeated    [L]: share of a token's experts that the previous token also had; nan if no token follows another
    lookahead   [L, D]: share of correct guesses of a layer's experts, made 1 to D layers earlier (the embeddings count
                as the layer before the first); nan if there is no layer that early
    trace       [T * L, k]: the experts of each token and layer, all layers of a token together
    """

    tokens: Mapping[str, int]
    counts: Mapping[str, Counts]
    mass: Mapping[str, Shares]
    repeated: Shares
    lookahead: Shares
    trace: npt.NDArray[np.int16]

    @property
    def total(self) -> Counts:
        """Tokens routed to each expert, [L, E]."""
        return np.sum(list(self.counts.values()), axis=0)

    @property
    def use(self) -> Shares:
        """Share of all tokens routed to each expert, [L, E]."""
        return self.total / sum(self.tokens.values())

    @property
    def scarce(self) -> list[tuple[int, int]]:
        """(layer, expert) of the experts with fewer than ENOUGH tokens."""
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(self.total < ENOUGH)]

    def to_json(self) -> dict[str, Any]:
        """Return the `routing` part of a profile's file."""
        return {
            "tokens": dict(self.tokens),
            "counts": {language: table.tolist() for language, table in self.counts.items()},
            "mass": {language: table.round(3).tolist() for language, table in self.mass.items()},
            "repeated": _rounded(self.repeated),
            "lookahead": [_rounded(row) for row in self.lookahead],
            "scarce": [list(key) for key in self.scarce],
        }


def _rounded(values: Shares) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


class RoutingRecorder(Observer):
    """Records the routing of sequences, each in a language; guesses from `norms` [L, H] and `gates` [L, E, H]."""

    def __init__(
        self,
        geometry: Geometry,
        norms: torch.Tensor,
        gates: torch.Tensor,
        sequences: Sequence[Sequence[int]],
        languages: Sequence[str],
    ) -> None:
        self._geometry = geometry
        self._prefetcher = Prefetcher(norms, gates, geometry.experts_per_token)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        names = list(dict.fromkeys(languages))
        numbers = torch.tensor([names.index(language) for language in languages])
        of_token = numbers.repeat_interleave(lengths)  # [T]
        self._of_language = {name: of_token == number for number, name in enumerate(names)}
        self._follows = torch.ones(len(of_token), dtype=torch.bool)  # has a previous token in its sequence
        self._follows[lengths.cumsum(0) - lengths] = False
        layers, experts, k = geometry.num_layers, geometry.num_experts, geometry.experts_per_token
        self._counts = {name: np.zeros((layers, experts), np.int64) for name in names}
        self._mass = {name: np.zeros((layers, experts)) for name in names}
        self._repeated = np.full(layers, np.nan)
        self._guessed = np.full((layers, min(DEPTH, layers)), np.nan)
        self._guesses: dict[int, list[tuple[int, torch.Tensor]]] = {}  # layer -> depths and guesses [T, k]
        self._trace = np.zeros((len(of_token), layers, k), np.int16)

    def embedded(self, stream: torch.Tensor) -> None:
        self._guess(EMBEDDING, stream)

    def routed(self, layer: int, stream: torch.Tensor, states: torch.Tensor, routing: RouterOutput) -> None:
        chosen, experts = routing.chosen, self._geometry.num_experts
        probabilities = routing.logits.double().softmax(-1)
        for name, mine in self._of_language.items():
            self._counts[name][layer] = torch.bincount(chosen[mine].flatten(), minlength=experts).numpy()
            self._mass[name][layer] = probabilities[mine].sum(0).numpy()
        self._trace[:, layer] = chosen.numpy()
        if self._follows.any():
            before = chosen.roll(1, 0)[self._follows]
            self._repeated[layer] = _share_found(chosen[self._follows], before)
        for depth, guesses in self._guesses.pop(layer, []):
            self._guessed[layer, depth - 1] = _share_found(chosen, guesses)
        self._guess(layer, states)

    def result(self) -> RoutingStatistics:
        """Return the statistics of the finished pass."""
        tokens = {name: int(mine.sum()) for name, mine in self._of_language.items()}
        trace = self._trace.reshape(-1, self._trace.shape[-1])
        return RoutingStatistics(tokens, self._counts, self._mass, self._repeated, self._guessed, trace)

    def _guess(self, layer: int, states: torch.Tensor) -> None:
        """Guess the experts of the next layers as the pool's prefetch would."""
        parts = [self._prefetcher.guesses_from(layer, some).short() for some in states.split(CHUNK)]
        for depth, guesses in enumerate(torch.cat(parts).unbind(1), 1):
            self._guesses.setdefault(layer + depth, []).append((depth, guesses))


def _share_found(wanted: torch.Tensor, among: torch.Tensor) -> float:
    """Return the share of experts in the rows [T, k] of `wanted` that are also in the same row of `among`."""
    return (wanted[:, :, None] == among[:, None, :]).any(-1).double().mean().item()
