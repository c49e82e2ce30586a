"""The PTX that looks up nf4 and fp4 is run by an emulator of the ten instructions that it uses."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qmix.kernels.gpu.lookup import OPERANDS, VALUES, WIDE_OPERANDS, bits, eight, eight_wide
from qmix.precision.bitsandbytes import functional as bnb

LANES = 32
Words = npt.NDArray[np.uint32]
TORCH = {
    "bf16": (torch.bfloat16, torch.int16),
    "fp16": (torch.float16, torch.int16),
    "fp32": (torch.float32, torch.int32),
}
SIMPLE = {
    "mov.u32": lambda a: a.copy(),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "setp.ne.u32": lambda a, b: a != b,
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "shfl.sync.idx.b32": lambda a, lane, clamp, members: a[lane & 31],
}


def prmt(a: Words, b: Words, selector: Words) -> Words:
    """Choose four of the eight bytes of a and b."""
    both, out = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32), np.zeros(LANES, np.uint32)
    for i in range(4):
        which = (selector >> np.uint32(4 * i)) & 15
        assert (which < 8).all(), "the sign mode is not wanted"
        out |= ((both >> (8 * which.astype(np.uint64))) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * i)
    return out


def emulate(text: str, operands: str, words: Words) -> Words:
    """Return registers $0 to $7 of all lanes, [8, 32], for the words of the registers after them."""
    registers = {f"${8 + i}": row.copy() for i, row in enumerate(words)}
    registers["%laneid"] = np.arange(LANES, dtype=np.uint32)
    assert operands == ",".join(["=&r"] * 8 + ["r"] * len(words))
    for line in text.removeprefix("{").removesuffix("}").split(";"):
        instruction, _, rest = line.strip().partition(" ")
        if instruction in ("", ".reg"):
            continue
        to, *names = (name.strip() for name in rest.split(","))
        values = [registers[n] if n in registers else np.full(LANES, int(n, 0), np.uint32) for n in names]
        registers[to] = (SIMPLE | {"prmt.b32": prmt})[instruction](*values)
    return np.stack([registers[f"${i}"] for i in range(8)])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", VALUES)
def test_eight_pairs_of_numbers(kind, dtype):
    table = np.array([bits(value, dtype) for value in VALUES[kind]], np.uint32)
    words = np.random.default_rng(0).integers(0, 2**32, (2, LANES), dtype=np.uint32)
    found = emulate(eight(kind, dtype), OPERANDS, words)
    for nibble in range(8):
        low, high = table[(words >> np.uint32(4 * nibble)) & 15]
        np.testing.assert_array_equal(found[nibble], low | high << 16)


@pytest.mark.parametrize("kind", VALUES)
def test_eight_wide_numbers(kind):
    table = np.array([bits(value, "fp32") for value in VALUES[kind]], np.uint32)
    words = np.random.default_rng(1).integers(0, 2**32, (1, LANES), dtype=np.uint32)
    found = emulate(eight_wide(kind), WIDE_OPERANDS, words)
    for nibble in range(8):
        np.testing.assert_array_equal(found[nibble], table[(words[0] >> np.uint32(4 * nibble)) & 15])


@pytest.mark.parametrize("kind", VALUES)
def test_values_are_those_of_bitsandbytes(kind):
    codes = torch.arange(16, dtype=torch.uint8).repeat_interleave(2).view(-1, 2)
    packed = (codes[:, :1] << 4 | codes[:, 1:]).repeat_interleave(2, 0)  # 64 weights, four of each code
    _, state = bnb.quantize_4bit(torch.ones(1, 64), blocksize=64, quant_type=kind)  # with absmax 1
    wanted = bnb.dequantize_4bit(packed, state).view(16, 4)[:, 0]
    assert torch.equal(torch.tensor(VALUES[kind], dtype=torch.float32), wanted)


@pytest.mark.parametrize("dtype", TORCH)
def test_rounding_is_torchs(dtype):
    half, whole = TORCH[dtype]
    mask = 0xFFFF if whole is torch.int16 else 0xFFFFFFFF
    for value in (*VALUES["nf4"], *VALUES["fp4"], 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11):
        assert bits(value, dtype) == torch.tensor(value, dtype=torch.float32).to(half).view(whole).item() & mask
