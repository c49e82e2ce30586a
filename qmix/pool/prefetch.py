"""Guess the experts of later layers from this layer's input.

A layer adds little to the residual stream, so this layer's input, put through a later layer's norm and gate, mostly
gives that layer's experts (A. Eliseev and D. Mazur, "Fast Inference of Mixture-of-Experts Language Models with
Offloading", 2023). A norm's scale does not change which gate scores are largest, so with x the normed input of layer
l and w its norm weights, the guess for layer m is the top k of gate_m * w_m applied to x / w_l.

The share of right guesses is measured for each layer and depth; guesses that are mostly wrong are not acted upon.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch

from qmix.pool.eviction import Key

DEPTH = 8  # layers ahead: the misses of a token come in bursts, which the disk has time for in the layers before
TRUSTED = 0.75  # least share of right guesses to act upon them: a wrong one delays the reads that are waited for
MEMORY = 0.9  # weight of the share so far against the next guess
FEW_TOKENS = 8  # with more, nearly every expert of a layer is needed
EMBEDDING = -1  # the "layer" before the first


class Prefetcher:
    """Guesses for a model with `norms` [L, H] (of the experts' inputs) and `gates` [L, E, H].

    Experts that lie `elsewhere` than in a pool are left out. `right` and `guesses` count by depth, for reports.
    """

    def __init__(
        self,
        norms: torch.Tensor,
        gates: torch.Tensor,
        top_k: int,
        depth: int = DEPTH,
        elsewhere: frozenset[Key] = frozenset(),
    ) -> None:
        self.layers, self.experts, _ = gates.shape
        self.top_k, self.depth, self.elsewhere = top_k, depth, elsewhere
        self._gates = gates.float() * norms.float()[:, None]  # [L, E, H]
        self._norms = norms
        self._trust: defaultdict[tuple[int, int], float] = defaultdict(lambda: 1.0)  # by layer and depth
        self._guessed: defaultdict[int, dict[int, list[int]]] = defaultdict(dict)  # layer -> depth -> experts
        self.right: Counter[int] = Counter()
        self.guesses: Counter[int] = Counter()

    def coming(self, layer: int, hidden: torch.Tensor) -> list[Key]:
        """Return experts of the layers after `layer`, soonest first, from its normed input [T, H] or the embeddings.

        With many tokens the last layer is followed by the first: a prompt's next chunk, or a batch's next pass.
        """
        if len(hidden) > FEW_TOKENS:
            return [((layer + 1) % self.layers, expert) for expert in range(self.experts)]
        keys = []
        by_depth = self.guesses_from(layer, hidden).transpose(0, 1).flatten(1).tolist()  # [D, T * k]
        for depth, best in enumerate(by_depth, 1):
            later, experts = layer + depth, list(dict.fromkeys(best))
            self._guessed[later][depth] = experts
            if self._trust[later, depth] >= TRUSTED:
                keys += [(later, expert) for expert in experts]
        return self._wanted(keys)

    def guesses_from(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the guessed experts [T, D, k] of the D layers after `layer`; D is 0 after the last."""
        ahead = range(layer + 1, min(layer + 1 + self.depth, self.layers))
        stream = hidden.float().to(self._norms.device)
        if layer != EMBEDDING:
            stream = stream / self._norms[layer].float()
        scores = stream @ self._gates[ahead.start : ahead.stop].flatten(0, 1).T  # [T, D * E]
        return scores.view(len(hidden), len(ahead), self.experts).topk(self.top_k, dim=-1).indices

    def _wanted(self, keys: Iterable[Key]) -> list[Key]:
        return [key for key in keys if key not in self.elsewhere]

    def chosen(self, layer: int, experts: Sequence[int]) -> None:
        """Compare the experts that a layer's router chose with the guesses."""
        for depth, guesses in self._guessed.pop(layer, {}).items():
            right = len(set(guesses).intersection(experts))
            self.right[depth] += right
            self.guesses[depth] += len(guesses)
            share = self._trust[layer, depth]
            self._trust[layer, depth] = share * MEMORY + right / len(guesses) * (1 - MEMORY)

    def precision(self, depth: int) -> float:
        """Return the share of right guesses `depth` layers ahead; 1 before the first."""
        return self.right[depth] / self.guesses[depth] if self.guesses[depth] else 1.0
