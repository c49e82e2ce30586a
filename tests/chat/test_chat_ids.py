"""A turn of a chat costs its new tokens: counted where the model takes them in, on the embedded model."""

from __future__ import annotations

from contextlib import closing, contextmanager
from itertools import islice, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stores import make_store

from qmix.chat.conversation import Conversation
from qmix.chat.format import PlainFormat, Said, TemplateFormat, format_of
from qmix.chat.session import Session, shown_ids
from qmix.engine.prefixes import common_prefix
from qmix.engine.stream import Runner
from qmix.errors import Cancelled, StoreError, UsageError
from qmix.plan import make_plan
from qmix.plan.memory import PREFILL_CHUNK
from qmix.text.detokenizer import Detokenizer
from qmix.text.tokenizer import load_tokenizer

GREEDY = {"temperature": 0.0, "max_new_tokens": 24}
QUESTIONS = ("How do I install a package?", "And how is it removed again?", "What is a file name?")

# the template of Mixtral-8x7B-Instruct-v0.1 as it was published first, but for its spacing
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
WITH_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}[INST]{{ m['role'] + '[/INST]' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[INST]assistant[/INST]{% endif %}"
)
# the system text stands before the last question: what lies before a new turn changes with it
SYSTEM_LAST = (
    "{{ bos_token }}{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{% if loop.last and system %}{{ system }} {% endif %}"
    "{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
WITHOUT_SYSTEM = WITH_SYSTEM.replace("in messages", "in messages if m['role'] != 'system'")


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("chat") / "store")


@pytest.fixture(scope="module")
def half(tiny, tmp_path_factory):
    return make_store(tiny, tmp_path_factory.mktemp("chat") / "half", "half")


def runner_of(store, context=1024, slots=48) -> Runner:
    return Runner(store, make_plan(store.layout, 2**40, context, 2**28).with_slots(slots))


@pytest.fixture(scope="module")
def runner(store):
    with runner_of(store) as runner:
        yield runner


@contextmanager
def taken_in(runner):
    """The token ids that reach the model in each of its steps."""
    steps: list[list[int]] = []
    embeddings = runner.model.model.embed_tokens
    hook = embeddings.register_forward_hook(lambda module, arguments, result: steps.append(arguments[0][0].tolist()))
    yield steps
    hook.remove()


def say(session, text, again=False, tokens=None):
    """A turn, its answer cut off after so many pieces of text."""
    answer = session.ask(text, again)
    with closing(answer.pieces) as pieces:
        for _ in islice(pieces, tokens):
            pass
    session.keep(answer)
    return answer


def test_a_turn_takes_in_its_new_tokens_and_nothing_else(runner):
    """The last token of an answer is generated, not taken in: it comes with the next turn."""
    session = Session(runner, GREEDY)
    for question in QUESTIONS:
        before = session.conversation.ids
        with taken_in(runner) as steps:
            answer = say(session, question)
        new = answer.prompt.ids[max(0, len(before) - 1) :]
        assert answer.prompt.ids[: len(before)] == before
        assert steps[0] == new
        assert [len(step) for step in steps[1:]] == [1] * (len(answer.ids) - 1)
        assert (answer.result.prefilled_tokens, answer.result.reused_tokens) == (
            len(new),
            len(answer.prompt.ids) - len(new),
        )
    assert answer.result.reused_tokens > 60


def test_after_undo_the_same_turn_takes_in_what_was_taken_back_at_most(runner):
    session = Session(runner, GREEDY)
    say(session, QUESTIONS[0])
    first, ids = say(session, QUESTIONS[1]), session.conversation.ids
    session.conversation.take_back()
    with taken_in(runner) as steps:
        again = say(session, QUESTIONS[1])
    assert steps[0] == again.prompt.ids[-1:]  # the prompt is known; its last token's logits are not
    assert (again.ids, session.conversation.ids) == (first.ids, ids)
    session.conversation.take_back()
    kept = len(session.conversation.ids)
    with taken_in(runner) as steps:
        other = say(session, QUESTIONS[2])
    assert steps[0] == other.prompt.ids[len(other.prompt.ids) - len(steps[0]) :]
    assert len(steps[0]) <= len(other.prompt.ids) - kept


def test_another_answer_takes_in_one_token(runner):
    session = Session(runner, {"temperature": 1.0, "seed": 5, "max_new_tokens": 20})
    first = say(session, QUESTIONS[0])
    with taken_in(runner) as steps:
        second = say(session, QUESTIONS[0], again=True)
    assert steps[0] == first.prompt.ids[-1:]
    assert second.ids != first.ids  # drawn with the next seed
    assert [turn.answer_ids for turn in session.conversation.turns] == [second.ids]
    repeated = Session(runner, {"temperature": 1.0, "seed": 6, "max_new_tokens": 20})
    assert say(repeated, QUESTIONS[0]).ids == second.ids


@pytest.mark.parametrize("pieces", [1, 4])
def test_after_a_stopped_answer_a_turn_takes_in_its_new_tokens(runner, pieces):
    session = Session(runner, GREEDY | {"max_new_tokens": 500, "ignore_eos": True})
    stopped = say(session, QUESTIONS[0], tokens=pieces)
    assert 0 < len(stopped.ids) < 100
    known = len(stopped.prompt.ids) + len(stopped.ids)
    session.set("max_new_tokens", 8)
    with taken_in(runner) as steps:
        answer = say(session, QUESTIONS[1])
    assert answer.prompt.ids[:known] == stopped.prompt.ids + stopped.ids
    assert answer.prompt.ids[known] == 2  # the answer's end, which the model had not come to
    assert answer.prompt.ids[known - 1 :][-len(steps[0]) :] == steps[0]
    assert len(steps[0]) <= len(answer.prompt.ids) - known + 1
    assert runner.held == (answer.prompt.ids + answer.ids)[:-1]


def test_one_stopped_before_its_first_token_is_as_if_it_had_not_been(runner):
    session = Session(runner, GREEDY)
    say(session, QUESTIONS[0])
    before = session.conversation.state
    for again in (False, True):
        answer = session.ask(QUESTIONS[1] * 20, again)
        answer.pieces.close()
        assert not session.keep(answer)
        assert session.conversation.state == before


@pytest.mark.parametrize("draft", [0, 4])
def test_stopping_anywhere_leaves_a_cache_that_is_right(half, draft):
    """Between two layers, within a prompt of several chunks, and with drafts that nobody has seen."""
    options = {"temperature": 0, "max_new_tokens": 30, "ignore_eos": True}
    with runner_of(half, context=2048, slots=12) as runner:
        prompt = runner.tokenizer(QUESTIONS[0] * 140)["input_ids"]
        assert len(prompt) > 2 * PREFILL_CHUNK
        want = runner.complete(prompt, **options).token_ids
        get, asked = runner.pool.groups, 0

        def stopping(*arguments):
            nonlocal asked
            asked += 1
            runner.pool.cancelled = asked == stop_at
            return get(*arguments)

        for stop_at in (1, 4, 8, 15, 19, 33, 60):
            runner.complete("x", max_new_tokens=1)
            asked, runner.pool.groups = 0, stopping
            with pytest.raises(Cancelled):
                list(runner.generate(prompt, reuse=True, draft_ngram=draft, **options))
            runner.pool.cancelled, runner.pool.groups = False, get
            assert {layer.length for layer in runner.cache.layers} == {len(runner.held)}
            assert runner.held == (prompt + want)[: len(runner.held)]
            assert len(runner.held) >= min(len(prompt) - 1, (stop_at - 1) // 6 * PREFILL_CHUNK)
            assert runner.complete(prompt, reuse=True, **options).token_ids == want


def test_going_on_is_exactly_as_if_it_had_not_been_left(runner):
    """Bit for bit: the step that follows is the same step."""
    prompt, options = runner.tokenizer(QUESTIONS[0])["input_ids"], {"temperature": 0, "ignore_eos": True}
    whole = runner.complete(prompt, max_new_tokens=60, **options)
    keys = [layer.keys[0, :, : len(runner.held)].clone() for layer in runner.cache.layers]
    ids = list(prompt)
    for count in (1, 19, 40):
        ids += runner.complete(ids, reuse=True, max_new_tokens=count, **options).token_ids
    assert ids == prompt + whole.token_ids
    assert all(
        (layer.keys[0, :, : len(runner.held)] == kept).all()
        for layer, kept in zip(runner.cache.layers, keys, strict=True)
    )


def test_a_conversation_says_what_it_would_say_computed_afresh_but_for_ties(half):
    """Keys and values are rounded otherwise one token at a time than many at once. Where a text comes to differ, the
    two tokens' logits, computed afresh, are within two steps of bf16."""
    compared = 0
    with runner_of(half) as runner, torch.inference_mode():
        for questions in permutations(QUESTIONS):
            session = Session(runner, GREEDY)
            for question in questions:
                answer = say(session, question)
                afresh = runner.complete(answer.prompt.ids, **GREEDY)
                assert afresh.reused_tokens == 0
                same = common_prefix(answer.ids, afresh.token_ids)
                compared += same
                if same < len(answer.ids):
                    ids = torch.tensor([answer.prompt.ids + answer.ids[:same]])
                    logits = runner.model(ids).logits[0, -1].float()
                    one, other = logits[answer.ids[same]], logits[afresh.token_ids[same]]
                    assert abs(one - other) <= 2 * 2**-7 * abs(one)
    assert compared > 200


def test_without_reuse_a_prompt_is_computed_whole_each_time(runner):
    for _ in range(2):
        with taken_in(runner) as steps:
            result = runner.complete(QUESTIONS[0], max_new_tokens=2, temperature=0)
        assert (len(steps[0]), result.reused_tokens) == (result.prompt_tokens, 0)


def test_drafting_goes_on_from_the_cache_too(runner):
    session = Session(runner, GREEDY)
    say(session, QUESTIONS[0])
    want = [say(session, QUESTIONS[1]).ids, session.conversation.ids]
    session.conversation.take_back()
    session.set("draft_ngram", 4)
    with taken_in(runner) as steps:
        assert [say(session, QUESTIONS[1]).ids, session.conversation.ids] == want
    assert len(steps[0]) <= 5


def with_template(tiny, tmp_path, template: str | None):
    """tiny's tokenizer with another chat template, or none."""
    for path in tiny.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("template", [None, "tiny", INSTRUCT, WITH_SYSTEM, SYSTEM_LAST, WITHOUT_SYSTEM])
@pytest.mark.parametrize("system", ["", "Answer in one word."])
def test_a_turn_added_is_what_the_whole_would_be(tiny, tmp_path, template, system):
    """Holds where an answer's ids are those of its text, and the model has ended it or not."""
    text = (tiny / "chat_template.jinja").read_text() if template == "tiny" else template
    tokenizer = with_template(tiny, tmp_path, text)
    form, said = format_of(tokenizer), []
    assert form.takes_roles == (template is not None)
    assert form.takes_system == (template in (WITH_SYSTEM, SYSTEM_LAST))
    ids = form.whole(system, said, "The first")
    assert system.replace(" ", "") in tokenizer.decode(ids).replace(" ", "")
    for number in range(3):
        ids += tokenizer("It is so", add_special_tokens=False)["input_ids"]
        if number == 1:
            ids.append(tokenizer.eos_token_id)
        said.append(
            Said(f"{'The first' if number == 0 else f'Next {number}'}", "It is so" if form.takes_roles else " It is so")
        )
        ids = form.after(ids, system, said, f"Next {number + 1}")
        assert ids == form.whole(system, said, f"Next {number + 1}"), tokenizer.decode(ids)


def test_an_answer_stays_as_it_was_generated(tiny):
    """`H` and `i` may be one token when encoded, and are two when the model chose so."""
    tokenizer = load_tokenizer(tiny)
    form = format_of(tokenizer)
    prompt = form.whole("", [], "Say it")
    odd = [tokenizer.convert_tokens_to_ids(token) for token in ("▁", "t", "h", "e")]
    assert tokenizer("the", add_special_tokens=False)["input_ids"] != odd
    ids = form.after(prompt + odd, "", [Said("Say it", "the")], "More")
    assert ids[: len(prompt) + 4] == prompt + odd
    assert ids[len(prompt) + 4 :] == [2, *form.whole("", [], "More")[1:]]


def test_a_template_that_cannot_be_rendered_is_an_error_of_one_line(tiny, tmp_path):
    with pytest.raises(StoreError, match="the chat template cannot be used") as caught:
        format_of(with_template(tiny, tmp_path, "{% for %}"))
    assert "\n" not in str(caught.value)


def test_a_base_models_text_goes_on_with_one_space_at_most(tiny, tmp_path):
    tokenizer = with_template(tiny, tmp_path, None)
    form = format_of(tokenizer)
    assert isinstance(form, PlainFormat)
    for answer, user, whole in (
        (" upon", "a time", "Once upon a time"),
        (" upon\n", "a time", "Once upon\na time"),
        (" upon", "\na time", "Once upon\na time"),
    ):
        assert form.whole("", [Said("Once", answer)], user) == tokenizer(whole)["input_ids"]


def test_a_stop_sequence_is_no_part_of_what_is_kept(runner):
    session = Session(runner, GREEDY | {"ignore_eos": True})
    whole = say(session, QUESTIONS[0])
    session.conversation.clear()
    session.set("stop", (whole.text[10:14],))
    cut = say(session, QUESTIONS[0])
    assert len(cut.ids) > len(session.conversation.turns[0].answer_ids)
    kept = cut.prompt.ids + session.conversation.turns[0].answer_ids
    assert runner.decode(kept).endswith(cut.text[: len(runner.decode(kept)) - len(runner.decode(cut.prompt.ids))])
    assert whole.text[10:14] not in runner.decode(session.conversation.turns[0].answer_ids)


@given(st.lists(st.integers(5, 4000), max_size=30), st.integers(0, 40))
def test_shown_ids_are_a_beginning_whose_text_was_shown(tiny_tokenizer, ids, cut):
    decode = lambda tokens: tiny_tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
    detokenizer = Detokenizer(decode, [1, 5])
    text = "".join([*map(detokenizer.add, ids), detokenizer.finish()])
    kept = shown_ids(decode, [1, 5], ids, text[:cut])
    assert kept == ids[: len(kept)]
    if cut >= len(text):
        assert kept == ids


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny):
    return load_tokenizer(tiny)


def test_the_oldest_turns_go_where_the_context_is_full(store):
    with runner_of(store, context=128) as runner:
        session = Session(runner, GREEDY | {"max_new_tokens": 12, "ignore_eos": True}, "Be short.")
        gone = []
        for number in range(12):
            answer = say(session, f"Question {number}: what is a file?")
            assert len(answer.prompt.ids) + 12 <= 128
            assert answer.result.completion_tokens == 12
            assert "Be short." in runner.decode(answer.prompt.ids)
            assert f"Question {number}:" in runner.decode(answer.prompt.ids)
            gone.append(answer.forgotten)
        assert sum(gone) == session.conversation.forgotten > 4
        assert max(gone) > 1  # half of it is made free at once, and the next turns cost only their own tokens
        assert gone.count(0) > len(gone) // 2
        assert len(session.conversation.turns) == 12
        with pytest.raises(UsageError, match=r"this turn is \d+ tokens, too long for a context of 128"):
            session.ask("word " * 300)
        assert len(session.conversation.turns) == 12
        for _ in range(12):
            session.conversation.take_back()
        assert session.conversation.state == ([], 0)
        with pytest.raises(UsageError, match="nothing has been said"):
            session.conversation.take_back()


def test_a_turn_that_fills_most_of_the_context_is_still_answered(store):
    with runner_of(store, context=64) as runner:
        session = Session(runner, {"temperature": 0.0})
        say(session, "What?")
        text = "a file " * 27
        answer = say(session, text)
        assert (answer.forgotten, 50 < len(answer.prompt.ids) < 64) == (1, True)
        assert answer.result.finish_reason in ("length", "stop")


def test_another_system_text_renders_the_conversation_anew(tiny, tmp_path):
    form = TemplateFormat(with_template(tiny, tmp_path, WITH_SYSTEM))
    conversation = Conversation(form, 512, "One.")
    conversation.add(conversation.prompt("Hello", 10), "Hi", [7, 8, 2])
    assert conversation.prompt("More", 10).ids[: len(conversation.ids)] == conversation.ids
    conversation.system = "Two."
    assert conversation.prompt("More", 10).ids == form.whole("Two.", [Said("Hello", "Hi")], "More")
