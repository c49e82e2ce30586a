"""Time the CPU kernels by instruction set and number of threads, each with its ceiling in the same process.

    python benchmarks/cpu_paths.py --kinds nf4,bf16 --tokens 1,32,128 --threads 1,2

Runs benchmarks/kernels.py, attention.py and quantize_speed.py in processes restricted to each instruction set of this
processor, in alternation, and prints the median of each figure: GB/s of weights for few rows of x, GFLOP/s for many,
GB/s of keys and values in attention over 4096 positions, GB/s of bf16 weights that are quantised to nf4. The ceiling is
reading memory; for many rows it is torch's faster product, in bf16 or fp32, with the same instructions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from qmix.kernels.cpu.paths import environment, supported

KINDS = ("nf4", "fp4", "int8", "bf16", "fp16", "attention", "quantiser")
Key = tuple[str, int, int, str]  # kind, rows of x, threads, path


def run(path: str, threads: int, script: str, *arguments: str) -> Any:
    """Return what a script prints as JSON, in a process held to `path` with so many threads."""
    as_commands = {"GOMP_SPINCOUNT": "1000"}  # else OpenMP's threads spin on the cores while it is qmix's turn
    held = os.environ | environment(path) | as_commands | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=held, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def figures(path: str, threads: int, kind: str, shape: str, tokens: str) -> list[tuple[int, str, float, float]]:
    """Return rows of x (0: none), unit, speed and ceiling of each case of a kind."""
    if kind == "attention":
        found = run(path, threads, "attention.py", "--seconds", "2")
        ours, reading = (found["layer_bytes"] / 1e9 / found["seconds"][name] for name in ("qmix", "reading alone"))
        return [(0, "GB/s", ours, reading)]
    if kind == "quantiser":
        found = run(path, threads, "quantize_speed.py", "--rounds", "1", "--shape", *shape.split("x"))
        nbytes = 2 * found["shape"][0] * found["shape"][1]
        ours, reading = (nbytes / 1e9 / median(found["seconds"][name]) for name in ("qmix", "reading alone"))
        return [(0, "GB/s", ours, reading)]
    rows = run(path, threads, "kernels.py", "--rounds", "3", "--kinds", kind, "--shape", shape, "--tokens", tokens)
    return [(int(row["tokens"]), str(row["unit"]), float(row["qmix"]), float(row["ceiling"])) for row in rows]


@click.command()
@click.option("--kinds", default=",".join(KINDS), show_default=True)
@click.option("--shape", default="14336x4096", show_default=True, help="rows x columns")
@click.option("--tokens", default="1,32,128", show_default=True, help="rows of x")
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
                for kind in kinds.split(","):
                    for rows, unit, ours, ceiling in figures(path, count, kind, shape, tokens):
                        found[kind, rows, count, path].append((ours, ceiling))
                        units[rows] = unit
    table = Table(title=f"{shape}, median of {rounds} rounds")
    for column in ("kind", "rows of x", "threads", "path", "qmix", "unit", f"to {paths[0]}", "of ceiling"):
        table.add_column(column, justify="right")
    results = []
    for (kind, count, team, path), pairs in sorted(
        found.items(), key=lambda item: (item[0][:3], paths.index(item[0][3]))
    ):
        speed = median(ours for ours, _ in pairs)
        best = median(ours for ours, _ in found[kind, count, team, paths[0]])
        share = median(ours / ceiling for ours, ceiling in pairs)
        table.add_row(
            kind, str(count or ""), str(team), path, f"{speed:.1f}", units[count], f"{speed / best:.2f}", f"{share:.2f}"
        )
        row = {"kind": kind, "tokens": count, "threads": team, "path": path, "unit": units[count]}
        results.append(row | {"qmix": speed, "to_best": speed / best, "to_ceiling": share})
    Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
