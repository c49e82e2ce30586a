"""The launches of a step of a few tokens over the layers of one GPU: fixed memory, and nothing for Python to decide.

Tokens, positions, routing and the addresses of experts' records are read from device memory by the kernels, so the
same launches serve every step. A token of a row whose position is negative does not exist.

The step is cut where the host has to act: `attend` ends with a layer's routing, `mixture` computes the residents that
were chosen, and `add` sums up the layer, whose other experts have been computed elsewhere meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from qmix.geometry import Geometry
from qmix.kernels.gpu.shapes import ExpertShape, attention_splits, down_splits, sample_blocks
from qmix.model.gpu.kernels import Kernels


@dataclass(frozen=True, slots=True)
class StepLayer:
    """One layer on a GPU: its dense weights, its keys and values [B, G, N, D], and its experts' addresses.

    `tables` has for each precision the addresses [E] of the residents in it, 0 for others. `here` [E] is not 0 for any
    resident. `staged` are the precisions of experts that may be copied here for a step.
    """

    norm: torch.Tensor
    qkv: torch.Tensor  # [(Q + 2 G) * D, H]
    output: torch.Tensor
    post_norm: torch.Tensor
    gate: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: tuple[tuple[ExpertShape, torch.Tensor], ...]
    here: torch.Tensor
    staged: tuple[ExpertShape, ...]
    elsewhere: bool  # some experts are not resident


@dataclass(frozen=True, slots=True)
class StepEnds:
    """Embeddings, the last norm's weight and the head, where they lie on this GPU."""

    embed: torch.Tensor | None
    norm: torch.Tensor | None
    head: torch.Tensor | None


