"""Many sequences through the model together: continuous batching, a pass at a time, token ids only.

A pass is one flat row of tokens: the next one of every sequence that is being continued, and pieces of the prompts of
those that have just come, as far as there is room. One read of an expert serves them all, so that where experts come
from disk, taking in a prompt costs no pass of its own. A sequence that ends makes room for one that waits.

transformers has continuous batching too, made for GPUs: it takes memory by what is free and not by a plan, on CPUs
gathers each sequence's keys and values anew in every pass and masks them against all others, has one set of sampling
options for all, and a token's numbers there depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import MixtralForCausalLM

from qmix.engine.compute import ComputeThread
from qmix.engine.scheduler import Continuation, Scheduler
from qmix.model.kv_arena import Arena, Rows, Segment, positions_of
from qmix.plan.memory import PREFILL_CHUNK
from qmix.pool.experts import ExpertPool

OnLogits = Callable[[Continuation, torch.Tensor], bool]


class ContinuousEngine:
    """The model with its pool and arena, and the thread that computes.

    `scheduler` says what goes through the model; a sequence's next token is chosen by who calls `step`.
    """

    def __init__(self, model: MixtralForCausalLM, pool: ExpertPool, arena: Arena, capacity: int, batch: int) -> None:
        self.model, self.pool, self.arena = model, pool, arena
        self.scheduler = Scheduler(capacity, batch, PREFILL_CHUNK)
        self._thread = ComputeThread(pool)

    def clear(self) -> None:
        """Forget every sequence."""
        scheduler = self.scheduler
        self.scheduler = Scheduler(scheduler.capacity, scheduler.batch, scheduler.pass_tokens)

    def close(self) -> None:
        """Let go of the files; harmless to repeat."""
        self._thread.close()

    def step(self, take: OnLogits) -> int:
        """One pass. Returns the number of tokens that went through the model.

        `take` is given each sequence that is now to be continued, with the logits [V] in fp32 after its last token; it
        adds a token to the sequence and says whether it goes on. What interrupts the caller ends the pass within an
        expert's time; a sequence is then as far as it was, or has one token more.
        """
        return self._thread.run(self._step, take)

    @torch.inference_mode()
    def _step(self, take: OnLogits) -> int:
        chosen = self.scheduler.next_pass()
        segments = [
            Segment(
                sequence.tokens[sequence.done : sequence.done + count],
                sequence.done,
                sequence.start,
                wanted=sequence.done + count == len(sequence.tokens),
            )
            for sequence, count in chosen
        ]
        logits = self.forward(segments)
        for sequence, count in chosen:
            sequence.done += count
        ready = [sequence for sequence, _ in chosen if sequence.done == len(sequence.tokens)]
        for sequence, scores in zip(ready, logits, strict=True):
            if not take(sequence, scores.float()):
                self.scheduler.finish(sequence)
        return sum(count for _, count in chosen)

    def forward(self, segments: list[Segment]) -> torch.Tensor:
        """Segments through the model: logits [wanted segments, V]."""
        window = self.pool.store.geometry.sliding_window
        self.arena.rows = rows = Rows.of(segments, window)
        ids = torch.tensor([[token for segment in segments for token in segment.tokens]])
        hidden = self.model.model(
            ids, position_ids=positions_of(segments)[None], cache=self.arena, use_cache=True, rows=rows
        ).last_hidden_state[0]  # [T, H]
        ends = torch.tensor([len(segment.tokens) for segment in segments]).cumsum(0) - 1
        wanted = ends[torch.tensor([segment.wanted for segment in segments])]
        return self.model.lm_head(hidden[wanted]) if len(wanted) else hidden.new_empty(0, 0)
