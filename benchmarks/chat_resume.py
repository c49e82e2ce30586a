"""Time the next turn of a long conversation: KV cache read back from a file, and conversation computed again.

    python benchmarks/chat_resume.py [MODEL] --tokens 1500 --rounds 5 --ram 1GiB

MODEL is a store, a checkpoint or `tiny`. Both ways end with the first token of the same new turn, and alternate in each
round. The file is read through the page cache, and dropped from it before each read.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import qmix
from qmix.chat import record
from qmix.chat.session import Session
from qmix.units import format_bytes

SENTENCE = "Click the button to open the file, and save it under another name. "
GREEDY = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}


def first_token(session: Session) -> int:
    """Answer one more turn with one token, which is not kept; how many prompt tokens were computed."""
    answer = session.ask("And then?")
    for _ in answer.pieces:
        pass
    assert answer.result is not None
    return answer.result.prefilled_tokens


def dropped(path: Path) -> None:
    """Leave nothing of a file in the page cache."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@click.command()
@click.argument("model", default="tiny")
@click.option("--tokens", default=1500, show_default=True, help="of the conversation, nearly")
@click.option("--rounds", default=5, show_default=True)
@click.option("--ram")
def main(model: str, tokens: int, rounds: int, ram: str | None) -> None:
    """Print a table, then one JSON line."""
    seconds: dict[str, list[float]] = {"save": [], "read back": [], "computed again": []}
    with qmix.load(model, ram=ram, context=tokens + 64) as runner, tempfile.TemporaryDirectory(dir=".") as scratch:
        path = Path(scratch) / "session.json"
        session = Session(runner, GREEDY)
        count = tokens // len(runner.tokenizer(SENTENCE)["input_ids"])
        answer = session.ask(SENTENCE * count)
        for _ in answer.pieces:
            pass
        session.keep(answer)
        for _ in range(rounds):
            runner.complete("x", max_new_tokens=1)  # the cache holds something else
            started = time.perf_counter()
            computed = first_token(session)
            seconds["computed again"].append(time.perf_counter() - started)
            started = time.perf_counter()
            record.save(session, path)
            held = record.save_cache(session, path)
            seconds["save"].append(time.perf_counter() - started)
            runner.complete("x", max_new_tokens=1)
            dropped(record.kv_path(path))
            started = time.perf_counter()
            record.load(session, path)
            record.load_cache(session, path)
            left = first_token(session)
            seconds["read back"].append(time.perf_counter() - started)
        size = record.kv_path(path).stat().st_size
    title = f"{model}: {held} tokens in {format_bytes(size)}; computed {computed} of them again, {left} after reading"
    table = Table(title=title)
    for column in ("", "median s", "least s", "most s"):
        table.add_column(column, justify="right")
    for name, values in seconds.items():
        table.add_row(name, *(f"{value:.3f}" for value in (statistics.median(values), min(values), max(values))))
    Console(width=120).print(table)
    pairs = zip(seconds["computed again"], seconds["read back"], strict=True)
    ratio = statistics.median(again / back for again, back in pairs)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(json.dumps({"model": model, "tokens": held, "bytes": size, "seconds": medians, "times_faster": ratio}))


if __name__ == "__main__":
    main()
