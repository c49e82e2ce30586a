"""Time qmix's products and those of torch and bitsandbytes, each with its ceiling in the same run.

    python benchmarks/kernels.py --shape 14336x4096 --tokens 1,4,16,128

For each kind of matrix, enough are made to fill 256 MB, and each product takes the next, so that none is in a cache.
Few rows of x are bound by reading the matrix: their ceiling is summing its bytes as int64 in torch with the same
threads. Many rows are bound by arithmetic: their ceiling is torch's product in bf16 or in fp32, whichever is faster.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from qmix.checkpoint.torch_dtypes import TORCH
from qmix.kernels.cpu.products import multiply_packed, multiply_rows
from qmix.precision import quantised
from qmix.precision.formats import parts
from qmix.precision.memory import anonymous_memory

SET_BYTES = 256e6
BOUND_BY_READING = 16  # rows of x, up to where the ceiling is the memory's

Product = Callable[[torch.Tensor, int], object]


def matrices(kind: str, rows: int, columns: int) -> list[list[torch.Tensor]]:
    """Return the parts of enough matrices, on huge pages as a pool has them; random codes, scales of one."""
    wanted = parts("half" if kind in ("bf16", "fp16") else kind, "fp16" if kind == "fp16" else "bf16", rows, columns)
    made = []
    for _ in range(max(2, round(SET_BYTES / sum(part.nbytes for part in wanted)))):
        tensors = [anonymous_memory(part.nbytes).view(TORCH[part.dtype]).view(part.shape) for part in wanted]
        if kind in ("bf16", "fp16"):
            tensors[0].normal_()
        else:
            tensors[0].view(torch.int64).random_()
            tensors[1].fill_(1)
        made.append(tensors)
    return made


def products(kind: str, rows: int, columns: int, made: list[list[torch.Tensor]]) -> dict[str, Product]:
    """Ours and theirs: x and the number of a matrix to the product."""
    if kind in ("bf16", "fp16"):
        return {"qmix": lambda x, i: multiply_rows(x, made[i][0]), "torch": lambda x, i: F.linear(x, made[i][0])}
    if kind == "int8":
        ones = torch.ones(rows, dtype=torch.bfloat16)
        return {
            "qmix": lambda x, i: multiply_rows(x, *made[i]),
            "torch": lambda x, i: torch._weight_int8pack_mm(x, made[i][0], ones) * made[i][1],
        }
    theirs = quantised.packed_kernel(kind)

    def bitsandbytes(x: torch.Tensor, i: int) -> object:
        out = torch.empty(len(x), rows, dtype=torch.bfloat16)
        places = (tensor.data_ptr() for tensor in (x, *made[i], out))
        return theirs and theirs(len(x), rows, columns, *places, 64, columns, rows)

    def qmix(x: torch.Tensor, i: int) -> object:
        return multiply_packed(x, kind, made[i][0].data_ptr(), made[i][1].data_ptr(), rows, columns)

    return {"qmix": qmix, "bitsandbytes": bitsandbytes}


def plain_product(x: torch.Tensor, weight: torch.Tensor, _: int) -> torch.Tensor:
    return F.linear(x, weight)


def seconds(contestants: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """Median seconds of each, taking turns; argument: the number of the matrix."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds + 1):  # the first round warms up
        for name, call in contestants.items():
            start = time.perf_counter()
            for i in range(count):
                call(i)
            if index:
                times[name].append((time.perf_counter() - start) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(kind: str, rows: int, columns: int, tokens: list[int], rounds: int) -> list[dict[str, object]]:
    made = matrices(kind, rows, columns)
    nbytes = sum(tensor.nbytes for tensor in made[0])
    wide = torch.randn(rows, columns)
    dense = wide.bfloat16()
    results: list[dict[str, object]] = []
    for count in tokens:
        x = torch.randn(count, columns).to(torch.float16 if kind == "fp16" else torch.bfloat16)
        calls: dict[str, Callable[[int], object]] = {
            name: partial(call, x) for name, call in products(kind, rows, columns, made).items()
        }
        reading = count <= BOUND_BY_READING
        if reading:
            calls["ceiling"] = lambda i: made[i][0].view(torch.int64).sum()
        else:
            calls["ceiling"] = partial(plain_product, x.bfloat16(), dense)
            calls["in fp32"] = partial(plain_product, x.float(), wide)
        took = seconds(calls, len(made), rounds)
        took["ceiling"] = min(took["ceiling"], took.pop("in fp32", took["ceiling"]))
        ours, theirs = took["qmix"], next(took[name] for name in took if name not in ("qmix", "ceiling"))
        work = nbytes / 1e9 if reading else 2 * count * rows * columns / 1e9
        results.append(
            {"kind": kind, "shape": f"{rows}x{columns}", "tokens": count, "unit": "GB/s" if reading else "GFLOP/s"}
            | {"qmix": work / ours, "other": work / theirs, "ceiling": work / took["ceiling"]}
            | {"to_other": theirs / ours, "to_ceiling": took["ceiling"] / ours}
        )
    return results


@click.command()
@click.option("--kinds", default="bf16,nf4,int8", show_default=True, help="of bf16, fp16, int8, nf4, fp4")
@click.option("--shape", default="14336x4096", show_default=True, help="rows x columns")
@click.option("--tokens", default="1,4,16,128", show_default=True, help="rows of x")
@click.option("--rounds", default=5, show_default=True)
def main(kinds: str, shape: str, tokens: str, rounds: int) -> None:
    """Print a table and a JSON line."""
    rows, columns = map(int, shape.split("x"))
    counts = [int(count) for count in tokens.split(",")]
    results = [row for kind in kinds.split(",") for row in measure(kind, rows, columns, counts, rounds)]
    table = Table(title=f"{shape}, {torch.get_num_threads()} threads, median of {rounds} rounds")
    for column in (
        "kind",
        "rows of x",
        "unit",
        "qmix",
        "torch or bitsandbytes",
        "ceiling",
        "qmix / other",
        "of ceiling",
    ):
        table.add_column(column, justify="right")
    for row in results:
        speeds = (f"{row[name]:.1f}" for name in ("qmix", "other", "ceiling"))
        ratios = f"{row['to_other']:.2f}", f"{row['to_ceiling']:.2f}"
        table.add_row(str(row["kind"]), str(row["tokens"]), str(row["unit"]), *speeds, *ratios)
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
