"""Choose the next token of one sequence, by its own options and from its own random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import MixtralForCausalLM

from qmix.engine.generation_config import decoding, logits_processors
from qmix.engine.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Chosen:
    """A chosen token, its log-probability, and the likeliest tokens with theirs.

    Log-probabilities are the model's, before temperature and cuts. `logprob` is None where none was requested.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def stream_seed(run_seed: int, name: str) -> int:
    """Return a seed that depends on the run's seed and on `name` alone."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{name}".encode()).digest()[:8], "big") >> 1


class Sampler:
    """Chooses tokens as transformers' `generate` would, with draws from `sampling.seed`.

    `logprobs` is how many of the likeliest tokens are returned with each, None for no log-probabilities at all.
    """

    def __init__(
        self, model: MixtralForCausalLM, sampling: Sampling, prompt: Sequence[int], logprobs: int | None = None
    ) -> None:
        self.decoding, self.logprobs = decoding(model.generation_config, sampling), logprobs
        self._processors = logits_processors(model, self.decoding.config, prompt)
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
        return Chosen(token) if self.logprobs is None else self.scores([token], logits[None])[0]

    def scores(self, tokens: Sequence[int], logits: torch.Tensor) -> list[Chosen]:
        """Return given tokens with their log-probabilities, from logits [tokens, V] in fp32."""
        every = logits.log_softmax(-1)
        best, ids = every.topk(min(self.logprobs or 0, every.shape[-1]))
        own = every.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        likeliest = (tuple(zip(*pair, strict=True)) for pair in zip(ids.tolist(), best.tolist(), strict=True))
        return list(map(Chosen, tokens, own.tolist(), likeliest))
