"""Replay routing to see whether exchanging residents of a GPU between tokens pays: a table, then one JSON line.

    python benchmarks/promotion.py --tokens 400 --card "RTX 4090"

Traces are routing that the embedded model really did on text in five languages, one language after another or one
alone, and synthetic routing of 8x7B's 32 layers whose favourite experts change every 256 tokens. Ways to place:

    static      the most used by the profile, which is of other text, stay
    promoted    every so many tokens, experts with the most decayed use change places with the residents of their layer
                with the least, where the use so far promises more than the exchange costs, and once exchanges would
                have saved 5% of the last tokens' time; begins with the same residents
    hindsight   the most used of this very trace stay
    optimum     Belady's cache with free exchanges: nothing is better, and no program can know it

A second table has runs of --run tokens one after another, which begin with the residents of the profile, or with those
that the run before ended with.

An expert that is not resident is computed by the CPU. Its seconds and those of an exchange (a record over the link
and another one back) follow from a record of 8x7B and the rates of the card and of a typical CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import qmix
from calibration.corpus import LANGUAGES, TEXTS
from qmix.machine.cards import card_named
from qmix.machine.rates import Rates
from qmix.model.gpu import promotion
from qmix.pool.replay import belady_hits
from qmix.pool.stack import Array
from qmix.pool.trace import as_trace, recorded

RECORD = 93.6e6  # bytes of one expert of 8x7B in nf4
EXPERTS, TOP_K = 8, 2
LAYERS = 32  # of synthetic traces
TOPIC = 256  # tokens until the favourites of a synthetic trace change
PROMPT = 200  # letters of a text that the embedded model goes on from
RESIDENT = (0.5, 0.85)  # shares of all experts: 8x7B in 12 and in 24 GiB
DECAYS = (32, 128, 512)  # tokens after which a use counts 1 / e
PERIODS = (16, 64)  # tokens between exchanges
IN_USE = promotion.DECAY, promotion.PERIOD


@dataclass(frozen=True)
class Costs:
    """Seconds of an expert on the CPU, and of an exchange."""

    computed: float
    exchanged: float


@dataclass(frozen=True)
class Outcome:
    """Experts computed by the CPU and exchanges, both a token, and the seconds of both."""

    computed: float
    exchanged: float
    seconds: float


def outcome(computed: int, exchanged: int, tokens: int, costs: Costs) -> Outcome:
    seconds = computed * costs.computed + exchanged * costs.exchanged
    return Outcome(computed / tokens, exchanged / tokens, seconds / tokens)


def used(trace: Array, layers: int) -> Iterator[np.ndarray]:
    """Yield for each token the records that it uses, layer * EXPERTS + expert."""
    steps = trace.reshape(-1, layers, trace.shape[1]).astype(np.int64)
    numbers = steps + np.arange(layers)[None, :, None] * EXPERTS
    for token, asked in zip(numbers, steps >= 0, strict=True):
        yield token[asked]


def uses(trace: Array, layers: int) -> np.ndarray:
    """Return how often each record is used."""
    return np.bincount(np.concatenate(list(used(trace, layers))), minlength=layers * EXPERTS)


def static(trace: Array, layers: int, residents: int, profile: np.ndarray, costs: Costs) -> Outcome:
    held = np.argsort(-profile, kind="stable")[:residents]
    counts = uses(trace, layers)
    return outcome(int(counts.sum() - counts[held].sum()), 0, len(trace) // layers, costs)


def promoted(
    trace: Array, layers: int, residents: int, profile: np.ndarray, costs: Costs, decay: int, period: int
) -> Outcome:
    """Return what a run's promotion does, with another decay and period."""
    promotion.DECAY, promotion.PERIOD = decay, period
    groups = grouped(profile, layers, planned(profile, layers, residents), costs)
    return run(trace, groups, costs)


