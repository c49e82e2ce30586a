"""Time 4-bit products with the fast kernel, and by dequantising a few rows at a time, as for shapes without a kernel.

    python benchmarks/slow_path.py

Both alternate in one process, on the matrices of 8x7B's experts. One row less makes a shape without a kernel.
"""

from __future__ import annotations

import json
import statistics
import time

import click
import torch
from rich.console import Console
from rich.table import Table

from qmix.bench.machine_rates import COLUMNS, ROWS
from qmix.errors import QmixError
from qmix.precision.memory import anonymous_memory
from qmix.precision.quantised import FourBitMatrix

PER_MATRIX = ROWS * COLUMNS // 2 + ROWS * COLUMNS // 64 * 2
MATRICES = 8  # on the fast side, more than caches hold


def matrix(memory: torch.Tensor, kind: str, fast: bool) -> FourBitMatrix:
    """Make one over so many bytes; of a shape that no kernel takes where `fast` is false."""
    rows = ROWS if fast else ROWS - 1
    codes, absmax = memory[: rows * COLUMNS // 2], memory[ROWS * COLUMNS // 2 :].view(torch.bfloat16)
    if not fast:
        return FourBitMatrix(kind, codes, absmax[: rows * COLUMNS // 64], rows, COLUMNS)
    found = FourBitMatrix(kind, codes.view(rows, -1), absmax.view(COLUMNS // 64, rows), rows, COLUMNS)
    if found.kernel is None:
        raise QmixError("this CPU has no fast 4-bit kernel: there is nothing to compare")
    return found


def seconds(matrices: list[FourBitMatrix], x: torch.Tensor) -> float:
    """Time a product, the mean over all matrices."""
    started = time.perf_counter()
    for each in matrices:
        each.multiply(x)
    return (time.perf_counter() - started) / len(matrices)


@click.command()
@click.option("--kind", type=click.Choice(["nf4", "fp4"]), default="nf4", show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(kind: str, rounds: int) -> None:
    """Print a table, then one JSON line."""
    memory = anonymous_memory(MATRICES * PER_MATRIX)
    memory.random_(0, 64)
    fast = [matrix(part, kind, True) for part in memory.split(PER_MATRIX)]
    slow = [matrix(memory[:PER_MATRIX], kind, False)]
    table = Table(title=f"{kind}, {ROWS} x {COLUMNS}, {torch.get_num_threads()} threads, medians of {rounds}")
    for column in ("tokens", "kernel", "without", "times slower", "kernel reads", "without reads"):
        table.add_column(column, justify="right")
    rows = []
    with torch.inference_mode():
        for tokens in (1, 4, 16, 128):
            x = torch.randn(tokens, COLUMNS).bfloat16()
            seconds(fast, x)
            pairs = [(seconds(fast, x), seconds(slow, x)) for _ in range(rounds)]
            quick, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
            ratio = statistics.median(second / first for first, second in pairs)
            rows.append({"tokens": tokens, "fast_s": quick, "slow_s": plain, "times": ratio})
            cells = (f"{1e3 * quick:.3g} ms", f"{1e3 * plain:.3g} ms", f"{ratio:.3g}")
            table.add_row(str(tokens), *cells, *(f"{PER_MATRIX / each / 1e9:.3g} GB/s" for each in (quick, plain)))
    Console().print(table)
    print(json.dumps({"kind": kind, "rows": rows}))


if __name__ == "__main__":
    main()
