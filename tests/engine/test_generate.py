"""Generation through the Python API, on the embedded model."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import make_checkpoint
from stores import make_model, make_store
from transformers import MixtralForCausalLM

import qmix
from qmix.engine.sampling import Sampling
from qmix.engine.stream import Runner
from qmix.errors import Cancelled, DoesNotFitError, StoreError, UsageError
from qmix.plan import make_plan
from qmix.plan.memory import PREFILL_CHUNK

PROMPT = "To install a package on this system, open a terminal and"


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("generate") / "store")


def runner_of(store, slots, context=1024) -> Runner:
    return Runner(store, make_plan(store.layout, 2**40, context, 2**28).with_slots(slots))


@pytest.fixture(scope="module")
def runner(store):
    with runner_of(store, store.geometry.num_records) as runner:
        yield runner


def test_greedy_text_is_transformers_own_when_experts_are_half(tiny, tmp_path):
    theirs = MixtralForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).eval()
    with runner_of(make_store(tiny, tmp_path / "half", "half"), 48) as runner:
        ids = torch.tensor([runner.tokenizer(PROMPT)["input_ids"]])
        want = theirs.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        got = runner.complete(PROMPT, max_new_tokens=40, temperature=0)
    assert got.token_ids == want.tolist()


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95, "seed": 5}])
def test_the_text_is_the_same_whatever_the_budget(store, options):
    texts = []
    for slots in (48, 24, 2):
        with runner_of(store, slots) as runner:
            long = runner.complete(PROMPT * 60, max_new_tokens=40, ignore_eos=True, **options)
            short = runner.complete(PROMPT, max_new_tokens=40, ignore_eos=True, **options)
            texts.append((long.token_ids, short.token_ids))
            assert (short.misses == 0) == (slots == 48)
    assert texts[0] == texts[1] == texts[2]


def test_the_text_of_a_mixed_store_is_the_same_whatever_the_budget(tiny, tmp_path):
    """Budgets from the smallest to one that holds everything, and none exceeded by the pool."""
    store = make_store(tiny, tmp_path / "store", "nf4,*.7=int8,2.*=half")
    whole = make_plan(store.layout, 2**40, 1024, 2**28)
    texts, slots = [], []
    for share in (0, 0.1, 0.5, 0.9, 1):
        plan = make_plan(store.layout, int(whole.smallest + share * (whole.roomy - whole.smallest)), 1024, 2**28)
        with Runner(store, plan) as runner:
            assert runner.pool.memory.nbytes == plan.pool
            assert plan.total <= plan.ram
            found = [
                runner.complete(text, max_new_tokens=30, ignore_eos=True, temperature=0)
                for text in (PROMPT * 60, PROMPT)
            ]
            texts.append([each.token_ids for each in found])
            assert (found[-1].misses == 0) == (share == 1)
            if share == 1:
                assert runner.pool.counters.bytes_read == plan.expert_total
            slots.append(list(plan.slots_by_size.values()))
    assert slots == [[2, 2, 2], [8, 2, 2], [20, 3, 4], [32, 4, 7], [35, 5, 8]]
    assert all(text == texts[-1] for text in texts)


def test_a_mixed_store_keeps_as_many_records_as_its_bytes_have_room_for(tiny, tmp_path):
    store = make_store(tiny, tmp_path / "store", "nf4,*.7=int8")
    nf4, int8 = store.layout.record_counts
    whole = make_plan(store.layout, 2**40, 1024, 2**28)
    plan = make_plan(store.layout, (whole.smallest + whole.roomy) // 2, 1024, 2**28)
    assert plan.slots_by_size == {nf4: 23, int8: 3}
    assert plan.pool // int8 == 15  # slots of one size would hold so many
    with Runner(store, plan) as runner:
        runner.complete(PROMPT * 60, max_new_tokens=30, ignore_eos=True, temperature=0)
        assert len(runner.pool._resident) == 26


def test_a_seed_fixes_the_draws_and_another_changes_them(runner):
    one, same, other = (runner.complete(PROMPT, max_new_tokens=30, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one.token_ids == same.token_ids != other.token_ids


def test_a_run_does_not_touch_the_callers_random_stream(runner):
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    runner.complete(PROMPT, max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.rand(1), want)


def test_pieces_add_up_to_the_result(runner):
    pieces = list(runner.generate(PROMPT, max_new_tokens=30, temperature=0, ignore_eos=True))
    result = pieces[-1].result
    assert result is not None
    assert [piece.result for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert "".join(piece.text for piece in pieces) == result.text
    assert [token for piece in pieces for token in piece.token_ids] == result.token_ids
    assert len(pieces) > 10
    assert (result.completion_tokens, result.finish_reason) == (30, "length")


def test_a_stop_sequence_ends_the_text_before_it(runner):
    whole = runner.complete(PROMPT, max_new_tokens=30, temperature=0, ignore_eos=True).text
    stop = whole[12:16]
    cut = runner.complete(PROMPT, max_new_tokens=30, temperature=0, ignore_eos=True, stop=(stop,))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < 30


def test_the_end_of_text_token_stops_unless_ignored(runner):
    ids = runner.tokenizer(f"[INST]{PROMPT}[/INST]", add_special_tokens=False)["input_ids"]
    ends = runner.complete([1, *ids], max_new_tokens=400, temperature=0)
    goes_on = runner.complete([1, *ids], max_new_tokens=400, temperature=0, ignore_eos=True)
    assert (ends.finish_reason, ends.token_ids[-1]) == ("stop", 2)
    assert goes_on.token_ids[: len(ends.token_ids)] == ends.token_ids
    assert (goes_on.finish_reason, goes_on.completion_tokens) == ("length", 400)


def test_context_is_shared_by_prompt_and_answer(store):
    with runner_of(store, 48, context=32) as runner:
        count = len(runner.tokenizer(PROMPT)["input_ids"])
        result = runner.complete(PROMPT, max_new_tokens=100, temperature=0, ignore_eos=True)
        assert (result.prompt_tokens, result.completion_tokens) == (count, 32 - count)
        with pytest.raises(UsageError, match="too long for a context of 32"):
            runner.generate(PROMPT * 3)


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_an_empty_prompt_is_refused(runner, prompt):
    with pytest.raises(UsageError, match="prompt"):
        runner.generate(prompt)


def test_ids_outside_the_vocabulary_are_refused(runner):
    with pytest.raises(UsageError, match="4096"):
        runner.generate([1, 4096])


def test_leaving_the_stream_stops_the_work_and_the_next_run_is_right(runner):
    want = runner.complete(PROMPT, max_new_tokens=20, temperature=0).token_ids
    stream = runner.generate(PROMPT, max_new_tokens=400, temperature=0, ignore_eos=True)
    next(stream)
    stream.close()
    assert runner.complete(PROMPT, max_new_tokens=20, temperature=0).token_ids == want


def test_runs_share_threads_and_leave_none_behind(store):
    before = threading.active_count()
    with runner_of(store, 4) as runner:
        runner.complete(PROMPT, max_new_tokens=3)
        during = threading.active_count()
        for _ in range(5):
            runner.complete(PROMPT, max_new_tokens=3)
        assert threading.active_count() == during
    assert threading.active_count() == before


def test_the_model_can_be_used_as_any_of_transformers(runner):
    ids = torch.tensor([runner.tokenizer(PROMPT)["input_ids"]] * 2)
    out = runner.model.generate(ids, min_new_tokens=8, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert out.shape == (2, ids.shape[1] + 8)
    assert torch.equal(out[0], out[1])


def test_load_takes_a_budget_in_words_and_refuses_one_too_small():
    with pytest.raises(DoesNotFitError, match=r"smallest budget that works is ram='\d+MB'") as refused:
        qmix.load("tiny", ram="100MB")
    with qmix.load("tiny", ram=refused.value.smallest) as runner:
        assert runner.plan.slots >= 2
        assert runner.complete(PROMPT, max_new_tokens=5, temperature=0).completion_tokens == 5


def test_flash_attention_that_is_not_installed_is_a_clear_error():
    with pytest.raises(UsageError, match="flash-attn is not installed"):
        qmix.load("tiny", attention="flash_attention_2")


def test_a_closed_runner_can_be_closed_again_and_says_so_when_used(store):
    runner = runner_of(store, 4)
    runner.close()
    runner.close()
    with pytest.raises(UsageError, match="closed"):
        list(runner.generate(PROMPT))


def test_closing_ends_a_generation_under_way(store):
    runner = runner_of(store, 48)
    stream = runner.generate(PROMPT, max_new_tokens=900, temperature=0, ignore_eos=True)
    next(stream)
    runner.close()
    with pytest.raises(Cancelled):
        list(stream)


def test_one_text_to_stop_at_must_come_in_a_tuple():
    with pytest.raises(UsageError, match="tuple"):
        Sampling(stop="abc")


@pytest.mark.parametrize("content", ["{", '{"temperature": "abc"}', '{"num_beams": 4}'])
def test_a_generation_config_that_cannot_be_used_is_named_and_nothing_stays_open(tiny, tmp_path, content):
    store = make_store(tiny, tmp_path / "store")
    (store.directory / "generation_config.json").write_text(content)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StoreError, match=rf"^{store.directory}/generation_config\.json: "):
        runner_of(store, 4)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_rope_that_transformers_does_not_know_is_named(tmp_path):
    strange = {"rope_theta": 1e4, "rope_type": "bogus"}
    store = make_store(make_checkpoint(tmp_path / "checkpoint", rope_parameters=strange), tmp_path / "store")
    with pytest.raises(StoreError, match=r"config\.json: transformers refuses it"):
        make_model(store)


REPEATING = "sudo apt install python3. " * 15


@pytest.mark.parametrize("prompt", [REPEATING, REPEATING * 6, "a"])
def test_drafting_gives_the_same_text_in_fewer_passes(tiny, tmp_path, prompt):
    passes = []
    with runner_of(make_store(tiny, tmp_path / "half", "half"), 48) as runner:
        runner.model.register_forward_hook(lambda *_: passes.append(1))
        plain = runner.complete(prompt, max_new_tokens=50, temperature=0, ignore_eos=True)
        without = len(passes)
        drafted = runner.complete(prompt, max_new_tokens=50, temperature=0, ignore_eos=True, draft_ngram=6)
    assert drafted.token_ids == plain.token_ids
    assert drafted.completion_tokens == 50
    assert len(passes) - without < without


def test_drafting_reads_a_long_prompt_in_chunks_too(store):
    lengths = []
    with runner_of(store, 48, context=2048) as runner:
        hook = lambda module, arguments, options, result: lengths.append(result[0].shape[1])  # noqa: E731
        runner.model.model.register_forward_hook(hook, with_kwargs=True)
        runner.complete(REPEATING * 12, max_new_tokens=10, temperature=0, draft_ngram=4)
    assert max(lengths) == PREFILL_CHUNK


@pytest.mark.slow
def test_a_thousand_tokens_leave_nothing_behind(store):
    """Memory, threads and open files are what they were after a hundred."""
    process = psutil.Process()
    with runner_of(store, 24) as runner:
        seen = []
        for tokens in (100, 900):
            runner.complete(PROMPT, max_new_tokens=tokens, temperature=0.8, seed=1, ignore_eos=True)
            seen.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
    assert seen[1][1:] == seen[0][1:]
    assert seen[1][0] < seen[0][0] + 4 * 2**20
