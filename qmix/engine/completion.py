"""The continuation of a prompt: while it grows, and when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qmix.engine.generation_config import Decoding
from qmix.engine.sampler import Chosen
from qmix.text.constraint import Constraint
from qmix.text.detokenizer import Detokenizer, StopScanner
from qmix.units import format_bytes, plural


class GrowingCompletion:
    """The tokens after a prompt and their text, up to an end token or a stop sequence.

    `decode` turns ids into text. `stopped` tells of a stop sequence or the end of a `constraint`, `ended` of any end.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        decoding: Decoding,
        decode: Callable[[Sequence[int]], str],
        constraint: Constraint | None = None,
    ) -> None:
        self.prompt_tokens, self._constraint = len(prompt), constraint
        self.token_ids: list[int] = []
        self.ended = self._complete = self._failed = False
        self._ends = decoding.ends
        self._detokenizer, self._scanner = Detokenizer(decode, prompt), StopScanner(decoding.stops)
        self._text: list[str] = []

    @property
    def stopped(self) -> bool:
        return self._scanner.stopped or self._complete or self._failed

    @property
    def stop(self) -> str | None:
        """The stop sequence that was found."""
        return self._scanner.found

    @property
    def text(self) -> str:
        """The text so far, without a stop sequence; all of it after `finish`."""
        return "".join(self._text)

    @property
    def finish_reason(self) -> str:
        return "stop" if self.ended and not self._failed else "length"

    def add(self, token: int) -> str:
        """Add a token; return the text that can be shown now, which may be empty."""
        self.token_ids.append(token)
        shown = self._scanner.add(self._detokenizer.add(token))
        self._text.append(shown)
        if self._constraint is not None:
            if token not in self._ends:  # its end needs no end token
                self._complete = self._constraint.complete(self.token_ids)
            self._failed = self._constraint.failed
        self.ended = self.stopped or token in self._ends
        return shown

    def finish(self) -> str:
        """Return the text that was held back: an incomplete character, or the beginning of a stop sequence."""
        shown = self._scanner.add(self._detokenizer.finish()) + self._scanner.finish()
        self._text.append(shown)
        return shown


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished continuation. `finish_reason` is "stop" (end of text, or a stop sequence) or "length".

    `text` leaves out the stop sequence, `token_ids` are all that were generated.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class BatchResult(Completion):
    """Completion `index` of the request of this `name`; `tokens` has the requested log-probabilities.

    `prompt` has those of the prompt's tokens where they were echoed. `stop` is the stop sequence that ended the text.
    `reused_tokens` of the prompt were taken over from other sequences: it depends on these, the rest does not.
    """

    name: str
    index: int
    tokens: list[Chosen]
    prompt: list[Chosen] = field(default_factory=list)
    stop: str | None = None
    reused_tokens: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Failure:
    """The failure of completion `index` of the request of this `name`; requests beside it go on."""

    name: str
    index: int
    error: Exception


BatchOutcome = BatchResult | Failure


@dataclass(frozen=True, slots=True)
class Result(Completion):
    """A finished generation. Times in seconds, memory in bytes.

    The first `reused_tokens` of the prompt were in the KV cache already, the `prefilled_tokens` were computed.
    `hit_rate` is the share of experts found in memory. `logprobs` has each token's, where they were requested.
    """

    seed: int
    ttft_s: float
    tpot_s: float
    total_s: float
    peak_memory: int
    budget: int
    hits: int
    misses: int
    hit_rate: float
    bytes_read: int
    reused_tokens: int = 0
    logprobs: list[Chosen] | None = None

    @property
    def prefilled_tokens(self) -> int:
        return self.prompt_tokens - self.reused_tokens

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens computed a second, up to the first new token."""
        return self.prefilled_tokens / self.ttft_s

    @property
    def rate(self) -> float:
        """New tokens a second after the first; 0 where there was only one."""
        return 1 / self.tpot_s if self.tpot_s else 0.0

    def summary(self) -> str:
        """Return the line of statistics after an answer."""
        new, cached = ("new ", f" ({self.reused_tokens} cached)") if self.reused_tokens else ("", "")
        return (
            f"{plural(self.prefilled_tokens, f'{new}prompt token')}{cached} in {self.ttft_s:.2f} s "
            f"({self.prompt_rate:.1f} tok/s), {plural(self.completion_tokens, 'new token')} at {self.rate:.2f} tok/s, "
            f"{100 * self.hit_rate:.1f}% of experts in memory, "
            f"{format_bytes(self.bytes_read)} read, peak {format_bytes(self.peak_memory)} "
            f"of {format_bytes(self.budget)}, seed {self.seed}"
        )

    def to_json(self) -> dict[str, Any]:
        fields = asdict(self) | {"completion_tokens": self.completion_tokens}
        if self.logprobs is None:
            del fields["logprobs"]
        groups = {
            "usage": ("prompt_tokens", "reused_tokens", "completion_tokens"),
            "timings": ("ttft_s", "tpot_s", "total_s"),
            "memory": ("peak_memory", "budget"),
            "cache": ("hits", "misses", "hit_rate", "bytes_read"),
        }
        grouped = {group: {name: fields.pop(name) for name in names} for group, names in groups.items()}
        return fields | grouped


@dataclass(frozen=True, slots=True)
class Piece:
    """More text, and the ids of the tokens since the last piece; the last piece carries the result."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    result: Result | None = None
