"""int8 and half precision: products of tokens with row-major matrices where they lie in a record.

A weight in int8 becomes one in half precision in a register, exactly; sums are multiplied by row_max / 127 at the end.
Axes of tiles: S parts of the columns, added in this order at the end; M rows; N tokens. Any shape fits: what lies past
a row's or the matrix's end is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qmix.kernels.gpu.common import INTERPRETED, expert_tokens, product, to_half

ROWS = 16  # of a program


@triton.jit
def as_weights(w, HALF: tl.constexpr):
    """Return codes in int8, or weights, as weights in half precision; the interpreter has no such step from int8."""
    if INTERPRETED:
        return w.to(tl.float32)
    else:
        return w.to(HALF)


@triton.jit
def row_sums(weights_at, x_at, column, columns, span, row_seen, x_seen, HALF: tl.constexpr, K: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    """Return sums [M, N] of weights [S, M, K] * x [S, K, N] over all columns.

    Part s begins at column[s, 0] and has `span` columns, a multiple of K; the last part may be shorter.
    """
    total = tl.zeros((weights_at.shape[0], weights_at.shape[1], x_at.shape[2]), tl.float32)
    for at in tl.range(0, span, K, num_stages=STAGES):
        inside = column + at < columns
        w = tl.load(weights_at + at, mask=inside[:, None, :] & row_seen[None, :, None], other=0)
        xs = tl.load(x_at + at, mask=inside[:, :, None] & x_seen[None, None, :], other=0.0)
        total = product(as_weights(w, HALF), xs, total)
    return tl.sum(total, 0)


@triton.jit
def scaled(sums, scales, row, row_seen, SCALED: tl.constexpr):
    """Return sums [M, N] times row_max / 127 of their rows."""
    if SCALED:
        return sums * (tl.load(scales + row, mask=row_seen, other=0.0) / 127)[:, None]
    else:
        return sums


@triton.jit
def gate_up_rows(
    records, ids, order, chunks, x, out, gate, gate_scales, up, up_scales, hidden, inner, pairs,
    WEIGHT: tl.constexpr, TOP_K: tl.constexpr, PAIRS: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    TABLE: tl.constexpr, HALF: tl.constexpr, SCALED: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write silu(gate(x)) * up(x) of M rows, for tokens of one expert, to their rows of `out`.

    Offsets in a record are in bytes. An expert whose address is 0 is left out.
    """
    expert, mine = expert_tokens(ids, order, chunks, pairs, PAIRS, N, TABLE)
    if expert < 0:
        return
    record = tl.multiple_of(tl.load(records + expert), 64)
    if record == 0:
        return
    row = tl.program_id(0) * M + tl.arange(0, M)
    row_seen, x_seen = row < inner, mine >= 0
    span = tl.cdiv(tl.cdiv(hidden, K), S) * K
    column = (tl.arange(0, S) * span)[:, None] + tl.arange(0, K)[None, :]
    at = row.to(tl.int64)[None, :, None] * hidden + column[:, None, :]
    x_row = tl.where(x_seen, mine // TOP_K, 0).to(tl.int64)
    x_at = x + x_row[None, None, :] * hidden + column[:, :, None]
    base = tl.multiple_of((record + gate).to(tl.pointer_type(WEIGHT)), 16)
    a = row_sums(base + at, x_at, column, hidden, span, row_seen, x_seen, HALF, K, STAGES)
    base = tl.multiple_of((record + up).to(tl.pointer_type(WEIGHT)), 16)
    b = row_sums(base + at, x_at, column, hidden, span, row_seen, x_seen, HALF, K, STAGES)
    a = scaled(a, (record + gate_scales).to(tl.pointer_type(tl.float32)), row, row_seen, SCALED)
    b = scaled(b, (record + up_scales).to(tl.pointer_type(tl.float32)), row, row_seen, SCALED)
    to = out + mine[None, :].to(tl.int64) * inner + row[:, None]
    tl.store(to, to_half(a * tl.sigmoid(a) * b, HALF), mask=x_seen[None, :] & row_seen[:, None])


@triton.jit
def down_rows(
    records, ids, order, chunks, x, out, down, down_scales, hidden, inner, pairs,
    WEIGHT: tl.constexpr, PAIRS: tl.constexpr, N: tl.constexpr, S: tl.constexpr, TABLE: tl.constexpr,
    HALF: tl.constexpr, SCALED: tl.constexpr, M: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write part program_id(2) of down(x), fp32, of M rows for tokens of one expert; see `gate_up_rows`."""
    expert, mine = expert_tokens(ids, order, chunks, pairs, PAIRS, N, TABLE)
    if expert < 0:
        return
    record = tl.multiple_of(tl.load(records + expert), 64)
    if record == 0:
        return
    row = tl.program_id(0) * M + tl.arange(0, M)
    row_seen, x_seen = row < hidden, mine >= 0
    span = tl.cdiv(tl.cdiv(inner, K), S * tl.num_programs(2)) * K
    part = tl.arange(0, S) + tl.program_id(2) * S
    column = (part * span)[:, None] + tl.arange(0, K)[None, :]
    at = row.to(tl.int64)[None, :, None] * inner + column[:, None, :]
    x_at = x + tl.maximum(mine, 0).to(tl.int64)[None, None, :] * inner + column[:, :, None]
    base = tl.multiple_of((record + down).to(tl.pointer_type(WEIGHT)), 16)
    sums = row_sums(base + at, x_at, column, inner, span, row_seen, x_seen, HALF, K, STAGES)
    sums = scaled(sums, (record + down_scales).to(tl.pointer_type(tl.float32)), row, row_seen, SCALED)
    to = out + tl.program_id(2).to(tl.int64) * pairs * hidden + mine[None, :].to(tl.int64) * hidden + row[:, None]
    tl.store(to, sums, mask=x_seen[None, :] & row_seen[:, None])
