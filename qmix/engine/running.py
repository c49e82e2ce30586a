"""A request that is answered together with others, and its state meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from qmix.engine.completion import BatchResult, GrowingCompletion
from qmix.engine.sampler import Chosen, Sampler
from qmix.engine.sampling import Sampling


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A prompt as ids, under a name of the caller's; `sampling.seed` fixes its draws.

    `index` is the number of the completion where a prompt has several. With `echo` log-probabilities are told for the
    prompt's own tokens as well, if they are requested.
    """

    name: str
    prompt: Sequence[int]
    sampling: Sampling
    index: int = 0
    echo: bool = False

    def completions(self) -> list[BatchRequest]:
        """Return a request for each of the `sampling.n` completions, which share the prompt's keys and values."""
        if self.sampling.n == 1:
            return [self]
        return [replace(self, sampling=one, index=index) for index, one in enumerate(self.sampling.completions())]


OnToken = Callable[[Chosen, str], None]


def ignore_token(chosen: Chosen, text: str) -> None:
    """Take a token and the text that can be shown since, and do nothing."""


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A request that is being answered."""

    request: BatchRequest
    sampler: Sampler
    completion: GrowingCompletion
    on_token: OnToken
    tokens: list[Chosen] = field(default_factory=list)
    prompt: list[Chosen] = field(default_factory=list)

    def result(self, reused: int) -> BatchResult:
        """Return the finished answer; `reused` tokens of the prompt were not computed again."""
        completion = self.completion
        completion.finish()
        return BatchResult(
            text=completion.text,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            prompt_tokens=completion.prompt_tokens,
            name=self.request.name,
            index=self.request.index,
            tokens=self.tokens,
            prompt=self.prompt,
            stop=completion.stop,
            reused_tokens=reused,
        )
