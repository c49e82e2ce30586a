"""Log-probabilities of given tokens by a store's model, in layer-wise passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.layerwise import logits, run_layers
from qmix.engine.opener import OpenModel
from qmix.engine.passes import Pass
from qmix.engine.store_weights import PATH_ATTENTION, PathWeights
from qmix.model.kv import kv_layers
from qmix.plan.scoring import ScoringPlan
from qmix.progress import OnProgress, ignore
from qmix.store.opened import Store


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of a query's targets, in nats, and whether each of them was the likeliest token."""

    logprob: float
    greedy: bool


def scores_of(part: Pass, logprobs: torch.Tensor, greedy: torch.Tensor) -> list[Score]:
    """Return the score of each query of a pass from those of its predictions [P]."""
    count, owners = int(part.queries[-1]) + 1, torch.from_numpy(part.queries)
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, owners, logprobs.double())
    wrong = torch.zeros(count, dtype=torch.int64).index_add_(0, owners, (~greedy).long())
    return [Score(total, misses == 0) for total, misses in zip(sums.tolist(), wrong.tolist(), strict=True)]


class Scorer(OpenModel):
    """A model that scores passes of up to `plan.tokens` rows. Close it, or use it as a context manager."""

    def __init__(self, store: Store, plan: ScoringPlan, on_load: OnProgress = ignore) -> None:
        self.plan = plan
        (path,) = kv_layers(store.geometry, 1, plan.longest, HALF[store.layout.dtype], aligned=True)
        super().__init__(store, plan.slots, PATH_ATTENTION, invariant=True, generates=False, on_load=on_load)
        self._weights = PathWeights(self.model, path)

    def score(self, part: Pass, on_layer: Callable[[int], None] = lambda layers: None) -> list[Score]:
        """Return a score for each query of the pass. Interrupting the caller ends it within an expert's time.

        `on_layer` receives the number of finished layers, in the compute thread.
        """
        return self.thread.run(self._score, part, on_layer)

    @torch.inference_mode()
    def _score(self, part: Pass, on_layer: Callable[[int], None]) -> list[Score]:
        streams = run_layers(self._weights, part, on_layer=on_layer)
        logprobs, greedy = self._predict(streams, torch.from_numpy(part.rows), torch.from_numpy(part.targets))
        return scores_of(part, logprobs, greedy)

    def _predict(
        self, streams: list[torch.Tensor], rows: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities in fp32 of `targets` [P] after `rows` [P], and which are the likeliest."""
        logprobs, greedy = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        wanted, place = rows.unique(return_inverse=True)
        for some, (scores,) in logits(self._weights, streams, wanted):
            scores = scores.log_softmax(-1)  # noqa: PLW2901 -- [t, V]; frees the logits
            (asked,) = torch.where((place >= some.start) & (place < some.stop))
            here = place[asked] - some.start
            logprobs[asked] = scores[here, targets[asked]]
            greedy[asked] = scores.argmax(-1)[here] == targets[asked]
        return logprobs, greedy
