"""Clients together: some leave, some read slowly, some ask for nonsense; the others get what they get alone."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from conftest import BATCH, QUEUE, Running

from qmix.serve.events import events
from qmix.serve.following import Update

WORDS = ["install", "the", "package", "file", "menu", "click", "button", "to", "open", "window", "save", "print"]


def prompt(index: int) -> str:
    chosen = random.Random(index)
    return " ".join(chosen.choices(WORDS, k=chosen.randint(2, 80))).capitalize()


def test_a_client_that_leaves_frees_its_place(server: Running, client):
    """In a stream, before it, and while it waits in the queue."""
    server.wait_until_idle()
    long = {"prompt": "The file", "max_tokens": 1900, "ignore_eos": True}
    opened = server.open_files
    for stream in (True, False):
        before = server.figure("qmix_new_tokens_total")
        body = long | {"stream": stream}
        leaving = [threading.Thread(target=leave_early, args=(server.url, body)) for _ in range(BATCH + 2)]
        for thread in leaving:
            thread.start()
        for thread in leaving:
            thread.join()
        server.wait_until_idle()
        assert server.figure("qmix_new_tokens_total") - before < 1900 * BATCH / 2
    assert server.open_files <= opened + 1
    assert client.completions.create(model="tiny", prompt="The file", max_tokens=2).usage.completion_tokens == 2


def leave_early(url: str, body: dict) -> None:
    """Send a request, read for a moment, and close the connection."""
    host, _, port = url.removeprefix("http://").partition(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(0.4)


def test_a_full_queue_says_when_to_come_again(server: Running):
    server.wait_until_idle()

    async def ask() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
            body = {"prompt": ["The file"] * 24, "max_tokens": 20, "ignore_eos": True}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(5)))

    got = asyncio.run(ask())
    refused = [response for response in got if response.status_code == 429]
    assert {response.status_code for response in got} == {200, 429}
    assert len(refused) == 5 - (BATCH + QUEUE) // 24
    assert all(1 <= int(response.headers["retry-after"]) <= 60 for response in refused)
    assert refused[0].json()["error"]["code"] == "server_busy"


@pytest.mark.slow
def test_64_clients_get_what_each_gets_alone(server: Running, batch):
    """Greedy answers of the patient ones; others stream slowly, leave, or send what is refused. Memory stays within."""
    bodies = [{"prompt": prompt(index), "max_tokens": 40, "temperature": 0} for index in range(64)]
    wanted = [answer["choices"][0]["text"] for answer in batch(bodies)]

    async def patient(client: openai.AsyncOpenAI, index: int) -> str:
        return (await client.completions.create(model="tiny", **bodies[index])).choices[0].text

    async def slow(client: openai.AsyncOpenAI, index: int) -> str:
        text = ""
        async for chunk in await client.completions.create(model="tiny", **bodies[index], stream=True):
            text += chunk.choices[0].text
            await asyncio.sleep(0.02)
        return text

    async def leaving(client: openai.AsyncOpenAI, index: int) -> str:
        stream = await client.completions.create(model="tiny", **bodies[index] | {"max_tokens": 1500}, stream=True)
        async for _ in stream:
            break
        await stream.close()
        return await patient(client, index)

    async def wrong(client: openai.AsyncOpenAI, index: int) -> str:
        with pytest.raises(openai.APIStatusError):
            await client.completions.create(model="tiny", prompt=[10**9], max_tokens=3)
        return await patient(client, index)

    async def everybody() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=20,
            http_client=httpx.AsyncClient(limits=limits, timeout=120),
        ) as client:
            kinds = (patient, slow, leaving, wrong)
            return await asyncio.gather(*(kinds[index % 4](client, index) for index in range(64)))

    for _ in range(2):
        assert asyncio.run(everybody()) == wanted
    server.wait_until_idle()
    assert server.peak <= server.figure("qmix_memory_budget_bytes")


def test_two_servers_do_not_share_a_directory(server: Running, places, model):
    del server
    command = [sys.executable, "-m", "cli", "serve", str(model), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | places, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("another server has its batches here; choose another --directory")


def test_a_silent_stream_is_kept_alive_by_pings():
    class Slow:
        def __init__(self) -> None:
            self.results, self.turns = [], 0

        @property
        def done(self) -> bool:
            return self.turns == 3

        async def updates(self, patience: float) -> list[Update]:
            self.turns += 1
            return [Update(0, "text")] if self.turns == 3 else []

    class Encoder:
        def __getattr__(self, name: str):
            return lambda *arguments: name.encode()

    async def all_of() -> list[bytes]:
        return [data async for data in events(Slow(), Encoder(), 0.01)]

    assert asyncio.run(all_of()) == [b"begin", b"ping", b"ping", b"update", b"end"]


def test_an_interrupt_lets_running_requests_end(places, model, tmp_path):
    running = Running.start(tmp_path, places, model, "--batch", "4", "--directory", str(tmp_path / "own"))
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model="tiny", prompt="The file", max_tokens=300, stream=True, extra_body={"ignore_eos": True}
    )
    pieces = [next(stream)]
    running.process.send_signal(signal.SIGINT)
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length"
    assert running.stop() == 130
    assert running.messages.read_text().splitlines()[-2:] == [
        "stopping: still answering 1 request; Ctrl-C again cuts them",
        "qmix: interrupted",
    ]


PAIRS = [
    ("Click the button to", " open the file"),
    ("To install a package,", " select the name"),
    ("The file", " x y z q"),
]
LM_EVAL = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
url, pairs = sys.argv[1], json.loads(sys.argv[2])
model = LocalCompletionsAPI(
    base_url=url, model="tiny", tokenizer_backend="huggingface", tokenizer=sys.argv[3], batch_size=3, max_length=256,
    add_bos_token=True
)
asked = [Instance("loglikelihood", {}, tuple(pair), index) for index, pair in enumerate(pairs)]
until = [Instance("generate_until", {}, (text, {"until": ["\\n"], "max_gen_toks": 8}), 0) for text, _ in pairs]
print(json.dumps([model.loglikelihood(asked), model.generate_until(until)]))
"""


@pytest.mark.slow
def test_lm_eval_scores_and_generates_through_the_server(server: Running, client, tiny):
    arguments = [f"{server.url}/v1/completions", json.dumps(PAIRS), str(tiny)]
    environment = os.environ | {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LM_EVAL, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    scores, texts = json.loads(done.stdout.splitlines()[-1])
    for (logprob, greedy), (context, rest) in zip(scores, PAIRS, strict=True):
        echo = {"max_tokens": 0, "echo": True, "logprobs": 1}
        told = client.completions.create(model="tiny", prompt=context + rest, **echo).choices[0].logprobs
        start = next(index for index, offset in enumerate(told.text_offset) if offset >= len(context))
        assert logprob == pytest.approx(sum(told.token_logprobs[start:]), abs=1e-3)
        likeliest = [max(top.values()) for top in told.top_logprobs[start:]]
        assert greedy == (likeliest == told.token_logprobs[start:])
    assert all("\n" not in text for text in texts)
    assert any(texts)


@pytest.mark.slow
def test_llm_asks_the_server(server: Running, client, tmp_path):
    """simonw's command-line program, with a model of its extra-openai-models.yaml."""
    models = f"- model_id: qmix\n  model_name: tiny\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    command = [sys.executable, "-m", "llm", "-m", "qmix", "-o", "temperature", "0", "-o", "max_tokens", "9", "Open it."]
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Open it."}], max_tokens=9, temperature=0
    )
    assert (done.returncode, done.stdout.strip()) == (0, chat.choices[0].message.content.strip()), done.stderr
