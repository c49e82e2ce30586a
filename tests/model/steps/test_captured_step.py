"""Captured steps have the texts and logits of the CPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from checkpoints import make_checkpoint
from places import KIND
from spreads import spread_plan
from stores import make_store

from qmix.engine.stream import Runner
from qmix.machine.rates import Rates
from qmix.model.gpu.promotion import Exchange, Promotion

PROMPT = torch.randint(3, 96, (12,), generator=torch.Generator().manual_seed(1)).tolist()
COPIES = Rates(pcie=1e15)  # by these copying pays for every expert
ONE, TWO = ["gpu:0", "gpu:0"], ["gpu:0", "gpu:1"]


def with_tokenizer(checkpoint, tiny):
    for path in tiny.glob("tokenizer*"):
        (checkpoint / path.name).write_bytes(path.read_bytes())
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny):
    return with_tokenizer(make_checkpoint(tmp_path_factory.mktemp("captured") / "checkpoint"), tiny)


@pytest.fixture(scope="module")
def store(checkpoint, tmp_path_factory):
    return make_store(checkpoint, tmp_path_factory.mktemp("store") / "store", "nf4")


def runner(store, homes, residents=frozenset(), slots=8, rates=None, keeps=False):
    """Return a runner by a plan with `residents` of every layer on its GPU; without homes on the CPU alone."""
    plan = spread_plan(store.layout, homes or TWO, residents, slots)
    if not homes:
        plan = replace(plan, devices=(), layer_devices=("cpu",) * 2, placement=(("disk",) * 4,) * 2)
    return Runner(store, plan, kind=KIND, rates=rates or Rates(), keeps=keeps)


def answer(runner, tokens=2, prompt=PROMPT, **options):
    options = {"temperature": 0, "ignore_eos": True} | options
    return runner.complete(prompt, max_new_tokens=tokens, **options).token_ids


def logits(runner, ids):
    """Return logits [T, V] of ids behind the prompt: transformers' forward reads it, one forward follows."""
    with torch.inference_mode():
        runner.cache.reset()
        runner.model(torch.tensor([PROMPT]), cache=runner.cache, use_cache=True)
        return runner.model(torch.tensor([ids]), cache=runner.cache, use_cache=True).logits[0].float()


@dataclass(frozen=True)
class Case:
    """A plan, and the graphs of a step by it."""

    homes: list[str]
    residents: frozenset[int]
    graphs: int
    slots: int = 8
    rates: Rates | None = None


CASES = {
    "resident": Case(ONE, frozenset(range(4)), 1),
    "copied": Case(ONE, frozenset({0}), 5, rates=COPIES),
}
MORE = {
    "hybrid": Case(ONE, frozenset({0, 2}), 5),
    "CPU and GPU": Case(["cpu", "gpu:0"], frozenset({0, 1}), 3),
    "two GPUs": Case(TWO, frozenset(range(4)), 1),
    "two GPUs, hybrid": Case(TWO, frozenset({1, 2}), 5),
    "disk": Case(ONE, frozenset({1}), 5, slots=2),
    "none resident": Case(ONE, frozenset(), 3),
}
EVERY = [*CASES.items(), *((name, pytest.param(case, marks=pytest.mark.slow)) for name, case in MORE.items())]


@pytest.fixture(scope="module")
def wanted(store):
    """The CPU's answer, and its logits after three more tokens."""
    with runner(store, None) as host:
        return answer(host), logits(host, [7, 8, 9])


@pytest.mark.parametrize("case", [case for _, case in EVERY], ids=[name for name, _ in EVERY])
def test_a_text_is_the_cpus_and_logits_are_close_with_few_graphs_a_token(store, wanted, case):
    want, scores = wanted
    with runner(store, case.homes, case.residents, case.slots, case.rates) as gpu:
        steps = gpu.model.steps
        assert answer(gpu) == want
        tokens = len(want) - 1 + steps.begins_early  # the prompt gives the first; one may be begun in vain
        assert steps.launched == tokens * case.graphs
        before = steps.launched
        found = logits(gpu, [7, 8, 9])
        assert steps.launched == before + case.graphs  # three tokens at once
    torch.testing.assert_close(found, scores, rtol=0, atol=0.03 * scores.std().item())


