"""Compare prompts layer by layer with prompts chunk after chunk, by length, with the disk's ceiling of the same run.

    python benchmarks/synthetic_store.py STORE --model 8x22b --layers 8
    python benchmarks/prompt_length.py STORE --ram 7GiB

Both read the same prompts with the same pool, in alternation. The ceiling is the time to read, once, every expert that
has no slot, at the disk's rate measured between the runs. Tokens are random: every expert is used in every layer.
"""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from qmix.commands.shared import Size
from qmix.engine.stream import Runner
from qmix.machine.probes import DiskProbe
from qmix.plan.here import plan_for
from qmix.plan.memory import PREFILL_CHUNK
from qmix.store.opened import open_store

SLICE = 2 * 10**9  # bytes of disk reads between two runs


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True))
@click.option("--ram", type=Size(), required=True)
@click.option("--tokens", multiple=True, type=int, default=[1024, 2048, 4096], show_default=True)
@click.option("--together", type=int, help="tokens of a prompt a layer, in place of the plan's; takes more than --ram")
@click.option("--rounds", default=3, show_default=True)
def main(store: Path, ram: int, tokens: list[int], together: int | None, rounds: int) -> None:
    """Print seconds to the first token and bytes read, and the ratio pair by pair."""
    opened = open_store(store)
    plan = plan_for(opened.layout, ram, max(tokens) + 1)
    plan = replace(plan, prefill=together or plan.prefill)
    if plan.prefill == PREFILL_CHUNK:
        raise click.UsageError("the plan has no room for more than a chunk a layer; give more --ram, or --together")
    probe, rates, rows = DiskProbe.of_store(opened), [], []
    table = Table(
        title=f"{store.name}, {plan.slots} of {plan.num_records} experts have a slot, {plan.prefill} together"
    )
    for name in ("prompt", "by chunk", "by layer", "ratio", "read by chunk", "read by layer", "disk ceiling", "of it"):
        table.add_column(name, justify="right")
    with Runner(opened, plan) as runner:
        for count in tokens:
            found: dict[int, list[tuple[float, int]]] = {PREFILL_CHUNK: [], plan.prefill: []}
            for index in range(rounds):
                prompt = random.Random(index).choices(range(3, opened.geometry.vocab_size), k=count)
                for count_a_layer, results in found.items():
                    runner.plan = replace(plan, prefill=count_a_layer)
                    result = runner.complete(prompt, max_new_tokens=1, temperature=0)
                    results.append((result.ttft_s, result.bytes_read))
                    rates.append(probe.slice(SLICE))
            chunked, layered = found.values()
            seconds = [statistics.median(each for each, _ in results) for results in (chunked, layered)]
            read = [statistics.median(each for _, each in results) for results in (chunked, layered)]
            ratio = statistics.median(slow / fast for (slow, _), (fast, _) in zip(chunked, layered, strict=True))
            ceiling = plan.on_disk / statistics.median(rates)
            rows.append({"tokens": count, "seconds": seconds, "read": read, "ratio": ratio, "ceiling": ceiling})
            shown = [f"{each:.2f} s" for each in seconds], [f"{each / 1e9:.2f} GB" for each in read]
            last = f"{ceiling:.2f} s", f"{ceiling / seconds[1]:.0%}"
            table.add_row(str(count), *shown[0], f"{ratio:.2f}", *shown[1], *last)
    Console().print(table)
    print(json.dumps({"store": store.name, "ram": ram, "disk": statistics.median(rates), "rows": rows}))


if __name__ == "__main__":
    main()
