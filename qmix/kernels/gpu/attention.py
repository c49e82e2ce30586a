"""Attention of a step: rotary positions, the step's keys and values to the cache, and flash-decoding over it.

The cache of a layer is keys and values [B, G, capacity, D], B sequences with G key heads of width D. Row t of a step is
a token of sequence rows[t] at position positions[t], both in device memory; a negative position means no token. Several
tokens of a sequence may be in one step: each sees the positions up to its own.

The positions are cut into parts of a fixed size, each read by a program of its own; the parts' sums are put together in
order (Dao et al., "Flash-Decoding for long-context inference", 2023). A part that begins behind a token's position ends
at once. So a token's sums depend on its own position alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qmix.kernels.gpu.common import TYPES, product, rounded, to_half
from qmix.kernels.gpu.shapes import ATTENTION_SPLIT, attention_splits

TILE = 32  # positions at once
HEADS = 16  # rows of a product; query heads that share a key head fill some of them
GATHERED = 16  # parts put together at once


@triton.jit
def rotate_kernel(
    qkv, cos, sin, keys, values, rows, positions, capacity,
    Q: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Turn a query head in place, or turn a key head to the cache, or copy a value head there."""
    t, head = tl.program_id(0), tl.program_id(1)
    at = tl.load(positions + t)
    if at < 0:
        return
    d = tl.arange(0, D // 2)
    row = qkv + (t * (Q + 2 * G) + head).to(tl.int64) * D
    low, high = tl.load(row + d), tl.load(row + D // 2 + d)
    first, second = low, high
    if head < Q + G:
        c = tl.load(cos + at * (D // 2) + d).to(tl.float32)
        s = tl.load(sin + at * (D // 2) + d).to(tl.float32)
        a, b = low.to(tl.float32), high.to(tl.float32)
        first = to_half(rounded(a * c, HALF) + rounded(-b * s, HALF), HALF)
        second = to_half(rounded(b * c, HALF) + rounded(a * s, HALF), HALF)
    sequence = tl.load(rows + t)
    if head < Q:
        to = row
    elif head < Q + G:
        to = keys + ((sequence * G + head - Q) * capacity + at) * D
    else:
        to = values + ((sequence * G + head - Q - G) * capacity + at) * D
    tl.store(to + d, first)
    tl.store(to + D // 2 + d, second)


@triton.jit
def attend_kernel(
    qkv, keys, values, rows, positions, sums, stats, capacity, scale,
    Q: tl.constexpr, G: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Attend from one token's query heads of a key head to one part of the positions."""
    t, g, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(positions + t).to(tl.int32) + 1
    first = part * SPLIT
    if first >= length:
        return
    last = tl.minimum(first + SPLIT, length)
    SHARED: tl.constexpr = Q // G
    h, d, i = tl.arange(0, HEADS), tl.arange(0, D), tl.arange(0, TILE)
    head = t * (Q + 2 * G) + g * SHARED + h
    q = tl.load(qkv + head.to(tl.int64)[:, None] * D + d[None, :], mask=(h < SHARED)[:, None], other=0.0)
    start = (tl.load(rows + t) * G + g) * capacity * D
    most = tl.zeros((HEADS,), tl.float32) - 1e30
    weight = tl.zeros((HEADS,), tl.float32)
    total = tl.zeros((HEADS, D), tl.float32)
    for at in range(first, last, TILE):
        seen = at + i < last
        k = tl.load(keys + start + (at + i)[None, :] * D + d[:, None], mask=seen[None, :], other=0.0)
        v = tl.load(values + start + (at + i)[:, None] * D + d[None, :], mask=seen[:, None], other=0.0)
        scores = product(q, k, tl.zeros((HEADS, TILE), tl.float32)) * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        new = tl.maximum(most, tl.max(scores, 1))
        p = tl.where(seen[None, :], tl.exp(scores - new[:, None]), 0.0)
        old = tl.exp(most - new)
        weight = weight * old + tl.sum(p, 1)
        total = product(to_half(p, HALF), v, total * old[:, None])
        most = new
    to = ((t * Q + g * SHARED + h) * tl.num_programs(2) + part).to(tl.int64)
    tl.store(sums + to[:, None] * D + d[None, :], total, mask=(h < SHARED)[:, None])
    tl.store(stats + to * 2, most, mask=h < SHARED)
    tl.store(stats + to * 2 + 1, weight, mask=h < SHARED)


@triton.jit
def gather_kernel(
    sums, stats, positions, out, parts,
    Q: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Put the parts of a token's head together; zeros where there is no token."""
    t, head = tl.program_id(0), tl.program_id(1)
    used = tl.cdiv(tl.load(positions + t).to(tl.int32) + 1, SPLIT)
    p, d = tl.arange(0, PARTS), tl.arange(0, D)
    start = (t * Q + head).to(tl.int64) * parts
    most = -1e30
    weight = 0.0
    total = tl.zeros((D,), tl.float32)
    for at in range(0, used, PARTS):
        seen = at + p < used
        tops = tl.load(stats + (start + at + p) * 2, mask=seen, other=-1e30)
        new = tl.maximum(most, tl.max(tops, 0))
        factor = tl.where(seen, tl.exp(tops - new), 0.0)
        old = tl.exp(most - new)
        shares = tl.load(stats + (start + at + p) * 2 + 1, mask=seen, other=0.0)
        rows = tl.load(sums + (start + at + p)[:, None] * D + d[None, :], mask=seen[:, None], other=0.0)
        weight = weight * old + tl.sum(factor * shares, 0)
        total = total * old + tl.sum(rows * factor[:, None], 0)
        most = new
    to = out + (t * Q + head).to(tl.int64) * D + d
    tl.store(to, to_half(tl.where(used > 0, total / tl.where(used > 0, weight, 1.0), 0.0), HALF))


def rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Turn the queries of qkv [T, (Q + 2 G) * D] in place; write keys, turned, and values to the cache.

    cos and sin [positions, D / 2], rounded as the model rounds them. keys and values [B, G, capacity, D]. rows and
    positions [T] int64.
    """
    groups, capacity, width = keys.shape[1:]
    heads = qkv.shape[1] // width - 2 * groups
    rotate_kernel[(len(qkv), heads + 2 * groups)](
        qkv, cos, sin, keys, values, rows, positions, capacity,
        Q=heads, G=groups, D=width, HALF=TYPES[qkv.dtype], num_warps=1,
    )  # fmt: skip


def attend(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    sums: torch.Tensor,
    stats: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the attention of the queries in qkv [T, (Q + 2 G) * D] over the cache to out [T, Q * D].

    The work space, fp32, is sums [T, Q, P, D] and stats [T, Q, P, 2] with P = attention_splits(capacity).
    """
    tokens, (groups, capacity, width) = len(qkv), keys.shape[1:]
    heads, parts = qkv.shape[1] // width - 2 * groups, attention_splits(capacity)
    half = TYPES[qkv.dtype]
    attend_kernel[(tokens, groups, parts)](
        qkv, keys, values, rows, positions, sums, stats, capacity, width**-0.5,
        Q=heads, G=groups, D=width, SPLIT=ATTENTION_SPLIT, TILE=TILE, HEADS=HEADS, HALF=half, num_warps=4,
    )  # fmt: skip
    gather_kernel[(tokens, heads)](
        sums, stats, positions, out, parts,
        Q=heads, D=width, SPLIT=ATTENTION_SPLIT, PARTS=GATHERED, HALF=half, num_warps=2,
    )  # fmt: skip
