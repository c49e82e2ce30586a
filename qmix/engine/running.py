"""A request while it is answered together with others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qmix.engine.completion import BatchResult, GrowingCompletion
from qmix.engine.sampler import Chosen, Sampler

if TYPE_CHECKING:
    from qmix.engine.batch import BatchRequest

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
