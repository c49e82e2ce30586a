"""A store as the weights of a layer-wise pass: dense weights resident, experts served by a pool.

Keys and values in memory are those of one sequence in one layer. Sequences come in the order of `qmix.engine.passes`:
each finds its prefix where the one before left it, and overwrites the rest. All parts are the invariant ones of
`qmix.model.invariant`, so that a sequence's numbers do not depend on the rest of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import MixtralForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qmix.engine.layerwise import Observer, RouterOutput
from qmix.engine.passes import PathSegment
from qmix.model.attention import row_attention
from qmix.model.kv import Chunk, KVLayer, Rows
from qmix.plan.memory import HEAD_ROWS, PREFILL_CHUNK

PATH_ATTENTION = "qmix_paths"  # its name among transformers' attention functions


def path_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    path: KVLayer,
    segments: Sequence[PathSegment],
    scaling: float,
    sliding_window: int | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attend from query [1, H, T, D] and key, value [1, G, T, D], the rows of `segments` in order, to [1, T, H, D]."""
    parts, start = [], 0
    for segment in segments:
        end = start + segment.count
        path.length = segment.position
        keys, values = path.update(key[:, :, start:end], value[:, :, start:end])
        rows = Rows.of([Chunk(range(segment.count), segment.position, 0, False)], sliding_window)
        parts.append(row_attention(module, query[:, :, start:end], keys, values, None, rows, scaling)[0])
        start = end
    return torch.cat(parts, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(PATH_ATTENTION, path_attention)


class StoreWeights:
    """The weights of a store's model over its pool: dense weights stay in memory, experts come from the pool.

    Experts are summed in the router's order, as whenever a pool's model runs. A subclass has `attend`.
    """

    streams = 1
    chunk_rows: int | None = PREFILL_CHUNK
    head_rows = HEAD_ROWS

    def __init__(self, model: MixtralForCausalLM) -> None:
        self.model = model

    @contextmanager
    def loaded(self, name: str) -> Iterator[Any]:
        """Return a submodule of the model."""
        yield self.model.get_submodule(name)

    def experts(
        self, layer: int, states: Sequence[torch.Tensor], routing: Sequence[RouterOutput], observers: Sequence[Observer]
    ) -> list[torch.Tensor]:
        """Return the experts' weighted sums [T, H], in half precision, as the model's own module computes them."""
        module = self.model.model.layers[layer].mlp.experts
        return [module(normed, each.chosen, each.weights) for normed, each in zip(states, routing, strict=True)]


class PathWeights(StoreWeights):
    """Weights of a model built with PATH_ATTENTION over an invariant pool; `path` holds one sequence in one layer."""

    def __init__(self, model: MixtralForCausalLM, path: KVLayer) -> None:
        super().__init__(model)
        self._path = path

    def attend(
        self, module: Any, normed: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], segments: list[PathSegment]
    ) -> torch.Tensor:
        """Return the attention of the rows of several sequences, each after its own prefix."""
        return module.self_attn(
            normed, position_embeddings=rotary, attention_mask=None, path=self._path, segments=segments
        )[0][0]
