"""The cost of watching: tokens/s on `tiny` alone, beside the terminal's live screen, and beside a watcher of the page.

    python benchmarks/watching.py [--tokens 400] [--rounds 5]

The three alternate in one process. A look's own time on a core, times the looks a second, is the share of a core that
watching takes. The embedded model is the worst case: it has the most tokens a second, and Python, which the watcher
shares, takes most of a token's time.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console

from qmix.checkpoint import open_checkpoint
from qmix.checkpoint.source import LocalSource
from qmix.engine.figures import Watch
from qmix.engine.stream import Runner
from qmix.models import EMBEDDED
from qmix.plan import make_plan
from qmix.serve.page import PERIOD
from qmix.store.quantize import quantize
from qmix.store.sources import layout_for
from qmix.terminal.live import REFRESHES, LiveView

PROMPT = "To install a package,"


@contextmanager
def beside(look: Callable[[], object], seconds: float) -> Iterator[None]:
    """Look again and again in another thread while the block runs."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(seconds):
            look()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def rate(runner: Runner, tokens: int) -> float:
    """Return tokens/s of a greedy answer."""
    started = time.perf_counter()
    runner.complete(PROMPT, max_new_tokens=tokens, temperature=0.0, ignore_eos=True)
    return tokens / (time.perf_counter() - started)


def core_seconds(look: Callable[[], object], looks: int = 40) -> float:
    """Return the median time that a look takes of a core."""
    times = []
    for _ in range(looks):
        started = time.thread_time()
        look()
        times.append(time.thread_time() - started)
    return statistics.median(times)


Ways = dict[str, tuple[Callable[[], object], float]]


def ways_of(runner: Runner) -> Ways:
    """Return what is done again and again beside the runner, and after how many seconds."""
    screen, page = Watch(runner), Watch(runner)
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True)

    def draw() -> None:
        console.print(LiveView("benchmark", screen.figures(), "words of an answer " * 40))

    def event() -> bytes:
        return msgspec.json.encode(page.figures().to_json())

    return {"alone": (lambda: None, 3600.0), "screen": (draw, 1 / REFRESHES), "page": (event, PERIOD)}


def measure(runner: Runner, ways: Ways, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return the rates of each way, round by round; the order turns so that each way is first in its turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    rate(runner, tokens)
    for turn in range(rounds):
        names = list(ways)
        for name in names[turn % 3 :] + names[: turn % 3]:
            with beside(*ways[name]):
                found[name].append(rate(runner, tokens))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        opened = open_checkpoint(LocalSource(EMBEDDED["tiny"]))
        store = quantize(opened, Path(directory) / "store", layout_for(opened, "nf4", None, False))
        plan = make_plan(store.layout, 2**40, 1024, 2**28)
        with Runner(store, plan) as runner:
            ways = ways_of(runner)
            found = measure(runner, ways, options.tokens, options.rounds)
            shares = {name: core_seconds(look) / seconds for name, (look, seconds) in ways.items()}
    alone = found["alone"]
    ratios = {name: [one / other for one, other in zip(rates, alone, strict=True)] for name, rates in found.items()}
    for name, rates in found.items():
        of = ratios[name]
        print(
            f"{name:8} {statistics.median(rates):7.1f} tok/s ({min(rates):.1f} to {max(rates):.1f}), "
            f"ratio to alone {statistics.median(of):.3f} ({min(of):.3f} to {max(of):.3f}), "
            f"{100 * shares[name]:.2f}% of a core"
        )
    print(json.dumps({"tokens": options.tokens, "rates": found, "ratios": ratios, "shares": shares}))


if __name__ == "__main__":
    main()
