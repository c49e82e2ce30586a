"""Experts with many tokens: each matrix dequantised once a use into a buffer and multiplied by torch, or in place.

    dequantize    a matrix of a record to [rows, columns] in half precision, one launch, no reordering
    forward       an expert's forward with a buffer for one matrix
    in_place      the same by `moe`'s kernels
    dense_from    the tokens of an expert from which `forward` is the faster one, measured on the card

`moe.gate_up` and `moe.down` with groups keep one order of sums whatever the number of tokens; torch.mm does not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from qmix.kernels.gpu import moe
from qmix.kernels.gpu.common import INTERPRETED, TYPES, to_half
from qmix.kernels.gpu.fourbit import both_scales
from qmix.kernels.gpu.lookup import WIDE_OPERANDS, eight_wide
from qmix.kernels.gpu.shapes import DENSE_FROM, FEW_TOKENS, FOUR_BITS, MOST_IN_PLACE, ExpertShape, down_splits

PAIRS = 64  # of columns, in a program: two blocks
MEASURED = (8, 16, 32, 64, 128, MOST_IN_PLACE)  # tokens of an expert
CLEARLY = 0.95  # of the other way's time: noise of the measurement makes no choice
GATED = 1024  # numbers of a program of `gate_kernel`


@triton.jit
def nibble(words, table, shift: tl.constexpr):
    """Return the value of one nibble of each word, looked up in memory: portable."""
    return tl.load(table + ((words >> shift) & 15))


@triton.jit
def eight_wide_values(words, table, ASM: tl.constexpr, OPERANDS: tl.constexpr):
    """Return the values in fp32, before absmax, of the eight nibbles of each word. Without ASM by `table`."""
    if ASM == "":
        v0, v1 = nibble(words, table, 0), nibble(words, table, 4)
        v2, v3 = nibble(words, table, 8), nibble(words, table, 12)
        v4, v5 = nibble(words, table, 16), nibble(words, table, 20)
        v6, v7 = nibble(words, table, 24), nibble(words, table, 28)
        return v0, v1, v2, v3, v4, v5, v6, v7
    else:
        return tl.inline_asm_elementwise(
            ASM, OPERANDS, [words], is_pure=True, pack=1,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32,
                   tl.float32, tl.float32, tl.float32, tl.float32),
        )  # fmt: skip


@triton.jit
def as_pair(low, high, HALF: tl.constexpr):
    """Return two tensors rounded to half precision in one int32, `low` in the lower half."""
    a = to_half(low, HALF).to(tl.int16, bitcast=True).to(tl.int32)
    b = to_half(high, HALF).to(tl.int16, bitcast=True).to(tl.int32)
    return (a & 0xFFFF) | (b << 16)


@triton.jit
def dequantize_kernel(
    codes, scales, table, out, rows, columns,
    HALF: tl.constexpr, ASM: tl.constexpr, OPERANDS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write 32 rows and PAIRS pairs of columns; codes, scales and out in int32 words, see `fourbit`."""
    group = tl.program_id(0)
    p = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    q = tl.arange(0, 8)
    inside = (p < columns // 2)[:, None] & (q >= 0)[None, :]
    words = tl.load(codes + group * (columns * 4) + p[:, None] * 8 + q[None, :], mask=inside, other=0)
    at = scales + (p // 32)[:, None] * (rows // 2) + (group * 16 + q)[None, :]
    s0, s2 = both_scales(tl.load(at, mask=inside, other=0))
    s1, s3 = both_scales(tl.load(at + 8, mask=inside, other=0))
    v0, v1, v2, v3, v4, v5, v6, v7 = eight_wide_values(words, table, ASM, OPERANDS)
    to = out + (group * 32 + 2 * q).to(tl.int64)[None, :] * (columns // 2) + p[:, None]
    tl.store(to, as_pair(v0 * s0, v2 * s0, HALF), mask=inside)
    tl.store(to + 16 * (columns // 2), as_pair(v1 * s1, v3 * s1, HALF), mask=inside)
    tl.store(to + columns // 2, as_pair(v4 * s2, v6 * s2, HALF), mask=inside)
    tl.store(to + 17 * (columns // 2), as_pair(v5 * s3, v7 * s3, HALF), mask=inside)


@triton.jit
def gate_kernel(gate, up, out, count, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Write silu(gate) * up of `count` numbers."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + i, mask=i < count, other=0.0).to(tl.float32)
    b = tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, to_half(a * tl.sigmoid(a) * b, HALF), mask=i < count)


def matrix_shape(shape: ExpertShape, matrix: int) -> tuple[int, int]:
    """Return the rows and columns of w1 (0), w3 (1) or w2 (2)."""
    return (shape.hidden, shape.inner) if matrix == 2 else (shape.inner, shape.hidden)


def dequantize(shape: ExpertShape, record: torch.Tensor, matrix: int, out: torch.Tensor) -> torch.Tensor:
    """Write w1 (0), w3 (1) or w2 (2) of a record, uint8 on the device, to `out` and return it as [rows, columns].

    `out` is flat, bf16 or fp16, with room for the matrix. A weight is its value times absmax in fp32, rounded once. The
    codes of int8 are widened, exactly; their scales belong to the sums.
    """
    rows, columns = matrix_shape(shape, matrix)
    to = out[: rows * columns].view(rows, columns)
    raw = record[shape.codes[matrix] :]
    if shape.precision not in FOUR_BITS:
        to.copy_(raw[: rows * columns].view(torch.int8).view(rows, columns))
        return to
    codes = raw[: rows * columns // 2].view(torch.int32)
    scales = record[shape.scales[matrix] :][: rows * columns // 32].view(torch.int32)
    asm = "" if INTERPRETED or torch.version.cuda is None else eight_wide(shape.precision)
    table = moe.value_table(shape.precision, torch.float32, record.device)
    dequantize_kernel[(rows // 32, -(-columns // (2 * PAIRS)))](
        codes, scales, table, to.view(torch.int32), rows, columns,
        HALF=TYPES[out.dtype], ASM=asm, OPERANDS=WIDE_OPERANDS, PAIRS=PAIRS, num_warps=2,
    )  # fmt: skip
    return to


def forward(shape: ExpertShape, record: torch.Tensor, x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Return w2 (silu(w1 x) * (w3 x)) for x [T, H], by torch's products of dequantised matrices.

    `record` uint8 on the device. `buffer` is flat, in x's type, of hidden * inner numbers; `half` does not use it.
    """
    gate = _multiply(shape, record, 0, x, buffer)
    up = _multiply(shape, record, 1, x, buffer)
    gate_kernel[(-(-gate.numel() // GATED),)](
        gate, up, gate, gate.numel(), HALF=TYPES[x.dtype], BLOCK=GATED, num_warps=4
    )
    return _multiply(shape, record, 2, gate, buffer)


def dense_from(shape: ExpertShape, record: torch.Tensor, dtype: torch.dtype, buffer: torch.Tensor) -> int:
    """Return the fewest tokens of an expert from which `forward` is faster than `moe`'s kernels, for one chunk a run.

    Both are timed on the record's device, a CUDA device; elsewhere the answer is `DENSE_FROM`.
    """
    if record.device.type != "cuda":
        return DENSE_FROM
    for tokens in MEASURED:
        x = torch.randn(tokens, shape.hidden, dtype=dtype, device=record.device)
        if _seconds(partial(forward, shape, record, x, buffer)) < CLEARLY * _seconds(
            partial(in_place, shape, record, x)
        ):
            return tokens
    return 2 * MEASURED[-1]


def in_place(shape: ExpertShape, record: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the same of `moe`'s kernels, which read the record where it lies: [T, H] of x [T, H].

    The work space of a token are its inner values and `down_splits` partial results in fp32.
    """
    ids = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
    addresses = torch.full((1,), record.data_ptr(), dtype=torch.int64, device=x.device)
    groups = moe.one_group(len(x), x.device) if len(x) > FEW_TOKENS else None
    inner = x.new_empty(len(x), shape.inner)
    parts = x.new_empty(down_splits(shape.inner), len(x), shape.hidden, dtype=torch.float32)
    moe.gate_up(shape, addresses, ids, x, inner, groups)
    moe.down(shape, addresses, ids, inner, parts, groups)
    return parts.sum(0).to(x.dtype)


def _multiply(
    shape: ExpertShape, record: torch.Tensor, matrix: int, x: torch.Tensor, buffer: torch.Tensor
) -> torch.Tensor:
    rows, columns = matrix_shape(shape, matrix)
    if shape.precision == "half":
        weight = record[shape.codes[matrix] :][: rows * columns * 2].view(x.dtype).view(rows, columns)
        return torch.mm(x, weight.T)
    out = torch.mm(x, dequantize(shape, record, matrix, buffer).T)
    if shape.precision == "int8":
        row_max = record[shape.scales[matrix] :][: rows * 4].view(torch.float32)
        out = (out * (row_max / 127)).to(x.dtype)
    return out


def _seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Return the median seconds of a run on the device, after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times[2:])[repeats // 2]
