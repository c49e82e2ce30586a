"""Predicted against measured peak memory of a store, over several budgets.

python benchmarks/plan_accuracy.py STORE --context 1536 --budgets 8
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from qmix.units import format_bytes

PROMPT = "To install a package on this system, open a terminal and type the name. "


def qmix_json(*arguments: str, text: str = "") -> dict[str, Any]:
    """What a command with --json answers."""
    command = [sys.executable, "-m", "cli", *arguments, "--json"]
    done = subprocess.run(command, input=text, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@click.command()
@click.argument("store")
@click.option("--context", default=1536, show_default=True, help="filled to two thirds by the prompt")
@click.option("--budgets", default=8, show_default=True, help="from the smallest to what holds everything")
def main(store: str, context: int, budgets: int) -> None:
    """Print a table, then one JSON line."""
    whole = qmix_json("plan", store, "--ram", "4TiB", "--context", str(context))
    low, high = whole["smallest"], int(whole["total"] * 1.02) + 2**24
    prompt = PROMPT * (context // 24)  # some 16 tokens each
    table = Table(title=f"{store}, context {context}")
    for column in ("budget", "experts in memory", "predicted peak", "measured", "difference"):
        table.add_column(column, justify="right")
    rows = []
    for index in range(budgets):
        limits = ("--ram", str(low + (high - low) * index // (budgets - 1)), "--context", str(context))
        plan = qmix_json("plan", store, *limits)
        greedy = ("--temperature", "0", "--ignore-eos", "--max-new-tokens", "20")
        peak = qmix_json("generate", "-m", store, *limits, *greedy, text=prompt)["memory"]["peak_memory"]
        share = peak / plan["total"] - 1
        rows.append({"ram": plan["ram"], "slots": plan["slots"], "total": plan["total"], "peak": peak, "off": share})
        cells = (format_bytes(plan["ram"]), f"{plan['slots']} of {plan['num_records']}", format_bytes(plan["total"]))
        table.add_row(*cells, format_bytes(peak), f"{share:+.1%}")
    Console().print(table)
    print(json.dumps({"store": store, "context": context, "rows": rows}))


if __name__ == "__main__":
    main()
