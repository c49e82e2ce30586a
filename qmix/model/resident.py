"""Steps of a few tokens of a model whose experts are all in main memory: every layer in one call of the thread team.

In transformers' place a forward of one token, or a pass of a few tokens of many sequences, calls only the modules
around the layers: embedding, rotary embedding, the last norm and the head. Where a module that is left out has a hook,
another forward, or another module in its place, the layers run one by one instead. Their numbers are the same, but for
a layer that qmix's kernels cannot take so.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import _has_any_global_hook
from transformers import MixtralForCausalLM
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from qmix.geometry import HALF_BYTES
from qmix.kernels.cpu.threads import one_for_torch
from qmix.model.continued import continues
from qmix.model.decoder_layer import OneTokenLayer, kernel_reads
from qmix.model.kv import KVCache, Rows
from qmix.plan.memory import is_short
from qmix.pool.experts import ExpertPool
from qmix.precision.expert import Expert

if TYPE_CHECKING:
    from qmix.kernels.cpu.attention_half import Seen  # these load Numba
    from qmix.kernels.cpu.resident_step import ResidentLayers


class ResidentSteps:
    """Serves forwards of one token, or passes of a few, of a model over a pool that holds all of its experts."""

    launched = 0  # no graphs

    def __init__(self, model: MixtralForCausalLM, pool: ExpertPool) -> None:
        """`model` has layers with a short way for one token, and `pool` a slot for every expert."""
        inner = model.model
        self._around, self.pool, self.config = model._modules, pool, model.config  # no cycle: a model is freed at once
        self._modules = [inner, inner.layers, *(part for layer in inner.layers for part in layer.modules())]
        self._kinds = [type(part) for part in self._modules]
        self._hooks = [hooks for part in self._modules for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._children = [(part._modules, *item) for part in self._modules for item in part._modules.items()]
        self._weights = [part._parameters for layer in inner.layers for part in layer.parts()[2:]]
        self._places: list[int] = []
        self._layers: ResidentLayers | None = None
        self._expert_bytes, self._dense_bytes = _layer_bytes(model)

    def forward(self, ids: torch.Tensor | None, options: dict[str, Any]) -> MoeCausalLMOutputWithPast | None:
        """Return what the model's forward would for these arguments; None where a step does not serve them."""
        cache = options.get("cache")
        if type(ids) is not torch.Tensor or ids.shape != (1, 1) or type(cache) is not KVCache:
            return None
        if not (continues(self.config, cache, ids, options) and self._sees_all(cache) and self._nobody_looks()):
            return None
        from qmix.kernels.cpu.attention_half import Seen

        position = cache.get_seq_length()
        hidden = self._hidden(ids, torch.tensor([[position]]), cache, Seen.alone(position + 1))
        if hidden is None:
            return None
        for layer in cache.layers:
            layer.length += 1
        with one_for_torch(self.config.hidden_size):
            return MoeCausalLMOutputWithPast(logits=self._around["lm_head"](hidden), cache=cache)

    def rows(self, ids: torch.Tensor, positions: torch.Tensor, cache: KVCache, rows: Rows) -> torch.Tensor | None:
        """Return the normed hidden states [1, T, H] of a pass [1, T]; None where a step does not serve it."""
        if not (is_short(len(rows.places), rows.longest) and self._nobody_looks()):
            return None
        from qmix.kernels.cpu.attention_half import Seen

        return self._hidden(ids, positions, cache, Seen.of(rows.first, rows.seen))

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor, cache: KVCache, seen: Seen) -> torch.Tensor | None:
        """Return the normed hidden states [1, T, H] of tokens [1, T]; None where the kernel does not take them."""
        layers = self._resident_layers()
        if layers is None:
            return None
        self.pool.check_running()
        inner: Any = self._around["model"]
        inner.layers[0].mlp.experts.check_caller()
        with one_for_torch(ids.numel() * self.config.hidden_size):
            embedded = inner.embed_tokens(ids)
            rotary = inner.rotary_emb(embedded, position_ids=positions)
            if not _kernel_takes(layers, embedded, rotary, cache):
                return None
            stream = embedded.clone()  # which is written to; the embedding may be somebody's
            self._run(layers, stream, rotary, cache, seen)
            hidden: torch.Tensor = inner.norm(stream)
        return hidden

    def _run(
        self,
        layers: ResidentLayers,
        stream: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: KVCache,
        seen: Seen,
    ) -> None:
        """Take tokens through the layers, and count their experts in the pool."""
        started, kept = time.perf_counter(), cache.layers
        keys, values = [layer.keys.data_ptr() for layer in kept], [layer.values.data_ptr() for layer in kept]
        strides = HALF_BYTES * kept[0].keys.stride(1), HALF_BYTES * kept[0].values.stride(1)
        chosen = layers.run(stream, rotary, keys, values, strides, seen)
        used = chosen if len(seen.table) == 1 else [sorted(set(experts)) for experts in chosen]
        experts = sum(map(len, used)) / len(used) * self._expert_bytes
        self.pool.used(used, experts / (experts + self._dense_bytes) * (time.perf_counter() - started))

    def _sees_all(self, cache: KVCache) -> bool:
        """Return whether the next token of a cache sees all of its positions, which every layer has."""
        return self.config.sliding_window is None and cache.complete_length == cache.get_seq_length()

    def _nobody_looks(self) -> bool:
        """Return whether all modules are those of the start, with their own forward, and without hooks."""
        return not (
            _has_any_global_hook()
            or self._around["model"] is not self._modules[0]
            or self._modules[0].training
            or any(self._hooks)
            or any("forward" in part.__dict__ for part in self._modules)
            or any(type(part) is not kind for part, kind in zip(self._modules, self._kinds, strict=True))
            or any(children.get(name) is not child for children, name, child in self._children)
        )

    def _resident_layers(self) -> ResidentLayers | None:
        """Return the layers for the kernel; None where it does not take their weights as they are now."""
        weights = [parameters["weight"] for parameters in self._weights]
        places = [weight.data_ptr() for weight in weights]
        if places != self._places:
            experts = self.pool.whole()
            if experts is None:
                return None
            self._places = places
            self._layers = (
                _resident_layers(self._modules[0], self.pool, experts) if all(map(_is_plain, weights)) else None
            )
        return self._layers


