"""Options of a generation: the choice of the next token, and when to stop. Loads no torch."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qmix.errors import UsageError, arg
from qmix.text.detokenizer import check_text

LEAST_HEAT = 1e-6  # logits divided by less may overflow
MOST_STOP = 8192  # characters of all stop sequences: each of hundreds of answers at once keeps its own


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
    "seed": Range(lambda value: 0 <= value < 2**63, "0 to 2^63 - 1"),
    "draft_ngram": Range(lambda value: 0 <= value <= 64, "0 (off) to 64"),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of one generation; None leaves a value to the model's own generation_config.json.

    `temperature` 0 is greedy. `seed` fixes the draws; by default a random seed is drawn and reported. `draft_ngram` is
    the number of tokens that are drafted from earlier text after the same words and verified in one pass; 0 is off.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = field(default_factory=lambda: secrets.randbelow(2**31))
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
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
