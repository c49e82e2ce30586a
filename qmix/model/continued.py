"""Tell steps from other forwards: those of one sequence's next tokens after the cached ones, for logits alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MixtralConfig

from qmix.model.kv import KVCache

KNOWN = ("use_cache", "return_dict", "logits_to_keep", "attention_mask", "position_ids", "cache")
RECORDED = ("output_hidden_states", "output_attentions", "output_router_logits")


def continues(config: MixtralConfig, cache: KVCache, ids: torch.Tensor, options: dict[str, Any]) -> bool:
    """Return whether a model's forward of ids [1, T] with these options is a step of one sequence over `cache`.

    Then its output is the logits alone, and every position before is seen.
    """
    if cache.rows is not None or torch.is_grad_enabled() or ids.shape[0] != 1:
        return False
    if any(options[name] for name in options.keys() - {*KNOWN}) or any(getattr(config, name) for name in RECORDED):
        return False
    start, mask, positions = cache.get_seq_length(), options.get("attention_mask"), options.get("position_ids")
    end = start + ids.shape[1]
    return (
        end <= cache.capacity
        and options.get("return_dict") is not False
        and isinstance(options.get("logits_to_keep", 0), int)
        and (mask is None or (mask.shape == (1, end) and bool(mask.all())))
        and (positions is None or positions[0].tolist() == list(range(start, end)))
    )
