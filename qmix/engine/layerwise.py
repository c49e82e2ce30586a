"""Much text through a checkpoint, layer by layer: each weight is read once for all of it, whatever the model's size.

In memory are one layer's dense weights, one expert, and the hidden states of all tokens. Several variants of the
model, which differ in how their experts are held, go through side by side: each has hidden states of its own, and an
expert that is read serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from qmix.checkpoint import Checkpoint
from qmix.checkpoint.fingerprint import WeightDigest, read_fingerprint
from qmix.checkpoint.naming import expert_key
from qmix.checkpoint.rows import WeightFile
from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.variants import Variant
from qmix.model.build import activation_of, empty_mixtral, module_name
from qmix.plan.memory import PREFILL_CHUNK
from qmix.progress import OnProgress, Progress, ignore
from qmix.units import format_bytes

CHUNK = PREFILL_CHUNK  # tokens through an expert, a norm or the head at once

EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Observer(Protocol):
    """Sees what the first variant's tokens go through, layer by layer. What it is given is not its own to keep."""

    def embedded(self, stream: torch.Tensor) -> None:
        """The embeddings [T, H] of all tokens."""

    def routed(self, layer: int, stream: torch.Tensor, states: torch.Tensor, routing: RouterOutput) -> None:
        """A layer's routing: of the residual stream and its normed copy, both [T, H]."""

    def expert(self, layer: int, index: int, matrices: Mapping[str, torch.Tensor]) -> None:
        """An expert that some token was routed to, as the checkpoint has it, after its layer's routing."""


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """What a layer's router makes of T tokens: logits [T, E], and the chosen experts and their weights, [T, k]."""

    logits: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor


