"""The two ends of transformers' generation loop: ids that become text, and stop sequences."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from qmix.engine.completion import GrowingCompletion, Piece
from qmix.engine.figures import Work
from qmix.engine.sampler import Chosen, chosen_token


class PieceStreamer(BaseStreamer):
    """Takes ids from transformers, a step at a time, notes when they came, and sends pieces of text."""

    def __init__(
        self, completion: GrowingCompletion, send: Callable[[Piece], None], work: Work, logprobs: int | None = None
    ) -> None:
        self.completion, self.send, self.work, self.logprobs = completion, send, work, logprobs
        self.tokens: list[Chosen] | None = None if logprobs is None else []
        self.started = self._last = time.perf_counter()
        self.times: list[float] = []
        self._prompt_seen = False
        self._sent = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the [1] id of one step, or the [1, k] ids of a verified draft."""
        if not self._prompt_seen:  # transformers streams the prompt first
            self._prompt_seen = True
            return
        now = time.perf_counter()
        self.work.step(value.numel(), now - self._last)
        self._last = now
        for index, token in enumerate(value.flatten().tolist()):
            if not self.completion.ended:  # a draft may go on behind the end
                self.times.append(now)
                if self.tokens is not None:
                    self.tokens.append(chosen_token(token, self._logits[index], self.logprobs))
                self.send_text(self.completion.add(token))

    def end(self) -> None:
        pass

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep the logits of the last step, where log-probabilities are requested: [1, V], or [k, V] for a draft."""
        hook = model.register_forward_hook(self._keep_logits) if self.tokens is not None else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _keep_logits(self, model: nn.Module, arguments: object, output: Any) -> None:
        self._logits = output.logits[0].float()

    def send_text(self, text: str) -> None:
        """Send a piece, unless there is no text yet."""
        if text:
            ids = self.completion.token_ids
            self.send(Piece(text, ids[self._sent :]))
            self._sent = len(ids)


class StopAtSequence(StoppingCriteria):
    """Ends transformers' loop once a stop sequence was seen."""

    def __init__(self, completion: GrowingCompletion) -> None:
        self.completion = completion

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.tensor([self.completion.stopped])
