"""Distances between a quantised model's next-token distributions and those of the model in half precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qmix.engine.checkpoint_weights import CheckpointWeights
from qmix.engine.layerwise import logits, run_layers
from qmix.engine.passes import plain_pass


@dataclass(frozen=True, slots=True)
class Fidelity:
    """A variant compared with the reference over all predicted tokens.

    Divergences are KL(reference || variant) in nats; one token in a hundred exceeds `kl_p99`. `expert_bytes` is the
    size of all expert records. `top1` is the share of tokens for which both have the same likeliest one.
    """

    name: str
    expert_bytes: int
    perplexity: float
    kl_mean: float
    kl_error: float  # standard error of the mean, with tokens taken as independent
    kl_p99: float
    kl_worst: float
    top1: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Scores:
    """A variant's predictions compared with the reference's: divergence, surprise (nats) and agreement, each [T]."""

    name: str
    expert_bytes: int
    divergences: torch.Tensor
    surprises: torch.Tensor
    agreed: torch.Tensor

    def fidelity(self) -> Fidelity:
        """Return the figures over all tokens."""
        kl, count = self.divergences, len(self.divergences)
        error = kl.std().item() / math.sqrt(count) if count > 1 else math.nan
        p99, worst = torch.quantile(kl, 0.99).item(), kl.max().item()
        perplexity = math.exp(self.surprises.sum().item() / count)
        top1 = int(self.agreed.sum()) / count
        return Fidelity(self.name, self.expert_bytes, perplexity, kl.mean().item(), error, p99, worst, top1)


def score(weights: CheckpointWeights, sequences: Sequence[Sequence[int]]) -> list[Scores]:
    """Score every predicted token for each variant; the first variant is the reference."""
    part = plain_pass(sequences)
    targets = torch.from_numpy(part.targets)
    found: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in weights.variants]
    for some, scores in logits(weights, run_layers(weights, part), torch.from_numpy(part.rows)):
        reference = scores[0].log_softmax(-1)
        for tokens, each in zip(found, scores, strict=True):
            tokens.append(_tokens(reference, each.log_softmax(-1), targets[some]))
    return [
        Scores(variant.name, variant.nbytes, *map(torch.cat, zip(*tokens, strict=True)))
        for variant, tokens in zip(weights.variants, found, strict=True)
    ]


def _tokens(reference: torch.Tensor, scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return divergence, surprise and agreement [t], from log-probabilities [t, V] of both and the next tokens [t]."""
    # summed in double and clamped at zero: terms nearly cancel, and rounding must not give a negative divergence
    kl = (reference.exp() * (reference - scores)).sum(-1, dtype=torch.float64).clamp_(min=0)
    surprise = -scores.gather(1, targets[:, None])[:, 0].double()
    return kl, surprise, reference.argmax(-1) == scores.argmax(-1)


def compare(weights: CheckpointWeights, sequences: Sequence[Sequence[int]]) -> list[Fidelity]:
    """Compare each variant with the first, the reference, which is also first in the result."""
    return [scores.fidelity() for scores in score(weights, sequences)]
