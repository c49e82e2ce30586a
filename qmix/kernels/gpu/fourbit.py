"""nf4 and fp4: products of tokens with packed matrices where they lie in a record.

A group of 32 rows is [columns / 2, 32] bytes. Seen as int32 words [columns / 2, 8], word q of column pair p holds

    bits  0-3  row 2q     column 2p        bits 16-19  row 2q + 1   column 2p
    bits  4-7  row 2q+16  column 2p        bits 20-23  row 2q + 17  column 2p
    bits  8-11 row 2q     column 2p + 1    bits 24-27  row 2q + 1   column 2p + 1
    bits 12-15 row 2q+16  column 2p + 1    bits 28-31  row 2q + 17  column 2p + 1

so nibble i of a tile of words [groups * 8, 32 pairs] is a dense tile of weights: one row of each word, and every even
or every odd column. Eight products with x's even and odd columns give four rows a word for 64 columns, a block. Its
sums are scaled by absmax afterwards, in fp32. No weight moves between lanes.

Axes of tiles: S parts of the columns, one for each warp or more, added in this order at the end; M = 8 words of each
group; N tokens. x holds pairs of numbers in half precision as int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qmix.kernels.gpu.common import INTERPRETED, expert_tokens, product, to_half

GROUPS = 2  # of 32 rows, in a program: a product wants 16 rows


@triton.jit
def nibble_values(words, table, shift: tl.constexpr, HALF: tl.constexpr):
    """Return the values of one nibble of each word, looked up in memory: portable, and a seventh of the speed."""
    return tl.load(table + ((words >> shift) & 15)).to(HALF)


@triton.jit
def eight_values(words, table, HALF: tl.constexpr, ASM: tl.constexpr, OPERANDS: tl.constexpr):
    """Return the weights, before absmax, of the eight nibbles of each word: 8 tensors. Without ASM by `table`."""
    if ASM == "":
        v0 = nibble_values(words, table, 0, HALF)
        v1 = nibble_values(words, table, 4, HALF)
        v2 = nibble_values(words, table, 8, HALF)
        v3 = nibble_values(words, table, 12, HALF)
        v4 = nibble_values(words, table, 16, HALF)
        v5 = nibble_values(words, table, 20, HALF)
        v6 = nibble_values(words, table, 24, HALF)
        v7 = nibble_values(words, table, 28, HALF)
        return v0, v1, v2, v3, v4, v5, v6, v7
    elif HALF == tl.bfloat16:
        return tl.inline_asm_elementwise(
            ASM, OPERANDS, [words], is_pure=True, pack=2,
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                   tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            ASM, OPERANDS, [words], is_pure=True, pack=2,
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16,
                   tl.float16, tl.float16, tl.float16, tl.float16),
        )  # fmt: skip


@triton.jit
def both_scales(words):
    """Return the two bf16 of an int32 as fp32, the low one first."""
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def even_and_odd(words, HALF: tl.constexpr):
    """Return the two numbers in half precision of an int32, the low one first."""
    if INTERPRETED and HALF == tl.bfloat16:
        return both_scales(words)
    else:
        return words.to(tl.int16).to(HALF, bitcast=True), (words >> 16).to(tl.int16).to(HALF, bitcast=True)


@triton.jit
def block_products(
    codes, scales, even, odd, table, rows, block, HALF: tl.constexpr, ASM: tl.constexpr, OPERANDS: tl.constexpr
):
    """Return 4 tensors [S, M, N]: the sums of one block of 64 columns for rows 2q, 2q + 16, 2q + 1, 2q + 17.

    `codes` [S, M, 32] and `scales` [S, M] are where block 0 lies. x's columns are [S, 32, N].
    """
    words = tl.load(codes + block * 256)
    s0, s2 = both_scales(tl.load(scales + block * (rows // 2)))
    s1, s3 = both_scales(tl.load(scales + block * (rows // 2) + 8))
    v0, v1, v2, v3, v4, v5, v6, v7 = eight_values(words, table, HALF, ASM, OPERANDS)
    zero = tl.zeros((even.shape[0], words.shape[1], even.shape[2]), tl.float32)
    d0 = product(v2, odd, product(v0, even, zero)) * s0[:, :, None]
    d1 = product(v3, odd, product(v1, even, zero)) * s1[:, :, None]
    d2 = product(v6, odd, product(v4, even, zero)) * s2[:, :, None]
    d3 = product(v7, odd, product(v5, even, zero)) * s3[:, :, None]
    return d0, d1, d2, d3


@triton.jit
def place_codes(base, codes, group, first, columns, M: tl.constexpr):
    """Return pointers [S, M, 32] to the words of block 0 of each part; `first` [S] are the parts' first blocks."""
    m = tl.arange(0, M)
    p = tl.arange(0, 32)
    at = (first * 256)[:, None, None] + ((group + m // 8) * (columns * 4) + m % 8)[None, :, None]
    at = at + (p * 8)[None, None, :]
    # Not so, but the hint orders lanes along the pairs before the parts: a warp then reads runs of 256 bytes.
    return base + codes + tl.max_contiguous(at, [1, 8, 2])


@triton.jit
def place_scales(base, scales, group, first, rows, M: tl.constexpr):
    """Return pointers [S, M] to the scales, in pairs, of rows 2q and 2q + 1; those of 2q + 16 lie 8 words after."""
    m = tl.arange(0, M)
    return base + scales + (first * (rows // 2))[:, None] + ((group + m // 8) * 16 + m % 8)[None, :]


@triton.jit
def place_x(x, row, first, columns):
    """Return pointers [S, 32, N] to column pairs of x [*, columns]; `row` [N], less than 0 for none."""
    p = tl.arange(0, 32)
    at = (first * 32)[:, None, None] + p[None, :, None]
    return x + at + (tl.maximum(row, 0) * (columns // 2))[None, None, :]


@triton.jit
def gated(gate, up, HALF: tl.constexpr):
    """Return silu(gate) * up of sums whose parts [S, M, N] are added first."""
    a = tl.sum(gate, 0)
    return to_half(a * tl.sigmoid(a) * tl.sum(up, 0), HALF)


@triton.jit
def gate_up_packed(
    records, ids, order, chunks, x, table, out, gate, gate_scales, up, up_scales, hidden, inner, pairs,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, N: tl.constexpr, S: tl.constexpr, TABLE: tl.constexpr,
    HALF: tl.constexpr, ASM: tl.constexpr, OPERANDS: tl.constexpr, G: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write silu(gate(x)) * up(x) of a group of rows, for tokens of one expert, to their rows of `out`.

    Offsets in a record are in int32 words. An expert whose address is 0 is left out.
    """
    expert, mine = expert_tokens(ids, order, chunks, pairs, PAIRS, N, TABLE)
    if expert < 0:
        return
    record = tl.multiple_of(tl.load(records + expert), 64)
    if record == 0:
        return
    base = tl.multiple_of(record.to(tl.pointer_type(tl.int32)), 16)
    group = tl.program_id(0) * G
    M: tl.constexpr = G * 8
    span = hidden // 64 // S
    first = tl.arange(0, S) * span
    gate_at = place_codes(base, gate, group, first, hidden, M)
    up_at = place_codes(base, up, group, first, hidden, M)
    gate_scales_at = place_scales(base, gate_scales, group, first, inner, M)
    up_scales_at = place_scales(base, up_scales, group, first, inner, M)
    x_at = place_x(x, tl.where(mine >= 0, mine // TOP_K, -1), first, hidden)
    seen = (mine >= 0)[None, None, :]
    a0 = tl.zeros((S, M, N), tl.float32)
    a1 = tl.zeros((S, M, N), tl.float32)
    a2 = tl.zeros((S, M, N), tl.float32)
    a3 = tl.zeros((S, M, N), tl.float32)
    b0 = tl.zeros((S, M, N), tl.float32)
    b1 = tl.zeros((S, M, N), tl.float32)
    b2 = tl.zeros((S, M, N), tl.float32)
    b3 = tl.zeros((S, M, N), tl.float32)
    for block in tl.range(0, span, num_stages=STAGES):
        even, odd = even_and_odd(tl.load(x_at + block * 32, mask=seen, other=0), HALF)
        d0, d1, d2, d3 = block_products(gate_at, gate_scales_at, even, odd, table, inner, block, HALF, ASM, OPERANDS)
        a0 += d0
        a1 += d1
        a2 += d2
        a3 += d3
        d0, d1, d2, d3 = block_products(up_at, up_scales_at, even, odd, table, inner, block, HALF, ASM, OPERANDS)
        b0 += d0
        b1 += d1
        b2 += d2
        b3 += d3
    m = tl.arange(0, M)
    row = (group + m // 8) * 32 + (m % 8) * 2
    to = out + mine[None, :].to(tl.int64) * inner + row[:, None]
    kept = (mine >= 0)[None, :] & (m >= 0)[:, None]
    tl.store(to, gated(a0, b0, HALF), mask=kept)
    tl.store(to + 16, gated(a1, b1, HALF), mask=kept)
    tl.store(to + 1, gated(a2, b2, HALF), mask=kept)
    tl.store(to + 17, gated(a3, b3, HALF), mask=kept)


@triton.jit
def down_packed(
    records, ids, order, chunks, x, table, out, down, down_scales, hidden, inner, pairs,
    PAIRS: tl.constexpr, N: tl.constexpr, S: tl.constexpr, TABLE: tl.constexpr,
    HALF: tl.constexpr, ASM: tl.constexpr, OPERANDS: tl.constexpr, G: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write part program_id(2) of down(x), fp32, of a group of rows for tokens of one expert; see `gate_up_packed`."""
    expert, mine = expert_tokens(ids, order, chunks, pairs, PAIRS, N, TABLE)
    if expert < 0:
        return
    record = tl.multiple_of(tl.load(records + expert), 64)
    if record == 0:
        return
    base = tl.multiple_of(record.to(tl.pointer_type(tl.int32)), 16)
    group = tl.program_id(0) * G
    M: tl.constexpr = G * 8
    span = inner // 64 // (S * tl.num_programs(2))
    first = (tl.arange(0, S) + tl.program_id(2) * S) * span
    at = place_codes(base, down, group, first, inner, M)
    scales_at = place_scales(base, down_scales, group, first, hidden, M)
    x_at = place_x(x, mine, first, inner)
    seen = (mine >= 0)[None, None, :]
    c0 = tl.zeros((S, M, N), tl.float32)
    c1 = tl.zeros((S, M, N), tl.float32)
    c2 = tl.zeros((S, M, N), tl.float32)
    c3 = tl.zeros((S, M, N), tl.float32)
    for block in tl.range(0, span, num_stages=STAGES):
        even, odd = even_and_odd(tl.load(x_at + block * 32, mask=seen, other=0), HALF)
        d0, d1, d2, d3 = block_products(at, scales_at, even, odd, table, hidden, block, HALF, ASM, OPERANDS)
        c0 += d0
        c1 += d1
        c2 += d2
        c3 += d3
    m = tl.arange(0, M)
    row = (group + m // 8) * 32 + (m % 8) * 2
    part = tl.program_id(2).to(tl.int64) * pairs * hidden
    to = out + part + mine[None, :].to(tl.int64) * hidden + row[:, None]
    kept = (mine >= 0)[None, :] & (m >= 0)[:, None]
    tl.store(to, tl.sum(c0, 0), mask=kept)
    tl.store(to + 16, tl.sum(c1, 0), mask=kept)
    tl.store(to + 1, tl.sum(c2, 0), mask=kept)
    tl.store(to + 17, tl.sum(c3, 0), mask=kept)
