"""Attention over shared key and value heads, without a copy of them for every query head.

transformers' sdpa repeats keys and values in memory wherever a mask is given (every prefill chunk but the first:
100 MB for 8x22B at 4096 tokens, 1.6 GB at 65536), and leaves the single query of a decode step to a kernel that is slow
on grouped heads. Here the query heads that share a key head are taken one after another in prefill, so that mask and
heads are used as they lie. In decode they are so many queries of one head, for sdpa while the cache is small and for
qmix's own kernel beyond.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

GROUPED_SDPA = "qmix_grouped_sdpa"  # its name among transformers' attention functions
KERNEL_NUMBERS = 2**18  # in the keys of a sequence: from where on qmix's kernel pays; smaller caches never load Numba
KERNEL_COLUMNS = 16  # of whose multiples the kernel wants a head


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """query [B, H, T, D], key and value [B, G, S, D], mask [B or 1, 1, T, S] or None, to [B, T, H, D].

    Query heads g * H / G to (g + 1) * H / G - 1 share key head g. Without a mask, T queries of T positions are causal.
    `dropout` is the share of attention weights that training leaves out.
    """
    batch, heads, tokens, width = query.shape
    groups = key.shape[1]
    shared = query.view(batch, groups, heads // groups, tokens, width)  # [B, G, H / G, T, D]
    if tokens == 1:
        out = _decode(shared[:, :, :, 0], key, value, attention_mask, dropout, scaling)
        return out.view(batch, 1, heads, width), None
    out = query.new_empty(batch, tokens, groups, heads // groups, width)
    causal = attention_mask is None
    for index in range(heads // groups):
        part = F.scaled_dot_product_attention(
            shared[:, :, index],
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
        )
        out[:, :, :, index] = part.transpose(1, 2)
    return out.view(batch, tokens, heads, width), None


def _decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """query [B, G, H / G, D] of one token a sequence to [B, G, H / G, D]."""
    if key[0].numel() < KERNEL_NUMBERS or dropout or not _kernel_takes(query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    from qmix.kernels.cpu.attention import attend

    bias = None
    if mask is not None:
        seen = mask[:, 0, 0]
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf) if seen.dtype == torch.bool else seen.float()
    return attend(query, key, value, bias, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _kernel_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Half precision throughout, in main memory, rows of keys and of values one after another, one mask a sequence;
    nothing that requires a gradient."""
    batch, _, positions, width = key.shape
    return (
        type(query) is torch.Tensor  # the kernel takes addresses, which subclasses may not have
        and query.dtype in (torch.bfloat16, torch.float16)
        and all(rows.dtype == query.dtype and rows.stride()[2:] == (width, 1) for rows in (key, value))
        and all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in (query, key, value))
        and width % KERNEL_COLUMNS == 0
        and (
            mask is None
            or (mask.shape[0] in (1, batch) and mask.shape[1:] == (1, 1, positions) and not mask.requires_grad)
        )
    )


def register() -> None:
    """Make the function known to transformers; harmless to repeat."""
    ALL_ATTENTION_FUNCTIONS.register(GROUPED_SDPA, grouped_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED_SDPA, sdpa_mask)
