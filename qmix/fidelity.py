"""How far a quantised model's next-token distributions are from those of the model in half precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from qmix.layerwise import LayerwisePass


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One variant beside the reference, over all predicted tokens.

    Divergences are KL(reference || variant) in nats; `kl_p99` is exceeded by one token in a hundred. `expert_bytes` are
    those of all expert records, `top1` is the share of tokens where both give the same likeliest one.
    """

    name: str
    expert_bytes: int
    perplexity: float
    kl_mean: float
    kl_error: float  # the mean's standard error, tokens taken as independent
    kl_p99: float
    kl_worst: float
    top1: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class _Tally:
    """What is gathered of one variant."""

    surprise: float = 0.0  # negative log-likelihood, in all
    divergences: list[torch.Tensor] = field(default_factory=list)
    agreed: int = 0

    def add(self, reference: torch.Tensor, scores: torch.Tensor, targets: torch.Tensor) -> None:
        """Log-probabilities [t, V] of both, and the tokens [t] that came."""
        self.surprise -= scores.gather(1, targets[:, None]).double().sum().item()
        # in double, and never below zero: rounding of numbers that nearly cancel is not a divergence
        kl = (reference.exp() * (reference - scores)).sum(-1, dtype=torch.float64).clamp_(min=0)
        self.divergences.append(kl)
        self.agreed += int((reference.argmax(-1) == scores.argmax(-1)).sum())

    def result(self, name: str, nbytes: int) -> Fidelity:
        kl = torch.cat(self.divergences)
        count = len(kl)
        error = kl.std().item() / math.sqrt(count) if count > 1 else math.nan
        p99, worst = torch.quantile(kl, 0.99).item(), kl.max().item()
        perplexity = math.exp(self.surprise / count)
        return Fidelity(name, nbytes, perplexity, kl.mean().item(), error, p99, worst, self.agreed / count)


def compare(layers: LayerwisePass, sequences: Sequence[Sequence[int]]) -> list[Fidelity]:
    """Each variant beside the first, which is the reference and comes first in the result."""
    hidden = layers.run(sequences)
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    ends = torch.tensor([len(sequence) for sequence in sequences]).cumsum(0) - 1
    predicting = torch.ones(len(ids), dtype=torch.bool)
    predicting[ends] = False  # a window's last token is followed by nothing that it saw
    tallies = [_Tally() for _ in layers.variants]
    for rows, *logits in layers.logits(hidden, predicting.nonzero()[:, 0]):
        targets = ids[rows + 1]
        reference = logits[0].log_softmax(-1)
        for tally, scores in zip(tallies, logits, strict=True):
            tally.add(reference, scores.log_softmax(-1), targets)
    return [tally.result(variant.name, variant.nbytes) for tally, variant in zip(tallies, layers.variants, strict=True)]