@pytest.mark.parametrize(
    "rates", [Rates(pcie=1.0), pytest.param(COPIES, marks=pytest.mark.slow)], ids=["on the CPU", "copied"]
)
def test_experts_change_places_between_steps_and_the_text_and_the_memory_stay(store, wanted, monkeypatch, rates):
    """Before each token, in turns, two pairs of experts and then one of them back."""
    turns = [[Exchange(0, 1, 0), Exchange(1, 3, 2)], [Exchange(0, 0, 1)]]
    with runner(store, ONE, frozenset({0, 2}), rates=rates) as gpu:
        steps, pool = gpu.model.steps, gpu.pool
        layers = [layer.mlp.experts for layer in gpu.model.model.layers]
        records = {key: bytes(pool.record(*key)) for key in store.layout.experts if pool.holds(*key)}
        records |= {(layer, each): bytes(layers[layer].residents[each].cpu()) for layer in (0, 1) for each in (0, 2)}
        places = {record.data_ptr() for experts in layers for record in experts.residents.values()}
        read = pool.counters.bytes_read
        monkeypatch.setattr(steps.exchanges.promotion, "exchanges", lambda tokens: turns.pop(0) if turns else [])
        graphs = steps.captured(1)
        for texts, residents in ((1, [{1, 2}, {0, 3}]), (2, [{0, 2}, {0, 3}])):
            found = logits(gpu, [7])
            assert len(turns) == 2 - texts
            assert [set(experts.residents) for experts in layers] == residents
            torch.testing.assert_close(found[0], wanted[1][0], rtol=0, atol=0.03 * wanted[1].std().item())
            for (layer, expert), record in records.items():
                here = layers[layer].residents.get(expert)
                assert bytes(pool.record(layer, expert) if here is None else here.cpu()) == record
        assert answer(gpu) == wanted[0]
        assert {record.data_ptr() for experts in layers for record in experts.residents.values()} == places
        assert pool.counters.bytes_read == read
        assert steps.captured(1) is graphs
        assert pool.elsewhere == {(0, 0), (0, 2), (1, 0), (1, 3)}


