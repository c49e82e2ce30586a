"""The figures of Mixtral 8x22B's model card, and their comparison with a model's own. Loads no torch.

The card quotes the Open LLM Leaderboard: six tasks, each with a fixed number of examples in the prompt, and their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CardTask:
    """A task of the card: the harness's names for it and its metric, and the card's figure in percent.

    `folder` is its place in the harness's directory of tasks.
    """

    title: str
    task: str
    folder: str
    shots: int
    metric: str
    figure: float


CARD = (
    CardTask("ARC-Challenge", "arc_challenge", "arc", 25, "acc_norm,none", 70.48),
    CardTask("HellaSwag", "hellaswag", "hellaswag", 10, "acc_norm,none", 88.73),
    CardTask("MMLU", "mmlu", "mmlu/default", 5, "acc,none", 77.81),
    CardTask("TruthfulQA mc2", "truthfulqa_mc2", "truthfulqa", 0, "acc,none", 51.08),
    CardTask("Winogrande", "winogrande", "winogrande", 5, "acc,none", 84.53),
    CardTask("GSM8K", "gsm8k", "gsm8k", 5, "exact_match,strict-match", 74.15),
)
CARD_AVERAGE = 74.46


@dataclass(frozen=True, slots=True)
class CardRow:
    """A figure and the card's, in percent.

    `error` is the standard error of the figure, NaN if there is none. It is also used for the difference: the card
    gives no error, and both figures are for the same questions.
    """

    title: str
    shots: int | None
    metric: str
    figure: float
    error: float
    card: float

    @property
    def difference(self) -> float:
        """The figure minus the card's."""
        return self.figure - self.card

    def to_json(self) -> dict[str, Any]:
        error = None if math.isnan(self.error) else self.error
        return asdict(self) | {"difference": self.difference, "error": error, "difference_error": error}


def card_rows(results: Mapping[str, Mapping[str, Any]]) -> list[CardRow]:
    """Return the rows of the six tasks and of their mean, from the harness's `results` by task."""
    rows = []
    for known in CARD:
        metric, kind = known.metric.split(",")
        values = results[known.task]
        figure, error = values[known.metric], values[f"{metric}_stderr,{kind}"]
        name = metric if kind == "none" else f"{metric}, {kind}"
        rows.append(CardRow(known.title, known.shots, name, 100 * figure, 100 * _number(error), known.figure))
    mean = sum(row.figure for row in rows) / len(rows)
    error = math.sqrt(sum(row.error**2 for row in rows)) / len(rows)
    return [*rows, CardRow("average", None, "", mean, error, CARD_AVERAGE)]


def _number(error: Any) -> float:
    """Return an error as a number: the harness gives "N/A" for a single question."""
    return float(error) if isinstance(error, int | float) else math.nan
