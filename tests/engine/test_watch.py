"""Figures of a running model: worked out by hand from counters, and taken beside a model that works."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from stores import make_store

from qmix.engine.batch import BatchRunner
from qmix.engine.figures import EXPERTS, IDLE, ON_DISK, REST_CPU, REST_GPU, Requests, Watch, Work
from qmix.engine.running import BatchRequest
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Runner
from qmix.plan import make_plan
from qmix.plan.plan import DevicePlan
from qmix.pool.counters import ExpertCounts, PoolCounters


@dataclass
class Pool:
    """Two layers of two experts; expert 0 of each is in memory."""

    by_expert: ExpertCounts = field(default_factory=lambda: ExpertCounts(2, 2))
    counters: PoolCounters = field(default_factory=PoolCounters)
    waited: float = 0.0
    computed: float = 0.0
    layer: int = 0
    elsewhere: frozenset[tuple[int, int]] = frozenset({(0, 0)})

    def held(self) -> frozenset[tuple[int, int]]:
        return frozenset({(0, 0), (1, 0)})


@dataclass
class Running:
    plan: SimpleNamespace
    pool: Pool = field(default_factory=Pool)
    thread: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(busy=0.0))
    work: Work = field(default_factory=Work)

    def requests(self) -> Requests:
        return Requests(2, 1, 4)


@pytest.fixture
def running() -> Running:
    return Running(SimpleNamespace(ram=1000, devices=(), placement=(("gpu:0", "disk"), ("ram", "ram"))))


def test_figures_of_one_second_by_hand(running):
    """A second with 0.5 s of waiting for the disk and 0.3 s of products, in which two experts were used."""
    now = [10.0]
    watch = Watch(running, clock=lambda: now[0])
    now[0], running.thread.busy, running.pool.waited, running.pool.computed = 11.0, 0.85, 0.5, 0.3
    running.pool.by_expert.add([(1, 0), (1, 1)], [(1, 0)])
    running.pool.counters.bytes_read, running.pool.layer = 4_000_000, 1
    running.work.end_pass(100, 0, 0.5)
    running.work.end_pass(4, 4, 0.4)
    got = watch.figures()
    assert got.tiers == (("gpu:0", "disk"), ("ram", "disk"))
    assert (got.use, got.hits) == (((0, 0), (1, 1)), ((0, 0), (1, 0)))
    assert (got.prefill, got.decode, got.hit_rate) == (pytest.approx(200), pytest.approx(10), 0.5)
    assert (got.read_rate, got.bytes_read, got.layer) == (pytest.approx(4e6), 4_000_000, 1)
    assert [(name, round(share, 6)) for name, share in got.limits] == [
        (ON_DISK, 0.5),
        (EXPERTS, 0.3),
        (IDLE, 0.15),
        (REST_CPU, 0.05),
    ]
    assert got.requests == Requests(2, 1, 4)
    assert (got.memory[0].name, got.memory[0].budget) == ("RAM", 1000)


def test_what_is_past_fades_and_speeds_stay_as_they_last_were(running):
    """Four seconds later a use counts e times less; ten minutes later there is none, and the last speed stands."""
    now = [0.0]
    watch = Watch(running, clock=lambda: now[0])
    running.pool.by_expert.add([(0, 1)], [])
    running.work.end_pass(1, 1, 0.25)
    running.thread.busy = 1.0
    now[0] = 1.0
    assert watch.figures().use[0] == (0, 1)
    now[0] = 5.0
    assert watch.figures().use[0][1] == pytest.approx(1 / math.e)
    now[0] = 605.0
    late = watch.figures()
    assert late.use[0][1] < 1e-6
    assert (late.decode, late.prefill) == (pytest.approx(4), 0)
    assert late.limits[0] == (IDLE, pytest.approx(1))


def test_of_an_hour_without_a_look_only_seconds_count(running):
    """At 900 uses a second the sums have those of four seconds, and the disk's rate is that of the hour."""
    now = [0.0]
    watch = Watch(running, clock=lambda: now[0])
    running.pool.by_expert.asked = [[0, 3600 * 900], [0, 0]]
    running.pool.counters.bytes_read = 3600
    now[0] = 3600.0
    got = watch.figures()
    assert got.use[0][1] == pytest.approx(4 * 900)
    assert got.read_rate == pytest.approx(1)
    running.pool.counters.bytes_read += 5000
    now[0] = 3605.0
    assert watch.figures().read_rate > 600  # of the last seconds, and not of the hour


