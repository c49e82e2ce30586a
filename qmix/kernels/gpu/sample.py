"""The next token on the device: the largest logit, or a draw at a temperature.

A draw is the largest of logit / temperature + Gumbel noise (Maddison et al., "A* sampling", 2014), which has the
probabilities of softmax. The noise of a logit follows from the token's seed, its position and the logit's place alone
(Philox), so a sequence draws the same tokens whatever else is in the step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qmix.kernels.gpu.common import power_of_two
from qmix.kernels.gpu.shapes import SAMPLE_BLOCK, sample_blocks


@triton.jit
def first_of_largest(values, numbers):
    """Return the largest value and the smallest of its numbers."""
    best = tl.max(values, 0)
    return best, tl.min(tl.where(values == best, numbers, 2147483647), 0)


@triton.jit
def block_kernel(logits, temperatures, seeds, positions, best, places, vocabulary, BLOCK: tl.constexpr):
    """Write the largest score of a block of a row of logits, and its place."""
    t, block = tl.program_id(0), tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < vocabulary
    score = tl.load(logits + t.to(tl.int64) * vocabulary + place, mask=inside, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperatures + t)
    if temperature > 0:
        counter = tl.load(positions + t).to(tl.uint32) + tl.zeros_like(place).to(tl.uint32)
        zero = tl.zeros_like(counter)
        random, _, _, _ = tl.philox(tl.load(seeds + t), place.to(tl.uint32), counter, zero, zero)
        uniform = tl.maximum(tl.uint_to_uniform_float(random), 1e-10)
        score = score / temperature - tl.log(-tl.log(uniform))
        score = tl.where(inside, score, float("-inf"))
    top, number = first_of_largest(score, place)
    to = t * tl.num_programs(1) + block
    tl.store(best + to, top)
    tl.store(places + to, number)


@triton.jit
def choose_kernel(best, places, out, blocks, vocabulary, BLOCKS: tl.constexpr):
    """Write the place of the largest score of a row's blocks; the last place where there is none, with NaN."""
    t = tl.program_id(0)
    b = tl.arange(0, BLOCKS)
    scores = tl.load(best + t * blocks + b, mask=b < blocks, other=float("-inf"))
    numbers = tl.load(places + t * blocks + b, mask=b < blocks, other=2147483647)
    _, number = first_of_largest(scores, numbers)
    tl.store(out + t, tl.minimum(number, vocabulary - 1).to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    best: torch.Tensor,
    places: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write the next token of each row of logits [T, V], bf16, fp16 or fp32, to out [T] int64.

    temperatures [T] fp32: 0 takes the largest logit, the first among equals. seeds and positions [T] int64. Work space:
    best fp32 and places int32, both [T, sample_blocks(V)].
    """
    tokens, vocabulary = logits.shape
    blocks = sample_blocks(vocabulary)
    block_kernel[(tokens, blocks)](
        logits, temperatures, seeds, positions, best, places, vocabulary, BLOCK=SAMPLE_BLOCK, num_warps=4
    )
    choose_kernel[(tokens,)](best, places, out, blocks, vocabulary, BLOCKS=power_of_two(blocks), num_warps=1)
