"""Time drafting from repetitions on the embedded model, on text that repeats itself and on text that does not.

python benchmarks/draft_tiny.py --tokens 128 --rounds 5
"""

from __future__ import annotations

import json
import statistics

import click
from rich.console import Console
from rich.table import Table

import qmix
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Runner

TEXTS = {
    "repeating": "sudo apt install python3. " * 40,
    "plain": "To install a package on this system, open a terminal and",
}
DRAFTS = (0, 4, 10)


def measure(runner: Runner, text: str, draft: int, tokens: int) -> tuple[float, int]:
    """Seconds a token, and forward passes, of one greedy answer."""
    passes: list[int] = []
    hook = runner.model.register_forward_hook(lambda *_: passes.append(1))
    sampling = Sampling(max_new_tokens=tokens, temperature=0, ignore_eos=True, draft_ngram=draft)
    result = runner.complete(text, sampling)
    hook.remove()
    return (result.total_s - result.ttft_s) / tokens, len(passes)


@click.command()
@click.option("--tokens", default=128, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="the drafts take turns in each")
def main(tokens: int, rounds: int) -> None:
    """Print a table, then one JSON line."""
    rows = []
    with qmix.load("tiny", context=2048) as runner:
        for name, text in TEXTS.items():
            measure(runner, text, 0, tokens)
            times: dict[int, list[float]] = {draft: [] for draft in DRAFTS}
            passes = {}
            for _ in range(rounds):
                for draft in DRAFTS:
                    seconds, passes[draft] = measure(runner, text, draft, tokens)
                    times[draft].append(seconds)
            for draft in DRAFTS:
                ratios = [plain / drafted for plain, drafted in zip(times[0], times[draft], strict=True)]
                row = {"text": name, "draft": draft, "ms": statistics.median(times[draft]) * 1e3}
                rows.append(row | {"passes": passes[draft], "times_faster": statistics.median(ratios)})
    table = Table(title=f"{tokens} tokens, {rounds} rounds")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
