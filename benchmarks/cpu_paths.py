"""Time the CPU kernels by instruction set and number of threads, each with its ceiling in the same process.

    python benchmarks/cpu_paths.py --kinds nf4,bf16 --tokens 1,16,128 --threads 1,2

Runs benchmarks/kernels.py in processes restricted to each instruction set of this processor, in alternation, and prints
the median of each figure: GB/s of weights for few rows of x, GFLOP/s for many. The ceiling for few rows is reading
memory; for many it is torch's bf16 product with the same instructions.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from qmix.kernels.cpu.paths import environment, supported

Key = tuple[str, int, int, str]  # kind, rows of x, threads, path


def run(path: str, threads: int, *arguments: str) -> list[dict[str, float | str]]:
    """Return the rows that kernels.py prints as JSON, in a process held to `path` with so many threads."""
    held = os.environ | environment(path) | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).with_name("kernels.py")), "--rounds", "3", *arguments]
    done = subprocess.run(command, env=held, capture_output=True, text=True, check=True)
    rows: list[dict[str, float | str]] = json.loads(done.stdout.splitlines()[-1])
    return rows


@click.command()
@click.option("--kinds", default="nf4,bf16,int8", show_default=True, help="of bf16, fp16, int8, nf4, fp4")
@click.option("--shape", default="14336x4096", show_default=True, help="rows x columns")
@click.option("--tokens", default="1,16,128", show_default=True, help="rows of x")
@click.option("--threads", default="1,2", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="of all paths, taking turns")
def main(kinds: str, shape: str, tokens: str, threads: str, rounds: int) -> None:
    """Print a table and a JSON line."""
    paths = [path.name for path in supported()]
    found: dict[Key, list[tuple[float, float]]] = defaultdict(list)
    units: dict[int, str] = {}
    for _ in range(rounds):
        for count in map(int, threads.split(",")):
            for path in paths:
                for row in run(path, count, "--kinds", kinds, "--shape", shape, "--tokens", tokens):
                    key = str(row["kind"]), int(row["tokens"]), count, path
                    found[key].append((float(row["qmix"]), float(row["ceiling"])))
                    units[int(row["tokens"])] = str(row["unit"])
    table = Table(title=f"{shape}, median of {rounds} rounds")
    for column in ("kind", "rows of x", "threads", "path", "qmix", "unit", f"to {paths[0]}", "of ceiling"):
        table.add_column(column, justify="right")
    results = []
    for (kind, count, team, path), pairs in sorted(
        found.items(), key=lambda item: (item[0][:3], paths.index(item[0][3]))
    ):
        speed = statistics.median(ours for ours, _ in pairs)
        best = statistics.median(ours for ours, _ in found[kind, count, team, paths[0]])
        share = statistics.median(ours / ceiling for ours, ceiling in pairs)
        table.add_row(
            kind, str(count), str(team), path, f"{speed:.1f}", units[count], f"{speed / best:.2f}", f"{share:.2f}"
        )
        row = {"kind": kind, "tokens": count, "threads": team, "path": path, "unit": units[count]}
        results.append(row | {"qmix": speed, "to_best": speed / best, "to_ceiling": share})
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
