"""Routing of the embedded model, recorded and replayed: hit rate by pool size, beside the best possible.

python benchmarks/replay_tiny.py --tokens 200
"""

from __future__ import annotations

import json

import click
from rich.console import Console
from rich.table import Table

import qmix
from calibration.replay import belady_hits, hits, requests
from calibration.trace import recorded
from qmix.eviction import POLICIES

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
    with qmix.load("tiny") as runner, recorded(runner.pool) as trace:
        for prompt in PROMPTS:
            runner.complete(prompt, max_new_tokens=tokens, temperature=0.8, seed=0, ignore_eos=True)
        geometry = runner.store.geometry
    total, records = requests(trace), geometry.num_records
    table = Table(title=f"hit rate over {total} requests of {len(PROMPTS)} x {tokens} tokens, {records} experts")
    for column in ("slots", "share of experts", *POLICIES, "best possible"):
        table.add_column(column, justify="right")
    rows = []
    for slots in range(records // 8, records + 1, records // 8):
        found = {name: hits(trace, slots, policy(geometry)) for name, policy in POLICIES.items()}
        rates = {name: count / total for name, count in (found | {"belady": belady_hits(trace, slots)}).items()}
        rows.append({"slots": slots} | rates)
        table.add_row(str(slots), f"{slots / records:.0%}", *(f"{rate:.1%}" for rate in rates.values()))
    Console().print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
