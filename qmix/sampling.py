"""How the next token is chosen, and when to stop."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from qmix.errors import UsageError

LEAST_HEAT = 1e-6  # what logits can be divided by and stay finite
MOST_STOP = 8192  # characters of all stop sequences: each of hundreds of answers at once keeps its own


@dataclass(frozen=True, slots=True)
class Sampling:
    """Options of one generation; None leaves a value to the model's own generation_config.json.

    `temperature` 0 is greedy. `seed` fixes the draws; without one a random seed is taken and reported. `draft_ngram`
    tokens are drafted from what followed the same words earlier in the text, and verified in one pass; 0 is off.
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
        stops = sum(map(len, self.stop))
        heat, penalty = self.temperature, self.repetition_penalty
        for option, value, holds, wanted in (
            ("--max-new-tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            (
                "--temperature",
                heat,
                not heat or LEAST_HEAT <= heat <= 100,
                f"0 (greedy), or {LEAST_HEAT:f} to 100",
            ),
            ("--top-p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--top-k", self.top_k, self.top_k is None or self.top_k >= 0, "0 (off) or more"),
            ("--min-p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "0 to 1"),
            ("--repetition-penalty", penalty, penalty is None or 0.01 <= penalty <= 100, "0.01 to 100"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            ("--draft-ngram", self.draft_ngram, 0 <= self.draft_ngram <= 64, "0 (off) to 64"),
            ("--stop", "''", all(self.stop), "a text that is not empty"),
            ("--stop", f"of {stops} characters", stops <= MOST_STOP, f"at most {MOST_STOP} in all"),
        ):
            if not holds:
                raise UsageError(f"{option} {value}: must be {wanted}")

    def overrides(self) -> dict[str, Any]:
        """What these options change in a transformers GenerationConfig."""
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
