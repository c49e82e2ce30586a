"""Attention over shared key and value heads, without a copy of them for every query head.

transformers' sdpa repeats keys and values in memory wherever a mask is given (every prefill chunk but the first:
100 MB for 8x22B at 4096 tokens, 1.6 GB at 65536), and leaves the single query of a decode step to a kernel that is slow
on grouped heads. `grouped_sdpa` takes the query heads that share a key head one after another in prefill, and uses mask
and heads where they lie. In decode it treats them as queries of one head: sdpa while the cache is small, qmix's own
kernel beyond.

`row_attention` serves passes of many sequences. Every token is a row of the kernel by itself: what it sees, and in
which order it is summed, follows from its position alone. Neither the other sequences nor the chunks that a prompt was
taken in can change its result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qmix.geometry import HALF_BYTES
from qmix.model.kv import COLUMNS, Rows
from qmix.plan.memory import PREFILL_CHUNK

GROUPED_SDPA = "qmix_grouped_sdpa"  # names among transformers' attention functions
ROW_ATTENTION = "qmix_rows"
OWN_ATTENTION = (GROUPED_SDPA, ROW_ATTENTION)
KERNEL_NUMBERS = 2**18  # in the keys of a sequence: qmix's kernel pays from here on; smaller caches never load Numba


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
    """Return [B, T, H, D] for query [B, H, T, D], key and value [B, G, S, D], mask [B or 1, 1, T, S] or None.

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
    """Return [B, G, H / G, D] for the query [B, G, H / G, D] of one token a sequence."""
    if key[0].numel() < KERNEL_NUMBERS or dropout or not _kernel_takes(query, key, value, mask):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    from qmix.kernels.cpu.attention import attend

    bias = None
    if mask is not None:
        seen = mask[:, 0, 0]
        bias = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf) if seen.dtype == torch.bool else seen.float()
    return attend(query, key, value, bias, query.shape[-1] ** -0.5 if scaling is None else scaling)


def _kernel_takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Return whether qmix's kernel can read these tensors.

    It takes half precision in main memory, contiguous rows of keys and values, one mask a sequence, and no gradients.
    """
    batch, _, positions, width = key.shape
    return (
        type(query) is torch.Tensor  # the kernel takes addresses, which subclasses may not have
        and query.dtype in (torch.bfloat16, torch.float16)
        and all(rows.dtype == query.dtype and rows.stride()[2:] == (width, 1) for rows in (key, value))
        and all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in (query, key, value))
        and width % COLUMNS == 0
        and (
            mask is None
            or (mask.shape[0] in (1, batch) and mask.shape[1:] == (1, 1, positions) and not mask.requires_grad)
        )
    )


def row_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    rows: Rows,
    scaling: float,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Return [1, T, H, D] for query [1, H, T, D] over a layer of the cache [1, G, N, W]: each row over what it sees."""
    from qmix.kernels.cpu.attention import BLOCK, attend_rows

    _, heads, tokens, head_dim = query.shape
    _, groups, _, width = key.shape
    shared = F.pad(query[0].transpose(0, 1), (0, width - head_dim)).view(tokens, groups, heads // groups, width)
    table = torch.zeros(tokens, 4, dtype=torch.int64)
    table[:, 0] = key.data_ptr() + rows.first * width * HALF_BYTES
    table[:, 1] = value.data_ptr() + rows.first * width * HALF_BYTES
    table[:, 2] = rows.seen
    strides = key.stride(1) * HALF_BYTES, value.stride(1) * HALF_BYTES
    step = max(1, PREFILL_CHUNK * BLOCK // rows.longest)  # rows at once: the plan has room for their blocks' sums
    parts = [
        attend_rows(shared[i : i + step], table[i : i + step], strides, rows.longest, scaling)
        for i in range(0, tokens, step)
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(1, tokens, heads, width)[..., :head_dim], None


def register() -> None:
    """Make the functions known to transformers; harmless to repeat."""
    ALL_ATTENTION_FUNCTIONS.register(GROUPED_SDPA, grouped_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(GROUPED_SDPA, sdpa_mask)
    ALL_ATTENTION_FUNCTIONS.register(ROW_ATTENTION, row_attention)
