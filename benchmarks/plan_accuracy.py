"""Compare predicted with measured peak memory and decode speed of a store, over several budgets.

    python benchmarks/plan_accuracy.py STORE --context 1536 --budgets 8
    python benchmarks/plan_accuracy.py tiny --rounds 3

The machine's rates are measured first, on the disk that holds the store, as `qmix doctor` does. With --kept, the rates
that `qmix doctor` kept are used. Each budget is a process of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from qmix.units import format_bytes

PROMPT = "To install a package on this system, open a terminal and type the name. "
MOST_MEMORY, MOST_SPEED = 0.03, 0.25  # that a prediction may be off


def qmix_json(*arguments: str, text: str = "", state: Path | None = None) -> dict[str, Any]:
    """What a command with --json answers; `state` is in place of the user's directory of measurements."""
    command = [sys.executable, "-m", "cli", *arguments, "--json"]
    environment = os.environ | ({"XDG_STATE_HOME": str(state)} if state else {})
    done = subprocess.run(command, input=text, check=True, capture_output=True, text=True, env=environment)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measured(store: str, limits: tuple[str, ...], prompt: str, tokens: int, rounds: int) -> tuple[int, list[float]]:
    """Peak memory in bytes, and decode in tokens/s of each round."""
    greedy = ("--temperature", "0", "--ignore-eos", "--max-new-tokens", str(tokens))
    runs = [qmix_json("generate", "-m", store, *limits, *greedy, text=prompt) for _ in range(rounds)]
    return max(run["memory"]["peak_memory"] for run in runs), [1 / run["timings"]["tpot_s"] for run in runs]


@click.command()
@click.argument("store")
@click.option("--context", default=1536, show_default=True, help="filled to two thirds by the prompt")
@click.option("--budgets", default=8, show_default=True, help="from the smallest to what holds everything")
@click.option("--tokens", default=48, show_default=True, help="decoded at each budget")
@click.option("--rounds", default=1, show_default=True, help="at each budget; the median speed counts")
@click.option("--kept", is_flag=True, help="use what `qmix doctor` kept instead of measuring")
def main(store: str, context: int, budgets: int, tokens: int, rounds: int, kept: bool) -> None:
    """Print a table, then one JSON line."""
    with tempfile.TemporaryDirectory() as scratch:
        state = None if kept else Path(scratch)
        if not kept:
            disk = ("--directory", store) if Path(store).is_dir() else ()
            rates = qmix_json("doctor", *disk, state=state)["rates"]
        rows = [row(store, context, share / (budgets - 1), tokens, rounds, state) for share in range(budgets)]
        if kept:
            rates = qmix_json("doctor", "--no-measure")["rates"]
    Console(width=110).print(table(store, context, rows))
    print(json.dumps({"store": store, "context": context, "rates": rates, "rows": rows}))


def row(store: str, context: int, share: float, tokens: int, rounds: int, state: Path | None) -> dict[str, Any]:
    """One budget, that share of the way from the smallest to what holds everything."""
    whole = qmix_json("plan", store, "--ram", "4TiB", "--context", str(context))
    low, high = whole["smallest"], int(whole["total"] * 1.02) + 2**24
    limits = ("--ram", str(low + int((high - low) * share)), "--context", str(context))
    plan = qmix_json("plan", store, *limits, state=state)
    peak, speeds = measured(store, limits, PROMPT * (context // 24), tokens, rounds)  # some 16 tokens each
    speed, predicted = statistics.median(speeds), plan["predicted"]["decode"]
    return {
        "ram": plan["ram"],
        "slots": plan["slots"],
        "num_records": plan["num_records"],
        "total": plan["total"],
        "peak": peak,
        "memory_off": peak / plan["total"] - 1,
        "predicted": predicted["tokens_per_s"],
        "limit": predicted["limit"],
        "speeds": speeds,
        "speed_off": predicted["tokens_per_s"] / speed - 1,
    }


def table(store: str, context: int, rows: list[dict[str, Any]]) -> Table:
    """Differences beyond what is promised are marked."""
    found = Table(title=f"{store}, context {context}")
    for column in ("budget", "in memory", "predicted", "measured", "off", "predicted", "measured", "off", "limit"):
        found.add_column(column, justify="right")

    def off(value: float, most: float) -> str:
        return f"{value:+.1%}{' !' if abs(value) > most else ''}"

    for each in rows:
        memory = (format_bytes(each["total"]), format_bytes(each["peak"]), off(each["memory_off"], MOST_MEMORY))
        speed = (f"{each['predicted']:.3g} tok/s", f"{statistics.median(each['speeds']):.3g} tok/s")
        held = f"{each['slots']} of {each['num_records']}"
        off_speed = off(each["speed_off"], MOST_SPEED)
        found.add_row(format_bytes(each["ram"]), held, *memory, *speed, off_speed, each["limit"])
    return found


if __name__ == "__main__":
    main()
