"""Answer requests on the machines of a Ray cluster: one model on each, blocks of requests, answers in one file.

Needs the extra `ray`. `Answerer` is a class for Ray Data's `map_batches`, `answer_file` a whole run with it. Ray runs
the block of a worker that died again on another one; the answers of a block are handed over together when all are
there, so no request has two. Loads no torch before a worker has said what Ray takes of its memory.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from qmix.batch.lines import Entry, Requests
from qmix.batch.output import FileAnswers, answer_of, differences
from qmix.errors import QmixError, UsageError
from qmix.units import parse_bytes, plural

BLOCK = 64  # requests that a worker takes together; what it loses if it dies
ALWAYS = ("ignore_eos", "max_new_tokens", "stop")  # options that `qmix batch` writes down also where they are not given
LINE, NUMBER = "text", "number"  # columns of a block: the first is that of `ray.data.read_text`, the other may lack
ID, ANSWER, SUBJECT = "custom_id", "answer", "subject"  # columns of its answers


class _Block:
    """The answers of a block, in memory."""

    lasting = False
    refused = 0
    done: Sequence[str] = ()

    def __init__(self, chosen: Mapping[str, int]) -> None:
        self._chosen = dict(chosen)
        self.lines: list[bytes] = []
        self.subject: dict[str, Any] = {}

    def begin(self, subject: Mapping[str, Any], chosen: Mapping[str, Any], lines: int) -> dict[str, Any]:
        self.subject = dict(subject)
        return self._chosen

    def append(self, lines: list[bytes]) -> None:
        self.lines += lines


class Answerer:
    """A loaded model that answers blocks of lines, each a request as `qmix batch` reads it.

    `ram` and `gpu` are the budgets of one worker, `options` Sampling's fields for lines that do not set them. `digest`
    is that of the whole input, `seed` and `chosen` are the run's (see `answer_file`); without them, each block is a run
    of its own. Raises QmixError.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        ram: int | str | None = None,
        gpu: Sequence[int | str] | None = None,
        context: int | None = None,
        precision: str | None = None,
        dtype: str | None = None,
        clip: bool = False,
        block: int = BLOCK,
        digest: str = "",
        seed: int | None = None,
        chosen: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        from qmix.machine.found import own_memory

        others = 0 if "torch" in sys.modules else own_memory()  # Ray's part of this process
        from qmix.batch.session import context_limit
        from qmix.engine.batch import BatchRunner
        from qmix.engine.resolve import prepare_store
        from qmix.engine.sampling import Sampling
        from qmix.machine.arithmetic import computed_on
        from qmix.machine.measured import measured_rates
        from qmix.plan.batching import plan_lines
        from qmix.plan.here import run_machine
        from qmix.plan.memory import STRUCTURED_BYTES, bias_bytes

        asked = Sampling(**options)
        always = {name: getattr(asked, name) for name in ALWAYS}
        self._options, self._digest, self._seed = always | options, digest, seed
        self._chosen = chosen or {"seed": 0 if seed is None else seed, "created": int(time.time())}
        self._where = computed_on(bool(gpu))
        store = prepare_store(model, precision, dtype, clip=clip)
        self._limit = context_limit(store.geometry, context)
        budget = None if ram is None else parse_bytes(ram)
        gpus = run_machine(budget, gpu) if gpu else None
        held = others + STRUCTURED_BYTES + bias_bytes(store.layout.geometry, block)  # any line may have a grammar
        plan = plan_lines(store.layout, [self._limit] * block, budget, None, held, store.use, gpus)
        self._runner = BatchRunner(store, plan, rates=measured_rates())

    def __call__(self, block: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return the columns `custom_id`, `answer` (a line of `qmix batch`) and `subject` for a block of lines.

        The block has the columns `text`, and perhaps `number`, by which errors name a line.
        """
        from qmix.batch.session import begin_run

        requests = Requests(io.BytesIO("".join(f"{line}\n" for line in block[LINE]).encode()), digest=self._digest)
        if requests.bad:
            raise UsageError(f"{plural(requests.bad, 'line')} of a block invalid: {requests.problems[0]}")
        if NUMBER in block:
            numbered = zip(requests.entries, block[NUMBER], strict=True)
            requests.entries = [replace(entry, number=int(number)) for entry, number in numbered]
        answers, runner = _Block(self._chosen), self._runner
        run, _, _ = begin_run(
            runner.store, requests, answers, self._options, self._seed, self._limit, runner.tokenizer, self._where
        )
        run.refuse()
        run.run(runner, lambda summary: None)
        ids = [answer_of(line, "a block's answer").custom_id for line in answers.lines]
        subject = json.dumps(answers.subject)
        lines = [line.decode().removesuffix("\n") for line in answers.lines]
        return {ID: ids, ANSWER: lines, SUBJECT: [subject] * len(ids)}


def answer_file(
    source: Path,
    output: Path,
    model: str = "tiny",
    *,
    workers: int = 1,
    cpus: float = 1,
    block: int = BLOCK,
    seed: int | None = None,
    on_answers: Callable[[int, int], None] = lambda done, lines: None,
    **loading: Any,
) -> tuple[int, int]:
    """Answer a file of requests with `workers` of the Ray cluster, `cpus` cores each; return lines and errors.

    `loading` are the arguments of Answerer. The result is what `qmix batch` writes with the same model, options and
    seed, and either continues the other's output. `on_answers` is called with the answers so far and the lines in all.
    Raises UsageError where a line is invalid, where workers have different models and as `qmix batch` does.
    """
    from qmix.batch.session import seed_for

    try:
        lines_file = source.open("rb")
    except OSError as error:
        raise UsageError(f"{source}: {error.strerror}; give a file with one JSON object per line") from None
    with lines_file, FileAnswers(output) as answers:
        requests = Requests(lines_file)
        if requests.bad or not requests.count:
            raise UsageError(f"{source}: {requests.problems[0] if requests.bad else 'has no requests'}")
        known = answers.known() if answers.done else None
        if answers.done and (known is None or known.subject.get("input") != requests.digest):
            raise UsageError(f"{output}: has answers to another input; choose another name, or delete it")
        chosen = {"seed": seed_for(requests, seed), "created": int(time.time())}
        if known is not None:
            chosen = {"seed": known.chosen.seed, "created": known.chosen.created}
        shared = {"block": block, "digest": requests.digest, "seed": seed, "chosen": chosen}
        left = [entry for entry in requests.entries if entry.id not in answers.done]
        told: dict[str, Any] = {}
        for rows in _answered(lines_file, left, model, workers, cpus, loading | shared) if left else ():
            subject = json.loads(rows[SUBJECT][0])
            if not told:
                answers.begin(subject, chosen, len(requests.entries))
                told = subject
            if differs := differences(told, subject):
                raise UsageError(
                    f"a worker answers otherwise than the first ({differs}); give all the same model and QMIX_CPU"
                )
            answers.add({name: f"{line}\n".encode() for name, line in zip(rows[ID], rows[ANSWER], strict=True)})
            on_answers(len(answers.done), len(requests.entries))
        return len(answers.done), answers.refused


def _answered(
    file: BinaryIO, left: Sequence[Entry], model: str, workers: int, cpus: float, arguments: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the columns of each block that a worker has answered."""
    try:
        import ray
    except ImportError:
        raise UsageError("the package ray is not installed; pip install 'qmix-moe[ray]'") from None

    def row(entry: Entry) -> dict[str, Any]:
        file.seek(entry.offset)
        return {LINE: file.read(entry.size).decode().strip(), NUMBER: entry.number}

    block = arguments["block"]
    blocks = -(-len(left) // block)
    dataset = ray.data.from_items([row(entry) for entry in left], override_num_blocks=blocks)
    answered = dataset.map_batches(
        Answerer,
        fn_constructor_args=(model,),
        fn_constructor_kwargs=dict(arguments),
        batch_size=block,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
        num_cpus=cpus,
        scheduling_strategy="SPREAD",
    )
    try:
        yield from answered.iter_batches(batch_size=None, batch_format="numpy")
    except ray.exceptions.RayError as error:
        found: BaseException | None = error
        while found is not None and (isinstance(found, ray.exceptions.RayError) or not isinstance(found, QmixError)):
            found = getattr(found, "cause", None) or found.__cause__
        raise (found or QmixError(f"Ray: {str(error).splitlines()[0]}; look at `ray status` and the logs")) from None
