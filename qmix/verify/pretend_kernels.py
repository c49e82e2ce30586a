"""Shape functions in the place of the GPU kernels: they check operands as the kernels use them, and compute nothing.

The launches of a captured step run through them on pretend devices. What looks at a value raises there, as it would
spoil a capture.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qmix.kernels.gpu.shapes import ExpertShape, attention_splits, down_splits, sample_blocks
from qmix.model.gpu.matrices import check_together

WIDE, INDEX = torch.float32, torch.int64


def check(operand: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, what: str) -> None:
    """Raise RuntimeError where an operand has another shape or type, or is not contiguous."""
    if tuple(operand.shape) != shape or operand.dtype != dtype or not operand.is_contiguous():
        raise RuntimeError(f"{what}: {list(operand.shape)} of {operand.dtype}, not {list(shape)} of {dtype}")


class PretendRouter(NamedTuple):
    """The operands of a router."""

    gate: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor


class PretendMixture(NamedTuple):
    """The results of a layer's experts."""

    parts: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    addresses: torch.Tensor
    away: torch.Tensor | None


class PretendKernels:
    """The functions of `qmix.model.gpu.kernels.TritonKernels`; `launches` counts the calls."""

    Router, Mixture = PretendRouter, PretendMixture

    def __init__(self) -> None:
        self.launches = 0

    def address(self, tensor: torch.Tensor) -> int:
        """Return an address that is not 0; fake tensors have none."""
        return 4096

    def linear(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        (rows, columns), tokens = weight.shape, len(x)
        check_together("a product", x, weight, out)
        check(weight, (rows, columns), x.dtype, "a matrix")
        check(x, (tokens, columns), x.dtype, "x")
        check(out, (tokens, rows), out.dtype, "a product")
        self.launches += 1

    def rotate(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        capacity, width = keys.shape[2:]
        check_together("rotary positions", qkv, cos, sin, keys, values, rows, positions)
        for table in (cos, sin):
            check(table, (capacity, width // 2), qkv.dtype, "a rotary table")
        for index in (rows, positions):
            check(index, (len(qkv),), INDEX, "rows and positions")
        check(values, tuple(keys.shape), qkv.dtype, "the cache")
        self.launches += 1

    def attend(
        self,
        qkv: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        positions: torch.Tensor,
        sums: torch.Tensor,
        stats: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        tokens, (groups, capacity, width) = len(qkv), keys.shape[1:]
        heads, parts = qkv.shape[1] // width - 2 * groups, attention_splits(capacity)
        check_together("attention", qkv, keys, values, rows, positions, sums, stats, out)
        check(sums, (tokens, heads, parts, width), WIDE, "attention's sums")
        check(stats, (tokens, heads, parts, 2), WIDE, "attention's weights")
        check(out, (tokens, heads * width), qkv.dtype, "attention")
        self.launches += 2

    def norm(
        self,
        stream: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        eps: float,
        *,
        delta: torch.Tensor | None = None,
        mixture: PretendMixture | None = None,
        router: PretendRouter | None = None,
    ) -> None:
        tokens, hidden = stream.shape
        for rows in (stream, out, *([] if delta is None else [delta])):
            check_together("a norm", rows, weight)
            check(rows, (tokens, hidden), weight.dtype, "rows of a norm")
        if mixture is not None:
            pairs = mixture.ids.numel()
            check_together("a mixture", stream, mixture.parts, mixture.ids, mixture.weights, mixture.addresses)
            check(mixture.parts, (len(mixture.parts), pairs, hidden), WIDE, "the experts' sums")
            if mixture.away is not None:
                check_together("a mixture", stream, mixture.away)
                check(mixture.away, (pairs, hidden), stream.dtype, "the host's results")
        if router is not None:
            check_together("a router", stream, router.gate, router.ids, router.weights, router.positions)
            check(router.gate, (len(router.gate), hidden), stream.dtype, "a router")
            check(router.weights, tuple(router.ids.shape), WIDE, "a router's weights")
        self.launches += 1

    def gate_up(
        self, shape: ExpertShape, addresses: torch.Tensor, ids: torch.Tensor, x: torch.Tensor, out: torch.Tensor
    ) -> None:
        check_together("experts", addresses, ids, x, out)
        check(x, (len(ids), shape.hidden), x.dtype, "x of experts")
        check(out, (ids.numel(), shape.inner), x.dtype, "inner values")
        check(ids, tuple(ids.shape), INDEX, "ids")
        self.launches += 1

    def down(
        self, shape: ExpertShape, addresses: torch.Tensor, ids: torch.Tensor, inner: torch.Tensor, parts: torch.Tensor
    ) -> None:
        check_together("experts", addresses, ids, inner, parts)
        check(inner, (ids.numel(), shape.inner), inner.dtype, "inner values")
        check(parts, (down_splits(shape.inner), ids.numel(), shape.hidden), WIDE, "the experts' sums")
        self.launches += 1

    def sample(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        best: torch.Tensor,
        places: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        tokens, vocabulary = logits.shape
        check_together("sampling", logits, temperatures, seeds, positions, best, places, out)
        check(best, (tokens, sample_blocks(vocabulary)), WIDE, "sampling's scores")
        check(out, (tokens,), INDEX, "chosen tokens")
        self.launches += 2
