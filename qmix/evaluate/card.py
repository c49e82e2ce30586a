"""The figures of Mixtral 8x22B's model card, and a model's own beside them. Loads no torch.

The card takes them from the Open LLM Leaderboard: six tasks, each with so many examples in the prompt, and their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CardTask:
    """A task of the card: the harness's name for it and for its figure, and the card's figure in percent.

    `folder` is where the harness keeps it among its tasks.
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
    """A figure beside the card's, in percent.

    `error` is the figure's standard error, NaN if there is none, and the difference's too: the card gives none for its
    own, and both are of the same questions.
    """

    title: str
    shots: int | None
    metric: str
    figure: float
    error: float
    card: float

    @property
    def difference(self) -> float:
        return self.figure - self.card

    def to_json(self) -> dict[str, Any]:
        error = None if math.isnan(self.error) else self.error
        return asdict(self) | {"difference": self.difference, "error": error, "difference_error": error}


def card_rows(results: Mapping[str, Mapping[str, Any]]) -> list[CardRow]:
    """The six, and last their mean, from the harness's `results` by task."""
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
    """The harness says "N/A" where there is one question only."""
    return float(error) if isinstance(error, int | float) else math.nan
