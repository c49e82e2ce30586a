"""Log-probabilities of given tokens by a model on GPUs, in captured steps of a few tokens.

Sequences come in the order of `qmix.engine.passes`: each finds its prefix in the cache where the one before left it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from qmix.checkpoint.torch_dtypes import HALF
from qmix.engine.opener import OpenModel
from qmix.engine.passes import Pass
from qmix.engine.scoring import Score, scores_of
from qmix.errors import UsageError
from qmix.machine.rates import Rates
from qmix.model.gpu.devices import HOST
from qmix.model.gpu.spread import spread_for
from qmix.model.gpu.steps import NOT_ON_GPUS
from qmix.model.kv import KVCache
from qmix.plan import Plan
from qmix.plan.device_memory import captured_tokens
from qmix.progress import OnProgress, ignore
from qmix.store.opened import Store


class GpuScorer(OpenModel):
    """A model on GPUs that scores passes of sequences of up to `plan.context` tokens.

    Close it, or use it as a context manager.
    """

    def __init__(
        self, store: Store, plan: Plan, on_load: OnProgress = ignore, rates: Rates | None = None, kind: str = "cuda"
    ) -> None:
        """`rates` and `kind` are as Runner takes them. Raises UsageError where no kernels serve the plan."""
        self.plan = plan
        spread = spread_for(plan, rates or Rates(), kind)
        assert spread is not None
        homes = [device.device for device in spread.layers]
        self._cache = KVCache(store.geometry, plan.context, HALF[store.layout.dtype], plan.batch, homes)
        slots = plan.slots_by_size
        super().__init__(store, slots, "sdpa", spread=spread, invariant=True, generates=False, on_load=on_load)
        steps = self.capture(spread, self._cache, captured_tokens(store.geometry, plan.context, plan.batch))
        if steps is None or steps.cpu_layers:
            self.close()
            raise UsageError(NOT_ON_GPUS)
        self._steps = steps

    def score(self, part: Pass, on_layer: Callable[[int], None] = lambda layers: None) -> list[Score]:
        """Return a score for each query of the pass. Interrupting the caller ends it within an expert's time.

        `on_layer` is called once at the end, with the number of layers.
        """
        return self.thread.run(self._score, part, on_layer)

    @torch.inference_mode()
    def _score(self, part: Pass, on_layer: Callable[[int], None]) -> list[Score]:
        logprobs, greedy = torch.empty(len(part.rows)), torch.empty(len(part.rows), dtype=torch.bool)
        first = 0  # the pass's row of a step's first token
        for segment in part.segments:
            for done in range(0, segment.count, self._steps.rows):
                count = min(self._steps.rows, segment.count - done)
                self._steps.step(part.tokens[first : first + count].tolist(), segment.position + done)
                self._predict(part, first, count, logprobs, greedy)
                first += count
        self._cache.reset()
        on_layer(self.store.geometry.num_layers)
        return scores_of(part, logprobs, greedy)

    def _predict(self, part: Pass, first: int, count: int, logprobs: torch.Tensor, greedy: torch.Tensor) -> None:
        """Fill in the predictions of the step that began with row `first`."""
        (asked,) = np.nonzero((part.rows >= first) & (part.rows < first + count))
        if not len(asked):
            return
        logits = self._steps.logits(count)
        rows, targets = (torch.from_numpy(numbers[asked]).to(logits.device) for numbers in (part.rows, part.targets))
        scores = logits[rows - first].float().log_softmax(-1)
        logprobs[asked] = scores.gather(1, targets[:, None])[:, 0].to(HOST)
        greedy[asked] = (scores.argmax(-1) == targets).to(HOST)
