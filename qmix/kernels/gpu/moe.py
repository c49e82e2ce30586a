"""The mixture of experts on a GPU: records read in place, expert numbers and addresses from device memory.

    gate_up   x [T, H]           -> inner [T * k, I]: silu(w1 x) * (w3 x), for each pair of a token and its expert
    down      inner [T * k, I]   -> parts [splits, T * k, H]: partial sums of w2 inner, fp32
    norms.norm adds the parts, in order, times the router's weights, in router order

A pair whose expert has address 0, or whose expert number is negative, writes nothing: another device computes it. So a
layer with several precisions takes one launch for each, with addresses of that precision's records and zeros.

A token's sums have the same order whatever other tokens there are: cuts follow from the shapes of weights alone, and a
tile of tokens only says how many share a read. Up to `FEW_TOKENS` tokens find their places without a table; for more,
`group` makes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl

from qmix.kernels.gpu import fourbit, rows
from qmix.kernels.gpu.common import INTERPRETED, TYPES, power_of_two, tensor_cores, tile_of
from qmix.kernels.gpu.lookup import OPERANDS, VALUES, eight
from qmix.kernels.gpu.shapes import FEW_TOKENS, FOUR_BITS, ExpertShape, down_splits, warps_of

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
STAGES = 4  # of the software pipeline of loads
MANY = 32  # tokens of a tile with a table


@dataclass(frozen=True, slots=True)
class Groups:
    """Pairs in order of their experts, cut into chunks of at most `tile` pairs of one expert.

    order [T * k] int32; chunks [C, 3] int32: expert (-1 for none), first place in `order`, number of pairs.
    """

    order: torch.Tensor
    chunks: torch.Tensor
    tile: int


def group(ids: torch.Tensor, experts: int, tile: int | None = None) -> Groups:
    """Return the groups of ids [T, k] (int64; negative for none) without waiting for the device.

    The number of chunks is the most that T * k pairs can need.
    """
    tile = tile or _tile(ids.device)
    flat = ids.flatten()
    flat = torch.where(flat < 0, experts, flat)
    order = torch.argsort(flat, stable=True)
    number = torch.arange(experts, device=ids.device)
    counts = (flat[None, :] == number[:, None]).sum(1)
    starts, ends = counts.cumsum(0) - counts, ((counts + tile - 1) // tile).cumsum(0)
    chunk = torch.arange(-(-len(flat) // tile) + experts, device=ids.device)
    expert = torch.searchsorted(ends, chunk, right=True)
    real = expert.clamp(max=experts - 1)
    within = (chunk - (ends - (counts + tile - 1) // tile)[real]) * tile
    count = (counts[real] - within).clamp(0, tile)
    chunks = torch.stack((torch.where(expert < experts, real, -1), starts[real] + within, count), 1)
    return Groups(order.int(), chunks.int(), tile)


def one_group(tokens: int, device: torch.device) -> Groups:
    """Return the groups of tokens that all have expert 0."""
    tile = _tile(device)
    order = torch.arange(tokens, dtype=torch.int32, device=device)
    first = order[::tile]
    return Groups(order, torch.stack((torch.zeros_like(first), first, (tokens - first).clamp(max=tile)), 1), tile)


def _tile(device: torch.device) -> int:
    return MANY if tensor_cores(device) else 4


def gate_up(
    shape: ExpertShape,
    addresses: torch.Tensor,
    ids: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    groups: Groups | None = None,
) -> None:
    """Write silu(w1 x) * (w3 x) of each pair to out [T * k, I]; rows of absent experts are left as they are.

    addresses [E] int64: where each expert's record lies on this device, 0 if it does not. ids [T, k] int64. x [T, H]
    and `out` are contiguous, bf16 or fp16. Beyond `FEW_TOKENS` tokens `groups` are needed.
    """
    how = _launch(shape, ids, x, groups)
    parts = warps_of(shape.hidden)
    how |= {"TOP_K": ids.shape[1], "S": parts, "num_warps": how["num_warps"] * parts}
    places = (shape.codes[0], shape.scales[0], shape.codes[1], shape.scales[1])
    sizes = (shape.hidden, shape.inner, ids.numel())
    tables = _tables(ids, groups)
    programs = _programs(ids, groups)
    if shape.precision in FOUR_BITS:
        words = [place // 4 for place in places]
        grid = (shape.inner // 32 // fourbit.GROUPS, programs)
        x, table = x.view(torch.int32), value_table(shape.precision, x.dtype, x.device)
        fourbit.gate_up_packed[grid](addresses, *tables, x, table, out, *words, *sizes, **how)
    else:
        grid = (-(-shape.inner // rows.ROWS), programs)
        rows.gate_up_rows[grid](addresses, *tables, x, out, *places, *sizes, **how)


def down(
    shape: ExpertShape,
    addresses: torch.Tensor,
    ids: torch.Tensor,
    inner: torch.Tensor,
    parts: torch.Tensor,
    groups: Groups | None = None,
) -> None:
    """Write partial sums of w2 inner of each pair to parts [down_splits(I), T * k, H] fp32; see `gate_up`."""
    how = _launch(shape, ids, inner, groups)
    splits = down_splits(shape.inner)
    across = warps_of(shape.inner, splits)
    how |= {"S": across, "num_warps": how["num_warps"] * across}
    places, sizes = (shape.codes[2], shape.scales[2]), (shape.hidden, shape.inner, ids.numel())
    tables = _tables(ids, groups)
    programs = _programs(ids, groups)
    if shape.precision in FOUR_BITS:
        words = [place // 4 for place in places]
        grid = (shape.hidden // 32 // fourbit.GROUPS, programs, splits)
        x, table = inner.view(torch.int32), value_table(shape.precision, inner.dtype, inner.device)
        fourbit.down_packed[grid](addresses, *tables, x, table, parts, *words, *sizes, **how)
    else:
        grid = (-(-shape.hidden // rows.ROWS), programs, splits)
        rows.down_rows[grid](addresses, *tables, inner, parts, *places, *sizes, **how)


@cache
def value_table(kind: str, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the 16 values as the kernels use them: rounded to `dtype`, in fp32."""
    return torch.tensor(VALUES[kind], dtype=torch.float32).to(dtype).float().to(device)