def test_a_run_begins_with_the_residents_that_the_last_one_ended_with(store, wanted, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    where = []
    for turns in (1, 0):
        with runner(store, ONE, frozenset({0, 2}), rates=Rates(pcie=1.0), keeps=True) as gpu:
            where.append([set(layer.mlp.experts.residents) for layer in gpu.model.model.layers])
            if turns:
                monkeypatch.setattr(Promotion, "exchanges", once_exchanged)
            assert answer(gpu) == wanted[0]
            monkeypatch.undo()
            monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert where == [[{0, 2}, {0, 2}], [{1, 2}, {0, 2}]]


def once_exchanged(promotion, tokens):
    """Exchange expert 0 of the first layer for expert 1, as `Promotion.exchanges` decides it."""
    (group,) = (group for group in promotion.groups if group.layer == 0)
    if group.real != group.start:
        return []
    group.imagined = {1, 2}
    return group.follow()


@pytest.mark.slow
def test_gpus_without_access_to_each_other_have_a_graph_each(store, wanted, monkeypatch):
    monkeypatch.setattr("qmix.model.gpu.captured.reach_each_other", lambda first, second: False)
    with runner(store, TWO, frozenset(range(4))) as gpu:
        assert answer(gpu) == wanted[0]
        assert gpu.model.steps.launched == 2 * len(wanted[0])


@pytest.mark.slow
def test_every_precision_in_one_layer(checkpoint, tmp_path):
    store = make_store(checkpoint, tmp_path / "store", "nf4,*.1=int8,*.2=half,1.3=fp4")
    with runner(store, None) as host:
        scores = logits(host, [7, 8])
    with runner(store, ONE, frozenset({0, 1}), rates=COPIES) as gpu:
        found = logits(gpu, [7, 8])
        assert gpu.model.steps.launched == 5
    torch.testing.assert_close(found, scores, rtol=0, atol=0.03 * scores.std().item())


@pytest.mark.slow
def test_drafts_are_verified_by_steps_of_several_tokens(store):
    """After a text that repeats itself every token is drafted."""
    with runner(store, ONE, frozenset({0, 1, 2, 3})) as gpu:
        want = answer(gpu, 4, prompt=[5, 6, 7, 8] * 3)
        assert set(gpu.model.steps._captured) == {1}
        assert answer(gpu, 4, prompt=[5, 6, 7, 8] * 3, draft_ngram=3) == want
        assert set(gpu.model.steps._captured) > {1}


@pytest.mark.slow
def test_long_drafts_are_verified_by_steps_of_up_to_32_tokens_and_prompts_are_not(store):
    with runner(store, ONE, frozenset({0, 1, 2, 3})) as gpu, torch.inference_mode():
        steps, ids = gpu.model.steps, torch.tensor([[5, 6, 7, 8] * 3])
        options = {"cache": gpu.cache, "use_cache": True}
        assert steps.rows == 32
        assert steps.forward(ids, options) is None
        with steps.verifying(10):
            assert steps.forward(ids, options) is None
        with steps.verifying(11):
            assert steps.forward(ids[:, :6], options) is not None
            found = steps.forward(ids[:, 6:], options).logits
            gpu.cache.reset()
            whole = steps.forward(ids, options).logits
        assert set(steps._captured) == {1, 8, 16}
        assert torch.equal(found, whole[:, 6:])  # the sums have one order in steps of all sizes
        with steps.verifying(64):
            assert steps._most == 32
        assert steps._most == 8


@pytest.mark.slow
def test_a_draw_on_the_gpu_follows_its_seed(store):
    with runner(store, ONE, frozenset({0, 1, 2, 3})) as gpu:
        hot = {"temperature": 2.0, "top_k": 0}
        texts = [answer(gpu, 3, seed=seed, **hot) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
def test_a_token_that_was_not_expected_gets_a_step_of_its_own(store):
    """The step after the expected token has begun already; its results must not be used."""
    with runner(store, ONE, frozenset({0, 1, 2, 3})) as gpu, torch.inference_mode():
        steps, other = gpu.model.steps, [11, 12]
        want = logits(gpu, other)[-1]
        gpu.cache.reset()
        gpu.model(torch.tensor([PROMPT]), cache=gpu.cache, use_cache=True)
        with steps.choosing(0.0, 1):
            for token in other:
                found = gpu.model(torch.tensor([[token]]), cache=gpu.cache, use_cache=True).logits[0, -1]
        assert found.argmax() == want.argmax()
        assert found.isinf().sum() == found.numel() - 1


@pytest.mark.slow
def test_an_answer_that_nobody_wants_any_more_ends_at_the_next_step(store):
    with runner(store, ONE, frozenset({0, 1, 2, 3})) as gpu:
        pieces = gpu.generate(PROMPT, temperature=0, ignore_eos=True, max_new_tokens=40)
        next(pieces)
        pieces.close()
        assert gpu.model.steps.launched < 40


def test_what_no_step_serves_is_left_to_transformers(store):
    one = torch.tensor([[5]])
    with runner(store, ONE, frozenset({0, 1, 2, 3})) as gpu, torch.inference_mode():
        for ids, options in (
            (one, {"attention_mask": torch.tensor([[0]])}),
            (one, {"output_hidden_states": True}),
            (one, {"position_ids": torch.tensor([[3]])}),
            (one, {"cache": None}),
            (torch.tensor([[5] * 9]), {}),
            (torch.tensor([[5], [5]]), {}),
            (None, {"inputs_embeds": torch.zeros(1, 1, 64)}),
        ):
            assert gpu.model.steps.forward(ids, {"cache": gpu.cache, "use_cache": True} | options) is None
        with torch.enable_grad():
            assert gpu.model.steps.forward(one, {"cache": gpu.cache}) is None
        assert gpu.model.steps.launched == 0


@pytest.mark.parametrize("changes", [{"hidden_size": 65, "intermediate_size": 31}, {"hidden_act": "gelu"}])
def test_models_that_the_kernels_do_not_take_run_without_steps(tmp_path, tiny, changes):
    store = make_store(with_tokenizer(make_checkpoint(tmp_path / "checkpoint", **changes), tiny), tmp_path / "store")
    with runner(store, ONE, frozenset({0})) as gpu:
        assert gpu.model.steps is None
        assert len(answer(gpu)) == 2
