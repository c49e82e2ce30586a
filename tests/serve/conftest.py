"""One server for all tests, in a process of its own, and what `qmix batch` answers to the same requests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anthropic
import httpx
import openai
import pytest
from command import LIMIT_SECONDS

BATCH, QUEUE, RAM = 8, 64, 1100
TEMPLATE = (
    "{{ bos_token }}{% if tools %}Tools: {{ tools | tojson }} Answer with <tool_call>...</tool_call>.{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'tool' %}[{{ m['tool_call_id'] }}]{{ m['content'] }}{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}<tool_call>{{ c['function'] | tojson }}</tool_call>"
    "{% endfor %}{{ eos_token }}{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
ADDRESS = re.compile(r"serving .* at (http://\S+): ")


@dataclass
class Running:
    """A server's process, the address in its first message, the file of its messages, and its home directory."""

    process: subprocess.Popen
    url: str
    messages: Path
    home: str

    @classmethod
    def start(cls, scratch: Path, environment: dict[str, str], model: Path, *options: str) -> Running:
        messages = scratch / "messages"
        command = [sys.executable, "-m", "cli", "serve", str(model), "--model-name", "tiny", "--port", "0", *options]
        with messages.open("wb") as file:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=os.environ | environment)
        while (match := ADDRESS.search(messages.read_text())) is None:
            assert process.poll() is None, messages.read_text()
            time.sleep(0.05)
        return cls(process, match[1], messages, environment["HOME"])

    def stop(self, sent: int = signal.SIGINT) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sent)
        return self.process.wait(LIMIT_SECONDS)

    @property
    def peak(self) -> int:
        """The most bytes that it ever had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024

    def figure(self, name: str) -> float:
        """A figure of /metrics."""
        text = httpx.get(f"{self.url}/metrics", timeout=LIMIT_SECONDS).text
        return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])

    @property
    def open_files(self) -> int:
        """The files and sockets that it has open."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def wait_until_idle(self) -> None:
        for _ in range(6000):  # a busy machine is waited for
            if self.figure("qmix_requests_running") == self.figure("qmix_requests_waiting") == 0:
                return
            time.sleep(0.05)
        raise AssertionError("requests stay in the engine")


@pytest.fixture(scope="session")
def places(first_use, tmp_path_factory) -> dict[str, str]:
    """An environment in which the embedded model is ready."""
    home = tmp_path_factory.mktemp("served")
    return {"HOME": str(home), "XDG_CACHE_HOME": str(first_use.cache), "XDG_STATE_HOME": str(home / "state")}


@pytest.fixture(scope="session")
def model(places, tiny, tmp_path_factory) -> Path:
    """A store of the embedded model with a chat template that has tools, and is its own without them."""
    checkpoint = tmp_path_factory.mktemp("models") / "checkpoint"
    shutil.copytree(tiny, checkpoint, ignore=shutil.ignore_patterns("recipe"))
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    store = checkpoint.with_name("store")
    command = [sys.executable, "-m", "cli", "quantize", str(checkpoint), str(store)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | places)
    return store


@pytest.fixture(scope="session")
def server(places, model, tmp_path_factory) -> Iterator[Running]:
    options = ("--batch", str(BATCH), "--queue", str(QUEUE), "--ram", f"{RAM}MiB")
    running = Running.start(tmp_path_factory.mktemp("server"), places, model, *options)
    yield running
    running.stop(signal.SIGTERM)


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="session")
def claude(server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture
def batch(qmix, model, tmp_path):
    """Answers of `qmix batch` to bodies of /v1/completions or /v1/chat/completions, in their order."""

    def answer(bodies: list[dict]) -> list[dict]:
        urls = ["/v1/chat/completions" if "messages" in body else "/v1/completions" for body in bodies]
        lines = [
            {"custom_id": str(index), "method": "POST", "url": url, "body": body}
            for index, (url, body) in enumerate(zip(urls, bodies, strict=True))
        ]
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = qmix("batch", source, "-o", output, "-m", model)
        assert done.status == 0, done.err
        found = {line["custom_id"]: line["response"]["body"] for line in map(json.loads, output.open())}
        return [found[str(index)] for index in range(len(bodies))]

    return answer