def _launch(shape: ExpertShape, ids: torch.Tensor, x: torch.Tensor, groups: Groups | None) -> dict:
    """Return the launch's constants but S, with the warps of each part of the columns as num_warps."""
    if groups is None and len(ids) > FEW_TOKENS:
        raise ValueError(f"{len(ids)} tokens need groups")
    how = {
        "PAIRS": 16 if groups is not None else max(16, power_of_two(ids.numel())),
        "N": tile_of(len(ids), x.device) if groups is None else groups.tile,
        "TABLE": groups is not None,
        "HALF": TYPES[x.dtype],
        "STAGES": STAGES,
        "num_warps": 1 if groups is None or groups.tile <= 16 else 2,
    }
    if shape.precision in FOUR_BITS:
        portable = INTERPRETED or torch.version.cuda is None
        asm = "" if portable else eight(shape.precision, NAMES[x.dtype])
        return how | {"G": fourbit.GROUPS, "ASM": asm, "OPERANDS": OPERANDS}
    scaled = shape.precision == "int8"
    weight = tl.int8 if scaled else TYPES[x.dtype]
    return how | {"M": rows.ROWS, "K": 64, "SCALED": scaled, "WEIGHT": weight}


def _tables(ids: torch.Tensor, groups: Groups | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (ids, ids, ids) if groups is None else (ids, groups.order, groups.chunks)


def _programs(ids: torch.Tensor, groups: Groups | None) -> int:
    return ids.numel() if groups is None else len(groups.chunks)
