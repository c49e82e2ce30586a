"""A run of a batch from its parts: what the file, the model and earlier runs say, put together."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmix.batch.forms import Forms, told_by
from qmix.batch.lines import Requests
from qmix.batch.output import FileAnswers, StreamAnswers
from qmix.batch.prompts import Asking
from qmix.batch.run import BatchRun, Job, Summary
from qmix.engine.batch_runner import BatchRunner
from qmix.errors import UsageError
from qmix.geometry import Geometry
from qmix.plan import Plan
from qmix.plan.batching import plan_lines
from qmix.plan.here import default_context
from qmix.progress import OnProgress
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout
from qmix.store.opened import WEIGHTS, Store
from qmix.text.chat_template import ChatTemplate
from qmix.text.prompt import PromptEncoder
from qmix.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Session:
    """A run that can begin: `run` has looked at every line, `plan` is None where nothing is left to compute."""

    store: Store
    requests: Requests
    run: BatchRun
    plan: Plan | None
    seed: int
    folds_system: bool

    def notes(self, name: str) -> list[str]:
        """What the user should know before it begins."""
        notes = []
        others = sorted(self.requests.models - {name, self.store.source_name})
        if others:
            notes.append(f"lines name {', '.join(map(repr, others[:3]))} as their model; {name} answers all of them")
        if self.folds_system and self.requests.has_system:
            notes.append("the model's template has no system role: system texts go into the first turn of the user")
        return notes

    def interrupted(self) -> str:
        """What to say of a run that was stopped."""
        done = self.run.summary(None).done
        lines = f"interrupted; {done} of {len(self.requests.entries)} lines are done"
        return f"{lines}, the same command goes on" if self.run.resumable else lines

    def answer(self, on_load: OnProgress, on_pass: Callable[[Summary], None]) -> Summary:
        """Write what is left, lines that cannot be answered first."""
        self.run.refuse()
        if self.plan is None:
            return self.run.summary(None)
        with BatchRunner(self.store, self.plan, on_load) as runner:
            return self.run.run(runner, on_pass)


def begin(
    store: Store,
    requests: Requests,
    answers: FileAnswers | StreamAnswers,
    options: Mapping[str, Any],
    seed: int | None,
    context: int | None,
    ram: int | None,
    batch: int | None,
) -> Session:
    """Check that earlier answers belong to this run, look at every line, and make the plan.

    `options` are Sampling's fields but the seed. Raises UsageError, and DoesNotFitError.
    """
    limit = _limit(store.geometry, context)
    subject = _subject(store, requests, options, limit, seed)
    chosen = {"seed": secrets.randbelow(2**31) if seed is None else seed, "created": int(time.time())}
    if isinstance(answers, FileAnswers):
        chosen = answers.begin(subject, chosen)
    tokenizer = load_tokenizer(store.directory)
    asking = _asking(tokenizer, store.geometry, limit, options, chosen["seed"])
    job = Job.of(requests, asking, answers)

    identity = hashlib.sha256(json.dumps([subject, chosen["seed"]]).encode()).hexdigest()
    forms = Forms(identity, store.source_name, chosen["created"], told_by(tokenizer))
    run = BatchRun(requests, job, asking, forms, answers)
    plan = _plan(store.layout, requests, job, ram, batch, store.use)
    folds_system = asking.template is not None and not asking.template.takes_system
    return Session(store, requests, run, plan, chosen["seed"], folds_system)


def check_budget(
    layout: StoreLayout,
    tokenizer: PreTrainedTokenizerBase,
    requests: Requests,
    answers: FileAnswers | StreamAnswers,
    options: Mapping[str, Any],
    context: int | None,
    ram: int | None,
    batch: int | None,
) -> None:
    """Look at every line before there is a store. Raises as `begin` does where the plan could not be made."""
    limit = _limit(layout.geometry, context)
    asking = _asking(tokenizer, layout.geometry, limit, options, seed=0)
    _plan(layout, requests, Job.of(requests, asking, answers), ram, batch, None)


def _asking(
    tokenizer: PreTrainedTokenizerBase, geometry: Geometry, limit: int, options: Mapping[str, Any], seed: int
) -> Asking:
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    encoder = PromptEncoder(tokenizer, limit, geometry.max_position)
    return Asking(encoder, template, geometry, dict(options), seed)


def _limit(geometry: Geometry, context: int | None) -> int:
    """Return the tokens that prompt and answer of a line may take together."""
    longest = geometry.max_position
    if context is not None and not 1 <= context <= longest:
        raise UsageError(f"--context {context}: must be 1 to {longest}, the model's longest")
    return context or default_context(geometry)


def _plan(
    layout: StoreLayout, requests: Requests, job: Job, ram: int | None, batch: int | None, use: ExpertFrequency | None
) -> Plan | None:
    """Return the plan for what is left, None where nothing is."""
    return plan_lines(layout, job.needs, ram, batch, requests.held, use) if job.needs else None


def _subject(
    store: Store, requests: Requests, options: Mapping[str, Any], context: int, seed: int | None
) -> dict[str, Any]:
    """What answers belong to, as JSON has it: input, model, and all options that change them."""
    model = {"model" if part == WEIGHTS else part: digest for part, digest in sorted(store.parts.items())}
    named = {f"--{name.replace('_', '-')}": value for name, value in sorted(options.items())}
    subject = {"input": requests.digest, **model, **named, "--context": context, "--seed": seed}
    whole: dict[str, Any] = json.loads(json.dumps(subject))
    return whole
