"""Changes of the logits that transformers has no processor for, as processors for both drivers."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor
from transformers.generation import LogitsProcessorList

from qmix.engine.sampling import Sampling
from qmix.text.constraint import Constraint


class AnswerPenalties(LogitsProcessor):
    """Subtracts `presence` from the logits of the answer's tokens, and `frequency` for each time that one occurs.

    As OpenAI defines them (https://platform.openai.com/docs/api-reference): the prompt does not count.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self.prompt_tokens, self.presence, self.frequency = prompt_tokens, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [1, V] after ids [1, T]."""
        tokens, counts = input_ids[0, self.prompt_tokens :].unique(return_counts=True)
        penalties = self.presence + self.frequency * counts.to(scores.dtype)
        return scores.index_add(1, tokens, -penalties[None])


class GrammarMask(LogitsProcessor):
    """Excludes the tokens that cannot continue the answer under its grammar.

    Where other options exclude all that can, those tokens are equally likely: the grammar comes first.
    """

    def __init__(self, prompt_tokens: int, constraint: Constraint) -> None:
        self.prompt_tokens, self.constraint = prompt_tokens, constraint

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [1, V] after ids [1, T]."""
        found = self.constraint.allowed(input_ids[0, self.prompt_tokens :].tolist())
        if found is None:  # behind a draft that the grammar excludes, which is not accepted
            return scores
        allowed = torch.from_numpy(found).to(scores.device)
        masked = scores.masked_fill(~allowed, -torch.inf)
        return masked if bool(masked.isfinite().any()) else torch.zeros_like(scores).masked_fill_(~allowed, -torch.inf)


def own_processors(sampling: Sampling, prompt_tokens: int, constraint: Constraint | None) -> LogitsProcessorList:
    """Return qmix's own processors of a generation; transformers applies them after its own, before temperature."""
    found = LogitsProcessorList()
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(AnswerPenalties(prompt_tokens, sampling.presence_penalty, sampling.frequency_penalty))
    if constraint is not None:
        found.append(GrammarMask(prompt_tokens, constraint))
    return found
