"""OpenAI's interface through its own client: answers are those of `qmix batch` to the same body."""

from __future__ import annotations

from functools import partial

import httpx
import openai
import pytest
from command import LIMIT_SECONDS
from conftest import Running

get, post = (partial(ask, timeout=LIMIT_SECONDS) for ask in (httpx.get, httpx.post))

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do I install a package?"}]
GREEDY = {"max_tokens": 12, "temperature": 0}


def test_chats_and_completions_are_those_of_a_batch(client, batch):
    bodies = [
        {"messages": CHAT, **GREEDY, "logprobs": True, "top_logprobs": 3},
        {"messages": CHAT, "max_tokens": 10, "temperature": 1.0, "seed": 7},
        {"messages": CHAT, "max_tokens": 30, "temperature": 0, "stop": [" the"]},
        {"messages": CHAT, "max_tokens": 9, "seed": 3, "presence_penalty": 1, "min_p": 0.1, "logit_bias": {"50": 5}},
        {"prompt": "To install a package,", **GREEDY, "logprobs": 2},
        {"prompt": [40, 41, 42, 43, 44], **GREEDY},
    ]
    wanted = batch(bodies)
    for body, want in zip(bodies, wanted, strict=True):
        create = client.chat.completions.create if "messages" in body else client.completions.create
        extra = {"min_p": body.pop("min_p")} if "min_p" in body else {}
        got = create(model="tiny", **body, extra_body=extra).to_dict()
        got["usage"].pop("prompt_tokens_details")
        assert (got["usage"], got["object"], got["model"]) == (want["usage"], want["object"], "tiny")
        (choice,), (same,) = got["choices"], want["choices"]
        for each in (choice.get("message", {}), choice["logprobs"] or {}):
            each.pop("refusal", None)
        assert choice == same


def test_a_stream_has_the_same_text_logprobs_and_usage(client):
    body = {"model": "tiny", "messages": CHAT, **GREEDY, "logprobs": True}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [token for choice in choices if choice.logprobs for token in choice.logprobs.content] == (
        whole.choices[0].logprobs.content
    )
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0, "the same prompt was computed before"

    texts = list(client.completions.create(model="tiny", prompt="The file", **GREEDY, stream=True))
    whole = client.completions.create(model="tiny", prompt="The file", **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in texts) == whole.choices[0].text
    assert all(chunk.usage is None for chunk in texts)


def test_several_prompts_and_answers_have_their_indices(client):
    two = {"model": "tiny", "prompt": ["The file", "Das"], "n": 2, "max_tokens": 6, "seed": 3, "temperature": 1}
    got, again = client.completions.create(**two), client.completions.create(**two)
    assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in got.choices}) == 4
    assert [choice.text for choice in again.choices] == [choice.text for choice in got.choices]
    first = client.completions.create(model="tiny", prompt="The file", max_tokens=6, seed=3, temperature=1)
    assert first.choices[0].text == got.choices[0].text
    assert got.usage.completion_tokens == 24
    assert got.usage.prompt_tokens == sum(
        client.completions.create(model="tiny", prompt=text, max_tokens=1).usage.prompt_tokens
        for text in ("The file", "Das")
    )


def test_an_echoed_prompt_has_the_logprobs_of_its_tokens(client):
    """The tokens of an answer score as they did when they were chosen, as part of a prompt."""
    ids = [40, 41, 42, 43, 44]
    answer = client.completions.create(model="tiny", prompt=ids, **GREEDY, logprobs=1)
    echoed = client.completions.create(model="tiny", prompt=ids, **GREEDY, logprobs=1, echo=True)
    scored = client.completions.create(model="tiny", prompt=ids, max_tokens=0, logprobs=1, echo=True)
    new, both, old = (each.choices[0].logprobs for each in (answer, echoed, scored))
    assert len(old.tokens) == 5
    assert old.token_logprobs[0] is None
    assert both.token_logprobs == old.token_logprobs + new.token_logprobs
    assert both.top_logprobs == old.top_logprobs + new.top_logprobs
    assert echoed.choices[0].text == scored.choices[0].text + answer.choices[0].text
    assert both.text_offset[5:] == [len(scored.choices[0].text) + offset for offset in new.text_offset]
    assert scored.usage.completion_tokens == 0


def test_offsets_are_places_in_the_echoed_text(client):
    """SentencePiece's first space is in the first token of a text or of token ids, and not in the echoed text."""
    for prompt in ("To install a package, open", " a", [1, 1282, 1461, 487], [1282, 1461], "\u00e9t\u00e9"):
        (choice,) = client.completions.create(model="tiny", prompt=prompt, **GREEDY, logprobs=0, echo=True).choices
        names, starts = choice.logprobs.tokens, choice.logprobs.text_offset
        for name, start, end in zip(names, starts, [*starts[1:], None], strict=True):
            if not name.startswith(("<", "bytes:")):
                shown = {name} if start else {name, name.removeprefix(" ")}
                assert choice.text[start:end] in shown, (prompt, name)


