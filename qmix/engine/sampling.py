"""Options of a generation: the choice of the next token, and when to stop. Loads no torch."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qmix.errors import UsageError, arg
from qmix.text.detokenizer import check_text
from qmix.text.grammar import grammar_source, schema_source

LEAST_HEAT = 1e-6  # logits divided by less may overflow
MOST_STOP = 8192  # characters of all stop sequences: each of hundreds of answers at once keeps its own
MOST_BIASES = 1024  # tokens with a bias, for the same reason
MOST_BIAS = 100.0


@dataclass(frozen=True, slots=True)
class Range:
    """The allowed values of an option, and their name in a message."""

    holds: Callable[[Any], bool]
    wanted: str


RANGES = {
    "max_new_tokens": Range(lambda value: value >= 1, "at least 1"),
    "temperature": Range(
        lambda value: value == 0 or LEAST_HEAT <= value <= 100, f"0 (greedy), or {LEAST_HEAT:f} to 100"
    ),
    "top_p": Range(lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "top_k": Range(lambda value: value >= 0, "0 (off) or more"),
    "min_p": Range(lambda value: 0 <= value <= 1, "0 to 1"),
    "repetition_penalty": Range(lambda value: 0.01 <= value <= 100, "0.01 to 100"),
    "presence_penalty": Range(lambda value: -2 <= value <= 2, "-2 to 2"),
    "frequency_penalty": Range(lambda value: -2 <= value <= 2, "-2 to 2"),
    "n": Range(lambda value: 1 <= value <= 128, "1 to 128"),
    "logprobs": Range(lambda value: 0 <= value <= 20, "0 to 20"),
    "seed": Range(lambda value: 0 <= value < 2**63, "0 to 2^63 - 1"),
    "draft_ngram": Range(lambda value: 0 <= value <= 64, "0 (off) to 64"),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of one generation; None leaves a value to the model's own generation_config.json.

    `temperature` 0 is greedy. `seed` fixes the draws; by default a random seed is drawn and reported. `draft_ngram` is
    the number of tokens that are drafted from earlier text after the same words and verified in one pass; 0 is off.

    Logits change in this order: `logit_bias` is added by token id; `repetition_penalty` divides the positive logits of
    tokens in prompt and answer, and multiplies the negative ones; `presence_penalty`, and `frequency_penalty` once for
    each occurrence, are subtracted for the tokens of the answer; temperature and the cuts follow. The definitions are
    those of OpenAI, vLLM and transformers. `n` completions are generated for the prompt. `logprobs` is how many of the
    likeliest tokens are returned at each position, None for no log-probabilities.

    The answer is a JSON text valid under `json_schema` (JSON), or a text of `grammar` (Lark, as llguidance reads it):
    other tokens are excluded before temperature and cuts. An answer that reaches `max_new_tokens` is only a beginning.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    logprobs: int | None = None
    seed: int = field(default_factory=lambda: secrets.randbelow(2**31))
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    json_schema: str | None = None
    grammar: str | None = None
    draft_ngram: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise UsageError(f"stop {self.stop!r}: give a tuple of texts")
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if value is not None and not allowed.holds(value):
                raise UsageError(f"{arg(name)} {value}: must be {allowed.wanted}")
        if not all(self.stop):
            raise UsageError(f"{arg('stop')} '': must not be empty")
        for text in self.stop:
            check_text(text, arg("stop"))
        if (characters := sum(map(len, self.stop))) > MOST_STOP:
            raise UsageError(f"{arg('stop')} of {characters} characters: must be at most {MOST_STOP} in all")
        self._check_biases()
        self._check_grammar()

    @property
    def source(self) -> str | None:
        """The grammar of the answer in llguidance's form, None for any text."""
        if self.json_schema is not None:
            return schema_source(self.json_schema)
        return None if self.grammar is None else grammar_source(self.grammar)

    def _check_grammar(self) -> None:
        if self.json_schema is not None and self.grammar is not None:
            raise UsageError(f"{arg('json_schema')} and grammar: give only one of them")
        if self.source is not None and self.ignore_eos:
            raise UsageError(f"{arg('ignore_eos')}: an answer with a grammar ends where that says; leave it out")

    def _check_biases(self) -> None:
        name = arg("logit_bias")
        if len(self.logit_bias) > MOST_BIASES:
            raise UsageError(f"{name} of {len(self.logit_bias)} tokens: must be at most {MOST_BIASES}")
        for token, bias in self.logit_bias.items():
            if type(token) is not int or token < 0:
                raise UsageError(f"{name}: {token!r} is not a token id")
            if not math.isfinite(bias) or abs(bias) > MOST_BIAS:
                raise UsageError(f"{name} {bias} of token {token}: must be -100 to 100")

    def check_vocabulary(self, size: int) -> None:
        """Raise UsageError where an option names a token that a model with `size` tokens does not have."""
        if self.logit_bias and (token := max(self.logit_bias)) >= size:
            raise UsageError(f"{arg('logit_bias')}: {token} is not a token id of this model (0 to {size - 1})")

    def completions(self) -> list[Sampling]:
        """Return the options of each of the `n` completions. The first has the same seed, the others seeds made of it.

        So the first completion does not depend on `n`.
        """
        seeds = [self.seed, *(stream_seed(self.seed, str(index)) for index in range(1, self.n))]
        return [replace(self, n=1, seed=seed) for seed in seeds]

    def overrides(self) -> dict[str, Any]:
        """Return the fields of a transformers GenerationConfig that these options change."""
        changed: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "max_length": None}
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            if getattr(self, name) is not None:
                changed[name] = getattr(self, name)
        if self.temperature is not None:
            changed["do_sample"] = self.temperature > 0
            changed["temperature"] = self.temperature or 1.0
        elif any(getattr(self, name) is not None for name in ("top_p", "top_k", "min_p")):
            changed["do_sample"] = True
        if self.draft_ngram:
            changed["prompt_lookup_num_tokens"] = self.draft_ngram
        if self.ignore_eos:
            changed["eos_token_id"] = None
        return changed


def stream_seed(run_seed: int, name: str) -> int:
    """Return a seed that depends on the run's seed and on `name` alone."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{name}".encode()).digest()[:8], "big") >> 1
