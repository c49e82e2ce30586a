"""One token through a decoder layer, without a module and a call of torch for every step.

transformers' layer takes some sixty small operations of torch a token, and each module a call of Python. For the single
token of a decode step, over the planned cache, all but the choice of experts is two pieces of work for the cores: the
half before the experts, and the experts. Everything else goes through transformers' layer as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralRMSNorm,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
)

from qmix.model.attention import GROUPED_SDPA
from qmix.model.kv import COLUMNS, KVCache
from qmix.precision.dense import HalfLinear

KINDS = (
    *(MixtralAttention, MixtralSparseMoeBlock),
    *(MixtralRMSNorm, HalfLinear, HalfLinear, HalfLinear, HalfLinear, MixtralRMSNorm, MixtralTopKRouter),
)  # what the short way stands for, in the order of HalfLayer from the third on


class OneTokenLayer(MixtralDecoderLayer):
    """transformers' decoder layer with a short way for one token in bf16 that nobody else looks at."""

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
        from qmix.kernels.cpu.attention_half import HalfLayer, attend_and_route

        attention, mixture, norm, *_, second_norm, router = parts
        weights = HalfLayer(*[part._parameters["weight"] for part in parts[2:]])
        epsilons = norm.variance_epsilon, second_norm.variance_epsilon
        keys, values = cache.layers[attention.layer_idx].extend(1)
        attended, normed, chosen, shares = attend_and_route(
            weights, hidden_states, position_embeddings, keys[0], values[0], epsilons, attention.scaling, router.top_k
        )
        return (attended + mixture._modules["experts"](normed, chosen, shares))[None]

    def parts(self) -> tuple[Any, ...]:
        """Return the modules of KINDS. Each attribute of a module that is looked up as such is a call of Python."""
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
            and type(hidden_states) is torch.Tensor
            and hidden_states.dtype == torch.bfloat16
            and hidden_states.is_contiguous()
            and not (self.training or hidden_states.requires_grad or _has_any_global_hook())
            and _are_plain(parts)
            and kernel_reads(cache.layers[parts[0].layer_idx].keys, rotary, parts[0].head_dim)
        )


def _are_plain(parts: tuple[Any, ...]) -> bool:
    """Return whether no module that the short way leaves out was replaced, is trained, or has a hook."""
    for part, kind in zip(parts, KINDS, strict=True):
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


def use_one_token_layers(model: MixtralForCausalLM) -> None:
    """Give every layer of a model with qmix's attention the short way for one token."""
    if model.config._attn_implementation == GROUPED_SDPA:
        for layer in model.model.layers:
            if layer.self_attn.head_dim % COLUMNS == 0:
                layer.__class__ = OneTokenLayer
