"""Parts that the kernels share: rounding, products that the interpreter can run, and the tokens of an expert."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from qmix.kernels.gpu.shapes import OLDEST_BF16

# Triton's interpreter (3.9) multiplies the bit patterns of bf16 and truncates where a GPU rounds: there products are
# in fp32 and numbers are rounded by hand.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
TYPES: dict[torch.dtype, Any] = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def to_half(x, HALF: tl.constexpr):
    """Return x, fp32, rounded to the nearest bf16 or fp16."""
    if INTERPRETED and HALF == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(HALF)


@triton.jit
def rounded(x, HALF: tl.constexpr):
    """Return x, fp32, rounded to bf16 or fp16 and widened again."""
    return to_half(x, HALF).to(tl.float32)


@triton.jit
def product(a, b, total):
    """Return a @ b + total: a and b in half precision, total in fp32."""
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, total)


@triton.jit
def expert_tokens(ids, order, chunks, pairs, PAIRS: tl.constexpr, N: tl.constexpr, TABLE: tl.constexpr):
    """Return the expert of program_id(1), -1 for none, and its up to N pairs of a token and an expert, -1 for none.

    Pairs are numbered token by token. With a table a program takes a chunk of the pairs in order of experts. Without
    one it takes a pair, and works if that is its expert's first, N-th, 2N-th pair and so on: then it is followed by
    the pairs that it works for. `PAIRS` is a power of two and at least `pairs`.
    """
    n = tl.arange(0, N)
    program = tl.program_id(1)
    if TABLE:
        expert = tl.load(chunks + program * 3)
        first = tl.load(chunks + program * 3 + 1)
        count = tl.load(chunks + program * 3 + 2)
        mine = tl.load(order + first + n, mask=n < count, other=-1)
    else:
        pair = tl.arange(0, PAIRS)
        chosen = tl.load(ids + pair, mask=pair < pairs, other=-1).to(tl.int32)
        expert = tl.load(ids + program).to(tl.int32)
        same = (chosen == expert) & (expert >= 0)
        rank = tl.cumsum(same.to(tl.int32), 0) - 1  # of a pair among its expert's
        before = tl.sum((same & (pair < program)).to(tl.int32))
        wanted = (before + n)[:, None] == rank[None, :]
        mine = tl.max(tl.where(wanted & same[None, :], pair[None, :], -1), 1)
        expert = tl.where(before % N == 0, expert, -1)
    return expert, mine


@cache
def tensor_cores(device: torch.device) -> bool:
    """Return whether Triton multiplies on a card's tensor cores: from Ampere on. The interpreter cuts as if it did."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST_BF16


def tile_of(tokens: int, device: torch.device) -> int:
    """Return how many of a step's tokens a program multiplies at once.

    Tensor cores multiply eight for the price of one. Without them each costs instructions and registers.
    """
    if tensor_cores(device):
        return 8 if tokens <= 8 else 16
    return min(4, power_of_two(tokens))


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()