def _kernel_takes(
    layers: ResidentLayers, embedded: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cache: KVCache
) -> bool:
    """Return whether a token, its angles and the cache are as the kernel reads them by their addresses."""
    sizes, keys = layers.sizes, cache.layers[0].keys
    return (
        type(embedded) is torch.Tensor
        and embedded.dtype == torch.bfloat16
        and embedded.shape[2:] == (sizes.hidden,)
        and embedded.is_contiguous()
        and (len(cache.layers), keys.shape[1]) == (layers.count, sizes.groups)
        and kernel_reads(keys, rotary, sizes.width)
    )


def _is_plain(weight: torch.Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.device.type == "cpu"


def _resident_layers(inner: Any, pool: ExpertPool, experts: list[list[Expert]]) -> ResidentLayers | None:
    """Return a model's layers with the addresses of all weights; None where there is no kernel for an expert."""
    from qmix.kernels.cpu.attention_half import HalfLayer, HalfLayerSizes
    from qmix.kernels.cpu.resident_step import ResidentLayers

    if not all(expert.takes_ours(1) for row in experts for expert in row):
        return None
    if not all(layer.mlp.experts.silu for layer in inner.layers):
        return None
    geometry, halves, constants = pool.store.geometry, [], []
    for layer in inner.layers:
        attention, _, norm, *_, second_norm, router = parts = layer.parts()
        halves.append(HalfLayer(*[part._parameters["weight"] for part in parts[2:]]))
        constants.append((norm.variance_epsilon, second_norm.variance_epsilon, attention.scaling))
    sizes = HalfLayerSizes(
        hidden=geometry.hidden_size,
        heads=geometry.num_heads,
        groups=geometry.num_kv_heads,
        width=geometry.head_dim,
        rows=0,
        experts=geometry.num_experts,
        top_k=router.top_k,
    )
    known = [[(expert.precision, expert.places) for expert in row] for row in experts]
    return ResidentLayers(sizes, experts[0][0].gate.rows, halves, known, constants)


def _layer_bytes(model: MixtralForCausalLM) -> tuple[float, float]:
    """Return the mean bytes of an expert, and of a layer's dense weights; a step's time is about in proportion."""
    layout, geometry = model.pool.store.layout, model.pool.store.geometry
    dense = sum(weight.nbytes for layer in model.model.layers for weight in layer.parameters())
    return sum(layout.expert_bytes.values()) / geometry.num_records, dense / geometry.num_layers


def use_resident_steps(model: MixtralForCausalLM, pool: ExpertPool) -> None:
    """Let a model take steps of a few tokens in one call, if all of its layers have the short way."""
    if all(isinstance(layer, OneTokenLayer) for layer in model.model.layers):
        model.steps = ResidentSteps(model, pool)
