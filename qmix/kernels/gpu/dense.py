"""Products of a step's tokens with dense weights in half precision, at the rate of reading the weights.

A program takes 16 rows of the weights; its warps share the columns, and their sums are added in order. One kernel for
any number of tokens: a token's sums do not depend on the others. With many tokens torch.mm is faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qmix.kernels.gpu.common import TYPES, tile_of, to_half
from qmix.kernels.gpu.rows import ROWS, row_sums

PARTS = 4  # of the columns, one for a warp
COLUMNS = 64  # at once


@triton.jit
def linear_kernel(
    x, weight, out, rows, columns, tokens,
    M: tl.constexpr, N: tl.constexpr, S: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, ROUND: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write x @ weight.T of M rows of the weight and N tokens."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    token = tl.program_id(1) * N + tl.arange(0, N)
    row_seen, x_seen = row < rows, token < tokens
    span = tl.cdiv(tl.cdiv(columns, K), S) * K
    column = (tl.arange(0, S) * span)[:, None] + tl.arange(0, K)[None, :]
    at = weight + row.to(tl.int64)[None, :, None] * columns + column[:, None, :]
    x_at = x + token.to(tl.int64)[None, None, :] * columns + column[:, :, None]
    sums = row_sums(at, x_at, column, columns, span, row_seen, x_seen, HALF, K, STAGES)
    to = out + token.to(tl.int64)[None, :] * rows + row[:, None]
    kept = x_seen[None, :] & row_seen[:, None]
    if ROUND:
        tl.store(to, to_half(sums, HALF), mask=kept)
    else:
        tl.store(to, sums, mask=kept)


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write x [T, columns] @ weight.T to out [T, rows], in x's type or fp32; weight [rows, columns]. All contiguous."""
    (tokens, columns), rows = x.shape, len(weight)
    tile = tile_of(tokens, x.device)
    linear_kernel[(-(-rows // ROWS), -(-tokens // tile))](
        x, weight, out, rows, columns, tokens,
        M=ROWS, N=tile, S=PARTS, K=COLUMNS, HALF=TYPES[x.dtype], ROUND=out.dtype == x.dtype, STAGES=4, num_warps=PARTS,
    )  # fmt: skip
