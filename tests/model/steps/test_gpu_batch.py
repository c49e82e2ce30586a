"""Batches and scores by captured steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import make_checkpoint
from places import KIND
from spreads import spread_plan
from stores import make_store

from qmix.engine.batch import BatchRunner
from qmix.engine.gpu_scoring import GpuScorer
from qmix.engine.passes import Query, make_pass
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling
from qmix.engine.scheduler import Sequence, Slots
from qmix.engine.scoring import Scorer
from qmix.errors import UsageError
from qmix.plan.scoring import plan_scoring

GREEDY = Sampling(max_new_tokens=2, temperature=0, ignore_eos=True)
ONE = ["gpu:0", "gpu:0"]


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny):
    directory = tmp_path_factory.mktemp("batch")
    checkpoint = make_checkpoint(directory / "checkpoint")
    for path in tiny.glob("tokenizer*"):
        (checkpoint / path.name).write_bytes(path.read_bytes())
    return make_store(checkpoint, directory / "store", "nf4")


def plan(store, residents, batch=2, homes=ONE):
    return replace(spread_plan(store.layout, homes, residents, 8), batch=batch, context=32)


def host_plan(store):
    return replace(plan(store, set()), devices=(), layer_devices=("cpu",) * 2, placement=(("disk",) * 4,) * 2)


def prompts(*lengths):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


def answers(runner, lines):
    requests = [BatchRequest(str(index), line, GREEDY) for index, line in enumerate(lines)]
    done = {result.name: result.token_ids for results in runner.answer(requests) for result in results}
    return [done[str(index)] for index in range(len(lines))]


@pytest.mark.parametrize(
    "residents", [pytest.param({0, 1, 2, 3}, marks=pytest.mark.slow), {1, 2}], ids=["resident", "hybrid"]
)
def test_answers_of_a_batch_on_a_gpu_are_the_cpus_and_each_lines_own(store, residents):
    """Three lines on two places: the third comes when another has ended."""
    lines = prompts(2, 3, 2)
    with BatchRunner(store, host_plan(store)) as host:
        want = answers(host, lines)
    with BatchRunner(store, plan(store, residents), kind=KIND) as gpu:
        assert answers(gpu, lines) == want
        gpu.begin(BatchRequest("served", lines[1], GREEDY))  # as a server does
        assert [each.token_ids for _ in range(2) for each in gpu.step()] == want[1:2]
        assert gpu.capacity == 2 * 32
        with pytest.raises(UsageError, match="a prompt of 33 tokens, planned for 1 to 32"):
            gpu.begin(BatchRequest("long", [5] * 33, GREEDY))
        assert gpu.work.passes < sum(map(len, lines))  # prompts go several tokens a pass


@pytest.mark.slow
def test_scores_on_a_gpu_are_the_cpus(store):
    lines = prompts(6, 5)
    lines[1][:3] = lines[0][:3]  # shared, and computed once
    queries = sorted(Query.of(line[:-1], line[3:]) for line in lines)
    with Scorer(store, plan_scoring(store.layout, 8, 16)) as host:
        want = host.score(make_pass(queries))
    with GpuScorer(store, plan(store, {0, 3}), kind=KIND) as gpu:
        found = gpu.score(make_pass(queries))
    assert [score.greedy for score in found] == [score.greedy for score in want]
    assert [score.logprob for score in found] == pytest.approx([score.logprob for score in want], rel=0.01)


def test_a_batch_whose_layers_lie_partly_on_the_cpu_is_refused_and_closed(store):
    with pytest.raises(UsageError, match="only where all layers fit there"):
        BatchRunner(store, plan(store, {0, 1, 2, 3}, homes=["cpu", "gpu:0"]), kind=KIND)


def test_places_of_sequences_by_hand():
    places, sequences = Slots(2, 10), [Sequence([1], 5) for _ in range(4)]
    assert [places.place(each, 4, True) for each in sequences[:3]] == [True, True, False]
    assert [each.start for each in sequences[:3]] == [0, 10, -1]
    places.leave(sequences[0], 4)
    assert places.place(sequences[3], 10, True)
    assert sequences[3].start == 0
