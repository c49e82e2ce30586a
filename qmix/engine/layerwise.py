"""A pass of text through a model, layer by layer: each weight is read once for all of its tokens.

The pass is one loop over the layers. A source of weights supplies what differs: a checkpoint, which is read a layer
and an expert at a time (`checkpoint_weights`), or a store with its pool (`store_weights`). Several variants of a model
can pass side by side: each has hidden states of its own, and a weight that is read serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import MixtralForCausalLM

from qmix.engine.passes import Pass, PathSegment, chunks
from qmix.plan.memory import PREFILL_CHUNK

CHUNK = PREFILL_CHUNK  # tokens through an expert or a norm at once


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """A layer's routing of T tokens: logits [T, E], and the weights and indices of the chosen experts, both [T, k]."""

    logits: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor


class Observer:
    """Base class of observers of the first variant's tokens. Tensors are valid during the call only."""

    def embedded(self, stream: torch.Tensor) -> None:
        """Receive the embeddings [T, H] of all tokens."""

    def routed(self, layer: int, stream: torch.Tensor, states: torch.Tensor, routing: RouterOutput) -> None:
        """Receive a layer's routing, its residual stream and the normed copy that was routed, both [T, H]."""

    def expert(self, layer: int, index: int, matrices: Mapping[str, torch.Tensor]) -> None:
        """Receive the half-precision matrices of an expert with tokens, after its layer's routing.

        Only a checkpoint has them: a pass over a store does not call this.
        """


class WeightSource(Protocol):
    """The weights of a pass, and the parts of the computation that depend on how they are held."""

    model: MixtralForCausalLM  # its modules are used only inside `loaded`
    streams: int  # variants, each with a residual stream
    chunk_rows: int | None  # in one call of attention or router. None: one sequence in attention, all in the router
    head_rows: int  # in one call of the head

    def loaded(self, name: str) -> AbstractContextManager[Any]:
        """Keep the dense weights of the model's submodule `name` in memory, and yield the submodule."""

    def attend(
        self, module: Any, normed: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], segments: list[PathSegment]
    ) -> torch.Tensor:
        """Return a layer's attention [t, H] for its normed rows [1, t, H], which are those of `segments`."""

    def experts(
        self, layer: int, states: Sequence[torch.Tensor], routing: Sequence[RouterOutput], observers: Sequence[Observer]
    ) -> Sequence[torch.Tensor]:
        """Return each variant's weighted sums of experts [T, H] for its normed states [T, H]; read each expert once."""


@torch.inference_mode()
def run_layers(
    weights: WeightSource,
    part: Pass,
    observers: Sequence[Observer] = (),
    on_layer: Callable[[int], None] = lambda layers: None,
) -> list[torch.Tensor]:
    """Return the hidden states [T, H] of each variant after the last layer, before the final norm.

    `on_layer` receives the number of finished layers.
    """
    tokens = torch.from_numpy(part.tokens)
    with weights.loaded("model.embed_tokens") as embed:
        streams = [embed(tokens) for _ in range(weights.streams)]
    for observer in observers:
        observer.embedded(streams[0])
    pieces = list(chunks(part.segments, weights.chunk_rows))
    for layer in range(weights.model.config.num_hidden_layers):
        with weights.loaded(f"model.layers.{layer}") as module:
            for stream in streams:
                _attend(weights, module, stream, pieces)
            _mix(weights, layer, module, streams, observers)
        on_layer(layer + 1)
    return streams


@torch.inference_mode()
def logits(
    weights: WeightSource, streams: Sequence[torch.Tensor], rows: torch.Tensor
) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Yield, for each slice of `rows` [P], each variant's logits [t, V] in fp32 after those rows of its stream."""
    with weights.loaded("model.norm") as norm, weights.loaded("lm_head") as head:
        for start in range(0, len(rows), weights.head_rows):
            some = slice(start, min(start + weights.head_rows, len(rows)))
            yield some, [head(norm(stream[rows[some]])).float() for stream in streams]


def _attend(
    weights: WeightSource, module: Any, stream: torch.Tensor, pieces: Sequence[tuple[slice, list[PathSegment]]]
) -> None:
    """Add a layer's attention to the residual stream [T, H], a chunk of rows at a time."""
    for rows, segments in pieces:
        normed = module.input_layernorm(stream[rows])[None]  # [1, t, H]
        positions = torch.cat([torch.arange(each.position, each.position + each.count) for each in segments])
        rotary = weights.model.model.rotary_emb(normed, positions[None])
        stream[rows] += weights.attend(module, normed, rotary, segments)


def _mix(
    weights: WeightSource, layer: int, module: Any, streams: Sequence[torch.Tensor], observers: Sequence[Observer]
) -> None:
    """Add a layer's mixture of experts to the residual streams [T, H]."""
    normed = [_by_chunks(module.post_attention_layernorm, stream) for stream in streams]
    routed = [_route(module.mlp.gate, states, weights.chunk_rows) for states in normed]
    for observer in observers:
        observer.routed(layer, streams[0], normed[0], routed[0])
    for stream, total in zip(streams, weights.experts(layer, normed, routed, observers), strict=True):
        stream.add_(total.to(stream.dtype))


def _route(gate: Any, states: torch.Tensor, rows: int | None) -> RouterOutput:
    """Route [T, H], `rows` at a time where given: a router's kernel may copy what it reads in fp32."""
    parts = [gate(some) for some in states.split(rows or max(1, len(states)))]
    return RouterOutput(*map(torch.cat, zip(*parts, strict=True)))


def _by_chunks(norm: Any, rows: torch.Tensor) -> torch.Tensor:
    """Norm all rows, CHUNK at a time: transformers computes norms in fp32 copies."""
    result = torch.empty_like(rows)
    for start in range(0, len(rows), CHUNK):
        result[start : start + CHUNK] = norm(rows[start : start + CHUNK])
    return result
