"""Failures of requests and of passes, in a service without HTTP."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from stores import make_store, many_prompts

from qmix.engine.batch import BatchRunner
from qmix.engine.running import BatchRequest
from qmix.engine.sampler import Sampler
from qmix.engine.sampling import Sampling
from qmix.serve import batches
from qmix.serve.batches import Batches, Wanted
from qmix.serve.errors import ApiError
from qmix.serve.files import Files
from qmix.serve.service import Service, Ticket, hand_out

GREEDY = Sampling(max_new_tokens=8, temperature=0, ignore_eos=True)
URL = "/v1/completions"


class Outcomes:
    """Takes outcomes of tickets by their requests' names."""

    def __init__(self) -> None:
        self.news: queue.SimpleQueue = queue.SimpleQueue()

    def take(self, ticket, text, chosen, outcome) -> None:
        if outcome is not None:
            self.news.put((ticket.request.name, outcome))

    def take_all(self, count: int) -> dict:
        return dict(self.news.get(timeout=60) for _ in range(count))


@pytest.fixture(scope="module")
def runner(tiny, tmp_path_factory) -> Iterator[BatchRunner]:
    store = make_store(tiny, tmp_path_factory.mktemp("failures") / "store")
    with many_prompts(store, 256, 4) as runner:
        yield runner


@pytest.fixture
def service(runner, monkeypatch) -> Iterator[Service]:
    monkeypatch.setattr(runner.thread, "close", lambda: None)  # another test goes on with it
    service = Service(runner, 16, lambda work: work(), lambda ticket, outcome: None)
    yield service
    service.close()


def ask(service: Service, outcomes: Outcomes, *prompts: range) -> None:
    service.submit([Ticket(BatchRequest(str(prompt[0]), prompt, GREEDY), outcomes) for prompt in prompts])


def test_a_request_whose_sampler_fails_fails_alone(service, monkeypatch):
    sample, outcomes = Sampler.sample, Outcomes()

    def failing(self, tokens, logits):
        if tokens[0] == 11 and len(tokens) == 23:
            raise ZeroDivisionError("by hand")
        return sample(self, tokens, logits)

    monkeypatch.setattr(Sampler, "sample", failing)
    ask(service, outcomes, *(range(first, first + 20) for first in (10, 11, 12)))
    found = outcomes.take_all(3)
    assert isinstance(found["11"], ApiError)
    assert (found["11"].status, found["11"].message) == (500, "a bug in qmix: ZeroDivisionError: by hand")
    assert [found[name].completion_tokens for name in ("10", "12")] == [8, 8]
    assert service.running == 0


def test_a_pass_that_fails_fails_its_requests_and_not_those_that_wait(service, runner, monkeypatch):
    hidden, outcomes, times = runner._hidden, Outcomes(), iter([0, 0, 1])

    def failing(chunks):
        if next(times, 0):
            raise ZeroDivisionError("by hand")
        return hidden(chunks)

    monkeypatch.setattr(runner, "_hidden", failing)
    ask(service, outcomes, *(range(first, first + 20) for first in range(10, 17)))
    found = outcomes.take_all(7)
    failed = [name for name, outcome in found.items() if isinstance(outcome, ApiError)]
    assert len(failed) == 4
    assert all(found[name].completion_tokens == 8 for name in found if name not in failed)


@pytest.mark.parametrize(("failing", "status", "completed"), [(2, "completed", 6), (10**6, "failed", 0)])
def test_a_batch_answers_the_lines_of_a_failed_pass_again(
    service, runner, tmp_path, monkeypatch, failing, status, completed
):
    """It gives up where passes fail again and again."""
    hidden, failures = runner._hidden, iter(range(failing))

    def sometimes(chunks):
        if next(failures, None) is not None:
            raise ZeroDivisionError("by hand")
        return hidden(chunks)

    monkeypatch.setattr(runner, "_hidden", sometimes)
    monkeypatch.setattr(batches, "RETRY_SECONDS", 0.01)
    body = {"prompt": "The file", "max_tokens": 4, "temperature": 0}
    lines = [{"custom_id": str(index), "method": "POST", "url": URL, "body": body} for index in range(6)]
    files = Files(tmp_path)
    found = Batches(tmp_path, files, service, 256)
    file = files.add(iter([json.dumps(line).encode() + b"\n" for line in lines]), "in.jsonl", "batch")
    name = found.create(Wanted(file.id, URL)).id
    while found.get(name).status == "in_progress":
        time.sleep(0.01)
    found.close()
    batch = found.get(name)
    assert (batch.status, batch.completed) == (status, completed)
    assert batch.errors == ([] if status == "completed" else ["a bug in qmix: ZeroDivisionError: by hand"])


def test_a_directory_that_cannot_be_read_is_not_held(service, tmp_path):
    def failing(self):
        raise PermissionError("by hand")

    files = Files(tmp_path)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(Files, "sweep", failing)
        with pytest.raises(PermissionError) as raised:
            Batches(tmp_path, files, service, 256)
    assert raised.tb is not None  # a failure that is kept keeps its frames, and what they hold open
    Batches(tmp_path, Files(tmp_path), service, 256).close()


def test_a_follower_that_fails_takes_nothing_from_the_others():
    taken = []

    class Follower:
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def take(self, ticket, text, chosen, outcome) -> None:
            if self.fails and outcome is None:
                raise RecursionError
            taken.append((text, type(outcome).__name__))

    tickets = [SimpleNamespace(follower=Follower(fails)) for fails in (True, False)]
    hand_out([(tickets[0], "a", None, None), (tickets[1], "b", None, None)])
    assert taken == [("", "ApiError"), ("b", "NoneType")]