class LayerwisePass:
    """One pass of some sequences of token ids through all layers, for all variants. Close it, or use it in a `with`."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, variants: Sequence[Variant], on_progress: OnProgress = ignore
    ) -> None:
        self.checkpoint, self.variants, self.geometry = checkpoint, variants, checkpoint.geometry
        self.on_progress = on_progress
        self.dtype = HALF[dtype]
        self._model: MixtralForCausalLM = empty_mixtral(checkpoint.config, dtype)
        self.activation = activation_of(self._model.config)
        self._rotary = MixtralRotaryEmbedding(self._model.config)
        self._files: dict[str, WeightFile] = {}
        self._digests: dict[str, str] = {}
        checkpoint.check_unchanged()
        self._open = ExitStack()
        self._read = 0
        self._total = sum(weight.rows * weight.cols for weight in checkpoint.weights.values()) * 2

    def __enter__(self) -> LayerwisePass:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()
        for variant in self.variants:
            variant.close()

    @torch.inference_mode()
    def run(self, sequences: Sequence[Sequence[int]], observers: Sequence[Observer] = ()) -> list[torch.Tensor]:
        """The final, normed hidden states [T, H] of each variant, the tokens of all sequences in a row."""
        spans = _spans(sequences)
        ids = torch.tensor([token for sequence in sequences for token in sequence])
        embeddings = self.weight(EMBEDDINGS)
        streams = [embeddings[ids] for _ in self.variants]
        del embeddings
        for observer in observers:
            observer.embedded(streams[0])
        for layer in range(self.geometry.num_layers):
            module = self._layer(layer)
            for stream in streams:
                self._attend(module, stream, spans)
            self._mix(layer, module, streams, observers)
            module.to("meta")
        norm = self._put(self._model.model.norm, "model.norm.", [NORM])
        for stream in streams:
            for start in range(0, len(stream), CHUNK):
                stream[start : start + CHUNK] = norm(stream[start : start + CHUNK])
        self.checkpoint.check_unchanged()
        return streams

    @torch.inference_mode()
    def logits(self, hidden: Sequence[torch.Tensor], rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Chunks of (rows, then each variant's logits [t, V] in fp32) at those rows of the hidden states."""
        head = self.weight(EMBEDDINGS if self.geometry.tie_embeddings else HEAD)
        for some in rows.split(CHUNK):
            yield (some, *((stream[some] @ head.T).float() for stream in hidden))

    def fingerprint(self) -> str:
        """The checkpoint's, once it has been run; reads what was not read on the way, where that is not known yet."""
        return self.checkpoint.known_fingerprint or read_fingerprint(self.checkpoint, read=self._digests)

    def routers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights of all layers' norms before the experts, [L, H], and of their gates, [L, E, H]."""
        prefixes = [f"model.layers.{layer}." for layer in range(self.geometry.num_layers)]
        norms = torch.stack([self.weight(f"{prefix}post_attention_layernorm.weight") for prefix in prefixes])
        gates = torch.stack([self.weight(f"{prefix}block_sparse_moe.gate.weight") for prefix in prefixes])
        return norms, gates

    def weight(self, key: str) -> torch.Tensor:
        """A whole weight of the checkpoint, in half precision, in the shape of its own."""
        weight = self.checkpoint.weights[key]
        if weight.file not in self._files:
            path = self.checkpoint.source.fetch(weight.file, partial(self._fetching, weight.file))
            self._files[weight.file] = self._open.enter_context(WeightFile(path))
        rows = self._files[weight.file].rows(weight, 0, weight.rows, self.geometry.head_dim)
        if key not in self._digests:
            digest = WeightDigest(weight)
            digest.update(rows)
            self._digests[key] = digest.hexdigest()
        self._read += weight.rows * weight.cols * 2
        return rows.to(self.dtype).view(weight.piece.shape)

    def _fetching(self, file: str, done: int, total: int) -> None:
        self._progress(f"fetching {file}: {format_bytes(done)} of {format_bytes(total)}")

    def _progress(self, note: str) -> None:
        self.on_progress(Progress(self._read, self._total, note))

    def _layer(self, layer: int) -> Any:
        prefix = f"model.layers.{layer}."
        names = [name for name in self.geometry.dense_tensors if name.startswith(prefix)]
        return self._put(self._model.model.layers[layer], prefix, names)

    def _put(self, module: nn.Module, prefix: str, names: Sequence[str]) -> Any:
        for name in names:
            value = self.weight(name)
            set_module_tensor_to_device(module, module_name(name).removeprefix(prefix), "cpu", value, value.dtype)
        return module.eval().requires_grad_(False)

    def _attend(self, module: Any, stream: torch.Tensor, spans: Sequence[slice]) -> None:
        """Add what attention gives to the residual stream [T, H], a sequence at a time."""
        for span in spans:
            normed = module.input_layernorm(stream[span])[None]  # [1, S, H]
            positions = self._rotary(normed, torch.arange(normed.shape[1])[None])
            stream[span] += module.self_attn(normed, position_embeddings=positions, attention_mask=None)[0][0]

    def _mix(self, layer: int, module: Any, streams: Sequence[torch.Tensor], observers: Sequence[Observer]) -> None:
        """Add what the experts give, each read once; summed in fp32 as they come, and rounded once."""
        normed = [_by_chunks(module.post_attention_layernorm, stream) for stream in streams]
        routed = [RouterOutput(*module.mlp.gate(states)) for states in normed]
        for observer in observers:
            observer.routed(layer, streams[0], normed[0], routed[0])
        sums = [torch.zeros(stream.shape, dtype=torch.float32) for stream in streams]
        for index in range(self.geometry.num_experts):
            places = [torch.where(routing.chosen == index) for routing in routed]
            if not any(len(tokens) for tokens, _ in places):
                continue
            matrices = {name: self.weight(expert_key(layer, index, name)) for name in self.geometry.expert_matrices}
            for observer in observers if len(places[0][0]) else ():
                observer.expert(layer, index, matrices)
            for variant, states, routing, (tokens, nth), total in zip(
                self.variants, normed, routed, places, sums, strict=True
            ):
                if not len(tokens):
                    continue
                expert = variant.expert(layer, index, matrices)
                for some, place in zip(tokens.split(CHUNK), nth.split(CHUNK), strict=True):
                    total[some] += expert(states[some], self.activation) * routing.weights[some, place, None]
            self._progress(f"layer {layer + 1} of {self.geometry.num_layers}")
        for stream, total in zip(streams, sums, strict=True):
            stream.add_(total.to(stream.dtype))


def _by_chunks(work: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """`work` of all rows; what it takes besides its result is taken for a few at a time."""
    result = torch.empty_like(rows)
    for start in range(0, len(rows), CHUNK):
        result[start : start + CHUNK] = work(rows[start : start + CHUNK])
    return result


def _spans(sequences: Sequence[Sequence[int]]) -> list[slice]:
    """Where each sequence lies in the row of all tokens."""
    spans, start = [], 0
    for sequence in sequences:
        spans.append(slice(start, start + len(sequence)))
        start += len(sequence)
    return spans
