"""Choose the next token of one sequence, by its own options and from its own random stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import MixtralForCausalLM

from qmix.engine.generation_config import decoding, logits_processors
from qmix.engine.processors import own_processors
from qmix.engine.sampling import Sampling
from qmix.text.constraint import Constraint


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen token, its log-probability, and the likeliest tokens with theirs.

    Log-probabilities are the model's, before temperature and cuts. `logprob` is None where none was requested.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def chosen_token(token: int, logits: torch.Tensor, logprobs: int | None) -> Chosen:
    """Return a token chosen after logits [V] in fp32, with its log-probability and the `logprobs` likeliest tokens.

    Without either where `logprobs` is None.
    """
    return Chosen(token) if logprobs is None else chosen_tokens([token], logits[None], logprobs)[0]


def chosen_tokens(tokens: Sequence[int], logits: torch.Tensor, logprobs: int | None) -> list[Chosen]:
    """Return given tokens with their log-probabilities and the likeliest tokens, from logits [tokens, V] in fp32."""
    every = logits.log_softmax(-1)
    best, ids = every.topk(min(logprobs or 0, every.shape[-1]))
    own = every.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    likeliest = (tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), best.tolist(), strict=True))
    return list(map(Chosen, tokens, own.tolist(), likeliest))


class Sampler:
    """Chooses tokens as transformers' `generate` would, with draws from `sampling.seed`."""

    def __init__(
        self,
        model: MixtralForCausalLM,
        sampling: Sampling,
        prompt: Sequence[int],
        constraint: Constraint | None = None,
    ) -> None:
        self.decoding, self.logprobs = decoding(model.generation_config, sampling), sampling.logprobs
        own = own_processors(sampling, len(prompt), constraint)
        self._processors = logits_processors(model, self.decoding.config, prompt, own)
        self._random = torch.Generator().manual_seed(sampling.seed)

    def sample(self, tokens: list[int], logits: torch.Tensor) -> Chosen:
        """Return the token after `tokens`, from logits [V] in fp32."""
        scores = logits[None]
        if self._processors:
            scores = self._processors(torch.tensor([tokens]), scores.clone())
        if self.decoding.config.do_sample:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))
        else:
            token = int(scores.argmax())
        return chosen_token(token, logits, self.logprobs)
