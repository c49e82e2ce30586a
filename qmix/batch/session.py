"""Put a batch run together from the file, the model and earlier runs."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qmix.batch.answering import BatchRun, Job, Summary
from qmix.batch.forms import Forms, told_by
from qmix.batch.lines import Requests
from qmix.batch.output import COMPUTED_ON, SHARD, Answers
from qmix.batch.prompts import Asking
from qmix.engine.batch import BatchRunner
from qmix.errors import UsageError, arg
from qmix.geometry import Geometry
from qmix.machine.arithmetic import computed_on
from qmix.machine.measured import measured_rates
from qmix.machine.rates import Machine
from qmix.plan import Plan
from qmix.plan.batching import plan_lines
from qmix.plan.here import default_context
from qmix.plan.memory import STRUCTURED_BYTES, bias_bytes
from qmix.progress import OnProgress
from qmix.store.expert_frequency import ExpertFrequency
from qmix.store.layout import StoreLayout
from qmix.store.opened import WEIGHTS, Store
from qmix.text.chat_template import ChatTemplate
from qmix.text.prompt import PromptEncoder
from qmix.text.tokenizer import load_tokenizer
from qmix.units import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Session:
    """A run that is ready: all lines are checked; `plan` is None where nothing is left to compute."""

    store: Store
    requests: Requests
    run: BatchRun
    plan: Plan | None
    seed: int
    folds_system: bool

    def notes(self, name: str) -> list[str]:
        """Return notes for the user before the run starts."""
        notes = []
        others = sorted(self.requests.models - {name, self.store.source_name})
        if others:
            notes.append(f"lines name {', '.join(map(repr, others[:3]))} as their model; all are answered by {name}")
        if self.folds_system and self.requests.has_system:
            notes.append("the chat template has no system role; the system prompt goes into the first turn")
        return notes

    def interrupted(self) -> str:
        """Return the message about an interrupted run."""
        done = self.run.summary(None).done
        lines = f"interrupted; {done} of {plural(len(self.requests.entries), 'line')} done"
        return f"{lines}, run the same command again to continue" if self.run.resumable else lines

    def answer(
        self,
        on_load: OnProgress,
        on_pass: Callable[[Summary], None],
        watched: Callable[[BatchRunner], AbstractContextManager[object]] = nullcontext,
    ) -> Summary:
        """Answer the lines that are left, with the runner `watched`; write first the error lines of the others."""
        self.run.refuse()
        if self.plan is None:
            return self.run.summary(None)
        with BatchRunner(self.store, self.plan, on_load, measured_rates()) as runner, watched(runner):
            return self.run.run(runner, on_pass)


def begin(
    store: Store,
    requests: Requests,
    answers: Answers,
    options: Mapping[str, Any],
    seed: int | None,
    context: int | None,
    ram: int | None,
    batch: int | None,
    gpus: Machine | None = None,
) -> Session:
    """Check every line and that earlier answers belong to this run, and make the plan.

    `options` are Sampling's fields but the seed. `gpus` is a machine whose GPUs take part. Raises UsageError, and
    DoesNotFitError.
    """
    limit = context_limit(store.geometry, context)
    where = computed_on(gpus is not None)
    tokenizer = load_tokenizer(store.directory)
    run, asking, chosen = begin_run(store, requests, answers, options, seed, limit, tokenizer, where)
    plan = _plan(store.layout, requests, run.job, ram, batch, store.use, gpus)
    folds_system = asking.template is not None and not asking.template.takes_system
    return Session(store, requests, run, plan, chosen, folds_system)


def begin_run(
    store: Store,
    requests: Requests,
    answers: Answers,
    options: Mapping[str, Any],
    seed: int | None,
    limit: int,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> tuple[BatchRun, Asking, int]:
    """Return a run of the lines that are left, with `limit` tokens for each, what makes their requests, and its seed.

    `where` names the processors. Raises UsageError as `begin` does.
    """
    subject = _subject(store, requests, options, limit, seed) | {COMPUTED_ON: where}
    part = {} if requests.shard is None else {SHARD: str(requests.shard)}
    chosen = {"seed": seed_for(requests, seed), "created": int(time.time())}
    chosen = answers.begin(subject | part, chosen, len(requests.entries))
    asking = asking_for(tokenizer, store.geometry, limit, options, chosen["seed"])
    job = Job.of(requests, asking, answers)

    identity = hashlib.sha256(json.dumps([subject, chosen["seed"]]).encode()).hexdigest()
    forms = Forms(identity, store.source_name, chosen["created"], told_by(tokenizer))
    run = BatchRun(requests, job, asking, forms, answers)
    return run, asking, chosen["seed"]


def check_budget(
    layout: StoreLayout,
    tokenizer: PreTrainedTokenizerBase,
    requests: Requests,
    answers: Answers,
    options: Mapping[str, Any],
    context: int | None,
    ram: int | None,
    batch: int | None,
    gpus: Machine | None = None,
) -> None:
    """Check every line before a store is made. Raises as `begin` does."""
    limit = context_limit(layout.geometry, context)
    asking = asking_for(tokenizer, layout.geometry, limit, options, seed=0)
    _plan(layout, requests, Job.of(requests, asking, answers), ram, batch, None, gpus)


def asking_for(
    tokenizer: PreTrainedTokenizerBase, geometry: Geometry, limit: int, options: Mapping[str, Any], seed: int
) -> Asking:
    """Return what makes requests of lines, each with `limit` tokens for prompt and answer."""
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    encoder = PromptEncoder(tokenizer, limit, geometry.max_position)
    return Asking(encoder, template, geometry, dict(options), seed)


def context_limit(geometry: Geometry, context: int | None) -> int:
    """Return the context of a line: tokens of prompt and answer together."""
    longest = geometry.max_position
    if context is not None and not 1 <= context <= longest:
        raise UsageError(f"{arg('context')} {context}: must be 1 to {longest}, the model's longest")
    return context or default_context(geometry)


def _plan(
    layout: StoreLayout,
    requests: Requests,
    job: Job,
    ram: int | None,
    batch: int | None,
    use: ExpertFrequency | None,
    gpus: Machine | None,
) -> Plan | None:
    """Return the plan for the lines that are left, None where there are none."""
    held = requests.held + (STRUCTURED_BYTES if job.structured else 0) + bias_bytes(layout.geometry, job.biased)
    return plan_lines(layout, job.sequences, ram, batch, held, use, gpus) if job.needs else None


def seed_for(requests: Requests, seed: int | None) -> int:
    """Return the seed of a run: `seed` if given. Without it all shards of a file have the same one."""
    if seed is not None:
        return seed
    return secrets.randbelow(2**31) if requests.shard is None else int(requests.digest, 16) % 2**31


def _subject(
    store: Store, requests: Requests, options: Mapping[str, Any], context: int, seed: int | None
) -> dict[str, Any]:
    """Return what answers depend on, in JSON types: input, model, and the options that change answers."""
    model = {"model" if part == WEIGHTS else part: digest for part, digest in sorted(store.parts.items())}
    named = [*sorted(options.items()), ("context", context), ("seed", seed)]
    subject = {"input": requests.digest, **model, **{f"--{name.replace('_', '-')}": value for name, value in named}}
    whole: dict[str, Any] = json.loads(json.dumps(subject))
    return whole
