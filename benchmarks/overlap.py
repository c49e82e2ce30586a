"""Compare the time of a token with its reads alone and its products alone, by the share of experts in memory.

    python benchmarks/synthetic_store.py STORE --layers 8 --intermediate 7168
    python benchmarks/overlap.py STORE

The store needs to be synthetic. Products alone are measured with every expert in memory. Reads alone are the bytes that
the run read, at the disk's rate measured just before and just after it. Perfect overlap takes the longer of the two;
the efficiency is that time over the measured one.
"""

from __future__ import annotations

import json
import statistics
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from qmix_peer import Clock
from rich.console import Console
from rich.table import Table
from synthetic_weights import SyntheticModel

from qmix.engine.stream import Runner
from qmix.machine.probes import DiskProbe
from qmix.plan.here import plan_for
from qmix.store.opened import Store, open_store

PROMPT = 32  # tokens
SLICE = 2 * 10**9  # bytes of disk reads between two runs


@dataclass(frozen=True, slots=True)
class Decoded:
    """Decode steps: their median and mean seconds, bytes read a token, and the pool's hits, reads ahead and waste."""

    median: float
    mean: float
    read: float
    hits: float
    ahead: float
    unused: float


def decode(store: Store, slots: int, warm_up: int, tokens: int) -> Decoded:
    """Decode on the synthetic model's tour, where greedy text and routing are known."""
    plan = plan_for(store.layout, 2**50, PROMPT + warm_up + tokens + 1).with_slots(slots)
    prompt = SyntheticModel.of(store.directory).prompt(0, PROMPT)
    with Runner(store, plan) as runner:
        clock = Clock(runner.pool)
        runner.model.register_forward_hook(lambda *_: clock.note())
        runner.complete(prompt, max_new_tokens=warm_up + tokens, temperature=0, ignore_eos=True)
        passes = clock.passes[-tokens - 1 :]
    steps = [after[0] - before[0] for before, after in pairwise(passes)]
    used = passes[-1][1].since(passes[0][1])
    missed = max(1, used.misses)
    return Decoded(
        statistics.median(steps),
        statistics.mean(steps),
        used.bytes_read / tokens,
        used.hit_rate,
        used.ahead / missed,
        used.unused / missed,
    )


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--shares", default="25,50,65,77,90", show_default=True, help="percent of the experts with a slot")
@click.option("--warm-up", default=24, show_default=True, help="tokens that fill the pool first")
@click.option("--tokens", default=40, show_default=True, help="measured at each share")
def main(store: Path, shares: str, warm_up: int, tokens: int) -> None:
    """Print a table, then one JSON line."""
    warnings.simplefilter("ignore")
    opened = open_store(store)
    records = opened.geometry.num_records
    products = decode(opened, records, 2, tokens).mean
    table = Table(title=f"{store.name}: {opened.geometry.num_layers} layers, products alone {1e3 * products:.0f} ms")
    names = ("in memory", "hits", "ahead", "unused", "read", "disk", "reads alone", "token", "median", "efficiency")
    for name in names:
        table.add_column(name, justify="right")
    rows: list[dict[str, Any]] = []
    with DiskProbe.of_store(opened) as probe:
        probe.slice(SLICE)
        for share in map(int, shares.split(",")):
            found = decode(opened, round(records * share / 100), warm_up, tokens)
            probe.slice(SLICE)
            disk = statistics.mean(probe.rates[-2:])
            reads = found.read / disk
            efficiency = max(reads, products) / found.mean
            rows.append({"share": share, "disk": disk, "reads": reads, "token": found.mean, "efficiency": efficiency})
            table.add_row(
                f"{share}%",
                *(f"{part:.0%}" for part in (found.hits, found.ahead, found.unused)),
                f"{found.read / 1e6:.0f} MB",
                f"{disk / 1e9:.2f} GB/s",
                *(f"{1e3 * seconds:.0f} ms" for seconds in (reads, found.mean, found.median)),
                f"{efficiency:.0%}",
            )
    Console(width=130).print(table)
    print(json.dumps({"store": store.name, "tokens": tokens, "products": products, "rows": rows}))


if __name__ == "__main__":
    main()
