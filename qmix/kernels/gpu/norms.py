"""RMSNorm of the residual stream, what is added to it before, and the router after it: one launch.

Every row is computed by one program of its own. Results are rounded where transformers rounds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qmix.kernels.gpu.common import TYPES, power_of_two, rounded, to_half

NOTHING, DELTA, MIXTURE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Mixture:
    """Results of a layer's experts that are to be added: parts [splits, T * k, H] fp32 of experts on this device.

    ids [T, k] int64 (negative for none), weights [T, k] fp32, addresses [E] int64: 0 where an expert lies elsewhere.
    `away` [T * k, H] in half precision has the results of those; without it they add nothing.
    """

    parts: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    addresses: torch.Tensor
    away: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Router:
    """A router's weight, gate [E, H], and where its choice goes: ids [T, k] int64, weights [T, k] fp32.

    Where positions [T] int64 is given and negative there is no token: its ids are -1, its weights 0.
    """

    gate: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor | None = None


@triton.jit
def add_mixture(
    parts, away, addresses, ids, weights, t, c, pairs,
    H: tl.constexpr, TOP_K: tl.constexpr, SPLITS: tl.constexpr, AWAY: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Return the weighted sum of a token's experts: each one's parts in order, the experts in router order."""
    total = tl.zeros_like(c).to(tl.float32)
    for k in tl.static_range(TOP_K):
        pair = t * TOP_K + k
        expert = tl.load(ids + pair)
        address = tl.load(addresses + tl.maximum(expert, 0))
        here = tl.where((expert >= 0) & (address != 0), H, 0)  # columns to read: all or none
        y = tl.zeros_like(c).to(tl.float32)
        for s in tl.static_range(SPLITS):
            y += tl.load(parts + (s * pairs + pair).to(tl.int64) * H + c, mask=c < here, other=0.0)
        if AWAY:
            elsewhere = tl.where((expert >= 0) & (address == 0), H, 0)
            y += tl.load(away + pair.to(tl.int64) * H + c, mask=c < elsewhere, other=0.0).to(tl.float32)
        total += rounded(y, HALF) * tl.load(weights + pair)
    return rounded(total, HALF)


@triton.jit
def route(
    normed, gate, positions, new_ids, new_weights, t, c, inside,
    H: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, IDLE: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Write the TOP_K experts of the largest softmax, the lower number first among equals, and their shares."""
    e = tl.arange(0, EXPERTS)
    g = tl.load(gate + e[:, None] * H + c[None, :], mask=(e < E)[:, None] & inside[None, :], other=0.0)
    logits = rounded(tl.sum(g.to(tl.float32) * normed[None, :], 1), HALF)
    logits = tl.where(e < E, logits, float("-inf"))
    scores = tl.exp(logits - tl.max(logits))
    scores = scores / tl.sum(scores)
    total = 0.0
    kept = tl.where(e < E, scores, -1.0)
    for _ in tl.static_range(TOP_K):
        total += tl.max(kept)
        kept = tl.where(e == tl.argmax(kept, 0), -1.0, kept)
    idle = False
    if IDLE:
        idle = tl.load(positions + t) < 0
    kept = tl.where(e < E, scores, -1.0)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(kept, 0)
        tl.store(new_ids + t * TOP_K + k, tl.where(idle, -1, best).to(tl.int64))
        tl.store(new_weights + t * TOP_K + k, tl.where(idle, 0.0, tl.max(kept) / total))
        kept = tl.where(e == best, -1.0, kept)


@triton.jit
def norm_kernel(
    stream, delta, parts, away, addresses, ids, weights, weight, out, gate, positions, new_ids, new_weights, eps, pairs,
    H: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, SPLITS: tl.constexpr, TOP_K: tl.constexpr,
    AWAY: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr, CHOSEN: tl.constexpr, IDLE: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Add to a row of the stream, write its RMSNorm, and with E the choice of its experts."""
    t = tl.program_id(0)
    c = tl.arange(0, WIDTH)
    inside = c < H
    row = t.to(tl.int64) * H + c
    h = tl.load(stream + row, mask=inside, other=0.0).to(tl.float32)
    if SOURCE == 1:
        h += tl.load(delta + row, mask=inside, other=0.0).to(tl.float32)
    if SOURCE == 2:
        h += add_mixture(parts, away, addresses, ids, weights, t, c, pairs, H, TOP_K, SPLITS, AWAY, HALF)
    if SOURCE != 0:
        h = rounded(h, HALF)
        tl.store(stream + row, to_half(h, HALF), mask=inside)
    n = rounded(h * tl.rsqrt(tl.sum(h * h) / H + eps), HALF)
    n = rounded(n * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32), HALF)
    tl.store(out + row, to_half(n, HALF), mask=inside)
    if E > 0:
        route(n, gate, positions, new_ids, new_weights, t, c, inside, H, E, EXPERTS, CHOSEN, IDLE, HALF)


def norm(
    stream: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    eps: float,
    *,
    delta: torch.Tensor | None = None,
    mixture: Mixture | None = None,
    router: Router | None = None,
) -> None:
    """Add `delta` [T, H] or `mixture` to stream [T, H], in place; write its RMSNorm with weight [H] to out [T, H].

    With `router` also choose each token's experts from the normed row. All rows are contiguous, bf16 or fp16.
    """
    tokens, hidden = stream.shape
    source = DELTA if delta is not None else MIXTURE if mixture is not None else NOTHING
    adds = mixture or Mixture(stream, stream, stream, stream)
    to = router or Router(stream, stream, stream)
    width = power_of_two(hidden)
    norm_kernel[(tokens,)](
        stream, stream if delta is None else delta, adds.parts, stream if adds.away is None else adds.away,
        adds.addresses, adds.ids, adds.weights, weight, out, to.gate,
        to.ids if to.positions is None else to.positions, to.ids, to.weights, eps, adds.ids.numel(),
        H=hidden, WIDTH=width, SOURCE=source, SPLITS=len(adds.parts) if mixture else 0,
        TOP_K=adds.ids.shape[1] if mixture else 0, AWAY=adds.away is not None,
        E=len(to.gate) if router else 0, EXPERTS=power_of_two(len(to.gate)) if router else 0,
        CHOSEN=to.ids.shape[1] if router else 0, IDLE=to.positions is not None, HALF=TYPES[stream.dtype],
        num_warps=_warps(width),
    )  # fmt: skip


def _warps(width: int) -> int:
    """Return the warps of a program: 8 columns a lane where that is possible."""
    return min(32, max(1, width // 256))