class StepBuffers:
    """A GPU's memory for steps of up to `rows` tokens, with its rotary tables [N, D / 2]."""

    def __init__(
        self,
        geometry: Geometry,
        rows: int,
        rotary: tuple[torch.Tensor, torch.Tensor],
        last: bool,
    ) -> None:
        self.geometry, self.rows = geometry, rows
        self.cos, self.sin = rotary
        self.dtype, self.device = self.cos.dtype, self.cos.device
        hidden, heads, width = geometry.hidden_size, geometry.num_heads, geometry.head_dim
        pairs, splits = rows * geometry.experts_per_token, attention_splits(len(self.cos))
        self.token, self.position = self._new(rows, dtype=torch.int64), self._new(rows, dtype=torch.int64)
        self.sequence, self.ids = self._new(rows, dtype=torch.int64), self._new(pairs, dtype=torch.int64)
        self.weights = self._new(pairs, dtype=torch.float32)
        self.stream, self.normed, self.delta = (self._new(rows, hidden) for _ in range(3))
        self.qkv = self._new(rows, (heads + 2 * geometry.num_kv_heads) * width)
        self.heads = self._new(rows, heads * width)
        self.sums = self._new(rows, heads, splits, width, dtype=torch.float32)
        self.stats = self._new(rows, heads, splits, 2, dtype=torch.float32)
        self.inner, self.away = self._new(pairs, geometry.intermediate_size), self._new(pairs, hidden)
        self.parts = self._new(down_splits(geometry.intermediate_size) * pairs * hidden, dtype=torch.float32)
        self.where = self._new(geometry.num_experts, dtype=torch.int64)
        if last:
            blocks = sample_blocks(geometry.vocab_size)
            self.logits = self._new(rows, geometry.vocab_size)
            self.temperature, self.seed = self._new(rows, dtype=torch.float32), self._new(rows, dtype=torch.int64)
            self.best = self._new(rows, blocks, dtype=torch.float32)
            self.places = self._new(rows, blocks, dtype=torch.int32)
            self.chosen = self._new(rows, dtype=torch.int64)

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def pairs(self, tensor: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return the rows of `tokens` tokens' pairs in a buffer that has one for each pair."""
        return tensor[: tokens * self.geometry.experts_per_token]

    def routing(self, tensor: torch.Tensor, tokens: int) -> torch.Tensor:
        """Return [T, k] of the ids or the weights."""
        return self.pairs(tensor, tokens).view(tokens, -1)

    def partial(self, tokens: int) -> torch.Tensor:
        """Return the partial sums [splits, T * k, H] of `tokens` tokens."""
        hidden = self.geometry.hidden_size
        shape = down_splits(self.geometry.intermediate_size), tokens * self.geometry.experts_per_token, hidden
        return self.parts[: prod(shape)].view(shape)


class DeviceStep:
    """The launches of a step of `tokens` tokens over a GPU's layers. `staged` [P, E] has addresses of copied records.

    Its rows are in the order of `precisions`.
    """

    def __init__(
        self,
        kernels: Kernels,
        buffers: StepBuffers,
        layers: Sequence[StepLayer],
        ends: StepEnds,
        eps: float,
        tokens: int,
        staged: dict[ExpertShape, torch.Tensor],
    ) -> None:
        self.kernels, self.buffers, self.layers, self.ends, self.eps = kernels, buffers, layers, ends, eps
        self.tokens, self.staged = tokens, staged
        self.stream, self.normed, self.delta = (
            each[:tokens] for each in (buffers.stream, buffers.normed, buffers.delta)
        )
        self.position, self.sequence = buffers.position[:tokens], buffers.sequence[:tokens]
        self.ids, self.weights = buffers.routing(buffers.ids, tokens), buffers.routing(buffers.weights, tokens)
        self.inner, self.away = buffers.pairs(buffers.inner, tokens), buffers.pairs(buffers.away, tokens)
        self.parts = buffers.partial(tokens)

    def embed(self) -> None:
        """Begin the stream with the tokens' embeddings."""
        assert self.ends.embed is not None
        torch.index_select(self.ends.embed, 0, self.buffers.token[: self.tokens], out=self.stream)

    def norm(self) -> None:
        """Norm the stream for the first layer here."""
        self.kernels.norm(self.stream, self.layers[0].norm, self.normed, self.eps)

    def attend(self, index: int) -> None:
        """Add a layer's attention to the stream, norm it, and choose the tokens' experts."""
        layer, buffers, kernels = self.layers[index], self.buffers, self.kernels
        qkv, heads = buffers.qkv[: self.tokens], buffers.heads[: self.tokens]
        kernels.linear(self.normed, layer.qkv, qkv)
        where = self.sequence, self.position
        kernels.rotate(qkv, buffers.cos, buffers.sin, layer.keys, layer.values, *where)
        sums, stats = buffers.sums[: self.tokens], buffers.stats[: self.tokens]
        kernels.attend(qkv, layer.keys, layer.values, *where, sums, stats, heads)
        kernels.linear(heads, layer.output, self.delta)
        router = kernels.Router(layer.gate, self.ids, self.weights, self.position)
        kernels.norm(self.stream, layer.post_norm, self.normed, self.eps, delta=self.delta, router=router)

    def mixture(self, index: int) -> None:
        """Compute the residents of a layer that were chosen."""
        for shape, addresses in self.layers[index].tables:
            self._experts(shape, addresses)

    def arrived(self, index: int) -> None:
        """Compute the experts of a layer that were copied here for this step."""
        for shape in self.layers[index].staged:
            self._experts(shape, self.staged[shape])

    def add(self, index: int) -> None:
        """Add a layer's mixture to the stream, and norm it for what follows here."""
        layer, where = self.layers[index], self.layers[index].here
        for shape in layer.staged:
            where = torch.add(where, self.staged[shape], out=self.buffers.where)
        away = self.away if layer.elsewhere else None
        mixture = self.kernels.Mixture(self.parts, self.ids, self.weights, where, away)
        last = index + 1 == len(self.layers)
        following = self.ends.norm if last else self.layers[index + 1].norm
        weight = layer.norm if following is None else following  # before a crossing the norm is not used
        self.kernels.norm(self.stream, weight, self.normed, self.eps, mixture=mixture)

    def choose(self) -> None:
        """Compute the logits and the next token of every row."""
        buffers, tokens = self.buffers, self.tokens
        assert self.ends.head is not None
        logits = buffers.logits[:tokens]
        self.kernels.linear(self.normed, self.ends.head, logits)
        how = buffers.temperature[:tokens], buffers.seed[:tokens], self.position
        self.kernels.sample(logits, *how, buffers.best[:tokens], buffers.places[:tokens], buffers.chosen[:tokens])

    def advance(self) -> None:
        """Move a single token's position on."""
        self.position.add_(1)

    def _experts(self, shape: ExpertShape, addresses: torch.Tensor) -> None:
        self.kernels.gate_up(shape, addresses, self.ids, self.normed, self.inner)
        self.kernels.down(shape, addresses, self.ids, self.inner, self.parts)