def planned(profile: np.ndarray, layers: int, residents: int) -> list[frozenset[int]]:
    """Return each layer's residents: the most used of all layers by the profile."""
    held = np.argsort(-profile, kind="stable")[:residents]
    return [frozenset(int(each) % EXPERTS for each in held if each // EXPERTS == layer) for layer in range(layers)]


def grouped(profile: np.ndarray, layers: int, starts: list[frozenset[int]], costs: Costs) -> list[promotion.Group]:
    """Return the groups of a run that begins with some residents of each layer."""
    shares = (profile / profile.sum() * layers * TOP_K).reshape(layers, EXPERTS)
    return [
        promotion.Group(
            layer, start, dict(enumerate(promotion.long_used(row.tolist()))), costs.computed, costs.exchanged
        )
        for layer, (start, row) in enumerate(zip(starts, shares, strict=True))
    ]


def run(trace: Array, groups: list[promotion.Group], costs: Costs) -> Outcome:
    """Return what a run computes on the CPU and exchanges."""
    layers, made = len(groups), promotion.Promotion(groups)
    computed = exchanged = 0
    for token in used(trace, layers):
        for record in token.tolist():
            layer, expert = divmod(record, EXPERTS)
            computed += expert not in groups[layer].real
            made.used(layer, [[expert]])
        exchanged += len(made.exchanges(1))
    return outcome(computed, exchanged, len(trace) // layers, costs)


def in_runs(
    trace: Array, layers: int, profile: np.ndarray, share: float, costs: Costs, length: int, kept: bool
) -> float:
    """Return the seconds of a trace in runs of `length` tokens, each of which begins anew, or where the last ended."""
    promotion.DECAY, promotion.PERIOD = IN_USE
    starts = first = planned(profile, layers, round(share * layers * EXPERTS))
    seconds = 0.0
    for at in range(0, len(trace), length * layers):
        part = trace[at : at + length * layers]
        groups = grouped(profile, layers, starts, costs)
        seconds += run(part, groups, costs).seconds * (len(part) // layers)
        starts = [frozenset(group.real) for group in groups] if kept else first
    return seconds


def optimum(trace: Array, layers: int, residents: int, costs: Costs) -> Outcome:
    """Return the least that any residents allow, exchanges for nothing."""
    hits = belady_hits(trace, layers, EXPERTS, residents, start=range(layers * EXPERTS))
    return outcome(int(np.count_nonzero(trace >= 0)) - hits, 0, len(trace) // layers, costs)


def real_traces(tokens: int) -> tuple[dict[str, Array], int, np.ndarray]:
    """Return traces of the embedded model by language, its layers, and a profile of other text in all languages."""
    traces, profiles = {}, []
    with qmix.load("tiny") as runner:
        layers = runner.store.geometry.num_layers
        for seed in (1, 0):  # the profile's first
            for language in LANGUAGES:
                text = (TEXTS / f"{language}.md").read_text()
                start = 0 if seed else len(text) // 2
                with recorded(runner.pool) as steps:
                    options: dict[str, Any] = {
                        "max_new_tokens": tokens,
                        "temperature": 0.8,
                        "seed": seed,
                        "ignore_eos": True,
                    }
                    runner.complete(text[start : start + PROMPT], **options)
                trace = decoded(as_trace(steps, layers), layers)
                profiles.append(uses(trace, layers)) if seed else traces.update({language: trace})
    together = np.concatenate(list(traces.values()))
    return traces | {"all five": together}, layers, np.sum(profiles, axis=0) + 1e-3


def decoded(trace: Array, layers: int) -> Array:
    """Return the tokens of a trace that were computed one by one, without the prompt."""
    passes = trace.reshape(-1, layers, trace.shape[1])
    single = (passes >= 0).sum(2).max(1) <= TOP_K
    return passes[single][..., :TOP_K].reshape(-1, TOP_K)


def synthetic(tokens: int, skew: float, repeats: float, seed: int = 0) -> tuple[Array, np.ndarray]:
    """Return a trace and the profile of a longer one with the same experts.

    An expert's chance goes with rank ** -skew. The ranks are half the profile's, and half each topic's own. With the
    chance `repeats` a token takes an expert of the token before.
    """
    random = np.random.default_rng(seed)
    general = np.argsort(random.random((LAYERS, EXPERTS)), 1)
    profile = ((general + 1.0) ** -skew).ravel()
    trace = np.empty((tokens, LAYERS, TOP_K), np.int16)
    chances = np.empty((LAYERS, EXPERTS))
    for token in range(tokens):
        if token % TOPIC == 0:
            own = np.argsort(random.random((LAYERS, EXPERTS)), 1)
            chances = np.log((general + 1.0) ** -skew + (own + 1.0) ** -skew)
        scores = chances + random.gumbel(size=chances.shape)  # drawing without replacement
        if token:
            again = random.random((LAYERS, TOP_K)) < repeats
            np.put_along_axis(
                scores, trace[token - 1], np.where(again, 100.0, np.take_along_axis(scores, trace[token - 1], 1)), 1
            )
        trace[token] = np.argsort(-scores, 1)[:, :TOP_K]
    return trace.reshape(-1, TOP_K), profile


def compared(name: str, trace: Array, layers: int, profile: np.ndarray, share: float, costs: Costs) -> dict[str, Any]:
    """Return the outcomes of every way for a share of resident experts."""
    residents = round(share * layers * EXPERTS)
    rows = {"static": static(trace, layers, residents, profile, costs)}
    tried = {
        f"decay {decay}, every {period}": promoted(trace, layers, residents, profile, costs, decay, period)
        for decay in DECAYS
        for period in PERIODS
    }
    best = min(tried, key=lambda way: tried[way].seconds)
    rows |= {"promoted": tried[best], "hindsight": static(trace, layers, residents, uses(trace, layers), costs)}
    rows["optimum"] = optimum(trace, layers, residents, costs)
    gains = {way: 1 - each.seconds / rows["static"].seconds for way, each in tried.items()}
    return {
        "trace": name,
        "tokens": len(trace) // layers,
        "resident": share,
        "computed": {way: each.computed for way, each in rows.items()},
        "ms": {way: 1e3 * each.seconds for way, each in rows.items()},
        "moved_MB": 2 * rows["promoted"].exchanged * RECORD / 1e6,
        "best": best,
        "gain": gains[best],
        "gains": gains,
    }


@click.command()
@click.option("--tokens", default=400, show_default=True, help="of each trace and language")
@click.option("--run", "length", default=128, show_default=True, help="tokens of a run in the second table")
@click.option("--card", "named", default="RTX 4090", show_default=True, help="whose link exchanges records")
def main(tokens: int, length: int, named: str) -> None:
    """Print a row for each trace and share of residents."""
    card = card_named(named)
    rates = Rates().with_card(card.rates, card.name, named=True)
    costs = Costs(RECORD / rates.four_bit_read, 2 * RECORD / rates.pcie)
    traces, layers, profile = real_traces(tokens)
    cases = [(f"tiny, {name}", trace, layers, profile) for name, trace in traces.items()]
    for skew in (0.0, 0.25, 0.5, 1.0):
        for repeats in (0.0, 0.25):
            trace, known = synthetic(4 * TOPIC, skew, repeats)
            cases.append((f"skew {skew}, repeats {repeats}", trace, LAYERS, known))
    rows = [compared(*case, share, costs) for case in cases for share in RESIDENT]
    ways = list(rows[0]["computed"])
    title = (
        f"experts on the CPU a token; {1e3 * costs.computed:.2f} ms each, an exchange {1e3 * costs.exchanged:.2f} ms"
    )
    table = Table(title=title)
    for column in ("trace", "resident", *ways, "MB moved\na token", "best", "gain in\nseconds"):
        table.add_column(column, justify="left" if column in ("trace", "best") else "right")
    for row in rows:
        counts = (f"{row['computed'][way]:.2f}" for way in ways)
        moved = f"{row['moved_MB']:.1f}"
        table.add_row(row["trace"], f"{row['resident']:.0%}", *counts, moved, row["best"], f"{row['gain']:+.1%}")
    console = Console(width=150)
    console.print(table)
    for way in rows[0]["gains"]:
        real = [row["gains"][way] for row in rows if row["trace"].startswith("tiny")]
        console.print(f"{way}: {min(real):+.1%} to {max(real):+.1%} on the embedded model's text")
    again = Table("trace", "resident", "seconds that keeping saves", title=f"runs of {length} tokens")
    for case in cases:
        for share in RESIDENT:
            anew, kept = (in_runs(*case[1:], share, costs, length, each) for each in (False, True))
            again.add_row(case[0], f"{share:.0%}", f"{1 - kept / anew:+.1%}")
    console.print(again)
    console.print(f"in use: decay {IN_USE[0]}, every {IN_USE[1]}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
