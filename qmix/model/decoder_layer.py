"""A few tokens through a decoder layer, without a module and a call of torch for every step.

transformers' layer takes some sixty small operations of torch, and each module a call of Python. For the single token
of a decode step, over the planned cache, and for a pass of a few tokens of many sequences, all but the choice of
experts is two pieces of work for the cores: the half before the experts, and the experts. Everything else goes through
transformers' layer as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralRMSNorm,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
)

from qmix.model.attention import GROUPED_SDPA, ROW_ATTENTION
from qmix.model.invariant import InvariantNorm, InvariantRouter
from qmix.model.kv import COLUMNS, KVCache, Rows
from qmix.plan.memory import is_short
from qmix.precision.dense import HalfLinear

if TYPE_CHECKING:
    from qmix.kernels.cpu.attention_half import Seen  # loads Numba

Kinds = tuple[type[nn.Module], ...]


def _kinds(norm: type[nn.Module], router: type[nn.Module]) -> Kinds:
    """Return the types of the modules that the short way replaces, in the order of HalfLayer from the third on."""
    return MixtralAttention, MixtralSparseMoeBlock, norm, *[HalfLinear] * 4, norm, router


class OneTokenLayer(MixtralDecoderLayer):
    """transformers' decoder layer with a short way for one token in bf16 that nobody else looks at."""

    kinds = _kinds(MixtralRMSNorm, MixtralTopKRouter)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the layer's residual stream [B, T, H]."""
        parts = self.parts()
        if position_embeddings is None or not self._takes(
            hidden_states, position_embeddings, attention_mask, cache, parts
        ):
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                **kwargs,
            )
        from qmix.kernels.cpu.attention_half import Seen

        keys, values = cache.layers[parts[0].layer_idx].extend(1)
        return self._run(parts, hidden_states, position_embeddings, keys[0], values[0], Seen.alone(keys.shape[2]))

    def _run(
        self,
        parts: tuple[Any, ...],
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        seen: Seen,
    ) -> torch.Tensor:
        """Return the residual stream [1, T, H] after the layer; keys and values are [G, N, D]."""
        from qmix.kernels.cpu.attention_half import HalfLayer, attend_and_route

        attention, mixture, norm, *_, second_norm, router = parts
        weights = HalfLayer(*[part._parameters["weight"] for part in parts[2:]])
        epsilons = norm.variance_epsilon, second_norm.variance_epsilon
        attended, normed, chosen, shares = attend_and_route(
            weights, hidden, rotary, keys, values, seen, epsilons, attention.scaling, router.top_k
        )
        return (attended + mixture._modules["experts"](normed, chosen, shares))[None]

    def parts(self) -> tuple[Any, ...]:
        """Return the modules of `kinds`. Each attribute of a module that is looked up as such is a call of Python."""
        mine, attention, mixture = self._modules, self._modules["self_attn"], self._modules["mlp"]
        projections: dict[str, Any] = attention._modules
        return (
            attention,
            mixture,
            mine["input_layernorm"],
            *(projections["q_proj"], projections["k_proj"], projections["v_proj"], projections["o_proj"]),
            mine["post_attention_layernorm"],
            mixture._modules["gate"],
        )

    def _takes(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Any,
        parts: tuple[Any, ...],
    ) -> bool:
        return (
            hidden_states.shape[:2] == (1, 1)
            and mask is None
            and type(cache) is KVCache
            and cache.rows is None
            and self._kernel_reads(hidden_states, rotary, cache, parts)
        )

    def _kernel_reads(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: KVCache,
        parts: tuple[Any, ...],
    ) -> bool:
        """Return whether no hook, replacement or gradient needs the modules, and the kernel can read the tensors."""
        return (
            type(hidden) is torch.Tensor
            and hidden.dtype == torch.bfloat16
            and hidden.is_contiguous()
            and not (self.training or hidden.requires_grad or _has_any_global_hook())
            and _are_plain(parts, self.kinds)
            and kernel_reads(cache.layers[parts[0].layer_idx].keys, rotary, parts[0].head_dim)
        )


class RowsLayer(OneTokenLayer):
    """The decoder layer of an invariant model, with a short way for the rows of a pass of up to SHORT_PASS tokens.

    A row has the same numbers in a longer pass, whose norms and choices have the same code.
    """

    kinds = _kinds(InvariantNorm, InvariantRouter)

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """Return the layer's residual stream [1, T, H] for the rows of a pass; arguments are those of transformers."""
        parts, rows, cache, rotary = self.parts(), *map(options.get, ("rows", "cache", "position_embeddings"))
        if (
            type(rows) is not Rows
            or type(cache) is not KVCache
            or rotary is None
            or not is_short(len(rows.places), rows.longest)
            or not self._kernel_reads(hidden_states, rotary, cache, parts)
        ):
            return MixtralDecoderLayer.forward(self, hidden_states, *arguments, **options)
        from qmix.kernels.cpu.attention_half import Seen

        layer = cache.layers[parts[0].layer_idx]
        seen = Seen.of(rows.first, rows.seen)
        return self._run(parts, hidden_states, rotary, layer.keys[0], layer.values[0], seen)


def _are_plain(parts: tuple[Any, ...], kinds: Kinds) -> bool:
    """Return whether no module that the short way leaves out was replaced, is trained, or has a hook."""
    for part, kind in zip(parts, kinds, strict=True):
        weight = part._parameters.get("weight")
        if type(part) is not kind or part._forward_hooks or part._forward_pre_hooks:
            return False
        if weight is not None and weight.requires_grad:
            return False
    return True


def kernel_reads(keys: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], head_dim: int) -> bool:
    """Return whether cache and angles are as the kernel takes them; it has addresses only, and checks nothing."""
    as_wide = keys.shape[-1] == head_dim == rotary[0].shape[-1] and rotary[0].is_contiguous()
    return as_wide and keys.device.type == "cpu" and keys.dtype == torch.bfloat16 == rotary[0].dtype


def use_short_layers(model: MixtralForCausalLM) -> None:
    """Give every layer of a model with qmix's attention its short way: for one token, or for rows."""
    kind = {GROUPED_SDPA: OneTokenLayer, ROW_ATTENTION: RowsLayer}.get(model.config._attn_implementation)
    for layer in model.model.layers if kind is not None else ():
        if layer.self_attn.head_dim % COLUMNS == 0:
            layer.__class__ = kind