def test_experts_that_changed_places_are_where_they_are_now(running):
    running.pool.elsewhere = frozenset({(0, 1)})
    assert Watch(running).figures().tiers == (("ram", "gpu:0"), ("ram", "disk"))


def test_a_prompt_under_way_is_told_and_a_gpu_is_what_is_left(running):
    running.plan.devices = (DevicePlan("gpu:0", 500, 0, 0, 0, 0, cuda=7),)
    now = [0.0]
    watch = Watch(running, clock=lambda: now[0])
    running.work.begin(40, reused=30)
    now[0], running.thread.busy = 1.0, 1.0
    got = watch.figures()
    assert (got.prompt, got.limits[0]) == (10, (REST_GPU, 1.0))
    assert (got.memory[1].name, got.memory[1].used, got.memory[1].budget) == ("gpu:0", 7, 500)
    running.work.step(1, 0.5)
    assert (running.work.prompt, running.work.prefill, running.work.decode.tokens) == (0, (10, 0.5), 0)
    running.work.step(3, 0.1)
    assert (running.work.decode, running.work.new_tokens) == ((3, 0.1), 4)


def test_json_has_a_letter_for_each_expert(running):
    found = json.loads(json.dumps(Watch(running).figures().to_json() | {"memory": []}))
    assert found["tiers"] == ["0d", "rd"]
    assert found["requests"] == {"running": 2, "waiting": 1, "places": 4}


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("figures") / "store")


def test_figures_of_a_stream_add_up(store):
    """Half of the experts have a slot: every request is counted, and what is held is what the pool holds."""
    plan = make_plan(store.layout, 2**40, 128, 2**28).with_slots(24)
    with Runner(store, plan) as runner:
        watch, total = Watch(runner), runner.pool.counters
        result = runner.complete("To install a package,", max_new_tokens=12, temperature=0.0, ignore_eos=True)
        got = watch.figures()
        counts = runner.pool.by_expert
        asked, missed = sum(map(sum, counts.asked)), sum(map(sum, counts.missed))
        assert (asked, missed) == (total.hits + total.misses, total.misses)
        assert sum(map(sum, got.use)) == pytest.approx(asked)
        assert [[tier == "ram" for tier in row] for row in got.tiers] == [
            [runner.pool.holds(layer, expert) for expert in range(8)] for layer in range(6)
        ]
        assert runner.work.prefill.tokens == result.prompt_tokens
        assert (runner.work.decode.tokens, got.new_tokens) == (11, 12)
        assert 0 < runner.pool.waited + runner.pool.computed < runner.thread.busy
        assert sum(share for _, share in got.limits) == pytest.approx(1)


def test_watching_from_other_threads_changes_no_answer(store):
    """Three threads look all the time; no figure is ever torn, and the answers are those without them."""
    plan = make_plan(store.layout, 2**40, 128, 2**28, batch=3).with_slots(12)
    with BatchRunner(store, plan) as runner:
        ids = [runner.tokenizer(text)["input_ids"] for text in ("The file", "Click the button to", "Das")]
        sampling = Sampling(max_new_tokens=16, temperature=0.0, ignore_eos=True)
        requests = [BatchRequest(str(index), prompt, sampling) for index, prompt in enumerate(ids)]
        alone = {one.name: one.text for finished in runner.answer(requests) for one in finished}
        over, failures, looks = threading.Event(), [], []

        def look() -> None:
            watch = Watch(runner)
            try:
                while not over.is_set():
                    got = watch.figures()
                    assert sum(row.count("ram") for row in got.tiers) <= 12
                    assert (np.array(got.hits) <= np.array(got.use)).all()
                    assert got.requests.running <= 3
                    looks.append(got.seconds)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        watched = {one.name: one.text for finished in runner.answer(requests) for one in finished}
        over.set()
        for thread in threads:
            thread.join()
        assert not failures, failures
        assert len(looks) > 3
        assert watched == alone
        assert runner.requests() == Requests(0, 0, 3)


def test_a_pass_that_fails_leaves_no_prompt_under_way(store):
    plan = make_plan(store.layout, 2**40, 128, 2**28)
    with BatchRunner(store, replace(plan, batch=1)) as runner:
        runner.work.prompt = 5
        runner.start_over()
        assert runner.work.prompt == 0
