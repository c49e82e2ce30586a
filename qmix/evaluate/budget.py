"""Check a memory budget against all requests of an evaluation before any is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qmix.engine.passes import TOKEN_BYTES, Query, spans
from qmix.errors import DoesNotFitError
from qmix.evaluate.prompt import Prompt
from qmix.machine.found import default_budget, own_memory
from qmix.machine.rates import Machine
from qmix.plan import Plan
from qmix.plan.batching import plan_lines
from qmix.plan.scoring import ScoringPlan, does_not_fit, plan_scoring
from qmix.store.layout import StoreLayout

if TYPE_CHECKING:
    from qmix.engine.scoring import Score

ALL = 2**62  # rows: one pass for all queries
NOTHING = 1  # byte: a budget that no model fits
# the process's own memory differs a little from run to run: the budget that an error names has room for that
SLACK_SHARE, SLACK_BYTES = 0.03, 2**23


@dataclass(slots=True)
class Budget:
    """A memory budget for a store of this layout. `base` is this process's memory, in bytes, before it loaded tasks.

    `gpus` is a machine whose GPUs take part.
    """

    layout: StoreLayout
    ram: int | None
    batch_tokens: int | None
    base: int
    gpus: Machine | None = None
    _beside: int | None = None

    @property
    def held(self) -> int:
        """Bytes of tasks and requests. Measured once, before the model runs: plans count what the model allocates."""
        if self._beside is None:
            self._beside = max(0, own_memory() - self.base)
        return self._beside

    def scoring_plan(self, queries: Sequence[Query]) -> ScoringPlan:
        """Return the plan for sorted queries. Raises DoesNotFitError."""
        return self._scoring(queries, self.ram, self.held)

    def gpu_scoring_plan(self, queries: Sequence[Query]) -> Plan:
        """Return the plan for scoring queries on the GPUs. Raises DoesNotFitError."""
        return self._scoring_on_gpus(queries, self.ram, self.held)

    def lines_plan(self, prompts: Sequence[Prompt]) -> Plan:
        """Return the plan for prompts. Raises DoesNotFitError."""
        return self._lines(prompts, self.ram, self.held)

    def check(self, queries: Sequence[Query], prompts: Sequence[Prompt]) -> None:
        """Raise DoesNotFitError if the budget is too small for a request; the error names one that fits all."""
        plans: list[Callable[[int | None, int], object]] = []
        scoring = self._scoring if self.gpus is None else self._scoring_on_gpus
        plans += [partial(scoring, sorted(queries))] if queries else []
        plans += [partial(self._lines, prompts)] if prompts else []
        try:
            for plan in plans:
                plan(self.ram, self.held)
        except DoesNotFitError:
            held = int(self.held * (1 + SLACK_SHARE)) + SLACK_BYTES
            smallest = max(_smallest(plan, held) for plan in plans)
            budget = default_budget() if self.ram is None else self.ram
            raise does_not_fit(budget, "all requests of these tasks", smallest) from None

    def _scoring(self, queries: Sequence[Query], ram: int | None, held: int) -> ScoringPlan:
        longest = max(len(query.inputs) for query in queries) // TOKEN_BYTES
        together = sum(span.rows for span in spans(queries, ALL))
        return plan_scoring(self.layout, longest, together, ram, held, self.batch_tokens)

    def _scoring_on_gpus(self, queries: Sequence[Query], ram: int | None, held: int) -> Plan:
        """Two sequences share captured steps of as many tokens as a batch has; scoring uses the first alone."""
        longest = max(len(query.inputs) for query in queries) // TOKEN_BYTES
        return plan_lines(self.layout, [longest, longest], ram, 2, held, gpus=self.gpus)

    def _lines(self, prompts: Sequence[Prompt], ram: int | None, held: int) -> Plan:
        return plan_lines(self.layout, [prompt.needs for prompt in prompts], ram, None, held, gpus=self.gpus)


class Checked(Exception):
    """Raised by BudgetCheck to end an evaluation when the budget is enough. Not an error."""


@dataclass(frozen=True, slots=True)
class BudgetCheck:
    """A RequestEngine for use before the store exists: checks all requests, then raises Checked."""

    budget: Budget

    def check(self, queries: Sequence[Query], prompts: Sequence[Prompt]) -> None:
        self.budget.check(queries, prompts)
        raise Checked

    def score(self, queries: Sequence[Query]) -> list[Score]:
        raise Checked

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        raise Checked


def _smallest(plan: Callable[[int | None, int], object], held: int) -> int:
    """Return the smallest budget that a plan accepts."""
    try:
        plan(NOTHING, held)
    except DoesNotFitError as refusal:
        return refusal.smallest
    raise AssertionError("a plan fits in one byte")
