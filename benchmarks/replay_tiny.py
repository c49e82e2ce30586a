"""Record the routing of the embedded model and replay it: hit rate by pool size, and the best possible.

python benchmarks/replay_tiny.py --tokens 200
"""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

import qmix
from qmix.pool.eviction import DEFAULT_POLICY
from qmix.pool.replay import replay
from qmix.pool.trace import as_trace, recorded

PROMPTS = (
    "To install a package on this system, open a terminal and",
    "Pour installer un paquet, ouvrez un terminal et",
    "Um ein Paket zu installieren, öffnen Sie ein Terminal und",
    "Para instalar un paquete, abra un terminal y",
    "Per installare un pacchetto, aprite un terminale e",
)


@click.command()
@click.option("--tokens", default=200, show_default=True, help="new tokens for each of five prompts")
def main(tokens: int) -> None:
    """Print a table, then one JSON line."""
    with qmix.load("tiny") as runner, recorded(runner.pool) as steps:
        for prompt in PROMPTS:
            runner.complete(prompt, max_new_tokens=tokens, temperature=0.8, seed=0, ignore_eos=True)
        geometry = runner.store.geometry
    layers, experts = geometry.num_layers, geometry.num_experts
    sizes = [layers * experts * part // 8 for part in range(1, 9)]
    found = replay(as_trace(steps, layers), layers, experts, sizes, top_k=geometry.experts_per_token)
    names = [curve.policy for curve in found.curves]
    table = Table(title=f"hit rate over {found.requests} requests of {len(PROMPTS)} x {tokens} tokens")
    for column in ("slots", "share of experts", *names):
        table.add_column(column, justify="right")
    rows = []
    for size in sizes:
        rates = {name: found.hit_rate(name, size) for name in names}
        rows.append({"slots": size} | rates)
        table.add_row(str(size), f"{size / found.records:.0%}", *(f"{rate:.1%}" for rate in rates.values()))
    console = Console()
    console.print(table)
    console.print(f"most hits: {found.recommended()}; the engine's default: {DEFAULT_POLICY}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