def test_more_than_a_chunk_of_a_prompt_is_scored(client):
    ids = [40 + index % 50 for index in range(700)]
    scored = client.completions.create(model="tiny", prompt=ids, max_tokens=0, logprobs=0, echo=True)
    short = client.completions.create(model="tiny", prompt=ids[:90], max_tokens=0, logprobs=0, echo=True)
    assert scored.choices[0].logprobs.token_logprobs[:90] == short.choices[0].logprobs.token_logprobs


def test_models_are_listed_by_name(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "qmix"


ONE = [{"role": "user", "content": "a"}]
LONG = "context_length_exceeded"
WRONG = [
    ({"messages": []}, "messages: must be a list of at least one message", "messages", None),
    ({"messages": ONE, "tools": [{"type": "x"}]}, "tools[0]: must be an object with 'type'", None, None),
    ({"messages": ONE, "functions": [{}]}, "functions: qmix takes only", "functions", None),
    ({"messages": ONE, "logit_bias": {"99999": 1}}, "logit_bias: 99999 is not a token id", "logit_bias", None),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id: is missing", None, None),
    ({"messages": ONE, "audio": {}}, "audio: qmix takes only null", "audio", None),
    ({"messages": ONE, "topp": 1}, "unknown field 'topp' (did you mean 'top_p'?)", "topp", None),
    ({"messages": ONE, "temperature": -1}, "temperature -1.0: must be", "temperature", None),
    ({"messages": ONE, "n": 1000}, "n 1000: ", "n", None),
    ({"messages": ONE, "stream_options": {}}, "stream_options: needs stream", "stream_options", None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]: ", None, None),
    (
        {"messages": ONE, "max_tokens": 5000},
        "this server's context has 2048 tokens",
        "messages",
        "context_length_exceeded",
    ),
    ({"messages": [{"role": "user", "content": "a " * 3000}]}, "the prompt is ", "messages", "context_length_exceeded"),
]


@pytest.mark.parametrize(("body", "told", "param", "code"), WRONG, ids=[told for _, told, _, _ in WRONG])
def test_a_wrong_request_is_refused_by_name(client, body, told, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body={"model": "tiny", **body}, cast_to=object)
    assert caught.value.body["message"].startswith(told)
    assert (caught.value.body["type"], caught.value.code) == ("invalid_request_error", code)
    assert param is None or caught.value.param == param


def test_other_models_paths_methods_and_bodies(server: Running, client):
    with pytest.raises(openai.NotFoundError, match="use tiny") as caught:
        client.chat.completions.create(model="gpt-5", messages=ONE)
    assert caught.value.code == "model_not_found"
    assert get(f"{server.url}/v1/nothing").json()["error"]["message"] == "GET /v1/nothing: not found"
    assert get(f"{server.url}/v1/completions").status_code == 405
    url = f"{server.url}/v1/completions"
    assert post(url, content=b'{"prompt": "a"}').status_code == 415
    broken = post(url, content=b"{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, "invalid JSON" in broken.text) == (400, True)
    large = post(url, content=b" " * (5 * 2**20), headers={"Content-Type": "application/json"})
    assert large.status_code == 413
    pieces = post(url, content=(b" " * 2**20 for _ in range(6)), headers={"Content-Type": "application/json"})
    assert pieces.status_code == 413


def test_metrics_count_what_was_asked(server: Running, client):
    names = ("qmix_new_tokens_total", "qmix_ttft_seconds_count", "qmix_tpot_seconds_count", "qmix_passes_total")
    before = [server.figure(name) for name in names]
    client.completions.create(model="tiny", prompt="The file", max_tokens=5)
    assert [server.figure(name) - old for name, old in zip(names, before, strict=True)] == [5, 1, 1, 5]
    assert server.figure("qmix_memory_peak_bytes") <= server.figure("qmix_memory_budget_bytes")
    assert get(f"{server.url}/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_responses_whole_and_streamed(client):
    body = {"model": "tiny", "instructions": "Be brief.", "temperature": 0}
    chat = client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY)
    whole = client.responses.create(input=CHAT[1]["content"], max_output_tokens=12, **body)
    assert (whole.output_text, whole.status) == (chat.choices[0].message.content, "incomplete")
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 12)

    turns = [{"role": "user", "content": [{"type": "input_text", "text": CHAT[1]["content"]}]}]
    events = list(client.responses.create(input=turns, max_output_tokens=12, stream=True, **body))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert events[-1].response.output == [events[-2].item]
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    for wrong, told in (
        ({"previous_response_id": "resp_1"}, "previous_response_id: "),
        ({"input": [{"type": "reasoning"}]}, r"input\[0\]: type 'reasoning'"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]: type 'web_search'"),
        ({"top": 1}, "unknown field 'top'"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            client.post("/responses", body={"model": "tiny", "input": "a", **wrong}, cast_to=object)
