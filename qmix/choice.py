"""Which token comes next in one sequence, by its own options and its own random stream."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, MixtralForCausalLM
from transformers.generation import LogitsProcessorList

from qmix.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token, its log-probability under the model (before temperature and cuts), and the likeliest with theirs.

    `logprob` is None where none was asked for.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


def generation_config(model: MixtralForCausalLM, sampling: Sampling) -> GenerationConfig:
    """The model's own defaults with these options on top."""
    config = GenerationConfig(**model.generation_config.to_diff_dict())
    config.update(**sampling.overrides())
    config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    if not config.do_sample:
        config.temperature = config.top_p = config.top_k = config.min_p = None
    return config


def end_tokens(config: GenerationConfig) -> frozenset[int]:
    """Tokens that end a text."""
    ends = config.eos_token_id
    return frozenset() if ends is None else frozenset(ends if isinstance(ends, list) else [ends])


def stream_seed(run_seed: int, name: str) -> int:
    """The seed of what is called `name` in a run: it follows from the two alone."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{name}".encode()).digest()[:8], "big") >> 1


class TokenChooser:
    """Chooses what follows so many prompt tokens as transformers' `generate` would, from the draws of `sampling.seed`.

    `logprobs` is how many of the likeliest tokens are told with each, None for no log-probabilities at all.
    """

    def __init__(
        self, model: MixtralForCausalLM, sampling: Sampling, prompt_tokens: int, logprobs: int | None = None
    ) -> None:
        config = generation_config(model, sampling)
        self.ends, self.logprobs, self.samples = end_tokens(config), logprobs, bool(config.do_sample)
        self._processors = _processors(model, config, prompt_tokens)
        self._random = torch.Generator().manual_seed(sampling.seed)

    def choose(self, tokens: list[int], logits: torch.Tensor) -> Chosen:
        """The token after `tokens`, from logits [V] in fp32."""
        scores = logits[None]
        if self._processors:
            scores = self._processors(torch.tensor([tokens]), scores.clone())
        if self.samples:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._random))
        else:
            token = int(scores.argmax())
        if self.logprobs is None:
            return Chosen(token)
        every = logits.log_softmax(-1)
        best, ids = every.topk(min(self.logprobs, len(every)))
        return Chosen(token, float(every[token]), tuple(zip(ids.tolist(), best.tolist(), strict=True)))


def _processors(model: MixtralForCausalLM, config: GenerationConfig, prompt_tokens: int) -> LogitsProcessorList:
    """What `generate` itself would put between logits and choice for these options."""
    full, _ = model._prepare_generation_config(config)
    full.do_sample = config.do_sample
    model._prepare_special_tokens(full, kwargs_has_attention_mask=True, device=torch.device("cpu"))
    found: LogitsProcessorList = model._get_logits_processor(
        full, input_ids_seq_length=prompt_tokens, logits_processor=LogitsProcessorList(), device="cpu"
    )
    return found
