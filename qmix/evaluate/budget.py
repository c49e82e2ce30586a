"""Check a budget against all that an evaluation will ask a model for, before any of it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from qmix.engine.passes import TOKEN_BYTES, Query, spans
from qmix.errors import DoesNotFitError
from qmix.evaluate.prompt import Prompt
from qmix.machine.found import default_budget, own_memory
from qmix.plan import Plan
from qmix.plan.batching import plan_lines
from qmix.plan.scoring import ScoringPlan, does_not_fit, plan_scoring
from qmix.store.layout import StoreLayout

if TYPE_CHECKING:
    from qmix.engine.scoring import Score

ALL = 2**62  # rows: a pass of everything
NOTHING = 1  # byte of memory: no model fits
# what the process holds beside the model differs a little from run to run: a budget that is named has room for that
SLACK_SHARE, SLACK_BYTES = 0.03, 2**23


@dataclass(slots=True)
class Budget:
    """A budget for a store of this layout. `base` is what this process held before it had tasks and requests."""

    layout: StoreLayout
    ram: int | None
    batch_tokens: int | None
    base: int
    _beside: int | None = None

    @property
    def held(self) -> int:
        """Bytes beside the model. Looked at once, before the model's first use: what that warms up plans know of."""
        if self._beside is None:
            self._beside = max(0, own_memory() - self.base)
        return self._beside

    def scoring_plan(self, queries: Sequence[Query]) -> ScoringPlan:
        """Return the plan for sorted queries. Raises DoesNotFitError."""
        return self._scoring(queries, self.ram, self.held)

    def lines_plan(self, prompts: Sequence[Prompt]) -> Plan:
        """Return the plan for prompts. Raises DoesNotFitError."""
        return self._lines(prompts, self.ram, self.held)

    def check(self, queries: Sequence[Query], prompts: Sequence[Prompt]) -> None:
        """Raise DoesNotFitError where the budget is too small for any of these; it names one that does for all."""
        plans: list[Callable[[int | None, int], object]] = []
        plans += [partial(self._scoring, sorted(queries))] if queries else []
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

    def _lines(self, prompts: Sequence[Prompt], ram: int | None, held: int) -> Plan:
        return plan_lines(self.layout, [prompt.needs for prompt in prompts], ram, None, held)


class Checked(Exception):
    """All requests were looked at, and the budget does; not an error of anything."""


@dataclass(frozen=True, slots=True)
class Unmade:
    """In an engine's place while there is no store yet: looks at all requests, then raises Checked."""

    budget: Budget

    def check(self, queries: Sequence[Query], prompts: Sequence[Prompt]) -> None:
        self.budget.check(queries, prompts)
        raise Checked

    def score(self, queries: Sequence[Query]) -> list[Score]:
        raise Checked

    def generate(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        raise Checked


def _smallest(plan: Callable[[int | None, int], object], held: int) -> int:
    try:
        plan(NOTHING, held)
    except DoesNotFitError as refusal:
        return refusal.smallest
    raise AssertionError("a model that takes no memory")
