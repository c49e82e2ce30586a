"""One token through a decoder layer, without a module and a call of torch for every step.

transformers' layer takes some sixty small operations of torch a token, and each module a call of Python. For the single
token of a decode step, over the planned cache, all but the choice of experts is two pieces of work for the cores: the
half before the experts, and the experts. Everything else goes through transformers' layer as it is.
"""

from __future__ import annotations

from typing import Any

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

from qmix.model.attention import GROUPED_SDPA
from qmix.model.kv import COLUMNS, KVCache
from qmix.precision.dense import HalfLinear


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
        if position_embeddings is None or not self._takes(hidden_states, attention_mask, cache):
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                **kwargs,
            )
        from qmix.kernels.cpu.attention_half import HalfLayer, attend_and_route

        attention, router = self.self_attn, self.mlp.gate
        weights = HalfLayer(
            self.input_layernorm.weight,
            attention.q_proj.weight,
            attention.k_proj.weight,
            attention.v_proj.weight,
            attention.o_proj.weight,
            self.post_attention_layernorm.weight,
            router.weight,
        )
        epsilons = self.input_layernorm.variance_epsilon, self.post_attention_layernorm.variance_epsilon
        keys, values = cache.layers[attention.layer_idx].extend(1)
        attended, normed, logits = attend_and_route(
            weights, hidden_states, position_embeddings, keys[0], values[0], epsilons, attention.scaling
        )
        chosen, experts = logits.float().softmax(-1).topk(router.top_k, dim=-1)
        chosen /= chosen.sum(-1, keepdim=True)
        return (attended + self.mlp.experts(normed, experts, chosen))[None]

    def _takes(self, hidden_states: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> bool:
        return (
            hidden_states.shape[:2] == (1, 1)
            and mask is None
            and type(cache) is KVCache
            and cache.rows is None
            and type(hidden_states) is torch.Tensor
            and hidden_states.dtype == torch.bfloat16
            and not (self.training or hidden_states.requires_grad or _has_any_global_hook())
            and self._is_plain()
            and _kernel_reads(cache.layers[self.self_attn.layer_idx].keys, self.self_attn.head_dim)
        )

    def _is_plain(self) -> bool:
        """Return whether no module that the short way leaves out was replaced, is trained, or has a hook."""
        attention, mixture = self.self_attn, self.mlp
        weights = (
            (self.input_layernorm, MixtralRMSNorm),
            (attention.q_proj, HalfLinear),
            (attention.k_proj, HalfLinear),
            (attention.v_proj, HalfLinear),
            (attention.o_proj, HalfLinear),
            (self.post_attention_layernorm, MixtralRMSNorm),
            (mixture.gate, MixtralTopKRouter),
        )
        return (
            type(attention) is MixtralAttention
            and type(mixture) is MixtralSparseMoeBlock
            and not (_has_hooks(attention) or _has_hooks(mixture))
            and all(
                type(part) is kind and not part.weight.requires_grad and not _has_hooks(part) for part, kind in weights
            )
        )


def _has_hooks(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)


def _kernel_reads(keys: torch.Tensor, head_dim: int) -> bool:
    return keys.device.type == "cpu" and keys.dtype == torch.bfloat16 and keys.shape[-1] == head_dim


def use_one_token_layers(model: MixtralForCausalLM) -> None:
    """Give every layer of a model with qmix's attention the short way for one token."""
    if model.config._attn_implementation == GROUPED_SDPA:
        for layer in model.model.layers:
            if layer.self_attn.head_dim % COLUMNS == 0:
                layer.__class__ = OneTokenLayer
