"""Shapes that the kernels take, the cuts of their sums, and the work space that follows. Loads no torch, no Triton.

The cuts depend on the shapes of weights alone, never on the number of tokens, so a token's sums have one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from qmix.kernels.packing import BLOCK

FOUR_BITS = ("nf4", "fp4")
DTYPES = ("bf16", "fp16")
FEW_TOKENS = 32  # tokens up to which `moe` finds an expert's tokens without a table
DENSE_FROM = 64  # tokens of an expert from which dequantising it pays, where nothing was measured
MOST_IN_PLACE = 256  # tokens of an expert up to which it may be multiplied in place: its sums take memory
ATTENTION_SPLIT = 128  # positions of a part of attention, which one program reads
SAMPLE_BLOCK = 1024  # logits that one program of sampling compares
OLDEST = (7, 5)  # compute capability of Turing; it has no products in bf16
OLDEST_BF16 = (8, 0)  # Ampere


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The places of an expert record's parts. All offsets are in bytes, in the order w1, w3, w2.

    `codes` are the weights or their codes, `scales` absmax (nf4, fp4) or row_max (int8); `half` has no scales. w1 and
    w3 are [inner, hidden], w2 is [hidden, inner]. Records begin at multiples of 64 bytes, and so does every part.
    """

    precision: str
    hidden: int
    inner: int
    codes: tuple[int, int, int]
    scales: tuple[int, int, int] = (0, 0, 0)


def available() -> bool:
    """Return whether Triton is installed; torch's wheels for CUDA bring it."""
    return find_spec("triton") is not None


def fits(shape: ExpertShape, dtype: str, capability: tuple[int, int] | None = None) -> bool:
    """Return whether the kernels take records of this shape with x in `dtype`, "bf16" or "fp16".

    `capability` is the card's compute capability, None for Triton's interpreter. 4-bit records must be packed: other
    shapes lie in bitsandbytes' order.
    """
    if not fits_card(dtype, capability):
        return False
    packed = shape.hidden % BLOCK == 0 and shape.inner % BLOCK == 0
    return packed if shape.precision in FOUR_BITS else shape.precision in ("int8", "half")


def fits_card(dtype: str, capability: tuple[int, int] | None) -> bool:
    """Return whether the card multiplies numbers of this type."""
    if dtype not in DTYPES:
        return False
    return capability is None or capability >= (OLDEST_BF16 if dtype == "bf16" else OLDEST)


def fits_attention(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Return whether the attention kernels take these heads: widths are powers of two, 16 query heads share a key."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0 and heads % kv_heads == 0 and heads // kv_heads <= 16


def warps_of(columns: int, splits: int = 1) -> int:
    """Return into how many parts the warps of a program cut its share of the columns."""
    return 2 if columns % (2 * splits * BLOCK) == 0 else 1


def down_splits(inner: int) -> int:
    """Return into how many partial sums w2's products are cut."""
    blocks = inner // BLOCK
    if inner % BLOCK:
        return 1
    return next(splits for splits in (4, 2, 1) if blocks % (2 * splits) == 0 or splits == 1)


def attention_splits(capacity: int) -> int:
    """Return into how many parts attention cuts a KV cache of `capacity` positions."""
    return -(-capacity // ATTENTION_SPLIT)


def sample_blocks(vocabulary: int) -> int:
    """Return into how many parts sampling cuts a row of logits."""
    return -(-vocabulary // SAMPLE_BLOCK)
