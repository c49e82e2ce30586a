"""A checkpoint as the weights of a layer-wise pass, whatever the model's size.

In memory are one layer's dense weights, one expert as it was published, and that expert as each variant holds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from qmix.checkpoint import Checkpoint
from qmix.checkpoint.fingerprint import WeightDigest, read_fingerprint
from qmix.checkpoint.naming import expert_key
from qmix.checkpoint.rows import WeightFile
from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.layerwise import CHUNK, Observer, RouterOutput
from qmix.engine.passes import PathSegment
from qmix.engine.variants import Variant
from qmix.geometry import EMBEDDINGS
from qmix.model.build import activation_of, empty_mixtral, module_name
from qmix.progress import OnProgress, Progress, ignore
from qmix.units import format_bytes


class CheckpointWeights:
    """The weights of some variants of a checkpoint, for one pass of whole sequences. Use it as a context manager.

    Attention is transformers' own. Experts are summed in fp32 in the order of their indices, and rounded once.
    Raises CheckpointError or HubError, also on leaving: where a file has changed since it was opened.
    """

    chunk_rows: int | None = None
    head_rows = CHUNK

    def __init__(
        self, checkpoint: Checkpoint, dtype: str, variants: Sequence[Variant], on_progress: OnProgress = ignore
    ) -> None:
        self.checkpoint, self.variants, self.geometry = checkpoint, variants, checkpoint.geometry
        self.streams, self.dtype, self.on_progress = len(variants), HALF[dtype], on_progress
        self.model = empty_mixtral(checkpoint.config, dtype)
        self.model.model.rotary_emb = MixtralRotaryEmbedding(self.model.config)
        self.activation = activation_of(self.model.config)
        self._files: dict[str, WeightFile] = {}
        self._digests: dict[str, str] = {}
        checkpoint.check_unchanged()
        self._open = ExitStack()
        self._read = 0
        self._total = sum(weight.rows * weight.cols for weight in checkpoint.weights.values()) * 2

    def __enter__(self) -> CheckpointWeights:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._open.close()
        for variant in self.variants:
            variant.close()
        if kind is None:
            self.checkpoint.check_unchanged()

    @contextmanager
    def loaded(self, name: str) -> Iterator[Any]:
        """Read the dense weights of a submodule of the model, and drop them afterwards."""
        module, prefix = self.model.get_submodule(name), f"{name}."
        keys = {
            module_name(key).removeprefix(prefix): key for key in self.geometry.dense_tensors if key.startswith(prefix)
        }
        for tensor, key in (keys or {"weight": EMBEDDINGS}).items():  # a tied head has no weight of its own
            value = self.weight(key)
            set_module_tensor_to_device(module, tensor, "cpu", value, value.dtype)
        yield module.eval().requires_grad_(False)
        module.to("meta")

    def attend(
        self, module: Any, normed: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], segments: list[PathSegment]
    ) -> torch.Tensor:
        """Return the attention of one whole sequence, by transformers' own function."""
        return module.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0][0]

    def experts(
        self, layer: int, states: Sequence[torch.Tensor], routing: Sequence[RouterOutput], observers: Sequence[Observer]
    ) -> list[torch.Tensor]:
        """Return the experts' weighted sums [T, H] in fp32 for each variant; read each expert once."""
        sums = [torch.zeros(each.shape, dtype=torch.float32) for each in states]
        for index in range(self.geometry.num_experts):
            places = [torch.where(each.chosen == index) for each in routing]
            if not any(len(tokens) for tokens, _ in places):
                continue
            matrices = {name: self.weight(expert_key(layer, index, name)) for name in self.geometry.expert_matrices}
            for observer in observers if len(places[0][0]) else ():
                observer.expert(layer, index, matrices)
            for variant, normed, routed, (tokens, nth), total in zip(
                self.variants, states, routing, places, sums, strict=True
            ):
                if not len(tokens):
                    continue
                expert = variant.expert(layer, index, matrices)
                for some, place in zip(tokens.split(CHUNK), nth.split(CHUNK), strict=True):
                    total[some] += expert(normed[some], self.activation) * routed.weights[some, place, None]
            self._progress(f"layer {layer + 1} of {self.geometry.num_layers}")
        return sums

    def routers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of all layers' norms before the experts, [L, H], and of their gates, [L, E, H]."""
        prefixes = [f"model.layers.{layer}." for layer in range(self.geometry.num_layers)]
        norms = torch.stack([self.weight(f"{prefix}post_attention_layernorm.weight") for prefix in prefixes])
        gates = torch.stack([self.weight(f"{prefix}block_sparse_moe.gate.weight") for prefix in prefixes])
        return norms, gates

    def fingerprint(self) -> str:
        """Return the checkpoint's fingerprint; read the weights that the pass did not, unless it is known already."""
        return self.checkpoint.known_fingerprint or read_fingerprint(self.checkpoint, read=self._digests)

    def weight(self, key: str) -> torch.Tensor:
        """Read a whole weight of the checkpoint: in half precision, in the checkpoint's shape."""
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
