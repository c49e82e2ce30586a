"""Time the parts of a calibration: measuring an expert in every format, replaying routing, and distributing bytes.

    python benchmarks/calibration_speed.py

Sizes are those of one expert of 8x7B, or with `--hidden 6144 --inner 16384` of 8x22B. Routing and errors are random, in
the shape of 8x22B. The floor of a measurement is the time of the expert's products in torch.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from calibration.sensitivity import KINDS, SAMPLES, SensitivityMeter
from qmix.engine.layerwise import RouterOutput
from qmix.geometry import Geometry
from qmix.pool.replay import replay
from qmix.store.allocation import Allocator

LAYERS, EXPERTS, TOP_K = 56, 8, 2
TOKENS = 8192


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median, after a first round that compiles."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measuring(hidden: int, inner: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Time one expert in every format, and its products alone, as often."""
    rng = torch.Generator().manual_seed(0)
    shapes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    matrices = {
        name: (torch.randn(shape, generator=rng) / shape[1] ** 0.5).bfloat16() for name, shape in shapes.items()
    }
    states = torch.randn(SAMPLES, hidden, generator=rng).bfloat16()
    geometry = Geometry(hidden, inner, 1, 32, 8, 128, 1, 1, 8, 16)
    meter = SensitivityMeter(geometry, F.silu)
    first = torch.zeros(SAMPLES, 1, dtype=torch.int64)

    def whole() -> None:
        meter.routed(0, states, states, RouterOutput(first.float(), first.float() + 1, first))
        meter.expert(0, 0, matrices)

    def products() -> None:
        for _ in range(1 + len(KINDS)):
            inside = F.silu(F.linear(states, matrices["w1"])) * F.linear(states, matrices["w3"])
            F.linear(inside, matrices["w2"])

    return whole, products


@click.command()
@click.option("--hidden", default=4096, show_default=True)
@click.option("--inner", default=14336, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(hidden: int, inner: int, rounds: int) -> None:
    """Print a table, then one JSON line."""
    rng = np.random.default_rng(0)
    trace = rng.random((TOKENS * LAYERS, EXPERTS)).argsort(1)[:, :TOP_K].astype(np.int16)
    errors = rng.lognormal(size=(LAYERS, EXPERTS))
    tables = {"nf4": errors.tolist(), "fp4": (1.5 * errors).tolist(), "int8": (errors / 99).tolist()}
    sizes = {"nf4": 160, "fp4": 160, "int8": 302, "half": 604}
    half = (0 * errors).tolist()
    with torch.inference_mode():
        expert, floor = (seconds(work, rounds) for work in measuring(hidden, inner))
    found = {
        "expert_s": expert,
        "products_s": floor,
        "weights_per_s": len(KINDS) * 3 * hidden * inner / expert,
        "replay_s": seconds(lambda: replay(trace, LAYERS, EXPERTS), rounds),
        "allocation_s": seconds(lambda: Allocator({**tables, "half": half}, sizes).frontier(), rounds),
    }
    table = Table(title=f"{torch.get_num_threads()} threads, medians of {rounds}")
    table.add_column("work")
    table.add_column("seconds", justify="right")
    table.add_row(f"an expert of {hidden} x {inner} in {len(KINDS)} formats, {SAMPLES} tokens", f"{expert:.2f}")
    table.add_row("its products alone", f"{floor:.2f}")
    table.add_row(f"{TOKENS} tokens of {LAYERS} layers through five policies", f"{found['replay_s']:.2f}")
    table.add_row(f"every number of bytes spread over {LAYERS * EXPERTS} experts", f"{found['allocation_s']:.2f}")
    Console().print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
